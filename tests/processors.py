"""A grammar of the settings of image processors; transformers' own processor is the oracle of what they mean."""

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn
from PIL import Image

SHAPES = [(23, 17), (16, 16), (9, 31), (40, 41)]  # height, width of the pictures that are prepared

PROCESSORS = ("CLIP", "Bit", "ViT", "DeiT", "Beit", "Siglip", "ConvNext")
ENDINGS = ("ImageProcessor", "ImageProcessorFast", "FeatureExtractor")

edge = st.integers(8, 40)
both = st.builds(lambda height, width: {"height": height, "width": width}, edge, edge)
shortest = st.builds(lambda number: {"shortest_edge": number}, edge)
limited = st.builds(lambda number: {"shortest_edge": number, "longest_edge": 2 * number}, edge)
three = st.lists(st.sampled_from([0.25, 0.456, 0.5]), min_size=3, max_size=3)
switch = st.booleans()

VALID: dict[str, st.SearchStrategy[Any]] = {
    "size": st.one_of(edge, both, both, shortest, shortest, limited, st.lists(edge, min_size=2, max_size=2)),
    "crop_size": st.one_of(edge, both, both),
    "do_resize": switch,
    "do_center_crop": switch,
    "do_rescale": switch,
    "do_normalize": switch,
    "do_convert_rgb": switch,
    "default_to_square": switch,
    "resample": st.integers(0, 5),
    "rescale_factor": st.sampled_from([1 / 255, 1 / 127.5, 0.0031, 1.0]),
    "image_mean": st.one_of(three, st.just(0.5)),
    "image_std": st.one_of(three, st.just(0.5)),
    "crop_pct": st.sampled_from([0.875, 0.9, 1.0, 0.5]),
    "do_pad": st.just(False),
    "processor_class": st.just("CLIPProcessor"),
    "a setting that nobody knows": st.integers(),
}
wrong = st.sampled_from(
    [
        0,
        -3,
        2.5,
        "",
        "224",
        [],
        [7],
        [5, 6, 7, 8],
        {},
        {"width": 9},
        {"shortest_edge": -1},
        {"height": 0, "width": 4},
        float("nan"),
        float("inf"),
        True,
        [None] * 3,
        {"longest_edge": 20},
        99,
    ]
)
WRONG = sorted(set(VALID) - {"processor_class", "do_convert_rgb", "a setting that nobody knows"})


@st.composite
def settings(draw: DrawFn, wrong_ones: int) -> dict[str, Any]:
    """The settings of some processor, in which so many have a value that is likely to be wrong."""
    name = draw(st.sampled_from(PROCESSORS)) + draw(st.sampled_from(ENDINGS))
    chosen = draw(st.lists(st.sampled_from(sorted(VALID)), max_size=7, unique=True))
    found = {key: draw(VALID[key]) for key in chosen}
    for key in draw(st.lists(st.sampled_from(WRONG), min_size=wrong_ones, max_size=wrong_ones, unique=True)):
        found[key] = draw(wrong)
    kind = "image_processor_type" if "ImageProcessor" in name else "feature_extractor_type"
    return {kind: name, **found}


def write(found: dict[str, Any], folder: Path) -> Path:
    """A folder with these settings."""
    (folder / "preprocessor_config.json").write_text(json.dumps(found))
    (folder / "config.json").write_text(json.dumps({"model_type": "vit"}))
    return folder


def pictures() -> list[Image.Image]:
    """Pictures of several shapes."""
    chance = np.random.default_rng(3)
    return [Image.fromarray(chance.integers(0, 256, (*shape, 3), np.uint8)) for shape in SHAPES]


def by_transformers(folder: Path) -> list[np.ndarray] | None:
    """The pictures as transformers prepares them; None if it cannot, or not all to one shape."""
    import transformers

    found: list[np.ndarray] = []
    with suppress(Exception):
        processor = transformers.AutoImageProcessor.from_pretrained(folder, backend="pil")
        for image in pictures():
            found.append(np.asarray(processor(images=[image], return_tensors="np")["pixel_values"], np.float32)[0])
    return found if len(found) == len(SHAPES) and len({array.shape for array in found}) == 1 else None
