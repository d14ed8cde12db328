"""How often are near copies found, and how often are two different images taken for copies?

    python benchmarks/duplicates.py [--model formula-vit] [--data ../shared/data] [--sets A,B] [--cache DIR] [--page]

Of a hundred test images of each data set, changed copies are made: encoded again as JPEG, resized to nine tenths, made a tenth
brighter. A copy is found if the cosine with its original reaches the threshold of mlfusion/store/overlap.py. A false alarm is
a test image of the data set as it is that reaches it with any train image; the sets have no image twice byte for byte, but
nobody has looked for near copies by eye. With --page the table goes into docs/method.md, between the marks of the model.
"""

import argparse
import io
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import page
from PIL import Image, ImageEnhance

import mlfusion
from mlfusion import datasets
from mlfusion.store.overlap import NEAR

SETS = ("cifar10", "dtd10", "fashion_mnist", "flowers5", "sign_digits")
COPIED = 100


def encoded(quality: int) -> Callable[[Image.Image], Image.Image]:
    """A change that encodes an image as JPEG."""

    def change(image: Image.Image) -> Image.Image:
        image.save(file := io.BytesIO(), "JPEG", quality=quality)
        return Image.open(file).convert("RGB")

    return change


CHANGES: dict[str, Callable[[Image.Image], Image.Image]] = {
    "JPEG 50": encoded(50),
    "JPEG 75": encoded(75),
    "JPEG 90": encoded(90),
    "size 0.9": lambda image: image.resize(
        (round(0.9 * image.width), round(0.9 * image.height)), Image.Resampling.BICUBIC
    ),
    "brightness 1.1": lambda image: ImageEnhance.Brightness(image).enhance(1.1),
}


def save_copies(split: datasets.Split, rows: np.ndarray, folder: Path) -> None:
    """<folder>/train/<change>/<row>.png for each change and row."""
    for row in rows:
        image = split.image(int(row))
        for name, change in CHANGES.items():
            path = folder / "train" / name / f"{row:05d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            change(image).save(path)


def scaled(tokens: np.ndarray) -> np.ndarray:
    """Tokens [N, D] of length 1."""
    return tokens / np.linalg.norm(tokens, axis=-1, keepdims=True)


def measured(model: str, path: Path, copies: Path, cache: str) -> tuple[str, ...]:
    """The line of one data set: false alarms, and the share of copies of each kind that are found."""
    test = datasets.load(str(path)).split("test")
    rows = np.linspace(0, len(test) - 1, min(COPIED, len(test))).astype(int)
    save_copies(test, rows, copies)
    mlfusion.extract(model, str(path), layers="last", tokens="cls", cache=cache)
    mlfusion.extract(model, str(copies), splits="train", layers="last", tokens="cls", cache=cache)
    read = {
        name: mlfusion.load_features(model, str(place), split, layers="last", tokens="cls", cache=cache)
        for name, place, split in (("train", path, "train"), ("test", path, "test"), ("copies", copies, "train"))
    }
    lengths = {name: scaled(each.tokens[:, 0, 0].astype(np.float64)) for name, each in read.items()}
    centred = {name: scaled(tokens - lengths["train"].mean(0)) for name, tokens in lengths.items()}
    alarms = (centred["test"] @ centred["train"].T).max(1) >= NEAR
    originals = np.array([int(Path(name).stem) for name in read["copies"].ids])
    found = (centred["copies"] * centred["test"][originals]).sum(1) >= NEAR
    changes = np.array([Path(name).parent.name for name in read["copies"].ids])
    shares = [f"{100 * found[changes == name].mean():.0f} %" for name in CHANGES]
    return path.name, f"{alarms.sum()} of {len(alarms):,}", *shares


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="formula-vit")
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--sets", default=",".join(SETS))
    parser.add_argument("--cache", default=None)
    parser.add_argument("--page", action="store_true")
    asked = parser.parse_args()
    lines = []
    with tempfile.TemporaryDirectory() as place:
        for name in asked.sets.split(","):
            lines.append(measured(asked.model, asked.data / name, Path(place) / name, asked.cache or f"{place}/cache"))
            print(*lines[-1], sep="\t", flush=True)
    if asked.page:
        name = Path(asked.model).name
        part = "duplicates" if name == parser.get_default("model") else f"duplicates of {name}"
        about = f"{name}, CLS of the last layer, threshold {NEAR}; {COPIED} copies of each kind.\n\n"
        page.put("method.md", part, about + page.table(("data set", "false alarms", *CHANGES), lines))


if __name__ == "__main__":
    main()
