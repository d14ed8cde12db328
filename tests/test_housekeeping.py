"""Looking after the cache: every flipped byte is found and mended, nothing in use is removed, copies are the same bits."""

import json
import os
import shutil
import sys
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from test_store import NAMES, PAIRS, fill, new_entry, small_shards  # noqa: F401 - the fixture makes shards small here too
from tiny import save_images, save_model
from workers import RUN

from mlfusion import cli, load_features
from mlfusion.errors import CacheUnusable, MlfusionError, NotCached
from mlfusion.specs.definitions import build
from mlfusion.specs.selection import CopyOptions, EntryFilter, PruneOptions
from mlfusion.store import FeatureStore
from mlfusion.store.housekeeping import (
    PruneResult,
    copy_entries,
    copy_entry,
    disk_usage,
    entry_paths,
    list_entries,
    prune,
    remove_entry,
)
from mlfusion.store.leases import Leases
from mlfusion.store.verify import repair_entry, verify, verify_entry
from mlfusion.system import disk
from mlfusion.system.tree import Tree


def everything(entry) -> np.ndarray:
    return entry.read([1, 2, 3], ["cls", "ap"])


def tree(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


@pytest.mark.parametrize("format", ["zarr", "hdf5"])
def test_a_flipped_byte_of_any_file_is_found_and_mended(format, tmp_path):
    """One byte of every file, first, last and somewhere: verify names it, repair and writing it again restore all."""
    entry = new_entry(tmp_path / "cache")
    written = fill(entry, format)
    whole = everything(entry)
    entry.record_run(RUN)
    sound = tree(entry.path)
    assert not list(verify_entry(entry.path))
    random = np.random.default_rng(0)
    for name, data in sound.items():
        for at in {0, len(data) - 1, int(random.integers(len(data)))}:
            file = entry.path / name
            bad = bytearray(data)
            bad[at] ^= 1 << int(random.integers(8))
            file.write_bytes(bad)
            found = list(verify_entry(entry.path))
            assert found, (name, at)
            assert all(damage.path == entry.path or damage.path.name in name for damage in found)
            with suppress(MlfusionError):  # a read gives what was written or an error, never anything else
                np.testing.assert_array_equal(everything(FeatureStore(tmp_path / "cache").by_key(entry.key)), whole)
            moved = repair_entry(tmp_path / "cache", entry.path, found)
            assert moved
            again = new_entry(tmp_path / "cache")  # what the next extraction does: records first, then missing shards
            made = 0
            for stream in again.streams():
                for shard in again.missing_shards(stream):
                    made += 1
                    rows = stream.rows(shard)
                    with again.draft(stream, shard) as draft:
                        draft.append(written[stream.name][rows.start : rows.stop])
                        draft.publish()
            again.seal()
            assert made <= 1  # only that again
            if not name.startswith(("names", "runs")):
                assert (
                    tree(entry.path).items()
                    >= {k: v for k, v in sound.items() if k[:4] not in ("name", "runs")}.items()
                )
            for (
                path,
                text,
            ) in sound.items():  # names and provenance are not made again: put them back for the next round
                (entry.path / path).write_bytes(text)
            np.testing.assert_array_equal(everything(again), whole)
    assert not list(verify_entry(entry.path))


def test_verify_names_layers_and_rows(tmp_path):
    entry = new_entry(tmp_path / "cache")
    fill(entry, "zarr")
    [stream] = entry.streams()
    shard = entry.folder(stream) / "c" / "1" / "0/0/0"
    data = bytearray(shard.read_bytes())
    record = entry.record(stream, 1)
    data[int(record.table("offsets")[1, 2, 0])] ^= (
        1  # second block of four rows of the second shard of eight, third layer
    )
    shard.write_bytes(data)
    [found] = verify_entry(entry.path)
    assert "layers 3 of rows 12-15" in found.why


@pytest.mark.parametrize("target", ["zarr", "hdf5"])
@pytest.mark.parametrize("source", ["zarr", "hdf5"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "int8"])
def test_a_copy_is_the_same_bits(source, target, dtype, tmp_path):
    entry = new_entry(tmp_path / "one", dtype=dtype)
    fill(entry, source)
    there = FeatureStore(tmp_path / "two").create(entry.spec, entry.samples, NAMES)
    assert copy_entry(entry, there, format=target) == entry.nbytes()
    np.testing.assert_array_equal(everything(there), everything(entry))
    assert {stream.format for stream in there.streams()} == {target}
    assert not list(verify_entry(there.path))
    if source == target:
        mine, its = tree(entry.path / "tokens"), tree(there.path / "tokens")
        assert mine == its
    assert copy_entry(entry, there, format=target) == 0  # it is there
    back = FeatureStore(tmp_path / "three").create(entry.spec, entry.samples, NAMES)
    copy_entry(there, back, format=source)
    assert tree(back.path / "tokens") == tree(entry.path / "tokens")


def test_a_damaged_chunk_is_not_copied(tmp_path):
    entry = new_entry(tmp_path / "one")
    fill(entry, "zarr")
    [stream] = entry.streams()
    shard = entry.folder(stream) / "c" / "0" / "0/0/0"
    data = bytearray(shard.read_bytes())
    data[5] ^= 1
    shard.write_bytes(data)
    there = FeatureStore(tmp_path / "two").create(entry.spec, entry.samples, NAMES)
    with pytest.raises(CacheUnusable, match="checksum"):
        copy_entry(entry, there)
    assert there.missing_shards(stream) == [0, 1, 2]
    assert not list(there.path.rglob(f"{disk.DRAFT}*"))


def pruned(cache, *, needed=None, **criteria) -> PruneResult:
    return prune(build(PruneOptions, criteria), cache, needed=needed)


def decisions(store: FeatureStore, **criteria) -> dict[int, bool]:
    """Whether it goes, by the number of images that tells the entries of these tests apart."""
    images = {entry.key: entry.spec.data.images for entry in store.own_entries()}
    return {images[each.key]: each.removed for each in pruned([store.root], dry_run=True, **criteria).decisions}


def test_what_the_commands_do_is_done_by_functions(tmp_path):
    """One each, with plain arguments; the results say what the commands print."""
    one, two = tmp_path / "one", tmp_path / "two"
    entry = new_entry(one)
    fill(entry, "zarr")
    [(copied, nbytes)] = copy_entries(one, two, build(CopyOptions, {"model": "m", "format": "hdf5"}))
    assert (copied.key, nbytes) == (entry.key, entry.nbytes())
    [listed] = list_entries(two).entries
    assert (listed.tokens, listed.bytes, listed.skipped) == ("cls+ap@1-3", entry.nbytes(), 0)
    assert entry_paths(two) == [two]
    assert entry_paths(two, EntryFilter(dataset="d")) == [copied.path]
    files = tree(two / "v3")
    assert disk_usage(two).entries == {("m", "d"): sum(map(len, files.values()))}
    assert verify(two).to_json() == {"entries": 1, "damaged": [], "unread": [], "quarantined": []}
    [shard, *_] = two.rglob("tokens.h5")
    shard.write_bytes(shard.read_bytes()[:-1])
    assert [damage.path for damage in verify(two).damaged] == [shard.parent]
    assert len(verify(two, repair=True).quarantined) == 2  # the shard with its record, and the manifest
    with pytest.raises(MlfusionError, match="name at least one of --model"):
        pruned(two)
    assert [each.removed for each in pruned(two, size=0, needed={entry.key}).decisions] == [False]
    assert pruned(two, size=0, dry_run=True).bytes_freed > 0
    assert [each.removed for each in pruned(two, size=0).decisions] == [True]
    assert list_entries(two).entries == ()
    with pytest.raises(CacheUnusable, match="there is no cache at"):
        copy_entries(tmp_path / "three", two)


def test_what_goes_by_age_size_and_need(tmp_path):
    store = FeatureStore(tmp_path)
    for images, days in ((9, 10), (17, 5), (25, 1)):
        entry = new_entry(tmp_path, images)
        fill(entry, "zarr")
        then = time.time() - days * 86400
        for path in (entry.path / "names", *(path for path in entry.path.rglob("*") if path.is_file())):
            os.utime(path, (then, then))
    assert decisions(store, older=3 * 86400) == {9: True, 17: True, 25: False}
    sizes = {entry.spec.data.images: entry.size() for entry in store.own_entries()}
    assert decisions(store, size=sizes[25] + sizes[17]) == {9: True, 17: False, 25: False}
    assert decisions(store, size=sizes[25]) == {9: True, 17: True, 25: False}
    assert decisions(store, size=sum(sizes.values())) == dict.fromkeys(sizes, False)
    assert decisions(store, needed={new_entry(tmp_path, 9).key}) == {9: False, 17: True, 25: True}
    new_entry(tmp_path, 9).read([1], ["cls"])  # reading is use
    assert decisions(store, older=3 * 86400) == {9: False, 17: True, 25: False}


def test_a_reader_keeps_its_entry(tmp_path):
    entry = new_entry(tmp_path)
    fill(entry, "zarr")
    whole = everything(entry)
    with entry.open([1, 2, 3], ["cls", "ap"]) as reader:
        assert decisions(FeatureStore(tmp_path), older=0) == {19: False}
        assert remove_entry(tmp_path, entry.path) == "it is being read"  # a reader that came after the decision
        np.testing.assert_array_equal(reader.read(), whole)
        np.testing.assert_array_equal(reader[np.arange(19)], whole)
    assert not list((tmp_path / "trash").iterdir())
    assert remove_entry(tmp_path, entry.path) == ""
    assert FeatureStore(tmp_path).by_key(entry.key) is None
    with pytest.raises(NotCached):
        entry.open([1], ["cls"]).read()


def test_an_extraction_keeps_its_entry(tmp_path):
    entry = new_entry(tmp_path)
    leases = Leases(entry.tree, f"{entry.at}/leases")
    assert leases.take(["cls~0"])
    assert remove_entry(tmp_path, entry.path) == "it is being extracted"
    leases.release()
    assert remove_entry(tmp_path, entry.path) == ""


@pytest.fixture(scope="module")
def words(tmp_path_factory) -> list[str]:
    model = save_model("vit", tmp_path_factory.mktemp("model") / "tiny-vit")
    images = save_images(tmp_path_factory.mktemp("data") / "colours", {"train": 4, "test": 2})
    return ["--model", str(model), "--dataset", str(images)]


@pytest.fixture
def run(monkeypatch, capfd):
    def call(*said: str, code: int = 0):
        monkeypatch.setattr(sys, "argv", ["mlfusion", *said])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        out, err = capfd.readouterr()
        assert (ended.value.code or 0) == code, err
        return json.loads(out) if "--json" in said else out + err

    return call


def test_the_commands(run, words, tmp_path):
    run("extract", *words)
    rows = sorted(run("cache", "ls", "--json")["entries"], key=lambda row: row["split"])
    assert [(row["split"], row["images"], row["tokens"]) for row in rows] == [
        ("test", 6, "cls+ap@1-4"),
        ("train", 12, "cls+ap@1-4"),
    ]
    assert run("cache", "du", "--json")["bytes"] == sum(
        f.stat().st_size for f in (tmp_path / "cache" / "v3").rglob("*") if f.is_file()
    )
    assert run("cache", "path", "--json")["paths"] == [str(tmp_path / "cache")]
    paths = run("cache", "path", *words, "--split", "train", "--json")["paths"]
    assert [Path(path).name for path in paths] == [row["key"] for row in rows if row["split"] == "train"]
    assert run("cache", "verify", "--json") == {"entries": 2, "damaged": [], "unread": [], "quarantined": []}
    assert run("cache", "export", str(tmp_path / "copy"), "--format", "hdf5", "--json")["entries"]
    assert {row["key"] for row in run("cache", "ls", "--cache", "copy", "--json")["entries"]} == {
        row["key"] for row in rows
    }
    assert "removed" in run("cache", "prune", *words)
    assert run("cache", "ls", "--json")["entries"] == []
    assert run("cache", "import", "copy", "--json")["entries"]
    again = run("extract", *words, "--json")["features"]
    assert sum(one["forward_passes"] for one in again) == 0
    # one shard damaged: found, taken out, and only it is made again
    [shard, *_] = (tmp_path / "cache" / "v3").rglob("*.h5")
    data = bytearray(shard.read_bytes())
    data[-1] ^= 255
    shard.write_bytes(data)
    said = run("cache", "verify", code=1)
    assert str(shard.parent.relative_to(tmp_path)) in said
    assert "--repair" in said
    assert run("cache", "verify", "--repair", "--json")["quarantined"]
    again = run("extract", *words, "--json")["features"]
    assert sorted(one["images_written"] > 0 for one in again) == [False, True]
    assert run("cache", "verify", "--json")["damaged"] == []


@pytest.mark.parametrize("file", ["entry.json", "manifest.json", "stream.json"])
def test_a_damaged_entry_hides_no_other(file, run, words, tmp_path):
    """It is told of with what to do; the others are listed, read and extracted as ever, and a repair lists it again."""
    run("extract", *words)
    rows = run("cache", "ls", "--json")["entries"]
    [train] = (row["key"] for row in rows if row["split"] == "train")
    [path] = (tmp_path / "cache" / "v3" / train).rglob(file)
    path.write_bytes(path.read_bytes().replace(b"a", b"b", 1))
    said = run("cache", "ls", "--json")
    assert [row["split"] for row in said["entries"]] == ["test"]
    [why] = said["damaged"]
    assert str(path.relative_to(tmp_path)) in why
    assert "cache verify --repair" in why
    listed = run("cache", "ls")
    assert str(path.relative_to(tmp_path)) in listed
    assert "test" in listed
    assert len(load_features(words[1], words[3], "test").labels) == 6
    with pytest.raises(MlfusionError):
        load_features(words[1], words[3], "train")
    run("extract", *words, "--split", "test")
    run("cache", "verify", "--repair")
    run("extract", *words)
    assert run("cache", "ls", "--json") == {"entries": rows, "damaged": []}


@pytest.mark.slow
def test_prune_says_first_and_asks_what(run, words):
    run("extract", *words)
    told = run("cache", "prune", "--older", "0h", "--dry-run", "--json")
    assert [one["removed"] for one in told["entries"]] == [True, True]
    assert told["bytes_freed"] > 0
    assert len(run("cache", "ls", "--json")["entries"]) == 2
    assert "at least one of" in run("cache", "prune", code=1)
    assert "--size many: allowed is a number" in run("cache", "prune", "--size", "many", code=1)
    run("probe", "--dataset", words[3], "--grid", "quick", "--seeds", "0", "--probe", "cls-last/linear")
    assert run("cache", "prune", "--unneeded", "results", "--json")["bytes_freed"] == 0


def test_explain_says_what_differs(run, words, tmp_path):
    run("extract", *words, "--split", "train")
    same = run("cache", "explain", *words, "--split", "train", "--json")["splits"]
    assert [(one["state"], one["lacking"]) for one in same] == [("whole", "")]
    more = run("cache", "explain", *words, "--split", "train", "--tokens", "cls,all@last", "--json")["splits"]
    assert [(one["state"], one["lacking"]) for one in more] == [("partial", "all@4")]
    model, data = tmp_path / "model", tmp_path / "data"
    shutil.copytree(words[1], model)
    shutil.copytree(words[3], data)
    settings = json.loads((model / "preprocessor_config.json").read_text())
    settings["image_std"] = [0.5, 0.5, 0.5]
    (model / "preprocessor_config.json").write_text(json.dumps(settings))
    first = sorted((data / "train" / "blue").iterdir())[0]
    first.unlink()
    told = run(
        "cache",
        "explain",
        "--model",
        str(model),
        "--dataset",
        str(data),
        "--split",
        "train",
        "--dtype",
        "int8",
        "--json",
    )
    [one] = told["splits"]
    assert one["state"] == "absent"
    fields = {difference["field"]: difference for difference in one["differences"]}
    assert set(fields) == {"model.preprocess.image_std", "data.content", "data.images", "dtype"}
    assert "[0.5, 0.5, 0.5]" in fields["model.preprocess.image_std"]["asked"]
    assert fields["data.content"]["asked"].startswith("1 gone")
    assert first.name in fields["data.content"]["asked"]


def test_a_plan_is_what_then_happens(run, words, tmp_path):
    planned = run("plan", *words, "--trial", "0.1", "--json")
    assert planned["fits"]
    assert planned["images_per_second"] > 0
    assert not (tmp_path / "cache").exists()
    done = run("extract", *words, "--json")["features"]
    assert [split["forward_passes"] for split in planned["splits"]] == [one["forward_passes"] for one in done]
    stored = sum(entry["bytes"] for entry in run("cache", "ls", "--json")["entries"])
    assert planned["bytes_to_write"] == stored
    again = run("plan", *words, "--json")
    assert again["bytes_to_write"] == again["seconds"] == 0
    assert [s["forward_passes_saved"] for s in again["splits"]] == [s["forward_passes"] for s in planned["splits"]]


def test_a_labs_cache_below_ones_own(run, words, tmp_path):
    """What the lab has is read and never written; what is lacking goes into one's own; both together are one cache."""
    run("extract", *words, "--layers", "4", "--cache", "lab")
    lab = tree(tmp_path / "lab")
    both = f"mine{os.pathsep}lab"
    done = run("extract", *words, "--layers", "4", "--cache", both, "--json")["features"]
    assert [one["forward_passes"] for one in done] == [0, 0]
    assert not (tmp_path / "mine").exists()  # nothing was lacking
    planned = run("plan", *words, "--layers", "3,4", "--trial", "0.1", "--cache", both, "--json")
    done = run("extract", *words, "--layers", "3,4", "--cache", both, "--json")["features"]
    assert [each["forward_passes"] for each in planned["splits"]] == [each["forward_passes"] for each in done]
    assert run("cache", "ls", "--cache", "mine", "--json")["entries"][0]["tokens"].endswith("@3")
    rows = run("cache", "ls", "--cache", both, "--json")["entries"]
    assert {row["tokens"] for row in rows} == {"cls+ap@3-4"}
    one = run("cache", "explain", *words, "--layers", "3,4", "--cache", both, "--json")["splits"]
    assert [each["state"] for each in one] == ["whole", "whole"]
    features = load_features(words[1], words[3], "train", layers="3,4", cache=both)
    alone = load_features(words[1], words[3], "train", layers="4", cache="lab")
    np.testing.assert_array_equal(features.tokens[:, 1], alone.tokens[:, 0])
    run("cache", "prune", "--older", "0h", "--cache", both)  # one's own goes
    assert run("cache", "ls", "--cache", "mine", "--json")["entries"] == []
    now = tree(tmp_path / "lab")
    assert {name: data for name, data in now.items() if "/pins/" not in name} == lab
    [shard, *_] = (tmp_path / "lab" / "v3").rglob("0/0/0/0")
    shard.write_bytes(shard.read_bytes()[::-1])
    assert str(shard.parent.parent.parent.parent.name) in run("cache", "verify", "--cache", both, code=1)
    assert run("cache", "verify", "--repair", "--cache", both, "--json", code=1)["quarantined"] == []  # it is the lab's
    assert "which was named as one to read from" in run("cache", "ls", "--cache", f"mine{os.pathsep}nowhere", code=1)


def test_prune_says_yes_or_no(run, words):
    run("extract", *words)
    told = run("cache", "prune", "--older", "0h", "--dry-run")
    assert "would remove 2 of 2 entries" in told
    assert [line.split()[5] for line in told.splitlines()[1:3]] == ["yes", "yes"]


def test_thousands_of_entries_are_listed_by_reading_each_once(tmp_path, monkeypatch):
    """A file of an entry is opened once for a listing, however many are asked for: the time is that of as many opens."""
    for images in range(1, 41):
        fill(new_entry(tmp_path, images), "zarr", {(1, "cls")})
    opened: list[str] = []
    read = Tree.read_at
    monkeypatch.setattr(
        Tree, "read_at", lambda tree, path, most: (opened.append(f"{tree.root}/{path}"), read(tree, path, most))[1]
    )
    assert len(FeatureStore(tmp_path).find(model="m", dataset="d")) == 40
    assert max(map(opened.count, opened)) == 1
    assert len(opened) <= 3 * 40
