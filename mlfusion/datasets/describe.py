"""Summarises a data set, and on request checks that every image of it can be read."""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass

import numpy as np

from mlfusion.datasets.images import Decoder
from mlfusion.datasets.split import DataSet, Split
from mlfusion.errors import BadData

SHOWN_IDS = 3  # number of ids that are shown of each split


@dataclass(frozen=True, kw_only=True)
class ReadCheck:
    """The result of reading every image of a split."""

    unreadable: dict[str, str]  # id → error message
    smallest: tuple[int, int] | None  # width, height, by area
    largest: tuple[int, int] | None
    repeated: int  # number of images whose bytes equal those of an earlier image of the split
    elsewhere: dict[str, int]  # earlier split → number of images whose bytes are in it too
    bits: int | None  # most bits of a value in an image's file; None if no image was read
    values: tuple[int, int] | None  # least and greatest value in the files, before a window is applied

    @property
    def used_share(self) -> float:
        """Share of the possible range between the least and the greatest value."""
        return (self.values[1] - self.values[0]) / (2**self.bits - 1) if self.values and self.bits else 1.0


@dataclass(frozen=True, kw_only=True)
class SplitSummary:
    """The numbers of one split."""

    split: str
    images: int
    groups: int | None  # number of groups, such as patients; None: every image is its own group
    labels: dict[str, float]  # fewest and most images of a class or label, labels per image; or the numbers' range
    first_ids: tuple[str, ...]
    checked: ReadCheck | None

    def to_json(self) -> dict[str, object]:
        """The object that `mlfusion data --json` prints."""
        return asdict(self)


def describe(
    data: DataSet, *, check: bool = False, progress: Callable[[str, int, int], None] = lambda *_: None
) -> list[SplitSummary]:
    """Summarise every split; with `check`, decode all images. `progress` gets split, images done, and their total."""
    digests_of: dict[str, set[bytes]] = {}
    return [
        SplitSummary(
            split=split.name,
            images=len(split),
            groups=None if split.groups is None else len(set(split.groups)),
            labels=_labels(split),
            first_ids=split.ids[:SHOWN_IDS],
            checked=_check(split, digests_of, progress) if check else None,
        )
        for split in data.splits.values()
    ]


def _labels(split: Split) -> dict[str, float]:
    if not split.labels.size:
        return {}
    if split.label_kind == "number":
        return {"least": float(split.labels.min()), "most": float(split.labels.max())}
    if split.label_kind == "class":
        counts = np.bincount(split.labels, minlength=len(split.classes))
        return {"fewest": int(counts.min()), "most": int(counts.max())}
    counts = split.labels.sum(0)
    mean = round(float(split.labels.sum(1).mean()), 3)
    return {"fewest": int(counts.min()), "most": int(counts.max()), "mean": mean}


Found = tuple[tuple[int, int], int, tuple[int, int] | None]
"""Width and height of an image, bits of its values, and the least and the greatest value if they are known."""


def _read(split: Split, row: int) -> tuple[bytes, Found | str]:
    """The digest of an image's bytes, and what it holds, or why it cannot be read."""
    digest = b""
    try:
        with split.at_work(row):
            digest = split.digest(row)
            if not isinstance(split.decode, Decoder):
                return digest, (split.image(row).size, 8, None)
            values, bits = split.decode.values(split.read(row))
            # An image of 8 bits is decoded by now; of others it is not known that they can be.
            size = split.image(row).size if bits == 16 else (values.shape[1], values.shape[0])
            return digest, (size, bits, (int(values.min()), int(values.max())))
    except BadData as err:
        return digest, str(err).removeprefix(f"{split.ids[row]} cannot be read: ")


def _check(split: Split, digests_of: dict[str, set[bytes]], progress: Callable[[str, int, int], None]) -> ReadCheck:
    depths: dict[int, tuple[int, int]] = {}  # bits → least and greatest value
    unreadable: dict[str, str] = {}
    sizes: set[tuple[int, int]] = set()
    digests: set[bytes] = set()
    repeated, elsewhere = 0, dict.fromkeys(digests_of, 0)
    with ThreadPoolExecutor(min(8, (os.cpu_count() or 1) + 1)) as pool:
        for row, (digest, found) in enumerate(pool.map(lambda row: _read(split, row), range(len(split)))):
            if isinstance(found, str):
                unreadable[split.ids[row]] = found
            else:
                size, bits, values = found
                sizes.add(size)
                if values:
                    least, most = depths.get(bits, values)
                    depths[bits] = min(least, values[0]), max(most, values[1])
            if digest:
                repeated += digest in digests
                digests.add(digest)
                for name, others in digests_of.items():
                    elsewhere[name] += digest in others
            progress(split.name, row + 1, len(split))
    digests_of[split.name] = digests
    by_area = sorted(sizes, key=lambda size: (size[0] * size[1], size))
    return ReadCheck(
        unreadable=unreadable,
        smallest=by_area[0] if by_area else None,
        largest=by_area[-1] if by_area else None,
        repeated=repeated,
        elsewhere={name: count for name, count in elsewhere.items() if count},
        bits=max(depths, default=None),
        values=depths[max(depths)] if depths else None,
    )
