"""What each test image got, beside the rows: `arrays/<id>.npz`, each file whole or not there."""

import os
import uuid
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np

from mlfusion.errors import ResultsUnusable
from mlfusion.system import disk

FOLDER = "arrays"


class ArrayFiles:
    """The arrays of one folder of results, by the ids of their rows. Refusals of the disk are the caller's to translate."""

    def __init__(self, results: Path) -> None:
        """`results` is the folder of results; nothing is created before the first array is saved."""
        self.results = results

    def read(self, row_id: str) -> dict[str, np.ndarray]:
        """Every array of a row.

        Raises:
            ResultsUnusable: there are none, or they cannot be read; says how to make them again.
        """
        path = self._path(row_id)
        try:
            with path.open("rb") as file, np.load(file, allow_pickle=False) as held:
                return {name: held[name] for name in held.files}
        except (OSError, ValueError, EOFError, zipfile.BadZipFile) as err:
            what = "were not kept" if isinstance(err, FileNotFoundError) else f"cannot be read ({err})"
            raise ResultsUnusable(
                f"the arrays of result {row_id} {what}: {path}. Make them again with `mlfusion results rerun {row_id} "
                f"--keep --results {self.results}`"
            ) from err

    def save(self, row_id: str, arrays: Mapping[str, np.ndarray]) -> None:
        """Write the arrays of a row, in place of those that are there.

        Raises:
            ValueError: an array holds Python objects.
        """
        if pickled := [name for name, array in arrays.items() if np.asarray(array).dtype.hasobject]:
            raise ValueError(f"arrays of Python objects cannot be read back: {', '.join(pickled)}")
        with self._draft(row_id) as file:
            np.savez_compressed(file, **dict(arrays))  # type: ignore[arg-type]

    def copy(self, row_id: str, source: "ArrayFiles") -> None:
        """Take over what another folder has of a row, if it has anything."""
        if source._path(row_id).is_file():
            with self._draft(row_id) as file:
                file.write(source._path(row_id).read_bytes())

    def _path(self, row_id: str) -> Path:
        return self.results / FOLDER / f"{row_id}.npz"

    @contextmanager
    def _draft(self, row_id: str) -> Iterator[BinaryIO]:
        """A file that gets its name, flushed, once it is whole."""
        final = self._path(row_id)
        final.parent.mkdir(parents=True, exist_ok=True)
        draft = final.with_name(f".{row_id}.{uuid.uuid4().hex[:8]}")
        try:
            with draft.open("xb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            draft.replace(final)
        finally:
            draft.unlink(missing_ok=True)
        disk.flush(final.parent)
