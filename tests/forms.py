"""One small data set in every form that mlfusion reads, made from class folders."""

import csv
import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tiny import save_images

from mlfusion import datasets


def plain(root: Path, counts: dict[str, int] | None = None) -> datasets.DataSet:
    """Class folders of three colours, which the other forms are made from."""
    save_images(root, counts or {"train": 3, "test": 2})
    return datasets.load(str(root))


def rows(split: datasets.Split) -> list[tuple[str, str, bytes]]:
    """(id, class name, bytes) of every image."""
    return [(split.ids[i], split.classes[split.labels[i]], split.encoded(i)) for i in range(len(split))]


def put(tar: tarfile.TarFile, name: str, body: bytes) -> None:
    """A file into a tar."""
    info = tarfile.TarInfo(name)
    info.size = len(body)
    tar.addfile(info, io.BytesIO(body))


def npy(vector: np.ndarray) -> bytes:
    """An array as the bytes of a .npy file."""
    np.save(file := io.BytesIO(), vector, allow_pickle=False)
    return file.getvalue()


def csv_folder(data: datasets.DataSet, root: Path) -> Path:
    """train.csv and test.csv beside the images."""
    for name, split in data.splits.items():
        with open(root / f"{name}.csv", "w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["path", "species"])
            writer.writerows((path, label) for path, label, _ in rows(split))
    return root


def csv_file(data: datasets.DataSet, root: Path) -> Path:
    """One CSV file whose column `split` says which row is of which."""
    with open(root / "all.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["split", "label", "file_name"])
        for name, split in data.splits.items():
            writer.writerows((name, label, path) for path, label, _ in rows(split))
    return root / "all.csv"


def jsonl(data: datasets.DataSet, root: Path) -> Path:
    """The hub's metadata.jsonl in each split's folder."""
    for name, split in data.splits.items():
        lines = [json.dumps({"file_name": p.removeprefix(f"{name}/"), "label": label}) for p, label, _ in rows(split)]
        (root / name / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    return root


def tars(data: datasets.DataSet, root: Path) -> Path:
    """train/*.tar and test/*.tar, two samples to a tar, with class names beside them."""
    folder = root / "tars"
    folder.mkdir()
    (folder / "classnames.txt").write_text("\n".join(next(iter(data.splits.values())).classes))
    for name, split in data.splits.items():
        (folder / name).mkdir()
        for start in range(0, len(split), 2):
            with tarfile.open(folder / name / f"{start // 2:03d}.tar", "w") as tar:
                for row in range(start, min(start + 2, len(split))):
                    put(tar, f"s{row:07d}.cls", str(split.labels[row]).encode())
                    put(tar, f"s{row:07d}.png", split.encoded(row))
    return folder


def parquet(data: datasets.DataSet, root: Path) -> Path:
    """Parquet files with the images' bytes."""
    import pyarrow
    import pyarrow.parquet

    folder = root / "parquet"
    folder.mkdir()
    for name, split in data.splits.items():
        every = rows(split)
        table = {"id": [r[0] for r in every], "image": [r[2] for r in every], "label": [r[1] for r in every]}
        pyarrow.parquet.write_table(pyarrow.table(table), folder / f"{name}-00000-of-00001.parquet")
    return folder


FORMS: dict[str, tuple[Callable[[datasets.DataSet, Path], Path], dict[str, str]]] = {
    "csv of each split": (csv_folder, {"image_column": "path", "label_column": "species"}),
    "one csv": (csv_file, {}),
    "jsonl": (jsonl, {}),
    "tars": (tars, {}),
    "parquet": (parquet, {"id_column": "id"}),
}


def picture(number: int) -> bytes:
    """A PNG of its own bytes for every number."""
    pixels = np.random.default_rng(number).integers(0, 256, (6, 5, 3), np.uint8)
    Image.fromarray(pixels).save(file := io.BytesIO(), "PNG")
    return file.getvalue()


def labelled(form: str, root: Path, labels: list[Any], start: int = 0) -> Path:
    """A file of one split that gives each image its label; `start` is the number of the first image."""
    root.mkdir(parents=True, exist_ok=True)
    count = range(start, start + len(labels))
    if form in ("csv", "jsonl"):
        for number in count:
            (root / f"{number}.png").write_bytes(picture(number))
        with open(root / f"set.{form}", "w", newline="", encoding="utf-8") as file:
            if form == "csv":
                csv.writer(file).writerows(
                    [("path", "label"), *((f"{n}.png", x) for n, x in zip(count, labels, strict=True))]
                )
            else:
                file.writelines(
                    json.dumps({"path": f"{n}.png", "label": x}) + "\n" for n, x in zip(count, labels, strict=True)
                )
    elif form == "tar":
        with tarfile.open(root / "set.tar", "w") as tar:
            for number, label in zip(count, labels, strict=True):
                put(tar, f"{number}.png", picture(number))
                put(tar, f"{number}.cls", str(label).encode())
    elif form == "parquet":
        import pyarrow
        import pyarrow.parquet

        table = pyarrow.table({"image": [picture(number) for number in count], "label": labels})
        pyarrow.parquet.write_table(table, root / "set.parquet")
    else:
        pixels = np.random.default_rng(start).integers(0, 256, (len(labels), 6, 5, 3), np.uint8)
        np.savez(root / "set.npz", images=pixels, labels=np.array(labels))
    return root / f"set.{form}"
