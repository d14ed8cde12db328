"""Random data sets and processors, drawn from a grammar: each gives the right answer, or is refused in one sentence."""

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grammar
import numpy as np
import pytest
from grammar import Content, Written
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiers import examples

from mlfusion import datasets
from mlfusion.specs.options import ReadOptions

SAMPLE = settings(
    max_examples=examples(100),
    derandomize=True,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
)


@pytest.fixture(autouse=True)
def arrow_copies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The datasets library keeps its copies in the test's own folder."""
    import datasets as library

    monkeypatch.setattr(library.config, "HF_DATASETS_CACHE", tmp_path / "arrow")


def loaded(written: Written) -> datasets.DataSet:
    return datasets.load(str(written.path), ReadOptions(**written.options))


def check(written: Written, found: datasets.DataSet) -> None:
    """Whether every split, id, label, class and pixel is what was drawn."""
    content = written.content
    assert set(found.splits) == set(content.splits)
    assert found.label_kind == content.kind
    assert found.classes == written.classes()
    for name, samples in content.splits.items():
        split = found.splits[name]
        assert list(split.ids) == written.ids[name]
        assert split.labels.tolist() == [written.label(sample) for sample in samples]
        for row, sample in enumerate(samples):
            np.testing.assert_array_equal(np.asarray(split.image(row)), sample.picture.pixels)


@SAMPLE
@given(content=grammar.contents(list(grammar.FORMS)))
def test_a_valid_data_set_is_read_as_it_was_drawn(content: Content) -> None:
    with tempfile.TemporaryDirectory() as folder:
        written = grammar.FORMS[content.form](content, Path(folder).resolve())
        check(written, loaded(written))
