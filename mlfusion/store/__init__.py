"""The cache: every layer's tokens of every model and data set seen so far, shared by all experiments.

The only room that knows a path under the cache's root. Both stages meet here and nowhere else. The format is written down
in `cache/README.md`.
"""

import logging
import os
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import fields
from functools import partial
from pathlib import Path

from mlfusion import disk
from mlfusion.errors import CacheUnusable, MlfusionError, NotCached
from mlfusion.specs import FORMAT, FeatureSpec, parse_model
from mlfusion.store.claims import Leases
from mlfusion.store.encoding import ENCODINGS, Encoding
from mlfusion.store.entry import Entry, Names, Samples, ShardDraft, folder_bytes, streams_for
from mlfusion.store.manifest import Manifest
from mlfusion.store.reader import Check, TokenReader, gone
from mlfusion.store.stream import FormatName, Stream

__all__ = [
    "ENCODINGS",
    "Check",
    "Encoding",
    "Entry",
    "FeatureStore",
    "FormatName",
    "Leases",
    "Manifest",
    "Names",
    "Place",
    "Samples",
    "ShardDraft",
    "Stream",
    "TokenReader",
    "default_root",
    "differences",
    "folder_bytes",
    "streams_for",
]

CACHEDIR_TAG = "Signature: 8a477f597d28d172789f06886806bc55\n# A cache of mlfusion; see README.md beside this file.\n"
MARKER = "mlfusion-cache.json"

log = logging.getLogger(__name__)
Told = Callable[[str], None]

Place = str | os.PathLike[str] | Sequence[str | os.PathLike[str]] | None
"""A cache's root; or several, one's own first and those below it, which are only read: a list, or 'mine:/lab/shared'."""


def default_root() -> str:
    """$MLFUSION_CACHE, or `cache` in the working folder."""
    return os.environ.get("MLFUSION_CACHE") or "cache"


class FeatureStore:
    """Entries by key, in one folder, or in layers: one's own cache above caches that are only read."""

    def __init__(self, place: Place = None) -> None:
        """Open, or name what is to be made.

        Raises:
            CacheUnusable: a newer mlfusion made it; or a lower layer is not there.
        """
        self.root, *below = _roots(place)
        self.below = tuple(FeatureStore([root]) for root in below)
        for layer in self.below:
            if not layer.root.is_dir():
                raise CacheUnusable(f"there is no cache at {layer.root}, which was named as one to read from")
        marker = self.root / MARKER
        if marker.is_file() and (found := disk.read_json(marker)["format"]) > FORMAT:
            raise CacheUnusable(f"{self.root} has format {found}, this mlfusion reads {FORMAT}; update mlfusion")

    @property
    def folder(self) -> Path:
        """Of the entries."""
        return self.root / f"v{FORMAT}"

    def entry(self, spec: FeatureSpec) -> Entry | None:
        """The entry of these features, if it was begun."""
        return self.by_key(spec.key)

    def by_key(self, key: str) -> Entry | None:
        """The entry of this key, in the uppermost layer that has it and with those below."""
        found = [entry for layer in self.below if (entry := layer.by_key(key))]
        with suppress(NotCached):
            return Entry(self.folder / key, found)
        return Entry(found[0].path, found[1:]) if found else None

    def create(self, spec: FeatureSpec, samples: Samples, names: Names) -> Entry:
        """The entry of these features in the uppermost layer, made if need be; drafts of dead writers are swept.

        Raises:
            CacheUnusable: the cache cannot be written.
            NotCached: a prune takes it away meanwhile.
        """
        with disk.told(self.root):
            self.prepare()
            if not (self.folder / spec.key).exists():
                disk.publish_folder(Entry.draft_in(self.folder, spec, samples), self.folder / spec.key)
            Entry.mend(self.folder / spec.key, spec, samples)
            entry = self.entry(spec)
            if entry is None or entry.path.parent != self.folder:
                raise NotCached(gone(self.folder / spec.key))
            entry.call(names)
            entry.sweep()
            return entry

    def prepare(self) -> None:
        """Make the root ready to be written to."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for name, text in {
            "CACHEDIR.TAG": CACHEDIR_TAG,
            MARKER: disk.sealed({"format": FORMAT, "uuid": str(uuid.uuid4())}),
        }.items():
            if not (self.root / name).exists():
                draft = disk.draft_name(self.root)
                disk.write(draft, text)
                disk.publish_file(draft, self.root / name)
        disk.sweep(self.root)
        disk.sweep(self.folder)

    def entries(self, damaged: Told | None = None) -> Iterator[Entry]:
        """Every entry, whole or begun, of all layers; of one whose record is damaged `damaged` is told, or the log."""
        layers = (self, *self.below)
        keys = {path.name for layer in layers for path in disk.finished(layer.folder, "entry.json")}
        for key in sorted(keys):
            if entry := _sound(partial(self.by_key, key), damaged):
                yield entry

    def own(self, damaged: Told | None = None) -> Iterator[Entry]:
        """Entries of the uppermost layer alone, without those below."""
        for path in disk.finished(self.folder, "entry.json"):
            if entry := _sound(partial(Entry, path), damaged):
                yield entry

    def find(
        self,
        *,
        model: str | None = None,
        dataset: str | None = None,
        split: str | None = None,
        damaged: Told | None = None,
    ) -> list[Entry]:
        """Entries that somebody extracted under these words: a name, a hub id or a folder; see `entries` for `damaged`."""

        def called(word: str | None, name: str, source: str, suffix: str = "") -> bool:
            if word is None:
                return True
            if Path(word).exists():  # a folder or file is meant by its place, two of the same name are told apart
                return source == str(Path(word).resolve()) + suffix
            return word + suffix in (name, source)

        asked = parse_model(model) if model else None  # its hook point and settings, told apart and in order

        def meant(entry: Entry) -> Entry | None:
            if model is dataset is None:  # whatever it was called
                return entry if split in (None, entry.spec.data.split) else None
            found = (split is None or entry.spec.data.split == split) and any(
                called(dataset, names.dataset, names.dataset_source)
                and (asked is None or called(asked.name, names.model, names.model_source, asked.suffix))
                for names in entry.names
            )
            return entry if found else None

        found = (_sound(partial(meant, entry), damaged) for entry in self.entries(damaged))
        return [entry for entry in found if entry]


def _sound(read: Callable[[], Entry | None], damaged: Told | None) -> Entry | None:
    """One of many entries: where it is damaged that is told, and the others are not kept from anybody."""
    try:
        return read()
    except NotCached:  # removed since
        return None
    except CacheUnusable as err:
        (damaged or log.warning)(str(err))
        return None


def _roots(place: Place) -> list[Path]:
    if place is None or place == "":
        place = default_root()
    if isinstance(place, (str, os.PathLike)):
        word = os.fspath(place)
        # A path that exists as it is written may hold the separator itself.
        place = [word] if Path(word).expanduser().is_dir() else [part for part in word.split(os.pathsep) if part]
    roots = [Path(root).expanduser() for root in place]
    if not roots:
        raise MlfusionError("--cache names no folder; allowed: PATH, or several as MINE:SHARED")
    return roots


def differences(one: FeatureSpec, other: FeatureSpec) -> list[tuple[str, object, object]]:
    """Fields of two specs that differ, as (name, one's, other's): those that make their keys differ."""
    found: list[tuple[str, object, object]] = []
    for group in ("model", "data", None):
        a, b = (getattr(one, group), getattr(other, group)) if group else (one, other)
        for field in fields(a):
            if (
                field.compare
                and field.name not in ("model", "data")
                and getattr(a, field.name) != getattr(b, field.name)
            ):
                found.append(
                    (".".join(filter(None, (group, field.name))), getattr(a, field.name), getattr(b, field.name))
                )
    return found
