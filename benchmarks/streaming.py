"""Does training from the cache take the same memory however many images there are, and what does it cost?

    python benchmarks/streaming.py [--images 16000] [--folder DIR] [--page]

Writes caches of N, 2N and 4N images (all 197 tokens of one layer, 192 channels, float16: 76 kB an image) and trains one
attentive probe on each by streaming, batches of 2,048, two passes, in a process of its own whose peak resident memory the
system tells; then the same from tokens that were loaded before. The caches are in the system's file cache or not as it
pleases. With --page the table goes into docs/measurements/speed.md.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import page
import torch

from mlfusion.cli.malloc import freed_memory_kept
from mlfusion.probing.heads import HeadShape
from mlfusion.probing.training import population
from mlfusion.probing.training.batches import Schedule, Tokens
from mlfusion.probing.training.population import Configuration, Population, TrainingData
from mlfusion.specs.identity import DataSpec, FeatureSpec, ModelSpec
from mlfusion.store import FeatureStore, Names, Samples, streams_for

TOKENS, WIDTH, CLASSES = 197, 192, 10
LAYER = 1
PASSES = 2


def write(root: Path, images: int) -> int:
    """A cache of random tokens; bytes of them."""
    samples = Samples(
        ids=tuple(f"train/{i:06d}" for i in range(images)),
        labels=np.arange(images) * CLASSES // images,
        digests=np.random.default_rng(0).integers(0, 256, (images, 16), np.uint8),
        classes=tuple(map(str, range(CLASSES))),
    )
    model = ModelSpec(
        weights="0" * 64,
        revision=None,
        config="none",
        preprocess="{}",
        name="none",
        family="none",
        depth=1,
        width=WIDTH,
    )
    data = DataSpec(content=samples.content, split="train", images=images, classes=samples.classes, name="none")
    names = Names(model="none", model_source="none", dataset="none", dataset_source="none")
    entry = FeatureStore(root).create(FeatureSpec(model=model, data=data, dtype="float16"), samples, names)
    [stream] = streams_for({(LAYER, "all"): (TOKENS, WIDTH)}, images=images, dtype="float16", format="zarr")
    entry.begin([stream])
    random = np.random.default_rng(0)
    for shard in range(stream.shards):
        with entry.draft(stream, shard) as draft:
            rows = stream.rows(shard)
            for start in range(rows.start, rows.stop, 256):
                count = min(start + 256, rows.stop) - start
                draft.append(random.standard_normal((count, 1, TOKENS, WIDTH), np.float32))
            draft.publish()
    entry.seal()
    return images * TOKENS * WIDTH * 2


def train(root: Path, way: str) -> None:
    """In a process of its own: print peak memory and images a second."""
    [entry] = FeatureStore(root).entries()
    with entry.open([LAYER], ["all"]) as reader:
        tokens = Tokens(reader, entry.samples.labels)
        if way == "loaded":
            tokens = Tokens(tokens[:], tokens.labels)
        schedule = Schedule.of(len(tokens), epochs=PASSES, least_steps=1)
        shape = HeadShape(tokens=TOKENS, width=WIDTH, classes=CLASSES, heads=8)
        times = [time.perf_counter()]
        one = Population("attentive", shape, [Configuration(1e-3, 1e-2, 0.1)], seed=0)
        data = TrainingData(tokens, np.arange(len(tokens)), schedule)
        for _ in population.train(one, data, progress=lambda _: times.append(time.perf_counter())):
            pass
    took = np.diff(times)[1:]  # the first step waits for the first images
    status = Path("/proc/self/status").read_text().splitlines()
    [peak] = [int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM")]
    print(json.dumps({"peak": peak, "rate": schedule.batch_size / float(took.mean()), "batch": schedule.batch_size}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--images", type=int, default=16_000, help="N")
    parser.add_argument("--folder", type=Path, help="for the caches; default: the system's temporary one")
    parser.add_argument("--page", action="store_true", help="put the table into docs/measurements/speed.md")
    parser.add_argument("--train", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--way", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.train:
        with freed_memory_kept():  # as at the command line
            train(args.train, args.way)
        return
    rows = []
    for images in (args.images, 2 * args.images, 4 * args.images):
        with tempfile.TemporaryDirectory(dir=args.folder) as folder:
            size = write(Path(folder), images)
            found = {}
            for way in ("streamed", "loaded"):
                command = [sys.executable, __file__, "--train", folder, "--way", way]
                ran = subprocess.run(command, capture_output=True, text=True, check=True)
                found[way] = json.loads(ran.stdout)
            shutil.rmtree(folder, ignore_errors=True)
            Path(folder).mkdir(exist_ok=True)
        streamed, loaded = found["streamed"], found["loaded"]
        rows.append(
            (
                f"{images:,}",
                f"{size / 1e6:,.0f} MB",
                f"{streamed['batch']:,}",
                f"{streamed['peak'] / 1e6:,.0f} MB",
                f"{loaded['peak'] / 1e6:,.0f} MB",
                f"{streamed['rate']:,.0f}",
                f"{loaded['rate']:,.0f}",
                f"{streamed['rate'] / loaded['rate']:.2f}",
            )
        )
        print(*rows[-1], sep="  ", flush=True)
    heads = [
        "images",
        "tokens",
        "batch",
        "peak, streamed",
        "peak, loaded",
        "images/s, streamed",
        "images/s, loaded",
        "ratio",
    ]
    if args.page:
        page.put(
            "measurements/speed.md",
            "streaming",
            f"{page.machine()}, torch {torch.__version__}.\n\n{page.table(heads, rows)}",
        )


if __name__ == "__main__":
    main()
