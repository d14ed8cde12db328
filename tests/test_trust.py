"""What a stranger puts into a cache leads nowhere, what is wrong is one sentence, and users of one cache spare each other."""

import errno
import json
import os
import shutil
import socket
import stat
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import workers
from sealed import read_json, sealed
from test_store import MODEL, NAMES, SHAPES, fill, new_entry, small_shards  # noqa: F401 - the fixture makes shards small here too
from tiny import save_images, save_model
from workers import Child

import mlfusion
from mlfusion.errors import CacheUnread, CacheUnusable, MlfusionError, printable
from mlfusion.specs.definitions import build
from mlfusion.specs.identity import digest
from mlfusion.specs.selection import PruneOptions
from mlfusion.store import Entry, FeatureStore, Gap, records, streams_for
from mlfusion.store.entry import zarr_group
from mlfusion.store.housekeeping import copy_entries, disk_usage, list_entries, prune, remove_entry
from mlfusion.store.leases import Leases
from mlfusion.store.verify import verify
from mlfusion.system import disk
from mlfusion.workflows.sampling import compare_sample

STREAM = "tokens/cls.ap.L1-3"


@pytest.fixture(autouse=True)
def no_flushes(monkeypatch: pytest.MonkeyPatch) -> None:
    """No power is lost here, and a flush takes most of a small cache's time."""
    monkeypatch.setattr(os, "fsync", lambda _: None)


@pytest.fixture
def entry(tmp_path: Path) -> Entry:
    """An entry of a cache that lies beside the folder of a victim."""
    entry = new_entry(tmp_path / "cache")
    fill(entry, "zarr")
    victim = tmp_path / "victim"
    for folder in (f"{entry.key}~12345678", entry.key, "runs"):
        (victim / folder).mkdir(parents=True)
        (victim / folder / "kept.json").write_text("{}")
    (victim / "old.txt").write_text("a letter")
    os.utime(victim / "old.txt", (1, 1))
    return entry


def tree(folder: Path) -> dict[str, bytes | None]:
    return {str(path): path.read_bytes() if path.is_file() else None for path in sorted(folder.rglob("*"))}


def everything(root: Path) -> list[str]:
    """Do all that reads, changes, mends and copies a cache; the sentences of what was refused."""
    said: list[str] = []

    def extraction() -> None:
        entry = new_entry(root)
        with Gap(entry, frozenset(SHAPES), said.append) as gap:
            for pieces in gap.rounds():
                list(pieces)
                raise CacheUnusable("a shard is missing")
        entry.sweep()

    acts: list[Callable[[], object]] = [
        lambda: said.extend(list_entries(root).damaged),
        lambda: disk_usage(root),
        lambda: said.extend(prune(build(PruneOptions, {"older": "9000d"}), root).damaged),
        lambda: [entry.read([1, 2, 3], ["cls", "ap"]) for entry in FeatureStore(root).entries(said.append)],
        lambda: copy_entries(root, root.with_name("copy")),
        extraction,
        lambda: said.extend(damage.why for damage in verify(root, repair=True).damaged),
        extraction,
        lambda: prune(build(PruneOptions, {"older": "0h"}), root),
    ]
    for act in acts:
        try:
            act()
        except MlfusionError as err:
            said.append(str(err))
    return said


PARTS = [
    "trash",
    "v3",
    "quarantine",
    "KEY",
    "KEY/entry.json",
    "KEY/ids.json",
    "KEY/labels.npy",
    "KEY/names",
    "KEY/runs",
]
PARTS += ["KEY/leases", "KEY/pins", "KEY/tokens", f"KEY/{STREAM}", f"KEY/{STREAM}/c", f"KEY/{STREAM}/c/1"]
PARTS += [f"KEY/{STREAM}/c/1/0", f"KEY/{STREAM}/c/1/0/0/0", f"KEY/{STREAM}/manifest.json", f"KEY/{STREAM}/stream.json"]
PARTS += ["KEY/names/x.json", "KEY/leases/cls.ap.L1-3~0", "KEY/leases/x", "KEY/pins/x", f"KEY/{STREAM}/zarr.json"]


def put_away(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@pytest.mark.parametrize("part", PARTS)
def test_a_link_leads_nowhere(part: str, entry: Entry, tmp_path: Path) -> None:
    """Whatever is replaced by a link to a victim's folder or file: nothing there is read, changed or deleted."""
    before = tree(tmp_path / "victim")
    for target in ("victim", "victim/old.txt"):
        kept = tmp_path / "kept"
        shutil.copytree(tmp_path / "cache", kept, symlinks=True)
        path = tmp_path / "cache" / part.replace("KEY", f"v3/{entry.key}")
        put_away(path)
        path.symlink_to(tmp_path / target)
        said = everything(tmp_path / "cache")
        assert tree(tmp_path / "victim") == before, target
        assert not (tmp_path / "nowhere").exists()
        assert part == "quarantine" or any("it is a link" in sentence for sentence in said), said
        shutil.rmtree(tmp_path / "cache")
        kept.rename(tmp_path / "cache")


@pytest.mark.parametrize("part", [part for part in PARTS if part not in ("trash", "quarantine")])
def test_what_is_neither_file_nor_folder_is_damage_and_nobody_waits_for_it(
    part: str, entry: Entry, tmp_path: Path
) -> None:
    path = tmp_path / "cache" / part.replace("KEY", f"v3/{entry.key}")
    put_away(path)
    os.mkfifo(path)
    assert any("it is a pipe" in sentence for sentence in everything(tmp_path / "cache"))


def test_a_socket_is_damage(entry: Entry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (entry.path / "ids.json").unlink()
    monkeypatch.chdir(entry.path)  # the path of a socket is short
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("ids.json")
        assert any("it is a socket" in sentence for sentence in everything(tmp_path / "cache"))


def test_repair_takes_the_link_itself(entry: Entry, tmp_path: Path) -> None:
    names = entry.path / "runs"
    shutil.rmtree(names)
    names.symlink_to(tmp_path / "victim")
    [moved] = verify(tmp_path / "cache", repair=True).quarantined
    assert moved.is_symlink()
    assert moved.is_relative_to(tmp_path / "cache" / "quarantine")
    new_entry(tmp_path / "cache")
    assert not verify(tmp_path / "cache").damaged


def test_prune_and_sweep_remove_only_what_mlfusion_names(entry: Entry, tmp_path: Path) -> None:
    """Strange files in the trash, in leases and among drafts stay, however old."""
    root = tmp_path / "cache"
    strange = [root / "trash" / "photos", entry.path / "leases" / "letter.txt", entry.path / f"{disk.DRAFT}mine"]
    strange += [entry.path / "pins" / "a~b", root / "v3" / "notes"]
    for path in strange:
        path.parent.mkdir(exist_ok=True)
        path.write_text("dear all")
        os.utime(path, (1, 1))
    (entry.path / "leases" / "bytes").write_bytes(b"\xff\xfe\x00")
    gone = root / "trash" / f"{entry.key}~0123abcd"
    gone.mkdir()
    new_entry(root)
    prune(build(PruneOptions, {"older": "9000d"}), root)
    verify(root, repair=True)
    assert all(path.read_text() == "dear all" for path in strange)
    assert not gone.exists()


def test_a_root_that_is_a_link_is_the_users_own_choice(entry: Entry, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "cache")
    assert not verify(tmp_path / "link").damaged
    assert [each.key for each in FeatureStore(tmp_path / "link").entries()] == [entry.key]


FORGED = [
    (f"{STREAM}/stream.json", {"kinds": ["../../../../planted", "ap"]}),
    (f"{STREAM}/stream.json", {"kinds": ["cls", "cls"]}),
    (f"{STREAM}/stream.json", {"kinds": ["ap", "cls"]}),
    (f"{STREAM}/stream.json", {"kinds": "a" * 1000}),
    (f"{STREAM}/stream.json", {"layers": [1, 2, 3, "x"]}),
    (f"{STREAM}/stream.json", {"layers": [1, 2, 4]}),
    (f"{STREAM}/stream.json", {"layers": [3, 2, 1]}),
    (f"{STREAM}/stream.json", {"layers": [True, 2, 3]}),
    (f"{STREAM}/stream.json", {"images": 5}),
    (f"{STREAM}/stream.json", {"images": 40}),
    (f"{STREAM}/stream.json", {"images": 10**13}),
    (f"{STREAM}/stream.json", {"dtype": "int8"}),
    (f"{STREAM}/stream.json", {"width": 8}),
    (f"{STREAM}/stream.json", {"shard_rows": 2**40}),
    (f"{STREAM}/stream.json", {"chunk_rows": 3}),
    (f"{STREAM}/manifest.json", {"skipped": 7}),
    (f"{STREAM}/manifest.json", {"skipped": {"1": 7}}),
    (f"{STREAM}/manifest.json", {"skipped": {"19": "x"}}),
    (f"{STREAM}/manifest.json", {"xxh3_128": ["x"] * 3}),
    ("entry.json", {"model": "x"}),
    ("entry.json", {"dtype": "float32"}),
    ("entry.json", {"more": 1}),
]


@pytest.mark.parametrize(("file", "change"), FORGED)
def test_forged_records_are_refused_by_readers_verify_and_import_alike(
    file: str, change: dict, entry: Entry, tmp_path: Path
) -> None:
    """In one sentence that names the file; the other entry is listed, read and copied as before."""
    other = new_entry(tmp_path / "cache", images=7)
    fill(other, "zarr")
    path = entry.path / file
    path.write_text(sealed({**read_json(path), **change}))
    listing = list_entries(tmp_path / "cache")
    assert [row.images for row in listing.entries] == [7]
    [sentence] = listing.damaged
    assert str(entry.path) in sentence and "is damaged" in sentence
    with pytest.raises(CacheUnusable, match="is damaged"):
        FeatureStore(tmp_path / "cache").by_key(entry.key).sources()
    assert any(damage.path.is_relative_to(entry.path) for damage in verify(tmp_path / "cache").damaged)
    before = set(tmp_path.iterdir())
    with pytest.raises(CacheUnusable) if file != "entry.json" else pytest.MonkeyPatch.context():
        copy_entries(tmp_path / "cache", tmp_path / "copy")
    assert set(tmp_path.iterdir()) - before <= {tmp_path / "copy"}


@pytest.mark.parametrize("images", [2, 18, 100, 10**12])
def test_an_entry_counts_its_images_as_its_ids(images: int, entry: Entry, tmp_path: Path) -> None:
    """Also where the forger renamed the folder to the new key, and described the group anew."""
    body = read_json(entry.path / "entry.json")
    body["data"]["images"] = images
    spec = msgspec.convert(body, type(entry.spec), str_keys=True)
    path = entry.path.rename(entry.path.with_name(spec.key))
    (path / "entry.json").unlink()
    (path / "entry.json").write_text(sealed(body))
    (path / "tokens" / "zarr.json").write_text(zarr_group(spec.key))
    assert verify(tmp_path / "cache").damaged
    with pytest.raises(CacheUnusable, match="damaged"):
        Entry(path).read([1], ["cls"])
    with pytest.raises(CacheUnusable, match="damaged"):
        Entry(path).rows()


@pytest.mark.parametrize("change", [{"depth": 2}, {"depth": 4}, {"depth": 10**9}, {"width": 5}, {"view": "crop1"}])
def test_depth_width_and_view_are_those_of_the_key(change: dict, entry: Entry) -> None:
    body = read_json(entry.path / "entry.json")
    body["model"] |= change
    (entry.path / "entry.json").write_text(sealed(body))
    with pytest.raises(CacheUnusable, match=r"entry\.json is damaged"):
        Entry(entry.path)


def random_json(random: np.random.Generator, depth: int) -> str:
    """Random JSON whose keys and texts hold colons, escapes and spaces; some keys occur twice."""

    def pick(*choices: str) -> str:
        return choices[int(random.integers(len(choices)))]

    inner = [random_json(random, depth - 1) for _ in range(int(random.integers(4)))] if depth else []
    match int(random.integers(3)):
        case 0 if inner:
            return f"[{','.join(inner)}]"
        case 1 if inner:
            keys = ('"a"', '"b"', '":"', '"\\u0061"', '"\\u003a"', '"a:"')
            return "{" + ",".join(f"{pick(*keys)}{pick('', ' ')}:{value}" for value in inner) + "}"
    return pick("1", "null", '"x"', '":"', '"a:b:"', '"\\u003a"', '"\\\\u:"', '"\\":"', '"{"', "{}")


def keys_occur_once(text: str) -> bool:
    """Python's own reader, key by key."""
    repeated: list[int] = []
    json.loads(text, object_pairs_hook=lambda pairs: repeated.append(len(pairs) - len(dict(pairs))))
    return not any(repeated)


def test_every_key_that_occurs_twice_is_found() -> None:
    random = np.random.default_rng(0)
    texts = [random_json(random, 4) for _ in range(3000)]
    once = [keys_occur_once(text) for text in texts]
    assert 100 < sum(once) < 2900
    for text, valid in zip(texts + [text + " " * (1 << 13) for text in texts], once * 2, strict=True):
        with nullcontext() if valid else pytest.raises(ValueError, match="twice"):
            records.parse(text.encode(), Any)


@pytest.mark.parametrize(
    "text",
    [
        '{"a": 1, "a": 2}',
        '{"a": NaN}',
        '{"a": -Infinity}',
        '{"a": 1e999}',
        '{"a": ' + "9" * 5000 + "}",
        '{"a": ' + "[" * 100_000 + "]" * 100_000 + "}",
        '{"a": "\\ud800"}',
        '{"a": 1',
        '{"format": "two"}',
        "[]",
    ],
)
@pytest.mark.parametrize("file", ["entry.json", f"{STREAM}/stream.json", f"{STREAM}/manifest.json", "names"])
def test_text_that_is_no_record_is_damage(text: str, file: str, entry: Entry, tmp_path: Path) -> None:
    path = next((entry.path / "names").iterdir()) if file == "names" else entry.path / file
    path.write_text(disk.sealed(text))
    assert verify(tmp_path / "cache").damaged
    with pytest.raises(CacheUnusable, match="is damaged"):
        _ = Entry(entry.path).sources(), Entry(entry.path).names()


@pytest.mark.parametrize(
    "file", ["entry.json", f"{STREAM}/manifest.json", f"{STREAM}/c/0/0/0/0", "ids.json", "leases/x"]
)
def test_a_file_of_a_terabyte_of_holes_takes_no_memory(file: str, entry: Entry, tmp_path: Path) -> None:
    with open(entry.path / file, "ab") as grown:
        grown.truncate(1 << 40)
    with pytest.raises(CacheUnusable, match=r"bytes; the most is|size is not the manifest's|do not match"):
        use(new_entry(tmp_path / "cache"))


@pytest.mark.parametrize("format", ["zarr", "hdf5"])
def test_a_shard_of_holes_is_refused_though_its_records_agree(format: str, tmp_path: Path) -> None:
    """Else `verify` reads a terabyte of nothing."""
    entry = new_entry(tmp_path / "cache")
    fill(entry, format)
    shard = next(
        path
        for path in (entry.path / STREAM / "c" / "0").rglob("*")
        if path.name in ("0", "tokens.h5") and path.is_file()
    )
    with open(shard, "ab") as file:
        file.truncate(1 << 40)
    for record in ("c/0/commit.json", "manifest.json"):
        body = read_json(entry.path / STREAM / record)
        (entry.path / STREAM / record).write_text(sealed(body | {"bytes": [1 << 40, *body["bytes"][1:]]}))
    assert verify(tmp_path / "cache").damaged
    with pytest.raises(CacheUnusable, match="damaged"):
        entry.sources()


def use(entry: Entry) -> None:
    """Read all that an extraction and a probe read."""
    entry.read([1, 2, 3], ["cls", "ap"])
    leases = Leases(entry.tree, f"{entry.at}/leases")
    leases.take(["x"])


def test_a_marker_of_no_format_marks_no_cache(entry: Entry, tmp_path: Path) -> None:
    for body in ({"format": "two", "uuid": ""}, {"uuid": ""}, {"format": 3}, {"format": -1, "uuid": ""}):
        (tmp_path / "cache" / "mlfusion-cache.json").write_text(sealed(body))
        with pytest.raises(CacheUnusable, match="marks no cache that this mlfusion can read"):
            FeatureStore(tmp_path / "cache")


def test_an_extraction_that_gets_nowhere_ends(entry: Entry, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shards that belong to no row are missing, and nobody makes them."""
    [stream] = streams_for({(1, "max"): (1, 4)}, images=19, dtype="float16", format="zarr")
    monkeypatch.setattr(Entry, "missing", lambda *_: {stream: {99}})
    with Gap(entry, frozenset({(1, "max")}), lambda _: None) as gap:
        rounds = gap.rounds()
        assert not list(next(rounds))
        with pytest.raises(CacheUnusable, match="does not advance"):
            next(rounds)


def test_a_stream_of_other_sizes_than_the_models_is_not_filled(tmp_path: Path) -> None:
    entry = new_entry(tmp_path)
    entry.begin(streams_for({(1, "max"): (1, 8)}, images=19, dtype="float16", format="zarr"))
    with (
        pytest.raises(CacheUnusable, match="of width 8, the model has 1 of width 4"),
        FeatureStore(tmp_path).filling(entry.spec, entry.samples, NAMES, {(1, "max"): (1, 4)}),
    ):
        pass


def test_names_are_filed_under_what_they_hold(entry: Entry) -> None:
    [file] = (entry.path / "names").iterdir()
    first_nine = list(msgspec.structs.astuple(NAMES))[:9]  # what was added later counts only where it is given
    assert file.stem == digest(first_nine)
    file.rename(file.with_name("0123456789abcdef.json"))
    with pytest.raises(CacheUnusable, match="not named after what it holds"):
        entry.names()


def test_text_for_a_terminal_has_no_controls() -> None:
    assert printable("a\x1b]0;b\x07\u202ec\x9b\u2066d\ne\t") == "a\\x1b]0;b\\x07\\u202ec\\x9b\\u2066d\ne\t"
    assert printable("Überraschung 特徴量 🦆") == "Überraschung 特徴量 🦆"


def test_a_folder_that_cannot_be_renamed_is_removed_in_place(entry: Entry, tmp_path: Path, monkeypatch) -> None:
    """As in the lower layer of an overlay, which few machines let a test mount."""
    rename = os.rename

    def refuse(old: str, new: str, *, src_dir_fd: int | None = None, dst_dir_fd: int | None = None) -> None:
        if stat.S_ISDIR(os.lstat(old, dir_fd=src_dir_fd).st_mode) and not old.startswith(disk.DRAFT):
            raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))
        rename(old, new, src_dir_fd=src_dir_fd, dst_dir_fd=dst_dir_fd)

    monkeypatch.setattr(os, "rename", refuse)
    (entry.path / STREAM / "c" / "1" / "commit.json").write_text("x")
    moved = verify(tmp_path / "cache", repair=True).quarantined
    assert (next(path for path in moved if path.name == "1") / "0" / "0" / "0").is_file()
    assert not (entry.path / STREAM / "c" / "1").exists()
    assert remove_entry(tmp_path / "cache", entry.path) == ""
    assert not entry.path.exists()


def test_a_read_where_no_mark_can_be_left_counts_as_use(entry: Entry) -> None:
    for path in (entry.path / "names", *(path for path in entry.path.rglob("*") if path.is_file())):
        os.utime(path, (1000, 1000))
    assert entry.read_at() == 1000
    for shard, at in (("0", 4000), ("2", 5000)):
        os.utime(entry.path / STREAM / "c" / shard / "0" / "0" / "0", (at, 1000))
        assert entry.read_at() == at


# --- several users ----------------------------------------------------------------------------------------------------

ANNA, BERT, LAB = 4001, 4002, 4100


@pytest.fixture
def common(tmp_path: Path) -> Path:
    """A folder for a cache that all users can reach."""
    if os.geteuid() != 0:
        pytest.skip("needs root, to act as several users")
    for folder in (tmp_path, *tmp_path.parents):
        if folder.stat().st_uid == 0 and folder.name.startswith(("pytest", "test", "popen")):
            folder.chmod(0o755)
    root = tmp_path / "cache"
    root.mkdir()
    os.chown(root, ANNA, LAB)
    return root


def as_user(user: int, umask: int, work: Callable[..., object], *arguments: object) -> None:
    """Do something in a process of that user, who is in the group."""

    def switched() -> None:
        os.setgroups([LAB])
        os.setgid(user)
        os.setuid(user)
        os.umask(umask)
        work(*arguments)

    child = Child(switched)
    assert child.wait() == 0, child.said


def extracted(root: Path, images: int) -> None:
    fill(new_entry(root, images), "zarr")


def read(root: Path, images: int) -> None:
    [entry] = [entry for entry in FeatureStore(root).entries() if entry.spec.data.images == images]
    assert len(entry.read([1, 2, 3], ["cls", "ap"])) == images


def test_a_group_works_together_whatever_the_umask(common: Path) -> None:
    common.chmod(0o2775)
    as_user(ANNA, 0o077, extracted, common, 9)
    as_user(BERT, 0o077, read, common, 9)
    as_user(BERT, 0o077, extracted, common, 12)
    as_user(ANNA, 0o022, read, common, 12)
    assert {path.stat().st_gid for path in common.rglob("*")} == {LAB}
    assert all(path.stat().st_mode & 0o060 == 0o060 for path in common.rglob("*"))

    def repaired() -> None:
        assert len(verify(common, repair=True).quarantined) == 2
        assert prune(build(PruneOptions, {"older": "0h"}), common).bytes_freed

    next(common.glob("v3/*/tokens/*/c/0/0/0/0")).write_bytes(b"x")
    as_user(BERT, 0o022, repaired)


def test_what_may_not_be_read_is_no_damage(common: Path) -> None:
    """Anna made a file private: Bert's repair names it, leaves it and goes on; nothing of hers is moved."""
    common.chmod(0o2775)
    as_user(ANNA, 0o022, extracted, common, 9)
    as_user(ANNA, 0o022, extracted, common, 12)
    for private in ("entry.json", f"{STREAM}/manifest.json", f"{STREAM}/c/0/0/0/0", "ids.json", "tokens"):
        path = next(path for path in common.glob("v3/*") if "9" in (path / "ids.json").read_text()) / private
        mode = path.stat().st_mode
        path.chmod(0o600 if path.is_file() else 0o700)

        def looked() -> None:
            found = verify(common, repair=True)
            assert (found.damaged, found.quarantined) == ((), ())
            assert found.unread and all("cannot be read" in each.why for each in found.unread)
            assert len(list_entries(common).entries) >= 1
            with pytest.raises(CacheUnread, match="belongs to user 4001"):
                [entry.read([1, 2, 3], ["cls"]) for entry in map(Entry, (common / "v3").iterdir())]

        as_user(BERT, 0o022, looked)
        path.chmod(mode)


def test_what_may_not_be_removed_is_left(common: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Sticky bits everywhere: Anna's drafts and leases of dead processes stay, and Bert extracts more."""
    common.chmod(0o1777)

    def killed() -> None:
        entry = new_entry(common, 9)
        number = f"{disk.process_scope()}~{2**22 - 1}.1~0123abcd"  # of no process
        for place in (common, entry.path, entry.path / "tokens"):
            (place / f"{disk.DRAFT}{number}").mkdir()
        (entry.path / "leases" / "cls.ap.L1-3~0").write_text(number)
        (entry.path / "pins" / number).touch()

    def more() -> None:
        entry = new_entry(common, 9)
        entry.sweep()
        dead = Leases(entry.tree, f"{entry.at}/leases")
        assert dead.take(["cls.ap.L1-3~0"])  # else this waits for a dead process for ever
        dead.release()
        assert (entry.path / "leases" / "cls.ap.L1-3~0").exists()
        fill(entry, "zarr")
        extracted(common, 12)
        [kept, gone] = sorted(
            prune(build(PruneOptions, {"older": "0h"}), common).decisions, key=lambda each: each.removed
        )
        assert "may not be removed" in kept.why and "belongs to user 4001" in kept.why
        assert gone.removed

    as_user(ANNA, 0o000, killed)
    as_user(BERT, 0o000, more)


def test_a_root_of_another_user_is_said(common: Path, caplog: pytest.LogCaptureFixture) -> None:
    common.chmod(0o777)
    new_entry(common, 9)
    new_entry(common, 12)
    [line] = [record.message for record in caplog.records if "another user's" in record.message]
    assert "belongs to user 4001" in line


# --- whoever may write a cache decides its numbers --------------------------------------------------------------------


@pytest.mark.slow
def test_a_sample_shows_numbers_that_are_not_the_models(tmp_path: Path) -> None:
    """Sound checksums over random numbers: `verify` finds nothing, a few images that are run again do."""
    model, data = save_model("vit", tmp_path / "m"), save_images(tmp_path / "d", {"train": 3, "test": 2})
    cache = tmp_path / "cache"
    _, test = mlfusion.extract(str(model), str(data), cache=cache)
    agreed = compare_sample(cache, 4)
    assert (agreed.images, agreed.entries, agreed.different, agreed.skipped) == (8, 2, (), ())
    entry, [stream] = test.entry, test.entry.streams()
    shutil.rmtree(entry.folder(stream))
    entry.begin([stream])
    with entry.draft(stream, 0) as draft:
        draft.append(np.random.default_rng(0).normal(size=(*stream.shape[:3], stream.width)).astype(np.float32))
        draft.publish()
    entry.seal()
    assert not verify(cache).damaged
    forged = compare_sample(cache, 4)
    assert forged.entries == 2
    [sentence] = forged.different
    assert str(entry.path) in sentence
    shutil.rmtree(data)
    gone = compare_sample(cache, 4)
    assert (gone.images, len(gone.skipped)) == (0, 2)


# --- from format 3 on ---------------------------------------------------------------------------------------------------

GOLDEN = Path(__file__).parent / "golden" / "format-3"


@pytest.mark.parametrize(("images", "dtype", "rounding"), [(12, "float16", 1e-3), (10, "int8", 1e-2)])
def test_a_cache_of_this_format_is_read_and_reused_by_every_later_one(
    images: int, dtype: str, rounding: float, tmp_path: Path
) -> None:
    """The files that were committed when the format was new; their numbers are a formula's."""
    shutil.copytree(GOLDEN, tmp_path / "cache")
    kept = {path: path.read_bytes() for path in (tmp_path / "cache").rglob("*") if path.is_file()}
    assert not verify(tmp_path / "cache").damaged
    entry = FeatureStore(tmp_path / "cache").entry(workers.spec(images, dtype))
    assert entry is not None, "the key of the same features is another by now"
    for layer, kind in sorted(workers.PAIRS):
        want = workers.numbers(range(images), layer, kind)
        np.testing.assert_allclose(entry.read([layer], [kind])[:, 0], want, atol=rounding)
    passes = tmp_path / "passes"
    workers.extract(tmp_path / "cache", images=images, dtype=dtype, passes=passes)
    assert not passes.exists()  # nothing was computed again
    assert all(path.read_bytes() == data for path, data in kept.items())
