"""The cache as a whole: entries by key, by name, in one folder or in layers, and how an extraction fills one."""

import logging
import os
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import fields
from functools import partial
from pathlib import Path

from mlfusion.errors import CacheUnusable, MlfusionError, NotCached
from mlfusion.specs.identity import FORMAT, FeatureSpec, Pair
from mlfusion.specs.names import ModelRef, parse_model
from mlfusion.specs.options import FormatName
from mlfusion.store import records
from mlfusion.store.entry import Entry, draft_entry, restore_missing_files
from mlfusion.store.gap import Gap, Missing, check_space, missing_bytes, new_streams
from mlfusion.store.records import CacheMarker, Names, removed_message
from mlfusion.store.samples import Samples
from mlfusion.system import disk

CACHEDIR_TAG = "Signature: 8a477f597d28d172789f06886806bc55\n# A cache of mlfusion; see README.md beside this file.\n"
MARKER = "mlfusion-cache.json"
QUARANTINE, TRASH = (
    "quarantine",
    "trash",
)  # folders beside the entries: what a repair took out, what a prune is removing

logger = logging.getLogger(__name__)

OnDamage = Callable[[str], None]
"""Called with one sentence about each damaged entry."""

CachePath = str | os.PathLike[str] | Sequence[str | os.PathLike[str]] | None
"""Root of a cache; or several, one's own first and then those that are only read: a list, or 'mine:/lab/shared'."""


def default_root() -> str:
    """$MLFUSION_CACHE, or `cache` in the working folder."""
    return os.environ.get("MLFUSION_CACHE") or "cache"


class FeatureStore:
    """Entries by key, in one folder, or in layers: one's own cache above caches that are only read."""

    def __init__(self, cache: CachePath = None) -> None:
        """Open a cache, or name one that is yet to be made.

        Raises:
            CacheUnusable: a newer mlfusion made it; or a lower layer does not exist.
        """
        self.root, *below = _roots(cache)
        self.below = tuple(FeatureStore([root]) for root in below)
        for layer in self.below:
            if not layer.root.is_dir():
                raise CacheUnusable(f"there is no cache at {layer.root}, which was named as one to read from")
        if (marker := self.root / MARKER).is_file():
            records.read_versioned(marker, CacheMarker, about=self.root)

    @property
    def folder(self) -> Path:
        """Folder of the entries."""
        return self.root / f"v{FORMAT}"

    # --- finding ----------------------------------------------------------------------------------------------------

    def entry(self, spec: FeatureSpec) -> Entry | None:
        """The entry of these features, if it was begun."""
        return self.by_key(spec.key)

    def by_key(self, key: str) -> Entry | None:
        """The entry of this key, in the uppermost layer that has it and with those below."""
        found = [entry for layer in self.below if (entry := layer.by_key(key))]
        with suppress(NotCached):
            return Entry(self.folder / key, found)
        return Entry(found[0].path, found[1:]) if found else None

    def entries(self, on_damage: OnDamage | None = None) -> Iterator[Entry]:
        """All entries of all layers, complete or begun; damaged ones are left out and reported, by default to the log."""
        layers = (self, *self.below)
        keys = {path.name for layer in layers for path in disk.finished(layer.folder, "entry.json")}
        for key in sorted(keys):
            if entry := _sound(partial(self.by_key, key), on_damage):
                yield entry

    def own_entries(self, on_damage: OnDamage | None = None) -> Iterator[Entry]:
        """Entries of the uppermost layer alone, without those below."""
        for path in disk.finished(self.folder, "entry.json"):
            if entry := _sound(partial(Entry, path), on_damage):
                yield entry

    def find(
        self,
        *,
        model: str | None = None,
        dataset: str | None = None,
        split: str | None = None,
        on_damage: OnDamage | None = None,
    ) -> list[Entry]:
        """Entries that were extracted under these names: catalogue names, hub ids or folders.

        Args:
            model: may name a hook point and settings, as in 'clip-vit-b16:block'; default any.
            dataset: default any.
            split: default any.
            on_damage: see `entries`.
        """
        asked = parse_model(model) if model else None

        def match(entry: Entry) -> Entry | None:
            if split not in (None, entry.spec.data.split):
                return None
            if (asked is None and dataset is None) or any(_goes_by(names, asked, dataset) for names in entry.names()):
                return entry
            return None

        found = (_sound(partial(match, entry), on_damage) for entry in self.entries(on_damage))
        return [entry for entry in found if entry]

    # --- filling ----------------------------------------------------------------------------------------------------

    def held(self, spec: FeatureSpec) -> frozenset[Pair]:
        """All (layer, kind) of these features that are complete."""
        entry = self.entry(spec)
        return entry.held() if entry else frozenset()

    def missing(self, spec: FeatureSpec, shapes: Mapping[Pair, tuple[int, int]], format: FormatName) -> Missing:
        """The shards that `filling` with the same arguments would write."""
        entry = self.entry(spec)
        new = {stream: set(range(stream.shards)) for stream in new_streams(entry, spec, shapes, format)}
        return (entry.missing(frozenset(shapes)) if entry else {}) | new

    @contextmanager
    def filling(
        self,
        spec: FeatureSpec,
        samples: Samples,
        names: Names,
        shapes: Mapping[Pair, tuple[int, int]],
        *,
        format: FormatName = "zarr",
        log: Callable[[str], None] = lambda _: None,
    ) -> Iterator[Gap]:
        """Fill what an entry lacks of some tokens: `with store.filling(…) as gap`, see `Gap`.

        Args:
            spec: of the entry, which is made if need be.
            samples: rows of the split.
            names: by which the user called model and data set; from now on they mean this entry.
            shapes: (layer, kind) → (tokens, width) of one image, for all tokens that are wanted.
            format: of shards of new streams.
            log: called with a message while waiting for another extractor.

        Raises:
            CacheUnusable: the cache cannot be written, or the disk is too small.
            NotCached: a prune removed the entry meanwhile.
        """
        entry, pairs = self.create(spec, samples, names), frozenset(shapes)
        with disk.translate_os_errors(self.root, lambda: missing_bytes(entry.missing(pairs))):
            new = new_streams(entry, spec, shapes, format)
            check_space(entry.path, missing_bytes(entry.missing(pairs)) + sum(stream.nbytes for stream in new))
            entry.begin(new)
            with Gap(entry, pairs, log) as gap:
                yield gap
        entry.mark_used(names)

    def reuse(self, spec: FeatureSpec, samples: Samples, names: Names) -> Entry:
        """The entry of features that are complete; small files that a repair took out are put back.

        Raises:
            NotCached: a prune removed the entry meanwhile.
        """
        entry = self.entry(spec)
        if entry is None:
            raise NotCached(removed_message(self.folder / spec.key))
        if entry.path.parent == self.folder:
            with suppress(OSError):  # a cache may be read-only
                restore_missing_files(entry.path, spec, samples)
                entry.sweep()  # drafts of an extractor that was killed after its last shard
        entry.mark_used(names)
        return entry

    def create(self, spec: FeatureSpec, samples: Samples, names: Names) -> Entry:
        """The entry of these features in the uppermost layer, made if need be; drafts of dead writers are swept.

        Raises:
            CacheUnusable: the cache cannot be written.
            NotCached: a prune removed it meanwhile.
        """
        with disk.translate_os_errors(self.root):
            self.prepare()
            path = self.folder / spec.key
            if not path.exists():
                disk.publish_folder(draft_entry(self.folder, spec, samples), path)
            restore_missing_files(path, spec, samples)
            entry = self.entry(spec)
            if entry is None or entry.path != path:
                raise NotCached(removed_message(path))
            entry.add_alias(names)
            entry.sweep()
            return entry

    def prepare(self) -> None:
        """Make the root ready to be written to."""
        self.folder.mkdir(parents=True, exist_ok=True)
        marker = CacheMarker(format=FORMAT, uuid=str(uuid.uuid4()))
        for name, text in {"CACHEDIR.TAG": CACHEDIR_TAG, MARKER: records.encode(marker)}.items():
            if not (self.root / name).exists():
                disk.publish_text(self.root / name, text)
        disk.sweep(self.root)
        disk.sweep(self.folder)


def _sound(read: Callable[[], Entry | None], on_damage: OnDamage | None) -> Entry | None:
    """One of many entries; a damaged one is reported and does not hide the others."""
    try:
        return read()
    except NotCached:  # removed since
        return None
    except CacheUnusable as err:
        (on_damage or logger.warning)(str(err))
        return None


def _goes_by(names: Names, model: ModelRef | None, dataset: str | None) -> bool:
    """Whether an entry with these names is meant by what the user typed."""

    def same(word: str, name: str, source: str, suffix: str = "") -> bool:
        if Path(word).exists():  # a folder or file is meant by its path: two may have the same name
            return source == str(Path(word).resolve()) + suffix
        return word + suffix in (name, source)

    if dataset is not None and not same(dataset, names.dataset, names.dataset_source):
        return False
    return model is None or same(model.name, names.model, names.model_source, model.suffix)


def _roots(cache: CachePath) -> list[Path]:
    if cache is None or cache == "":
        cache = default_root()
    if isinstance(cache, (str, os.PathLike)):
        word = os.fspath(cache)
        # A path that exists as it is written may hold the separator itself.
        cache = [word] if Path(word).expanduser().is_dir() else [part for part in word.split(os.pathsep) if part]
    roots = [Path(root).expanduser() for root in cache]
    if not roots:
        raise MlfusionError("--cache names no folder; allowed: PATH, or several as MINE:SHARED")
    return roots


def differences(one: FeatureSpec, other: FeatureSpec) -> list[tuple[str, object, object]]:
    """Fields in which the keys of two specs differ, as (name, one's value, other's value)."""
    found: list[tuple[str, object, object]] = []
    for group in ("model", "data", None):
        a, b = (getattr(one, group), getattr(other, group)) if group else (one, other)
        for field in fields(a):
            mine, its = getattr(a, field.name), getattr(b, field.name)
            if field.compare and field.name not in ("model", "data") and mine != its:
                found.append((".".join(filter(None, (group, field.name))), mine, its))
    return found
