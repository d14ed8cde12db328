"""How alike two layers are: centred kernel alignment (CKA; Kornblith et al. 2019, arXiv 1905.00414), linear or by an RBF.

The linear one is computed from products of features, never from an N × N Gram matrix: its memory does not grow with the
images squared. That of a radial basis function, which sees how like the neighbourhoods are, needs the matrices.
"""

from collections.abc import Callable
from typing import Literal, get_args

import numpy as np

from mlfusion.errors import BadData, UnknownName

Kernel = Literal["linear", "rbf"]
LEAST = 4  # images, for the unbiased estimate
SIGMA = 0.2
"""Width of the RBF, as a share of the median distance between two images, which no scale of the features changes."""


def cka(
    x: np.ndarray, y: np.ndarray, *, kernel: Kernel = "linear", sigma: float = SIGMA, debiased: bool = True
) -> float:
    """CKA of two representations of the same images: 1 for the same up to rotation and scale.

    Args:
        x: [N, D].
        y: [N, E].
        kernel: 'linear', or 'rbf': exp(-d² / 2 (sigma m)²) of the distance d, m being the median one.
        sigma: width of the RBF. The smaller, the nearer the neighbours that count.
        debiased: by the unbiased estimate of HSIC (Song et al. 2012; Nguyen et al. 2021, arXiv 2010.15327), which of unrelated
            representations is 0 on average; the plain one grows towards 1 with D / N.

    Raises:
        BadData: not of the same images, or of too few.
        UnknownName: no such kernel.
    """
    return cka_with(y, kernel=kernel, sigma=sigma, debiased=debiased)(x)


def cka_with(
    last: np.ndarray, *, kernel: Kernel = "linear", sigma: float = SIGMA, debiased: bool = True
) -> Callable[[np.ndarray], float]:
    """The same with one representation held, for many others: what is computed of it is computed once."""
    if kernel not in get_args(Kernel):
        raise UnknownName("kernel", kernel, get_args(Kernel))

    def prepared(x: np.ndarray) -> np.ndarray:
        return _centred(x) if kernel == "linear" else _centred_gram(_rbf(_centred(x), sigma), debiased)

    def hsic(a: np.ndarray, b: np.ndarray) -> float:
        return _hsic(a, b, debiased) if kernel == "linear" else float((a * b).sum())

    held = prepared(last)
    own = hsic(held, held)

    def with_it(x: np.ndarray) -> float:
        if len(x) != len(held):
            raise BadData(f"representations of {len(x)} and {len(held)} images; allowed: both of the same images")
        a = prepared(x)
        return _ratio(hsic(a, held), hsic(a, a), own)

    return with_it


def layer_cka(tokens: np.ndarray, *, debiased: bool = True) -> np.ndarray:
    """Linear CKA of every layer with every other [L, L], of one kind of token [N, L, D].

    features = mlfusion.load_features("formula-vit", "digits", "test", tokens="cls")
    layer_cka(features.tokens[:, :, 0])
    """
    layers = [_centred(tokens[:, layer]) for layer in range(tokens.shape[1])]
    own = [_hsic(one, one, debiased) for one in layers]
    found = np.empty((len(layers), len(layers)))
    for i, one in enumerate(layers):
        for j in range(i + 1):
            found[i, j] = found[j, i] = _ratio(_hsic(one, layers[j], debiased), own[i], own[j])
    return found


def _centred(x: np.ndarray) -> np.ndarray:
    """[N, D] float64 of mean 0: neither estimate depends on the mean, and sums of squares stay small without it."""
    held = np.asarray(x, np.float64)
    if held.ndim != 2 or len(held) < LEAST:
        raise BadData(f"a representation of shape {held.shape}; allowed: [N, D] with {LEAST} images or more")
    return held - held.mean(0)


def _hsic(a: np.ndarray, b: np.ndarray, debiased: bool) -> float:
    """The Hilbert-Schmidt independence criterion of linear kernels K = a aᵀ and L = b bᵀ, up to a factor in N."""
    cross = float(((a.T @ b) ** 2).sum())  # tr(K L)
    if not debiased:
        return cross
    n = len(a)
    own_a, own_b = (a**2).sum(1), (b**2).sum(1)  # the diagonals, which the unbiased estimate takes out
    both = float(own_a @ own_b)
    # The columns of a and b sum to 0, so the rows of K and L do, and those without their diagonals to minus that.
    squares = float(own_a.sum() * own_b.sum()) / ((n - 1) * (n - 2))
    return (cross - both + squares - 2 / (n - 2) * both) / (n * (n - 3))


def _rbf(x: np.ndarray, sigma: float) -> np.ndarray:
    """[N, N] of centred features; nothing where most images coincide, which leaves no width to choose."""
    squares = (x**2).sum(1)
    distances = np.maximum(squares[:, None] + squares - 2 * x @ x.T, 0)  # squared
    middle = float(np.median(distances[np.triu_indices(len(x), 1)]))
    return np.exp(distances / (-2 * sigma**2 * middle)) if middle else np.zeros_like(distances)


def _centred_gram(k: np.ndarray, debiased: bool) -> np.ndarray:
    """A Gram matrix such that the sum of two such, multiplied cell by cell, is HSIC up to a factor in N.

    Unbiased: without its diagonal, and with rows that sum to nothing without it (Székely and Rizzo 2014).
    """
    n = len(k)
    if not debiased:
        return np.asarray(k - k.mean(0) - k.mean(0)[:, None] + k.mean())
    np.fill_diagonal(k, 0)
    means = k.sum(0) / (n - 2)
    means -= means.sum() / (2 * (n - 1))
    k -= means
    k -= means[:, None]
    np.fill_diagonal(k, 0)
    return k


def _ratio(both: float, a: float, b: float) -> float:
    return both / float(np.sqrt(a * b)) if min(a, b) > 0 else float("nan")  # a constant representation is like nothing
