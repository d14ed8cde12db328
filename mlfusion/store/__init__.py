"""The cache: every layer's tokens of every model and data set seen so far, shared by all experiments.

The only room that knows a path under the cache's root. Both stages meet here and nowhere else. The format is written down
in `cache/README.md`.
"""

import json
import os
import uuid
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import numpy as np

from mlfusion import disk
from mlfusion.errors import CacheUnusable
from mlfusion.specs import FORMAT, FeatureSpec
from mlfusion.store.entry import TOKENS, Entry, Names, Samples, ShardDraft, streams_for
from mlfusion.store.stream import FormatName, Stream

__all__ = [
    "Entry",
    "FeatureStore",
    "FormatName",
    "Names",
    "Samples",
    "ShardDraft",
    "Stream",
    "default_root",
    "streams_for",
]

CACHEDIR_TAG = "Signature: 8a477f597d28d172789f06886806bc55\n# A cache of mlfusion; see README.md beside this file.\n"


def default_root() -> Path:
    """$MLFUSION_CACHE, or `cache` in the working folder."""
    return Path(os.environ.get("MLFUSION_CACHE") or "cache")


class FeatureStore:
    """A folder of entries, each named by its key."""

    def __init__(self, root: str | os.PathLike[str] | None = None) -> None:
        self.root = Path(root).expanduser() if root else default_root()
        marker = self.root / "mlfusion-cache.json"
        if marker.is_file() and (found := json.loads(marker.read_text())["format"]) > FORMAT:
            raise CacheUnusable(f"{self.root} has format {found}, this mlfusion reads {FORMAT}; update mlfusion")
        self._entries = self.root / f"v{FORMAT}"

    def entry(self, spec: FeatureSpec) -> Entry | None:
        """The entry of these features, if it was begun."""
        path = self._entries / spec.key
        return Entry(path) if (path / "entry.json").is_file() else None

    def create(self, spec: FeatureSpec, samples: Samples, names: Names) -> Entry:
        """The entry of these features, made if need be; drafts of dead writers are swept.

        Raises:
            CacheUnusable: the cache cannot be written.
        """
        with disk.told(self.root):
            self._entries.mkdir(parents=True, exist_ok=True)
            for name, text in {
                "CACHEDIR.TAG": CACHEDIR_TAG,
                "mlfusion-cache.json": json.dumps({"format": FORMAT, "uuid": str(uuid.uuid4())}),
            }.items():
                if not (self.root / name).exists():
                    draft = disk.draft_name(self.root)
                    draft.write_text(text)
                    disk.publish_file(draft, self.root / name)
            disk.sweep(self.root)
            disk.sweep(self._entries)
            final = self._entries / spec.key
            if not final.exists():
                draft = disk.draft_name(self._entries)
                for folder in (TOKENS, "names", "skipped", "runs"):
                    (draft / folder).mkdir(parents=True)
                np.save(draft / "labels.npy", samples.labels.astype("<i8"), allow_pickle=False)
                np.save(draft / "digests.npy", samples.digests, allow_pickle=False)
                (draft / "ids.json").write_text(json.dumps(samples.ids, ensure_ascii=False), encoding="utf-8")
                group = {"zarr_format": 3, "node_type": "group", "attributes": {"mlfusion": spec.key}}
                (draft / TOKENS / "zarr.json").write_text(json.dumps(group, indent=2))
                data = asdict(spec.data)
                del data["classes"]
                body = {
                    "format": spec.format,
                    "dtype": spec.dtype,
                    "model": asdict(spec.model),
                    "data": data,
                    "classes": spec.data.classes,
                }
                (draft / "entry.json").write_text(json.dumps(body, indent=2, ensure_ascii=False), encoding="utf-8")
                disk.publish_folder(draft, final)
            entry = Entry(final)
            entry.call(names)
            entry.sweep()
            return entry

    def entries(self) -> Iterator[Entry]:
        """Every entry, whole or begun."""
        for path in disk.finished(self._entries, "entry.json"):
            yield Entry(path)

    def find(self, *, model: str | None = None, dataset: str, split: str | None = None) -> list[Entry]:
        """Entries that somebody extracted under these words: a name, a hub id or a folder."""

        def called(word: str, name: str, source: str) -> bool:
            if Path(word).is_dir():  # a folder is meant by its place, two of the same name are told apart
                return source == str(Path(word).resolve())
            return word in (name, source)

        return [
            entry
            for entry in self.entries()
            if (split is None or entry.spec.data.split == split)
            and any(
                called(dataset, names.dataset, names.dataset_source)
                and (model is None or called(model, names.model, names.model_source))
                for names in entry.names
            )
        ]
