"""Parts groups of images, such as the slices of a patient, so that no group is in two parts: for splits, folds and few shots.

scikit-learn's StratifiedGroupKFold makes folds of equal size only, and its result depends on the order of the rows; a split
needs any shares, and the same parts on every machine whatever the order. This is the same greedy method for any shares.
"""

from collections.abc import Sequence
from math import ceil

import numpy as np

from mlfusion.shapes import Int


class NoPartition(ValueError):
    """Groups cannot be parted: a stratum, or None if it is that of all images, would be in too few parts."""

    def __init__(self, stratum: int | None, groups: int, parts: int) -> None:
        super().__init__(stratum, groups, parts)
        self.stratum, self.groups, self.parts = stratum, groups, parts


def codes_of(groups: Sequence[str]) -> Int[np.ndarray, " N"]:
    """The number of each image's group, counted by first appearance: a renamed group changes no code."""
    numbers: dict[str, int] = {}
    return np.array([numbers.setdefault(group, len(numbers)) for group in groups], np.int64)


def assign(
    strata: Int[np.ndarray, " N"],
    groups: Int[np.ndarray, " N"],
    shares: Sequence[float],
    rank: Int[np.ndarray, " G"],
    *,
    every: bool = True,
) -> Int[np.ndarray, " N"]:
    """The part of each image: whole groups, so that every part gets about its share of each stratum.

    Large groups come first, those of a size between the same powers of two in the order of `rank`. Each goes to the part p
    where it adds least to Σ_c (n_pc − s_p N_c)² / (s_p N_c²), n_pc being the part's images of stratum c so far, N_c all of
    them and s_p the part's share. Then, with `every`, groups are moved until every part has every stratum.

    Args:
        strata: the stratum of each image, such as its class.
        groups: the number of each image's group, 0..G-1.
        shares: of the parts; their sum is 1.
        rank: the place of each group in a random order, which alone decides between groups that are alike.
        every: whether each part must have each stratum; else it must have a group, and strata that follow each other and are
            of fewer groups than could be parted are joined.

    Raises:
        NoPartition: there are fewer groups than parts; or with `every` fewer with images of a stratum, or no move leads to it.
    """
    names, codes = np.unique(
        strata if every else _joined(strata, groups, ceil(1 / min(shares) - 1e-9)), return_inverse=True
    )
    table = _Table(groups, codes, len(names))
    held, share = np.zeros((len(shares), len(names))), np.array(shares)
    part = np.empty(len(rank), np.int64)
    for group in np.lexsort((rank, -np.frexp(table.sizes.astype(float))[1])).tolist():
        of, row = table.of_group(group)
        total = table.total[of]
        cost = (row * (row + 2 * held[:, of]) / share[:, None] - 2 * row * total) / total**2
        part[group] = np.argmin(np.round(cost.sum(1), 12))
        held[part[group], of] += row
    if every:
        _fill(part, table, held, rank, names.tolist())
    else:
        whole = _Table(groups, np.zeros_like(codes), 1)
        _fill(part, whole, held.sum(1, keepdims=True), rank, [None])
    return part[groups]


def _joined(strata: Int[np.ndarray, " N"], groups: Int[np.ndarray, " N"], least: int) -> Int[np.ndarray, " N"]:
    """Strata joined with those that follow, until each has images of so many groups.

    A stratum of one group says nothing of where that belongs: such as five slices of one patient, whose ages are equal.
    """
    _, codes, counts = np.unique(strata, return_inverse=True, return_counts=True)
    number, found, joined = 0, set[int](), np.zeros(len(counts), np.int64)
    for code, rows in enumerate(np.split(np.argsort(codes, kind="stable"), counts.cumsum()[:-1])):
        found.update(groups[rows].tolist())
        joined[code] = number
        if len(found) >= least:
            number, found = number + 1, set()
    if found:  # too few are left for a stratum of their own
        joined[joined == number] = max(0, number - 1)
    return joined[codes]


class _Table:
    """The number of images of each group and stratum, of those that have any: a dense table may not fit into memory."""

    def __init__(self, groups: Int[np.ndarray, " N"], codes: Int[np.ndarray, " N"], strata: int) -> None:
        pairs, self.counts = np.unique(groups * strata + codes, return_counts=True)
        self.groups, self.strata = np.divmod(pairs, strata)
        self.total, self.sizes = np.bincount(codes, minlength=strata), np.bincount(groups)
        self.starts = np.searchsorted(self.groups, np.arange(len(self.sizes) + 1))

    def of_group(self, group: int) -> tuple[Int[np.ndarray, " n"], Int[np.ndarray, " n"]]:
        """The strata of a group, and its number of images of each."""
        rows = slice(self.starts[group], self.starts[group + 1])
        return self.strata[rows], self.counts[rows]


def _fill(
    part: Int[np.ndarray, " G"],
    table: _Table,
    held: np.ndarray,
    rank: Int[np.ndarray, " G"],
    names: Sequence[int | None],
) -> None:
    """Move groups, in place, until every part has images of every stratum; no move takes a stratum from its part."""
    scarce = np.bincount(table.strata, minlength=len(names))  # groups with images of each stratum
    while (held == 0).any():
        missing = np.argwhere(held == 0)
        to, stratum = missing[np.argmin(scarce[missing[:, 1]])]
        free = []
        for group in table.groups[table.strata == stratum].tolist():
            of, row = table.of_group(group)
            if part[group] != to and (held[part[group], of] > row).all():  # its part keeps images of each of its strata
                free.append((table.sizes[group], rank[group], group))
        if not free:
            raise NoPartition(names[stratum], int(scarce[stratum]), len(held))
        group = min(free)[2]
        of, row = table.of_group(group)
        held[part[group], of] -= row
        held[to, of] += row
        part[group] = to


def in_turn(rows: Int[np.ndarray, " n"], groups: Int[np.ndarray, " N"], random: np.random.Generator) -> np.ndarray:
    """`rows` in random order, one image of each group in turn, so that the first few are of many groups."""
    shuffled = random.permutation(rows)
    turn = np.empty(len(rows), np.int64)
    seen: dict[int, int] = {}
    for place, group in enumerate(groups[shuffled].tolist()):
        turn[place] = seen[group] = seen.get(group, -1) + 1
    return shuffled[np.argsort(turn, kind="stable")]
