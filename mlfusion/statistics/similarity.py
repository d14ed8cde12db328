"""How alike two layers are: linear centred kernel alignment (CKA; Kornblith et al. 2019, arXiv 1905.00414).

Computed from products of features, never from an N × N Gram matrix: its memory does not grow with the images squared.
"""

import numpy as np

from mlfusion.errors import BadData

LEAST = 4  # images, for the unbiased estimate


def cka(x: np.ndarray, y: np.ndarray, *, debiased: bool = True) -> float:
    """Linear CKA of two representations of the same images: 1 for the same up to rotation and scale.

    Args:
        x: [N, D].
        y: [N, E].
        debiased: by the unbiased estimate of HSIC (Song et al. 2012; Nguyen et al. 2021, arXiv 2010.15327), which of unrelated
            representations is 0 on average; the plain one grows towards 1 with D / N.

    Raises:
        BadData: not of the same images, or of too few.
    """
    a, b = _centred(x), _centred(y)
    if len(a) != len(b):
        raise BadData(f"representations of {len(a)} and {len(b)} images; allowed: both of the same images")
    return _ratio(_hsic(a, b, debiased), _hsic(a, a, debiased), _hsic(b, b, debiased))


def layer_cka(tokens: np.ndarray, *, debiased: bool = True) -> np.ndarray:
    """Linear CKA of every layer with every other [L, L], of one kind of token.

        features = mlfusion.load_features("formula-vit", "digits", "test", tokens="cls")
        layer_cka(features.tokens[:, :, 0])

    Args:
        tokens: [N, L, D].
        debiased: as of `cka`.
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
    # The columns of a and b sum to 0, so the rows of K and L do, and those without their diagonals to minus that.
    return (
        cross
        - float(own_a @ own_b)
        + float(own_a.sum() * own_b.sum()) / ((n - 1) * (n - 2))
        - 2 / (n - 2) * float(own_a @ own_b)
    ) / (n * (n - 3))


def _ratio(both: float, a: float, b: float) -> float:
    if min(a, b) <= 0:  # a constant representation is like nothing
        return float("nan")
    return both / float(np.sqrt(a * b))
