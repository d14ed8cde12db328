"""How near does an extraction come to the bare model, and how far is it from the script that one would write?

    python benchmarks/extract.py [--data ../shared/data] [--part rate,usual,memory,features,ways] [--page]
    python benchmarks/extract.py --device cuda --part gpu --page

JPEGs of 500 x 375 pixels are made from the photographs of dtd10. `rate`: `mlfusion extract` of every layer's CLS and AP, with
the model loaded before, from the first look at the files to the last flushed shard, against the bare forward pass over tensors
in memory, and against decoding alone; round by round in turn. `usual`: against a DataLoader with the model's processor,
output_hidden_states and torch.save, one pass a token kind. `memory`: the peak of N, 2N and 4N images, a process each.
`features`: what the fast path and narrower numbers do to DeiT-Ti's features on the photographs as they are. `gpu`: a model of
CLIP-B/16's shape, from JPEGs and from pictures in memory, and its share of the device's rate of matrix products. `ways`: the
bare forward pass compiled, over channels-last pictures, and with attention that is not fused, against itself as it is.
"""

import argparse
import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import page
import torch
import transformers
from PIL import Image

import mlfusion
from mlfusion import models
from mlfusion.cli.malloc import freed_memory_kept
from mlfusion.extraction.loader import Loader
from mlfusion.extraction.request import Request
from mlfusion.extraction.run import fill, load
from mlfusion.models import preprocessing
from mlfusion.models.backbone import Backbone
from mlfusion.specs.options import ComputeOptions, FeatureOptions
from mlfusion.system import devices

BATCH = 32
DEIT = "weights/deit_tiny_patch16_224"
PARTS = ("rate", "usual", "memory", "features", "ways", "gpu")


def make_images(data: Path, root: Path, count: int) -> Path:
    """A folder of so many JPEGs of 500 x 375 pixels in two classes, and a few for its test split."""
    photos = sorted((data / "dtd10" / "train").glob("*/*.jpg"))[:120]
    made = []
    for photo in photos:
        Image.open(photo).convert("RGB").resize((500, 375), Image.Resampling.BICUBIC).save(
            held := io.BytesIO(), "JPEG", quality=90
        )
        made.append(held.getvalue())
    for split, images in (("train", count), ("test", 4)):
        for number in range(images):
            folder = root / split / f"class{number % 2}"
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{number:05d}.jpg").write_bytes(made[number % len(made)])
    return root


def make_model(data: Path, root: Path, which: str) -> Path:
    """ViT-B/16 or CLIP-B/16's vision tower with random weights, prepared for as DeiT is; or DeiT-Ti itself."""
    if which == "DeiT-Ti":
        return data / DEIT
    torch.manual_seed(0)
    model: Any
    if which == "ViT-B/16":
        model = transformers.ViTModel(transformers.ViTConfig(), add_pooling_layer=False)
    else:
        model = transformers.CLIPVisionModel(transformers.CLIPVisionConfig(patch_size=16))
    folder = root / which.replace("/", "-")
    model.save_pretrained(folder)
    settings = {"image_processor_type": "DeiTImageProcessor", "size": {"shortest_edge": 256}, "crop_size": 224}
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    return folder


class Ours:
    """`mlfusion extract` with the model loaded before."""

    def __init__(
        self,
        model: Path,
        images: Path,
        making: dict[str, Any],
        tokens: str,
        device: str = "cpu",
        batch: int | None = BATCH,
    ) -> None:
        self.words: dict[str, Any] = {
            "features": FeatureOptions(splits=("train",), tokens=tokens, **making),
            "compute": ComputeOptions(device=device, batch_size=batch),
        }
        self.model, self.images = str(model), str(images)
        self.backbone = load(Request.of(self.model, self.images, **self.words))
        self.limit = ""

    def __call__(self) -> float:
        """Images a second, from the first look at the files to the last flushed shard."""
        with tempfile.TemporaryDirectory() as cache:
            began = time.perf_counter()
            asked = Request.of(self.model, self.images, **self.words)
            [done] = fill(asked, cache=cache, model=lambda _: self.backbone)
            self.limit = done.bottleneck
            return done.images_written / (time.perf_counter() - began)


def bare(backbone: Backbone, pixels: torch.Tensor, count: int) -> float:
    """Images a second of the model alone, over a batch in memory."""
    began = time.perf_counter()
    with torch.inference_mode():
        for _ in range(count // len(pixels)):
            backbone._model(pixel_values=pixels)
    return count // len(pixels) * len(pixels) / (time.perf_counter() - began)


def decoding(asked: Request) -> float:
    """Images a second of reading and preparing alone, with as many threads."""
    job = asked.jobs[0]
    rows = range(len(job.split))
    began = time.perf_counter()
    for _ in Loader(job.split, job.steps, BATCH)((rows[at : at + BATCH], None) for at in range(0, len(rows), BATCH)):
        pass
    return len(rows) / (time.perf_counter() - began)


def in_turn(ways: dict[str, Callable[[], float]], rounds: int) -> list[dict[str, float]]:
    """Every way once a round, the order reversed in every other one; the first round does not count."""
    found = []
    for number in range(rounds + 1):
        names = list(ways) if number % 2 else list(ways)[::-1]
        found.append({name: ways[name]() for name in names})
    return found[1:]


def rate(args: argparse.Namespace, root: Path) -> None:
    rows = []
    for which, count, rounds in (("DeiT-Ti", 320, 4), ("ViT-B/16", 32, 3)):
        folder = make_model(args.data, root, which)
        images = make_images(args.data, root / f"images-{count}", count)
        ours = {word: Ours(folder, images, {"preprocess": word}, "cls,ap") for word in ("exact", "fast")}
        backbone = ours["exact"].backbone
        pixels = torch.randn(BATCH, 3, 224, 224)
        ways: dict[str, Callable[[], float]] = {"forward": lambda b=backbone, p=pixels, n=count: bare(b, p, n)}
        for word, one in ours.items():
            asked = Request.of(one.model, one.images, **one.words)
            ways[f"decoding, {word}"] = lambda asked=asked: decoding(asked)
            ways[word] = one
        found = in_turn(ways, rounds)
        for word, one in ours.items():
            ratios = [each[word] / min(each["forward"], each[f"decoding, {word}"]) for each in found]
            rows.append(
                (
                    which,
                    word,
                    *(
                        f"{median(each[name] for each in found):,.1f}"
                        for name in ("forward", f"decoding, {word}", word)
                    ),
                    f"{median(ratios):.2f}",
                    f"{min(ratios):.2f} to {max(ratios):.2f}",
                    one.limit,
                )
            )
            print(*rows[-1], sep="  ", flush=True)
    heads = ["model", "path", "forward alone", "decoding alone", "extract", "ratio to the slower", "rounds", "limit"]
    publish(args, "extraction", page.table(heads, rows, left=2))


class _Pictures(torch.utils.data.Dataset):  # type: ignore[type-arg]
    """What one would write: files, opened and prepared by the model's processor."""

    def __init__(self, folder: Path, images: Path) -> None:
        self.files = sorted(images.glob("train/*/*.jpg"))
        self.processor = transformers.AutoImageProcessor.from_pretrained(folder, backend="pil")

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, row: int) -> torch.Tensor:
        with Image.open(self.files[row]) as image:
            return self.processor(images=image.convert("RGB"), return_tensors="pt")["pixel_values"][0]


def usual_script(folder: Path, images: Path, out: Path) -> float:
    """Images a second of three passes: CLS of every layer, AP of every layer, all tokens of the last."""
    model = transformers.AutoModel.from_pretrained(folder, dtype=torch.float32, add_pooling_layer=False).eval()
    data = _Pictures(folder, images)
    kinds: dict[str, Callable[[Any], torch.Tensor]] = {
        "cls": lambda said: torch.stack([each[:, 0] for each in said.hidden_states[1:]], 1),
        "ap": lambda said: torch.stack([each[:, 1:].mean(1) for each in said.hidden_states[1:]], 1),
        "all": lambda said: said.last_hidden_state,
    }
    began = time.perf_counter()
    for kind, take in kinds.items():
        batches = torch.utils.data.DataLoader(data, batch_size=BATCH, num_workers=devices.processor_count())
        with torch.inference_mode():
            kept = [take(model(pixels, output_hidden_states=True)).cpu() for pixels in batches]
        torch.save(torch.cat(kept), out / f"{kind}.pt")
    return len(data) / (time.perf_counter() - began)


def usual(args: argparse.Namespace, root: Path) -> None:
    rows = []
    for which, count, rounds in (("DeiT-Ti", 128, 3), ("ViT-B/16", 32, 1)):
        folder = make_model(args.data, root, which)
        images = make_images(args.data, root / f"images-{count}", count)
        ways: dict[str, Callable[[], float]] = {
            word: Ours(folder, images, {"preprocess": word}, "cls,ap,all@last") for word in ("exact", "fast")
        }
        ways["usual"] = lambda folder=folder, images=images: usual_script(folder, images, root)
        found = in_turn(ways, rounds)
        for word in ("exact", "fast"):
            ratios = [each[word] / each["usual"] for each in found]
            rows.append(
                (
                    which,
                    word,
                    *(f"{median(each[name] for each in found):,.1f}" for name in ("usual", word)),
                    f"{median(ratios):.1f}",
                    f"{min(ratios):.1f} to {max(ratios):.1f}",
                )
            )
            print(*rows[-1], sep="  ", flush=True)
    heads = ["model", "path", "usual script", "extract", "ratio", "rounds"]
    publish(args, "extraction against a script", page.table(heads, rows, left=2))


def memory(args: argparse.Namespace, root: Path) -> None:
    rows = []
    for count in (args.images, 2 * args.images, 4 * args.images):
        images = make_images(args.data, root / f"images-{count}", count)
        command = [sys.executable, __file__, "--peak", models.EMBEDDED, str(images), str(root / f"cache-{count}")]
        ran = subprocess.run(command, capture_output=True, text=True, check=True)
        rows.append((f"{count:,}", f"{int(ran.stdout) / 1e6:,.0f} MB"))
        print(*rows[-1], sep="  ", flush=True)
        shutil.rmtree(root / f"cache-{count}")
    publish(args, "extraction's memory", page.table(["images", "peak"], rows, left=0))


def peak(model: str, images: str, cache: str) -> None:
    """In a process of its own: the most memory it ever had, by the system's count."""
    mlfusion.extract(model, images, splits="train", tokens="cls,ap,all@last", cache=cache)
    status = Path("/proc/self/status").read_text().splitlines()
    print(next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM")))


def features(args: argparse.Namespace, root: Path) -> None:
    folder = args.data / DEIT
    exact, fast = preprocessing.read(folder), preprocessing.read(folder, "fast")
    files = [
        path.read_bytes()
        for name, step in (("dtd10/train", 10), ("flowers5/train", 30), ("cifar10/train", 100))
        for path in sorted((args.data / name).glob("*/*.jpg"))[::step]
    ]
    # What a large camera's picture is decoded to at a share of its size.
    large = [path.read_bytes() for path in (args.data / "sign_digits").rglob("*.*") if path.stat().st_size > 500_000]
    pairs = [(layer, kind) for layer in range(1, 13) for kind in ("cls", "ap")]
    backbones = {c: Backbone(models.locate(str(folder)), compute=c) for c in ("float32", "bfloat16", "float16")}  # type: ignore[arg-type]

    def batches(steps: Any, quick: bool, data: list[bytes]) -> Iterator[torch.Tensor]:
        for at in range(0, len(data), BATCH):
            pictures = [
                made
                if quick and (made := steps.from_jpeg(each)) is not None
                else steps.picture(Image.open(io.BytesIO(each)))
                for each in data[at : at + BATCH]
            ]
            yield steps.finish(torch.from_numpy(np.stack(pictures)))

    def run(compute: str, steps: Any, quick: bool, data: list[bytes]) -> dict[Any, torch.Tensor]:
        made = [backbones[compute](pixels, pairs) for pixels in batches(steps, quick, data)]  # type: ignore[arg-type]
        return {pair: torch.cat([one[pair] for one in made]).double()[:, 0] for pair in pairs}

    want, wanted_large = run("float32", exact, False, files), run("float32", exact, False, large)
    ways = {
        "fast path": (want, run("float32", fast, True, files)),
        "fast path, large": (wanted_large, run("float32", fast, True, large)),
        "bfloat16": (want, run("bfloat16", exact, False, files)),
        "float16": (want, run("float16", exact, False, files)),
    }
    rows = []
    for layer in range(1, 13):
        row = [str(layer)]
        for one, other in ways.values():
            for kind in ("cls", "ap"):
                apart = 1 - torch.cosine_similarity(one[layer, kind], other[layer, kind], dim=-1)
                row.append(f"{float(apart.max()):.1e}")
        rows.append(row)
        print(*row, sep="  ", flush=True)
    heads = ["layer", *(f"{name}, {kind}" for name in ways for kind in ("CLS", "AP"))]
    text = f"{len(files)} photographs of 32 to 640 pixels, {len(large)} large ones; largest 1 - cosine over all of them.\n\n"
    publish(args, "extraction's differences", text + page.table(heads, rows))


def ways(args: argparse.Namespace, root: Path) -> None:
    rows = []
    for which, count in (("DeiT-Ti", 128), ("ViT-B/16", 32)):
        folder = make_model(args.data, root, which)
        pixels = torch.randn(BATCH, 3, 224, 224)

        def vit(attention: str, folder: Path = folder) -> Any:
            made = transformers.ViTModel.from_pretrained(
                folder, dtype=torch.float32, attn_implementation=attention, add_pooling_layer=False
            )
            return made.eval()

        def forward(model: Any, pictures: torch.Tensor, count: int = count) -> Callable[[], float]:
            @torch.inference_mode()
            def once() -> float:
                began = time.perf_counter()
                for _ in range(count // BATCH):
                    model(pixel_values=pictures)
                return count / (time.perf_counter() - began)

            return once

        plain = vit("sdpa")
        compiled = forward(torch.compile(vit("sdpa")), pixels)
        began = time.perf_counter()
        compiled()
        first = time.perf_counter() - began
        tried = {
            "default": forward(plain, pixels),
            "torch.compile": compiled,
            "channels last": forward(
                vit("sdpa").to(memory_format=torch.channels_last), pixels.to(memory_format=torch.channels_last)
            ),
            "without fused attention": forward(vit("eager"), pixels),
        }
        found = in_turn(tried, 5)
        for name in tried:
            ratios = [each[name] / each["default"] for each in found]
            note = f"first call {first:.0f} s" if name == "torch.compile" else ""
            rows.append(
                (
                    which,
                    name,
                    f"{median(each[name] for each in found):.1f}",
                    f"{median(ratios):.2f}",
                    f"{min(ratios):.2f} to {max(ratios):.2f}",
                    note,
                )
            )
            print(*rows[-1], sep="  ", flush=True)
    heads = ["model", "forward pass", "images/s", "ratio to default", "rounds", ""]
    publish(args, "ways of the forward pass", page.table(heads, rows, left=2))


def gpu(args: argparse.Namespace, root: Path) -> None:
    folder = make_model(args.data, root, "CLIP-B/16")
    images = make_images(args.data, root / "images", args.images * 16)
    making = {"preprocess": "fast", "compute": "bfloat16"}
    ours = Ours(folder, images, making, "cls,ap", args.device, None)
    batch = 256
    steps = ours.backbone.preprocessing
    pictures = torch.randint(0, 256, (batch, 3, 224, 224), dtype=torch.uint8, device=args.device)
    pairs = frozenset((layer, kind) for layer in range(1, 13) for kind in ("cls", "ap"))

    def decoded() -> float:
        torch.cuda.synchronize()
        began = time.perf_counter()
        for _ in range(40):
            ours.backbone(steps.finish(pictures), pairs)  # type: ignore[arg-type]
        torch.cuda.synchronize()
        return 40 * batch / (time.perf_counter() - began)

    def products() -> float:
        """Operations a second of one large product."""
        side = 8192
        a = torch.randn(side, side, device=args.device, dtype=torch.bfloat16)
        torch.cuda.synchronize()
        began = time.perf_counter()
        for _ in range(20):
            a @ a
        torch.cuda.synchronize()
        return 20 * 2 * side**3 / (time.perf_counter() - began)

    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        ours.backbone(steps.finish(pictures[:1]), pairs)  # type: ignore[arg-type]
    each = counter.get_total_flops()
    found = in_turn({"files": ours, "decoded": decoded, "products": products}, 5)
    rows = [
        (
            "from JPEG files",
            f"{median(one['files'] for one in found):,.0f} images/s",
            f"{devices.processor_count()} processors; limit: {ours.limit}",
        ),
        (
            "from pictures on the device",
            f"{median(one['decoded'] for one in found):,.0f} images/s",
            f"batches of {batch}, bfloat16",
        ),
        (
            "share of the product's rate",
            f"{median(one['decoded'] * each / one['products'] for one in found):.0%}",
            f"{each / 1e9:.1f} GFLOP an image; 8192 x 8192: {median(one['products'] for one in found) / 1e12:,.0f} TFLOP/s",
        ),
    ]
    for row in rows:
        print(*row, sep="  ", flush=True)
    publish(args, "extraction on a gpu", page.table(["", "", ""], rows), devices.device_name(args.device))


def publish(args: argparse.Namespace, part: str, text: str, machine: str | None = None) -> None:
    if args.page:
        busy = f"load {os.getloadavg()[0]:.0f} at the end, niceness {os.getpriority(os.PRIO_PROCESS, 0)}"
        page.put(
            "measurements/speed.md", part, f"{machine or page.machine()}, torch {torch.__version__}; {busy}.\n\n{text}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, default=page.DOCS.parent.parent / "shared" / "data")
    parser.add_argument("--part", default="rate,usual,memory,features,ways", help=f"of {', '.join(PARTS)}")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--images", type=int, default=512, help="N of the peaks of memory")
    parser.add_argument("--page", action="store_true", help="put the tables into docs/measurements/speed.md")
    parser.add_argument("--peak", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    with freed_memory_kept():  # as at the command line
        if args.peak:
            peak(*args.peak)
            return
        with tempfile.TemporaryDirectory() as root:
            for part in args.part.split(","):
                globals()[part](args, Path(root))


if __name__ == "__main__":
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # as at the command line
    main()
