"""What a plan says of an extraction beforehand is what the extraction then does: counts, bytes, files, forward passes, keys."""

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tiny import save_images, save_model

import mlfusion
from mlfusion.extraction.explain import Explained
from mlfusion.extraction.plan import Plan
from mlfusion.models.backbone import Backbone
from mlfusion.store import stream
from mlfusion.system import disk

TOKENS = "cls,ap,all@last"  # two streams
EVERY = {"train": 3 * 7, "test": 3 * 4}  # images


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_model("vit", tmp_path_factory.mktemp("model") / "tiny-vit"))


@pytest.fixture
def data(tmp_path: Path) -> str:
    return str(save_images(tmp_path / "colours", {"train": 7, "test": 4}))


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight images of CLS and AP to a shard, four of all tokens."""
    monkeypatch.setattr(stream, "SHARD_ROWS", (8, 8))
    monkeypatch.setattr(stream, "SHARD_BYTES", 4 * 17 * 32 * 2)
    monkeypatch.setattr(stream, "CHUNK_BYTES", 4 * 32 * 2)


def planned(model: str, data: str, **options: object) -> Plan:
    return mlfusion.plan(model, data, trial=0.01, batch_size=3, **options)


def written(folder: Path) -> list[Path]:
    """Every file of a cache but the record of a run, which is written where there was one."""
    return [path for path in folder.rglob("*") if path.is_file()]


@pytest.mark.parametrize("format", ["zarr", "hdf5"])
@pytest.mark.parametrize("dtype", ["float16", "float32", "int8"])
def test_an_empty_cache_is_filled_as_planned(model: str, data: str, format: str, dtype: str) -> None:
    before = planned(model, data, tokens=TOKENS, dtype=dtype, format=format)
    assert not written(Path("cache"))
    assert before.images_per_second is not None
    assert before.images_per_second > 0
    assert before.seconds == pytest.approx(sum(EVERY.values()) / before.images_per_second)
    number = {"float16": 2 * 32, "float32": 4 * 32, "int8": 32 + 4}[dtype]  # bytes of a token; int8 has a scale
    done = mlfusion.extract(model, data, tokens=TOKENS, dtype=dtype, format=format, batch_size=3)
    assert len(before.splits) == len(done) == 2
    for plan, result in zip(before.splits, done, strict=True):
        split = result.entry.spec.data.split
        assert (plan.split, plan.key, plan.images) == (split, result.entry.key, EVERY[split])
        assert (plan.images_to_run, plan.bytes_held) == (result.images_written, 0)
        assert (plan.forward_passes, plan.forward_passes_saved) == (result.forward_passes, 0)
        assert plan.bytes_to_write == EVERY[split] * (2 * 4 + 17) * number
        assert plan.files_to_write == len(written(result.entry.path))
    assert before.bytes_to_write == sum(plan.bytes_to_write for plan in before.splits)


def test_what_is_there_is_not_planned_again(model: str, data: str) -> None:
    done = mlfusion.extract(model, data, tokens=TOKENS)
    after = planned(model, data, tokens=TOKENS)
    assert (after.bytes_to_write, after.images_per_second, after.seconds) == (0, None, 0.0)
    for plan, result in zip(after.splits, done, strict=True):
        assert (plan.images_to_run, plan.files_to_write, plan.forward_passes) == (0, 0, 0)
        assert plan.bytes_held == sum(path.stat().st_size for path in written(result.entry.path))
        assert plan.forward_passes_saved > 0


def test_more_layers_are_planned_beside_those_that_are_there(model: str, data: str) -> None:
    mlfusion.extract(model, data, tokens="ap", layers="2")
    before = planned(model, data, tokens="ap", layers="2,4", splits="train")
    held = sum(path.stat().st_size for path in written(Path("cache/v3") / before.splits[0].key))
    [done] = mlfusion.extract(model, data, tokens="ap", layers="2,4", splits="train", batch_size=3)
    [plan] = before.splits
    assert plan.bytes_held == held
    assert plan.bytes_to_write == EVERY["train"] * 32 * 2  # of one layer more
    assert (plan.images_to_run, plan.forward_passes) == (done.images_written, done.forward_passes) == (21, 8)


def test_what_an_extraction_left_undone_is_planned_alone(
    model: str, data: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped in its fifth pass, it has published the first of its shards of 8, 8 and 5 images."""
    run, passes = Backbone.__call__, itertools.count(1)

    def stopped(backbone: Backbone, *args: Any) -> Any:
        if next(passes) == 5:
            raise KeyboardInterrupt
        return run(backbone, *args)

    with monkeypatch.context() as patch:
        patch.setattr(Backbone, "__call__", stopped)
        with pytest.raises(KeyboardInterrupt):
            mlfusion.extract(model, data, tokens="ap", splits="train", batch_size=3)
    [plan] = planned(model, data, tokens="ap", splits="train").splits
    assert (plan.images_to_run, plan.forward_passes, plan.forward_passes_saved) == (13, 3 + 2, 3)
    assert plan.bytes_to_write == 13 * 4 * 32 * 2
    [done] = mlfusion.extract(model, data, tokens="ap", splits="train", batch_size=3)
    assert (done.images_written, done.images_reused, done.forward_passes) == (13, 8, 5)


def test_a_plan_as_json_says_whether_it_fits(model: str, data: str, monkeypatch: pytest.MonkeyPatch) -> None:
    body = json.loads(json.dumps(planned(model, data).to_json()))
    assert [split["images"] for split in body["splits"]] == list(EVERY.values())
    assert body["fits"] is True
    monkeypatch.setattr(disk, "free_bytes", lambda _: body["bytes_to_write"] - 1)
    assert planned(model, data).to_json()["fits"] is False


# --- why there is no entry -------------------------------------------------------------------------------------------


def explained(model: str, data: str, **options: object) -> Explained:
    [one] = mlfusion.explain(model, data, splits="train", **options)
    return one


def test_an_empty_cache_has_nothing_near(model: str, data: str) -> None:
    one = explained(model, data)
    assert (one.entry, one.nearest, one.differences) == (None, None, ())
    assert one.to_json()["state"] == "absent"
    [done] = mlfusion.extract(model, data, splits="train")
    assert done.entry.key == one.key


def test_what_lacks_is_said_until_it_is_there(model: str, data: str) -> None:
    mlfusion.extract(model, data, splits="train", tokens="cls", layers="1,2")
    asked = {"tokens": "cls", "layers": "1-3"}
    one = explained(model, data, **asked)
    assert (one.to_json()["state"], one.lacking) == ("partial", {(3, "cls")})
    mlfusion.extract(model, data, splits="train", **asked)
    one = explained(model, data, **asked)
    assert (one.to_json()["state"], one.lacking) == ("whole", frozenset())


def test_the_nearest_entry_differs_in_what_was_changed(model: str, data: str) -> None:
    [held] = mlfusion.extract(model, data, splits="train")
    for options, field in (({"dtype": "float32"}, "dtype"), ({"hook": "block"}, "model.hook")):
        one = explained(model, data, **options)
        assert one.nearest is not None
        assert one.nearest.key == held.entry.key != one.key
        assert [name for name, _, _ in one.differences] == [field]


def test_another_size_is_a_setting_of_the_preprocessing(model: str, data: str) -> None:
    mlfusion.extract(model, data, splits="train")
    fields = {name: (asked, there) for name, asked, there in explained(model, data, size=48).differences}
    assert all(name.startswith("model.") for name in fields)
    assert any("48" in asked and "32" in there for asked, there in fields.values())


def test_changed_images_are_counted_and_named(model: str, data: str) -> None:
    """One other, one gone, one new."""
    mlfusion.extract(model, data, splits="train")
    train = Path(data) / "train"
    Image.fromarray(np.zeros((40, 36, 3), np.uint8)).save(train / "blue" / "000.png")
    (train / "green" / "001.png").unlink()
    Image.fromarray(np.ones((40, 36, 3), np.uint8)).save(train / "red" / "new.png")
    differences = {name: asked for name, asked, _ in explained(model, data).differences}
    text = differences["data.content"]
    assert "1 new (train/red/new.png)" in text
    assert "1 gone (train/green/001.png)" in text
    assert "1 with other bytes (train/blue/000.png)" in text
