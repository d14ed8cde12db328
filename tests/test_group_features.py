"""Groups in the cache: beside the samples, under the names that refer to them; features of the same images are reused."""

import json
from pathlib import Path

import pytest
from test_groups import cases, rows_of, table
from tiny import save_model

import mlfusion
from mlfusion.errors import CacheUnusable, NotCached
from mlfusion.specs.identity import digest
from mlfusion.specs.selection import CopyOptions
from mlfusion.store import Entry, FeatureStore, Groups, Names
from mlfusion.store.features import split_pairs
from mlfusion.store.housekeeping import copy_entries
from mlfusion.store.records import names_file
from mlfusion.store.verify import verify


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Scans with a split by patient."""
    rows = [row | {"split": "test" if row["patient"] > "p5" else "train"} for row in rows_of()]
    return table(tmp_path_factory.mktemp("data"), rows)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_model("vit", tmp_path_factory.mktemp("m") / "m"))


def patients(entry: Entry) -> list[str]:
    of = {f"{name}.png": who for name, _, who in cases()}
    return [of[name] for name in entry.samples.ids]


def groups_of(entry: Entry) -> list[str] | None:
    found = entry.groups(entry.names()[-1])
    return found and list(found.names)


def test_the_same_images_with_groups_are_the_same_features(place: str, model: str, tmp_path: Path) -> None:
    plain = mlfusion.extract(model, place, label_column="label", cache=tmp_path)
    [pair] = split_pairs(FeatureStore(tmp_path), place, model)
    assert pair.names[0].groups == pair.names[1].groups == "" and not list(tmp_path.glob("v3/*/groups-*"))
    grouped = mlfusion.extract(model, place, label_column="label", group_column="patient", cache=tmp_path)
    assert [one.entry.key for one in grouped] == [one.entry.key for one in plain]
    assert [one.images_written for one in grouped] == [0, 0]
    [pair] = split_pairs(FeatureStore(tmp_path), place, model)
    for entry, names in zip((pair.train, pair.test), pair.names, strict=True):
        assert groups_of(entry) == patients(entry)
        assert names.grouped_by == "patient" and names.groups == digest(patients(entry))
        assert names.options[-2:] == ("--group-column", "patient")
        [file] = entry.path.glob("groups-*")
        assert json.loads(file.read_bytes()) == patients(entry)
    assert pair.names[0].reading != pair.train.names()[0].reading
    assert verify(tmp_path).damaged == ()


def test_train_with_groups_and_test_without_are_no_pair(place: str, model: str, tmp_path: Path) -> None:
    mlfusion.extract(model, place, label_column="label", cache=tmp_path)
    mlfusion.extract(model, place, label_column="label", group_column="patient", splits="train", cache=tmp_path)
    with pytest.raises(NotCached, match=r"from another reading .*--group-column patient"):
        split_pairs(FeatureStore(tmp_path), place, model)


def test_damaged_or_missing_groups_are_found_and_written_again(place: str, model: str, tmp_path: Path) -> None:
    def extract() -> list[Entry]:
        found = mlfusion.extract(model, place, label_column="label", group_column="patient", cache=tmp_path)
        assert [one.forward_passes for one in found] in ([0, 0], [1, 1])
        return [one.entry for one in found]

    entry = extract()[0]
    [file] = entry.path.glob("groups-*")
    for content in (b"[", json.dumps(["p"] * 18).encode(), json.dumps(patients(entry)[:-1]).encode(), b"[1]"):
        file.write_bytes(content)
        with pytest.raises(CacheUnusable, match="is damaged"):
            entry.groups(entry.names()[-1])
        [damage] = verify(tmp_path).damaged
        assert damage.path == file and not damage.repairable
        assert len(verify(tmp_path, repair=True).quarantined) == 1 and not file.exists()
        [damage] = verify(tmp_path).damaged
        assert damage.path == file and damage.why == "it is not there"
        with pytest.raises(CacheUnusable, match="it is not there"):
            entry.groups(entry.names()[-1])
        assert groups_of(extract()[0]) == patients(entry)
        assert verify(tmp_path).damaged == ()


def test_a_copy_and_a_layer_below_have_the_groups(place: str, model: str, tmp_path: Path) -> None:
    shared, mine, copied = tmp_path / "shared", tmp_path / "mine", tmp_path / "copy"
    mlfusion.extract(model, place, label_column="label", cache=shared)
    mlfusion.extract(model, place, label_column="label", group_column="patient", cache=shared)
    copy_entries(shared, copied, CopyOptions())
    for entry in FeatureStore(copied).entries():
        assert groups_of(entry) == patients(entry) and entry.groups(entry.names()[0]) is None
    assert verify(copied).damaged == ()
    for entry in FeatureStore([mine, shared]).entries():
        assert groups_of(entry) == patients(entry)


def test_names_without_groups_are_stored_as_before() -> None:
    """The name of the file is the digest of the nine older fields, as caches of earlier versions have it."""
    names = Names(model="m", model_source="s", dataset="d", dataset_source="t", options=("--size", "32"), reading="r")
    assert names_file(names) == digest(["m", "s", "d", "t", "", "", "", ["--size", "32"], "r"]) + ".json"
    with_groups = Names(model="m", model_source="s", dataset="d", dataset_source="t", groups=Groups(("a",)).digest)
    assert names_file(with_groups) != names_file(Names(model="m", model_source="s", dataset="d", dataset_source="t"))
