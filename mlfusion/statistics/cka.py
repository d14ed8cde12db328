"""The similarity of two layers: centred kernel alignment (CKA; Kornblith et al. 2019, arXiv 1905.00414), linear or by an RBF.

The linear one is computed from products of features, never from an N × N Gram matrix: its memory does not grow with the
square of the number of images. The RBF kernel, which compares neighbourhoods, needs those matrices.
"""

from collections.abc import Callable
from typing import Literal, get_args

import numpy as np

from mlfusion.errors import BadData, UnknownName

Kernel = Literal["linear", "rbf"]
MIN_IMAGES = 4  # needed by the unbiased estimate
SIGMA = 0.2
"""Width of the RBF as a share of the median distance between two images, so that the scale of the features cancels."""


def cka(
    x: np.ndarray, y: np.ndarray, *, kernel: Kernel = "linear", sigma: float = SIGMA, debiased: bool = True
) -> float:
    """CKA of two representations of the same images: 1 for the same up to rotation and scale.

    Args:
        x: [N, D].
        y: [N, E].
        kernel: 'linear', or 'rbf': exp(-d² / 2 (sigma m)²) of the distance d, m being the median one.
        sigma: width of the RBF; a smaller one counts only nearer neighbours.
        debiased: use the unbiased estimate of HSIC (Song et al. 2012; Nguyen et al. 2021, arXiv 2010.15327), which averages 0
            for unrelated representations; the plain one grows towards 1 with D / N.

    Raises:
        BadData: the representations are of different images, or of too few.
        UnknownName: there is no such kernel.
    """
    return cka_with(y, kernel=kernel, sigma=sigma, debiased=debiased)(x)


def cka_with(
    fixed: np.ndarray, *, kernel: Kernel = "linear", sigma: float = SIGMA, debiased: bool = True
) -> Callable[[np.ndarray], float]:
    """CKA with one fixed representation, for comparison with many others: its own terms are computed once."""
    if kernel not in get_args(Kernel):
        raise UnknownName("kernel", kernel, get_args(Kernel))

    def prepared(x: np.ndarray) -> np.ndarray:
        return _centred(x) if kernel == "linear" else _centred_gram(_rbf(_centred(x), sigma), debiased)

    def hsic(a: np.ndarray, b: np.ndarray) -> float:
        return _hsic(a, b, debiased) if kernel == "linear" else float((a * b).sum())

    reference = prepared(fixed)
    own = hsic(reference, reference)

    def to_reference(x: np.ndarray) -> float:
        if len(x) != len(reference):
            raise BadData(f"representations of {len(x)} and {len(reference)} images; allowed: both of the same images")
        a = prepared(x)
        return _ratio(hsic(a, reference), hsic(a, a), own)

    return to_reference


def layer_cka(tokens: np.ndarray, *, debiased: bool = True) -> np.ndarray:
    """Linear CKA of every layer with every other [L, L], for the tokens of one kind [N, L, D].

    features = mlfusion.load_features("formula-vit", "digits", "test", tokens="cls")
    layer_cka(features.tokens[:, :, 0])
    """
    layers = [_centred(tokens[:, layer]) for layer in range(tokens.shape[1])]
    own = [_hsic(layer, layer, debiased) for layer in layers]
    similarity = np.empty((len(layers), len(layers)))
    for i, layer in enumerate(layers):
        for j in range(i + 1):
            similarity[i, j] = similarity[j, i] = _ratio(_hsic(layer, layers[j], debiased), own[i], own[j])
    return similarity


def _centred(x: np.ndarray) -> np.ndarray:
    """Centre to mean 0, [N, D] float64: neither estimate depends on the mean, and sums of squares stay small without it."""
    values = np.asarray(x, np.float64)
    if values.ndim != 2 or len(values) < MIN_IMAGES:
        raise BadData(f"a representation of shape {values.shape}; allowed: [N, D] with {MIN_IMAGES} images or more")
    return values - values.mean(0)


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
    """RBF Gram matrix [N, N] of centred features; zeros if most images coincide, since then no width can be chosen."""
    near = x - np.median(
        x, axis=0
    )  # a single far image moves the mean, and distances of the others would lose their digits
    squares = (near**2).sum(1)
    distances = np.maximum(squares[:, None] + squares - 2 * near @ near.T, 0)  # squared
    median = float(np.median(distances[np.triu_indices(len(x), 1)]))
    return np.exp(distances / (-2 * sigma**2 * median)) if median else np.zeros_like(distances)


def _centred_gram(k: np.ndarray, debiased: bool) -> np.ndarray:
    """Centre a Gram matrix so that the sum of the elementwise product of two is HSIC up to a factor in N.

    The unbiased form has a zero diagonal and rows that sum to zero (Székely and Rizzo 2014).
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
    return both / float(np.sqrt(a * b)) if min(a, b) > 0 else float("nan")  # not defined for a constant representation
