"""Writes one shard of a stream: row by row into a draft, then published whole together with its commit record."""

from collections.abc import Mapping
from pathlib import Path
from typing import Self

import numpy as np

from mlfusion.errors import BadData
from mlfusion.store import records
from mlfusion.store.formats import FORMATS, ShardWriter
from mlfusion.store.manifest import commit_record
from mlfusion.store.samples import Samples
from mlfusion.store.stream import Stream
from mlfusion.system import disk


class ShardDraft:
    """A shard being written. `publish` gives it its name; leaving the `with` before that leaves nothing behind."""

    def __init__(self, folder: Path, samples: Samples, stream: Stream, shard: int) -> None:
        """`folder` is the stream's, `samples` are all rows of the entry."""
        self._samples, self.stream, self.shard = samples, stream, shard
        self._row = stream.rows(shard).start
        self._skipped: dict[int, str] = {}
        self._final = folder / "c" / str(shard)
        self._draft = disk.draft_name(folder)
        file = self._draft / FORMATS[stream.format].file
        with disk.drafted(self._draft):
            self._draft.mkdir()  # not its parents: what a prune took away stays away
            file.parent.mkdir(parents=True, exist_ok=True)
            self._writer: ShardWriter | None = FORMATS[stream.format].writer(file, stream, shard)

    @property
    def row(self) -> int:
        """The image whose tokens come next."""
        return self._row

    def append(self, tokens: np.ndarray, unread: Mapping[int, str] = {}) -> None:
        """Add the shard's next rows.

        Args:
            tokens: [rows, layers, kinds x tokens, width].
            unread: row → why its image could not be read; such rows hold no numbers.

        Raises:
            BadData: a value is not finite, or too large for the storage type; the image is named.
        """
        self.append_stored(self.stream.encoding.encode(tokens), unread)

    def append_stored(self, stored: np.ndarray, unread: Mapping[int, str] = {}) -> None:
        """Add rows that are encoded already, [rows, layers, kinds x tokens, columns]; see `append`."""
        assert self._writer is not None
        encoding = self.stream.encoding
        finite = np.all(encoding.finite(stored), axis=2)  # [rows, layers]
        missing = [row - self._row for row in unread]
        finite[missing] = True
        if not finite.all():
            row, layer = (int(i[0]) for i in np.nonzero(~finite))
            raise BadData(
                f"layer {self.stream.layers[layer]} of image {self._samples.ids[self._row + row]!r} is not finite "
                f"in {self.stream.dtype}; use --dtype float32, or look at that image"
            )
        if missing:
            stored = stored.copy()
            stored[missing] = encoding.blank()
            self._skipped |= unread
        self._writer.append(stored)
        self._row += len(stored)

    def publish(self) -> bool:
        """Flush the shard and give it its name, together with its record; False if another writer was first."""
        rows = self.stream.rows(self.shard)
        assert self._writer is not None and self._row == rows.stop
        written = self._writer.close()
        self._writer = None
        record = commit_record(
            self.stream, self.shard, written, samples=self._samples.digest_of(rows), skipped=self._skipped
        )
        disk.write(self._draft / "commit.json", records.encode(record))
        return disk.publish_folder(self._draft, self._final)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._writer is not None:
            self._writer.abandon()
            self._writer = None
        disk.remove(self._draft)
