"""Stage 1 fills the gaps and nothing else; stopped anywhere it goes on; nothing that is not in the numbers is in the key."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import PIL.Image
import PIL.ImageOps
import pytest
import torch
import transformers
import zoo
from tiny import save_images, save_model

import mlfusion
from mlfusion.errors import BadData, BadModel, BadOption, CacheUnusable, MlfusionError, NotCached, UnknownName
from mlfusion.extraction import run
from mlfusion.models.backbone import Backbone
from mlfusion.specs.options import FeatureOptions
from mlfusion.store import FeatureStore, differences, stream
from mlfusion.system import disk


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return str(save_model("vit", tmp_path_factory.mktemp("model") / "tiny-vit"))


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> str:
    return str(save_images(tmp_path_factory.mktemp("data") / "colours", {"train": 7, "test": 3}))


def total(done, field: str) -> int:
    return sum(getattr(one, field) for one in done)


def test_a_second_time_is_free(model, images):
    first = mlfusion.extract(model, images)
    assert [one.entry.spec.data.split for one in first] == ["train", "test"]
    assert total(first, "images_written") == 30
    assert total(first, "forward_passes") > 0
    again = mlfusion.extract(model, images)
    assert total(again, "forward_passes") == total(again, "images_written") == 0
    assert total(again, "images_reused") == 30
    assert [one.entry.key for one in again] == [one.entry.key for one in first]


@pytest.mark.parametrize("format", ["zarr", "hdf5"])
def test_one_more_layer_writes_that_layer_alone(format, model, images):
    [first] = mlfusion.extract(model, images, splits="train", layers="3,4", format=format)
    files = {file: file.stat().st_mtime_ns for file in first.entry.path.glob("tokens/*/c/*/*")}
    [second] = mlfusion.extract(model, images, splits="train", layers="2-4", format=format)
    assert second.entry.key == first.entry.key
    assert second.forward_passes > 0
    new = {file.parts[-4] for file in second.entry.path.glob("tokens/*/c/*/*") if file not in files}
    assert new == {"cls.ap.L2"}
    assert {file: file.stat().st_mtime_ns for file in files} == files


def test_one_more_kind_writes_that_kind_alone(model, images):
    mlfusion.extract(model, images, splits="train", tokens="ap")
    [second] = mlfusion.extract(model, images, splits="train", tokens="cls,ap,all@last")
    assert {one.name for one in second.entry.streams()} == {"ap.L1-4", "cls.L1-4", "all.L4"}
    whole = second.entry.read([4], ["all"])[:, 0].astype(np.float32)
    np.testing.assert_array_equal(second.entry.read([4], ["cls"])[:, 0, 0], whole[:, 0])
    np.testing.assert_allclose(second.entry.read([4], ["ap"])[:, 0, 0], whole[:, 1:].mean(1), atol=2e-3)


def test_what_does_not_change_the_numbers_is_not_in_the_key(model, images, tmp_path):
    [one] = mlfusion.extract(model, images, splits="train", batch_size=2, cache=tmp_path / "a", layers="1,4")
    moved = shutil.copytree(model, tmp_path / "elsewhere" / "renamed")
    data = shutil.copytree(images, tmp_path / "elsewhere" / "other")
    [other] = mlfusion.extract(
        str(moved), str(data), splits="train", batch_size=7, cache=tmp_path / "b", layers="4,1", device="cpu"
    )
    assert other.entry.key == one.entry.key
    np.testing.assert_allclose(
        other.entry.read([1, 4], ["cls", "ap"]).astype(float), one.entry.read([1, 4], ["cls", "ap"]), atol=2e-3
    )


@pytest.mark.parametrize("change", ["weights", "preprocessing", "image", "label", "dtype", "split", "configuration"])
def test_what_changes_the_numbers_is_in_the_key(change, model, images, tmp_path):
    [one] = mlfusion.extract(model, images, splits="train", layers="1")
    folder, data, words = (
        Path(shutil.copytree(model, tmp_path / "m")),
        Path(shutil.copytree(images, tmp_path / "d")),
        {},
    )
    if change == "weights":
        shutil.copy(save_model("vit", tmp_path / "other", seed=1) / "model.safetensors", folder)
    elif change in ("preprocessing", "configuration"):
        file, field, value = {
            "preprocessing": ("preprocessor_config.json", "resample", 3),
            "configuration": ("config.json", "layer_norm_eps", 1e-3),
        }[change]
        body = json.loads((folder / file).read_text())
        (folder / file).write_text(json.dumps({**body, field: value}))
    elif change == "image":
        shutil.copy(data / "test" / "red" / "001.png", data / "train" / "red" / "001.png")
    elif change == "label":
        (data / "train" / "red" / "001.png").rename(data / "train" / "blue" / "9.png")
    elif change == "dtype":
        words = {"dtype": "float32"}
    [other] = mlfusion.extract(
        str(folder), str(data), splits="test" if change == "split" else "train", layers="1", **words
    )
    assert other.entry.key != one.entry.key
    assert other.forward_passes > 0


def test_load_features_gives_arrays_with_labels_and_ids(model, images):
    mlfusion.extract(model, images)
    found = mlfusion.load_features(model, images, "train")
    assert found.tokens.shape == (21, 4, 2, 32)
    assert found.tokens.dtype == np.float16
    assert found.ids[:2] == ("train/blue/000.png", "train/blue/001.png")
    assert [found.classes[label] for label in found.labels[[0, 7, 14]]] == ["blue", "green", "red"]
    part = mlfusion.load_features(model, images, "train", layers=[4, 2], tokens="ap")
    np.testing.assert_array_equal(part.tokens[:, :, 0], found.tokens[:, [3, 1], 1])
    tokens, labels = found.tensors()
    assert tokens.dtype == torch.float16
    assert (tokens.data_ptr(), labels.data_ptr()) == (found.tokens.ctypes.data, found.labels.ctypes.data)
    with pytest.raises(NotCached, match=r"lack all of layers 4; run: mlfusion extract .* --tokens all@4"):
        mlfusion.load_features(model, images, "train", layers="last", tokens="all")
    with pytest.raises(BadData, match="cached: test, train"):
        mlfusion.load_features(model, images, "validation")


def test_load_features_takes_every_word_of_a_split(model, tmp_path):
    data = str(save_images(tmp_path / "d", {"train": 2, "test": 1, "val": 2}))
    mlfusion.extract(model, data, splits="train,val", layers="last")
    for word in ("validation", "val", "Dev"):
        assert mlfusion.load_features(model, data, word, layers="last").ids[0].startswith("val/")
    mlfusion.extract(model, data, splits="val=test", layers="last")  # now a split of the cache has this very name
    assert mlfusion.load_features(model, data, "val", layers="last").ids[0].startswith("test/")
    assert mlfusion.load_features(model, data, "dev", layers="last").ids[0].startswith("val/")


@pytest.mark.slow
def test_open_features_reads_what_is_asked_for_and_no_more(model, images):
    mlfusion.extract(model, images)
    whole = mlfusion.load_features(model, images, "train", layers="3,4", tokens="ap")
    found = mlfusion.open_features(model, images, "train", layers="3,4", tokens="ap", check="always")
    assert (found.ids, found.layers, found.kinds, found.key) == (whole.ids, whole.layers, whole.kinds, whole.key)
    assert found.tokens.shape == whole.tokens.shape
    np.testing.assert_array_equal(found.tokens[[20, 3, 3]], whole.tokens[[20, 3, 3]])
    for rows, tokens in found.tokens.batches(8, seed=1):
        np.testing.assert_array_equal(tokens, whole.tokens[rows])
    # In the workers of a DataLoader, which get the reader by fork or by pickle, each image comes from its own process.
    for way in ("fork", "spawn"):
        loader = torch.utils.data.DataLoader(
            found.tokens, batch_size=None, sampler=[[5, 1], [7]], num_workers=2, multiprocessing_context=way
        )
        for rows, tokens in zip(([5, 1], [7]), loader, strict=True):
            np.testing.assert_array_equal(tokens.numpy(), whole.tokens[rows])


def test_an_unreadable_image_is_named_and_what_was_done_is_kept(model, images, tmp_path, monkeypatch):
    monkeypatch.setattr(stream, "SHARD_ROWS", (4, 4))
    data = Path(shutil.copytree(images, tmp_path / "d"))
    (data / "train" / "red" / "003.png").write_bytes(b"broken")
    with pytest.raises(BadData, match=r"train/red/003\.png cannot be read: not an image.*--skip-bad"):
        mlfusion.extract(model, str(data), batch_size=2)
    [entry] = FeatureStore().entries()
    [one] = entry.streams()
    assert one.shards - len(entry.missing_shards(one)) >= 3
    assert not list(entry.path.rglob(f"{disk.DRAFT}*"))
    train, test = mlfusion.extract(model, str(data), batch_size=2, skip_bad=True)
    assert train.entry.key == entry.key
    assert (train.images_skipped, test.images_skipped) == (1, 0)
    assert train.images_written < 21
    found = mlfusion.load_features(model, str(data), "train")
    whole = mlfusion.extract(model, images, batch_size=2)[0].entry.read([1, 2, 3, 4], ["cls", "ap"])
    assert len(found.tokens) == len(found.labels) == len(found.ids) == 20
    assert "train/red/003.png" not in found.ids
    np.testing.assert_array_equal(found.tokens, np.delete(whole, 17, 0))


def test_images_of_every_kind_pass_or_are_skipped_with_a_reason(model, images, tmp_path):
    """What cannot be read is named with its reason, in the cache and in what is said; all else gives features."""
    data = Path(shutil.copytree(images, tmp_path / "d"))
    red = data / "train" / "red"
    good = np.asarray(PIL.Image.open(red / "000.png"))
    for name, image in {
        "deep": PIL.Image.fromarray(good[..., 0].astype(np.uint16) * 257),
        "cmyk": PIL.Image.fromarray(np.dstack([good, good[..., :1]]), "CMYK"),
        "palette": PIL.Image.fromarray(good).quantize(8),
        "one": PIL.Image.new("RGB", (1, 1), "red"),
    }.items():
        image.save(red / f"{name}.{'tif' if name == 'cmyk' else 'png'}")
    PIL.Image.fromarray(good).save(red / "film.gif", save_all=True, append_images=[PIL.Image.fromarray(255 - good)])
    PIL.Image.new("1", (20_000, 20_000)).save(red / "bomb.png")
    (red / "cut.png").write_bytes((red / "001.png").read_bytes()[:90])
    (red / "empty.jpg").write_bytes(b"")
    (red / "page.jpg").write_text("<html>")
    [done] = mlfusion.extract(model, str(data), splits="train", layers="4", skip_bad=True)
    skipped = done.to_json()["skipped"]
    assert set(skipped) == {f"train/red/{name}" for name in ("bomb.png", "cut.png", "empty.jpg", "page.jpg")}
    assert "400,000,000 pixels; allowed are 178,956,970" in skipped["train/red/bomb.png"]
    assert (skipped["train/red/empty.jpg"], skipped["train/red/page.jpg"]) == ("the file is empty", "not an image")
    assert done.entry.unreadable() == skipped
    found = mlfusion.load_features(model, str(data), "train", layers="4")
    assert len(found.ids) == len(found.tokens) == 21 + 5
    assert np.isfinite(found.tokens).all()
    [again] = mlfusion.extract(model, str(data), splits="train", layers="4", skip_bad=True)
    assert again.forward_passes == 0
    assert again.to_json()["skipped"] == skipped


def test_turned_images_are_another_entry(model, images):
    plain, turned = (
        mlfusion.extract(model, images, splits="test", layers="4", exif_transpose=upright)[0].entry
        for upright in (False, True)
    )
    assert plain.key != turned.key
    assert differences(plain.spec, turned.spec)[0][0] == "model.preprocess"
    np.testing.assert_array_equal(plain.read([4], ["cls"]), turned.read([4], ["cls"]))  # no image of these has an EXIF


def test_data_sets_made_in_a_program(model):
    pixels = np.random.default_rng(0).integers(0, 256, (8, 20, 24, 3), np.uint8)
    data = mlfusion.array_dataset("mine", {"train": (pixels, [0, 1] * 4), "test": (pixels[::-1], [1, 0] * 4)})
    mlfusion.extract(model, data, layers="4")
    train, test = (mlfusion.load_features(model, "mine", split, layers="4") for split in ("train", "test"))
    np.testing.assert_allclose(test.tokens.astype(float), train.tokens[::-1], atol=2e-3)
    assert train.labels.tolist() == [0, 1] * 4


SLOWLY = """
import sys, time
from mlfusion.models.backbone import Backbone
from mlfusion.store import stream
stream.SHARD_ROWS = (4, 4)
forward = Backbone.__call__
def slow(self, pixels, pairs):
    time.sleep(0.15)
    return forward(self, pixels, pairs)
Backbone.__call__ = slow
import mlfusion
mlfusion.extract(sys.argv[1], sys.argv[2], splits="train", batch_size=2, tokens="cls,ap,all@last", format=sys.argv[3])
"""


@pytest.mark.long
@pytest.mark.parametrize("format", ["zarr", "hdf5"])
def test_killed_anywhere_it_ends_with_the_same_bytes(format, model, images, tmp_path):
    """kill -9 once shards have begun to appear, several times, then to the end: compared with an undisturbed run."""

    def start(folder: str) -> subprocess.Popen:
        env = {**os.environ, "MLFUSION_CACHE": str(tmp_path / folder)}
        return subprocess.Popen(
            [sys.executable, "-c", SLOWLY, model, images, format], env=env, stderr=subprocess.DEVNULL
        )

    def shards(folder: str) -> dict[str, bytes]:
        # os.walk passes over what goes away meanwhile
        files = [Path(at) / name for at, _, names in os.walk(tmp_path / folder) for name in names if "/c/" in at]
        return {str(file.relative_to(tmp_path / folder)): file.read_bytes() for file in files}

    assert start("whole").wait() == 0
    want = shards("whole")
    assert len(want) == 24  # twelve shards and their records
    kept: dict[str, bytes] = {}
    for more in (2, 8):
        process = start("killed")
        while len(shards("killed")) < len(kept) + more and process.poll() is None:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        now = shards("killed")
        assert kept.items() <= now.items()
        assert len(kept) < len(now) < len(want)
        kept = now
    assert start("killed").wait() == 0
    assert shards("killed") == want
    assert not list((tmp_path / "killed").rglob(f"{disk.DRAFT}*"))


@pytest.mark.slow
@pytest.mark.parametrize("format", ["zarr", "hdf5"])
def test_a_full_disk_loses_nothing(format, model, images, tmp_path):
    """A limit on the size of files stands in for the disk: the all-tokens shard does not fit, the others do."""
    limited = (
        "import resource, sys, mlfusion\nfrom mlfusion.errors import CacheUnusable\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))\n"
        "try:\n    mlfusion.extract(sys.argv[1], sys.argv[2], splits='train', tokens='all', layers='4', format=sys.argv[3])\n"
        "except CacheUnusable as err:\n    print(err)\n"
    )
    [before] = mlfusion.extract(model, images, splits="train", layers="1")
    said = subprocess.run(
        [sys.executable, "-c", limited, model, images, format],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path.cwd(),
    )
    assert "no space left for the cache" in said.stdout
    assert "--cache" in said.stdout
    assert not list(Path("cache").rglob(f"{disk.DRAFT}*"))
    assert before.entry.read([1], ["cls"]).shape == (21, 1, 1, 32)
    [after] = mlfusion.extract(model, images, splits="train", layers="4", tokens="all", format=format)
    assert after.entry.read([4], ["all"]).shape == (21, 1, 17, 32)


def test_too_little_space_is_refused_before_any_work(model, images, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(100, 99, 1))
    with pytest.raises(CacheUnusable, match="MB are needed"):
        mlfusion.extract(model, images)


@pytest.mark.long
@pytest.mark.skipif(os.geteuid() == 0 and not shutil.which("unshare"), reason="root writes anywhere, needs unshare")
def test_a_read_only_cache_is_said_and_still_read(model, images, tmp_path):
    """The cache mounted read-only in a mount namespace of its own."""
    cache = tmp_path / "lab"
    mlfusion.extract(model, images, cache=cache, layers="1")
    script = (
        f"mount --bind {cache} {cache} && mount -o remount,ro,bind {cache} && "
        f"{sys.executable} -m mlfusion extract --model {model} --dataset {images} --cache {cache} --layers $0 --json"
    )

    def run(layers: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(["unshare", "-rm", "sh", "-c", script, layers], capture_output=True, text=True)

    reused = run("1")
    if "unshare" in reused.stderr or "mount:" in reused.stderr:
        pytest.skip(f"this machine gives no mount namespaces: {reused.stderr.strip()}")
    assert json.loads(reused.stdout)["features"][0]["forward_passes"] == 0
    refused = run("1,2")
    assert refused.returncode == 1
    assert "cannot be written" in refused.stderr
    assert "--cache" in refused.stderr


@pytest.mark.parametrize(
    ("words", "error", "message"),
    [
        ({"layers": "5"}, UnknownName, "no layer named '5'"),
        ({"tokens": "patch"}, BadOption, "no token kind named 'patch'"),
        ({"dtype": "int4"}, BadOption, "--dtype int4: allowed are float16"),
        ({"batch_size": 0}, MlfusionError, "--batch-size 0: allowed are whole numbers from 1"),
        ({"splits": "valid"}, BadData, "it has test, train|it has train, test"),
        ({"device": "tpu"}, MlfusionError, "--device tpu: allowed are auto"),
    ],
)
def test_words_that_mean_nothing_are_refused_before_any_work(words, error, message, model, images):
    with pytest.raises(error, match=message):
        mlfusion.extract(model, images, **words)
    assert not Path("cache").exists()


def test_a_mixture_of_kinds_comes_from_one_pass_and_is_read_back(model, images):
    """Each kind at layers of its own; every one is what the whole sequence makes it."""
    words = "all@4,cls+grid2@2-4,max+std@4"
    [one] = mlfusion.extract(model, images, splits="train", tokens=words, dtype="float32", batch_size=64)
    assert one.forward_passes == 1
    assert one.tokens == ("cls", "max", "std", "grid2", "all")

    def read(kind: str) -> np.ndarray:
        return mlfusion.load_features(model, images, "train", layers="last", tokens=kind).tokens[:, 0]

    patches = read("all")[:, 1:]
    quarters = patches.reshape(-1, 2, 2, 2, 2, 32).mean((2, 4)).reshape(-1, 4, 32)
    for kind, want in {
        "cls": read("all")[:, :1],
        "max": patches.max(1),
        "std": patches.std(1),
        "grid2": quarters,
    }.items():
        np.testing.assert_allclose(read(kind).reshape(want.shape), want, atol=2e-6)
    with pytest.raises(
        NotCached, match=r"lack max of layers 3; run: mlfusion extract .* --tokens max@3 --dtype float32"
    ):
        mlfusion.load_features(model, images, "train", layers=[3], tokens="max")


def test_a_hook_point_or_a_setting_is_another_entry_under_a_name_of_its_own(model, images):
    words = [model, f"{model}:block", f"{model}:hidden_act=relu", f"{model}:block,hidden_act=relu"]
    keys = {mlfusion.extract(word, images, splits="train", layers="4")[0].entry.key for word in words}
    assert len(keys) == 4
    found = {word: mlfusion.load_features(word, images, "train", layers="last") for word in words}
    assert {one.key for one in found.values()} == keys
    again = mlfusion.load_features(f"{model}:hidden_act=relu,block", images, "train", layers="last")
    assert again.key == found[words[3]].key
    normed = torch.nn.functional.layer_norm(torch.from_numpy(found[words[1]].tokens.astype("f4")), (32,))
    assert normed.std() == pytest.approx(1, abs=0.05)
    with pytest.raises(NotCached, match=r"by .*:mlp in .* Run: mlfusion extract --model .*:mlp --dataset"):
        mlfusion.load_features(f"{model}:mlp", images, "train")


@pytest.mark.long
def test_what_needs_a_token_that_the_model_lacks_is_refused_with_the_alternatives(images, tmp_path):
    siglip = str(zoo.save("SigLIP", tmp_path / "siglip"))
    with pytest.raises(BadModel, match=r"siglip has no cls token; allowed: ap, max.* --tokens ap, .* ap-last/linear"):
        mlfusion.extract(siglip, images)
    assert not list(FeatureStore(None).entries())  # refused before anything was written
    mlfusion.extract(siglip, images, tokens="ap,grid2@last")
    with pytest.raises(BadModel, match=r"has no cls token; allowed: ap, .*ap-all-layers/attentive"):
        mlfusion.probe(images, model=siglip, probes="cls-last/linear")
    probes = "ap-last/linear,ap+grid2-last/attentive"
    done = mlfusion.probe(images, model=siglip, probes=f"all,{probes}", grid="quick", seeds=(0,))
    assert [row.probe for row in done.rows] == probes.split(",")
    assert all("is left out" in line for line in done.left_out)
    assert any("has no cls token" in line for line in done.left_out)
    assert done.rows[1].attention.kinds == ("ap", *["grid2"] * 4)


@pytest.mark.slow
def test_how_tokens_are_made_is_in_the_key_and_views_are_entries_of_their_own(model, images, tmp_path):
    done = mlfusion.extract(model, images, splits="train", layers="4", tokens="all", views="3")
    assert [one.view for one in done] == ["plain", "flip", "crop1"]
    others = [
        {"preprocess": "fast"},
        {"preprocess": "paper"},
        {"size": 40},
        {"compute": "bfloat16"},
        {"views": ("crop1",), "view_seed": 1},
    ]
    done += [mlfusion.extract(model, images, splits="train", layers="4", tokens="all", **each)[0] for each in others]
    assert len({one.entry.key for one in done}) == len(done)
    again = mlfusion.extract(model, images, splits="train", layers="4", tokens="all", views="3")
    assert total(again, "forward_passes") == 0
    # What is read without a word is what the model's own preprocessing shows, though views were extracted later.
    read = mlfusion.load_features(model, images, "train", layers="last", tokens="all", view="crop1")
    assert read.key in (done[2].entry.key, done[-1].entry.key)
    plain = {one.entry.key for one in done if one.entry.spec.model.view == "plain"}
    assert mlfusion.load_features(model, images, "train", layers="last", tokens="all").key in plain
    with pytest.raises(NotCached, match=r"cached of the views crop1, flip, plain, not of crop9; run: .* --views crop9"):
        mlfusion.load_features(model, images, "train", view="crop9")


def test_a_flipped_view_is_the_flipped_image(model, images, tmp_path):
    flipped = Path(shutil.copytree(images, tmp_path / "flipped"))
    for path in flipped.glob("train/*/*.png"):
        PIL.ImageOps.mirror(PIL.Image.open(path)).save(path)
    size = {"size": 32, "views": ("flip",)}
    [view] = mlfusion.extract(model, images, splits="train", **size)
    [own] = mlfusion.extract(model, str(flipped), splits="train")
    a, b = (one.entry.read([1, 4], ["cls", "ap"]).astype(float) for one in (view, own))
    assert np.abs(a - b).max() < 0.1 * np.abs(b).std()  # a level here and there, where a filter rounds


def test_every_run_says_what_made_it(model, images):
    [one] = mlfusion.extract(model, images, splits="train", batch_size=4, workers=1)
    [file] = one.entry.path.glob("runs/*.json")
    run = json.loads(file.read_text())
    assert {"python", "mlfusion", "torch", "transformers", "numpy", "pillow"} <= run["versions"].keys()
    assert (run["device"], run["compute"], run["batch_size"]) == ("cpu", "float32", 4)
    assert run["device_name"]
    assert run["images"] == 21
    assert run["forward_passes"] == 6
    assert run["parts"].keys() == {"decoding", "forward", "writing"}
    for part in run["parts"].values():
        assert part["seconds"] > 0
        assert part["images_per_second"] > 0
    assert run["bottleneck"] == one.bottleneck != ""
    assert one.to_json()["images_per_second"] == run["images_per_second"]


@pytest.mark.long
def test_what_is_kept_does_not_grow_with_the_images(model, tmp_path):
    """The loop over many images holds no more tensors than over few: of pictures, tokens and what waits to be written."""
    import gc

    held = []
    for count in (20, 80):
        data = str(save_images(tmp_path / str(count), {"train": count, "test": 1}))
        most = 0
        call = Backbone.__call__

        def counting(self, pixels, pairs, call=call):
            nonlocal most
            alive = sum(each.nbytes for each in gc.get_objects() if type(each) is torch.Tensor)
            most = max(most, alive)
            return call(self, pixels, pairs)

        Backbone.__call__ = counting
        try:
            mlfusion.extract(model, data, splits="train", tokens="all", layers="4", batch_size=4)
        finally:
            Backbone.__call__ = call
        held.append(most)
    assert held[1] < 1.1 * held[0]


def test_the_projected_last_layer_is_narrower_and_padded_with_zeros(images, tmp_path):
    """As the study's code has it: 24 of 32 channels, then zeros, beside layers that are what they were."""
    clip = str(zoo.save("CLIP", tmp_path / "clip"))
    for word in (clip, f"{clip}:projected"):
        mlfusion.extract(word, images, splits="train", tokens="cls", dtype="float32")
    plain, projected = (
        mlfusion.load_features(w, images, "train", tokens="cls").tokens for w in (clip, f"{clip}:projected")
    )
    assert projected.shape == plain.shape == (21, 3, 1, 32)
    np.testing.assert_array_equal(projected[:, :2], plain[:, :2])
    matrix = transformers.CLIPModel.from_pretrained(clip).visual_projection.weight.detach().numpy()
    np.testing.assert_allclose(projected[:, 2, :, :24], plain[:, 2] @ matrix.T, atol=2e-6)
    assert not projected[:, 2, :, 24:].any()


def test_a_copy_in_validation_is_not_said_to_be_left_out_by_an_option_of_test(model: str, tmp_path: Path) -> None:
    root = save_images(tmp_path / "set", {"train": 4, "val": 2, "test": 2})
    source = min((root / "train").rglob("*.*"))
    for split in ("val", "test"):
        shutil.copy(source, min((root / split).rglob("*.*")))
    told: list[str] = []
    run.extract(model, str(root), FeatureOptions(tokens="cls@last"), cache=tmp_path / "cache", log=told.append)
    lines = [line for line in told if "byte for byte" in line]
    assert len(lines) == 3  # train and test, train and validation, test and validation
    for line in lines:
        assert ("--drop-duplicates" in line) == (" test images of " in line and "in train too" in line), line
