"""Summarises a data set, and on request checks that every image of it can be read."""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass

import numpy as np

from mlfusion.datasets.split import DataSet, Split
from mlfusion.errors import BadData, BadImage

FIRST = 3  # ids that are shown of a split


@dataclass(frozen=True, kw_only=True)
class ReadCheck:
    """The result of reading every image of a split."""

    unreadable: dict[str, str]  # id → why
    smallest: tuple[int, int] | None  # width, height, by area
    largest: tuple[int, int] | None
    repeated: int  # images whose bytes equal those of an earlier image of the split
    elsewhere: dict[str, int]  # earlier split → images whose bytes are in it too


@dataclass(frozen=True, kw_only=True)
class SplitSummary:
    """The numbers of one split."""

    split: str
    images: int
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
    seen: dict[str, set[bytes]] = {}
    return [
        SplitSummary(
            split=split.name,
            images=len(split),
            labels=_labels(split),
            first_ids=split.ids[:FIRST],
            checked=_check(split, seen, progress) if check else None,
        )
        for split in data.splits.values()
    ]


def _labels(split: Split) -> dict[str, float]:
    if split.label_kind == "number":
        return {"least": float(split.labels.min()), "most": float(split.labels.max())}
    counts = (
        split.labels.sum(0) if split.label_kind == "labels" else np.bincount(split.labels, minlength=len(split.classes))
    )
    found: dict[str, float] = {"fewest": int(counts.min()), "most": int(counts.max())}
    if split.label_kind == "labels":
        found["mean"] = round(float(split.labels.sum(1).mean()), 3)
    return found


def _check(split: Split, seen: dict[str, set[bytes]], progress: Callable[[str, int, int], None]) -> ReadCheck:
    def look(row: int) -> tuple[bytes, tuple[int, int] | str]:
        digest = b""
        try:
            digest = split.digest(row)
            return digest, split.image(row).size
        except BadImage as err:
            return digest, str(err.__cause__ or err)
        except BadData as err:
            return digest, str(err)

    unreadable: dict[str, str] = {}
    sizes: set[tuple[int, int]] = set()
    own: set[bytes] = set()
    repeated, elsewhere = 0, dict.fromkeys(seen, 0)
    with ThreadPoolExecutor(min(8, (os.cpu_count() or 1) + 1)) as pool:
        for row, (digest, found) in enumerate(pool.map(look, range(len(split)))):
            if isinstance(found, str):
                unreadable[split.ids[row]] = found
            else:
                sizes.add(found)
            if digest:
                repeated += digest in own
                own.add(digest)
                for name, others in seen.items():
                    elsewhere[name] += digest in others
            progress(split.name, row + 1, len(split))
    seen[split.name] = own
    by_area = sorted(sizes, key=lambda size: (size[0] * size[1], size))
    return ReadCheck(
        unreadable=unreadable,
        smallest=by_area[0] if by_area else None,
        largest=by_area[-1] if by_area else None,
        repeated=repeated,
        elsewhere={name: count for name, count in elsewhere.items() if count},
    )
