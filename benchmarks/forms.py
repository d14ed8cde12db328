"""What does it cost to know a data set by its content, and does the form it is kept in matter?

    python benchmarks/forms.py [--images DIR] [--times 5] [--page]

Takes class folders (train/<class>/…), repeats their images `times` times under other names, and writes them in every form.
Of each it measures opening the set (ids, labels, where every image lies) and the pass that reads every image's bytes for its
digest, as an extraction does before its first forward pass; median of 25, files in the system's file cache. And the digest
alone, of the same bytes in memory. And what the splits cost that an extraction of another split reads for the reading: 10,000
made files of 50 kB. With --page the tables go into docs/datasets.md.
"""

import argparse
import csv
import hashlib
import io
import os
import statistics
import tarfile
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import page
import pyarrow
import pyarrow.parquet
import xxhash

from mlfusion import datasets
from mlfusion.extraction.request import Images
from mlfusion.specs.options import FeatureOptions

REPEATS = 25


def timed(work: Callable[[], object]) -> tuple[float, float]:
    """Median and interquartile range of seconds."""
    seconds = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    lower, median, upper = statistics.quantiles(seconds, n=4)
    return median, upper - lower


def repeated(source: Path, root: Path, times: int) -> list[tuple[str, str, bytes]]:
    """(path, class, bytes) of class folders below `root`; a few bytes behind each image make every copy another."""
    rows = []
    for file in sorted(path for path in (source / "train").rglob("*") if path.is_file()):
        for copy in range(times):
            name = f"train/{file.parent.name}/{file.stem}-{copy}{file.suffix}"
            body = file.read_bytes() + copy.to_bytes(4, "little")
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_bytes(body)
            rows.append((name, file.parent.name, body))
    return rows


def tar(rows: list[tuple[str, str, bytes]], path: Path) -> Path:
    """A WebDataset tar."""
    with tarfile.open(path, "w") as out:
        for number, (name, label, body) in enumerate(rows):
            for suffix, data in ((name.rpartition(".")[2], body), ("cls", label.encode())):
                info = tarfile.TarInfo(f"s{number:07d}.{suffix}")
                info.size = len(data)
                out.addfile(info, io.BytesIO(data))
    return path


def table(rows: list[tuple[str, str, bytes]], path: Path) -> Path:
    """A CSV of paths."""
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows([("path", "label"), *((name, label) for name, label, _ in rows)])
    return path


def parquet(rows: list[tuple[str, str, bytes]], folder: Path) -> Path:
    """Parquet with the bytes, a hundred rows to a group as the hub writes it."""
    folder.mkdir()
    names, labels, bodies = zip(*rows, strict=True)
    held = pyarrow.table({"image": list(bodies), "label": list(labels), "id": list(names)})
    pyarrow.parquet.write_table(held, folder / "train-00000-of-00001.parquet", row_group_size=100)
    return folder


def other_split(root: Path) -> list[tuple[str, str]]:
    """Seconds to read 10,000 files of 50 kB for their digests, from the disk and from the system's file cache; median of 5."""
    body = np.random.default_rng(0).bytes(50_000)
    paths = [root / "test" / f"class{number % 10}" / f"{number:05d}.png" for number in range(10_000)]
    for number, path in enumerate(paths):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(number.to_bytes(8, "little") + body[8:])
    os.sync()
    split = datasets.load(str(root)).splits["test"]
    seconds: dict[str, list[float]] = {"the disk": [], "the system's file cache": []}
    for _ in range(5):
        for path in paths:
            with open(path, "rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        for each in seconds.values():
            start = time.perf_counter()
            split.read_digests("forms")
            each.append(time.perf_counter() - start)
    return [
        (place, f"{statistics.median(each):.1f} ({min(each):.1f} to {max(each):.1f})")
        for place, each in seconds.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=Path, default=Path("../shared/data/dtd10"))
    parser.add_argument("--times", type=int, default=5)
    parser.add_argument("--page", action="store_true")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        root = Path(place)
        rows = repeated(asked.images, root / "folders", asked.times)
        nbytes = sum(len(body) for _, _, body in rows)
        forms = {
            "class folders": root / "folders",
            "CSV": table(rows, root / "folders" / "all.csv"),
            "tar": tar(rows, root / "all.tar"),
            "Parquet": parquet(rows, root / "parquet"),
        }
        lines = []
        for form, path in forms.items():
            opened, _ = timed(lambda path=path: datasets.load(str(path)))
            data = datasets.load(str(path))
            seconds, spread = timed(lambda data=data: Images.of(data, FeatureOptions(splits=("train",))))
            done, whole = f"{seconds:.2f} ± {spread / 2:.2f} s", opened + seconds
            lines.append((form, f"{opened:.2f} s", done, f"{len(rows) / whole:,.0f}", f"{nbytes / whole / 1e9:.2f}"))
            print(*lines[-1], sep="\t")
        others = other_split(root / "made")
    bodies = [body for _, _, body in rows]
    hashes = {
        "xxh3-128": lambda: [xxhash.xxh3_128_digest(body) for body in bodies],
        "SHA-256": lambda: [hashlib.sha256(body).digest() for body in bodies],
    }
    rates = {name: timed(work) for name, work in hashes.items()}
    alone = [(name, f"{nbytes / s / 1e9:.2f} ± {nbytes / s / 1e9 * d / s / 2:.2f}") for name, (s, d) in rates.items()]
    print(*(" ".join(each) for each in (*alone, *others)), sep="\n")
    if asked.page:
        about = (
            f"{len(rows):,} photographs of {nbytes / len(rows) / 1e3:.0f} kB on average. {page.machine()}; median of "
            f"{REPEATS}, ± half the interquartile range; load average {os.getloadavg()[0]:.0f}.\n\n"
        )
        heads = ("form", "opening", "digests of all images", "images/s, total", "GB/s, total")
        page.put(
            "datasets.md",
            "cost",
            about
            + page.table(heads, lines)
            + "\n\nOne thread, bytes already in memory:\n\n"
            + page.table(("digest", "GB/s"), alone)
            + "\n\nA split of 10,000 images of 50 kB that another split's extraction reads for the reading; median, least and "
            "greatest of 5:\n\n" + page.table(("read from", "seconds"), others),
        )


if __name__ == "__main__":
    main()
