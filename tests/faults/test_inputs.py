"""Random data sets and processors, drawn from a grammar: each gives the right answer, or is refused in one sentence."""

import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import grammar
import numpy as np
import processors
import pytest
import spoils
import xxhash
from grammar import Content, Picture, Written
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from spoils import Spoilt
from tiers import examples
from typer.testing import CliRunner

from mlfusion import cli, datasets
from mlfusion.errors import BadImage, BadModel, MlfusionError
from mlfusion.models import preprocessing
from mlfusion.specs.options import ReadOptions

# A Parquet file that is read in place stays open until the garbage is collected.
pytestmark = pytest.mark.filterwarnings("ignore:Exception ignored:pytest.PytestUnraisableExceptionWarning")


def sample(short: int) -> settings:
    """The same inputs in every run, ten times as many in the long form."""
    return settings(
        max_examples=examples(short), derandomize=True, deadline=None, suppress_health_check=list(HealthCheck)
    )


@pytest.fixture(autouse=True)
def arrow_copies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The datasets library keeps its copies in the test's own folder."""
    import datasets as library

    monkeypatch.setattr(library.config, "HF_DATASETS_CACHE", tmp_path / "arrow")


@pytest.fixture
def counts(figures: dict[str, Any]) -> dict[str, Counter[str]]:
    """What was tried, and what became of it, by the form of the input: for the page."""
    return figures.setdefault("inputs", {})


@contextmanager
def counted(counts: dict[str, Counter[str]], form: str, valid: bool) -> Iterator[Counter[str]]:
    """Counts one input of this form, and what became of it: the body adds `right` or `refused`; a failure is seen here."""
    count = counts.setdefault(form, Counter())
    count["valid" if valid else "spoilt"] += 1
    try:
        yield count
    except AssertionError:
        count["silently wrong"] += 1
        raise
    except MlfusionError:
        count["refused"] += 1
        raise
    except Exception:
        count["traceback"] += 1
        raise


def words(written: Written) -> list[str]:
    """The options that a data set is read with, as words of a command."""
    flags = {name: value for name, value in written.options.items() if value is not True}
    switches = [name for name, value in written.options.items() if value is True]
    found = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    return [
        word.replace("_", "-") if word.startswith("--") else word for word in [*found, *(f"--{n}" for n in switches)]
    ]


def check(written: Written) -> None:
    """Whether every split, id, label, class and pixel is what was drawn; a damaged picture is refused by its id."""
    content, found = written.content, datasets.load(str(written.path), ReadOptions(**written.options))
    assert set(found.splits) == set(content.splits)
    assert found.label_kind == content.kind
    assert found.classes == written.classes()
    for name, samples in content.splits.items():
        split = found.splits[name]
        assert list(split.ids) == written.ids[name]
        assert split.labels.tolist() == [written.label(sample) for sample in samples]
        for row, sample in enumerate(samples):
            if (pixels := pixels_of(sample.picture)) is not None:
                np.testing.assert_array_equal(np.asarray(split.image(row)), pixels)
                continue
            with pytest.raises(BadImage) as refused:
                split.image(row)
            assert str(refused.value).startswith(f"{split.ids[row]} cannot be read: ")


def pixels_of(picture: Picture) -> np.ndarray | None:
    """The pixels of a picture; of a damaged one those that Pillow reads, or None if it reads none."""
    if picture.pixels is not None:
        return picture.pixels
    with suppress(Exception):
        return grammar.by_pillow(picture.body)
    return None


def refuse(written: Written) -> None:
    """Whether `mlfusion data` refuses a data set in one sentence on standard error, and exits with 1."""
    said = CliRunner().invoke(cli.app, ["data", str(written.path), "--json", *words(written)])
    if said.exception is not None and not isinstance(said.exception, SystemExit):
        raise said.exception
    assert said.exit_code == 1, f"read without a word: {said.stdout}"
    assert said.stdout == ""
    *_, last = said.stderr.splitlines()
    assert last.startswith("error: ") and len(last) > 20


@sample(60)
@given(content=grammar.contents(list(grammar.FORMS)), as_snapshot=st.sampled_from([False, False, True]))
def test_a_valid_data_set_is_read_as_it_was_drawn(
    content: Content, as_snapshot: bool, counts: dict[str, Counter[str]]
) -> None:
    form = content.form + " in the hub's cache" * as_snapshot
    with tempfile.TemporaryDirectory() as folder, counted(counts, form, valid=True) as count:
        root = Path(folder).resolve()
        written = grammar.FORMS[content.form](content, root)
        check(grammar.snapshot(written, root) if as_snapshot else written)
        count["right"] += 1


def check_parts(written: Written, ratio: tuple[int, ...], seed: int) -> None:
    """Whether the images of train are dealt as docs/datasets.md says: by class, in the order of the hashes of their ids."""
    names = ("train", "test") if len(ratio) == 2 else ("train", "validation", "test")
    asked = {**written.options, "split_ratio": "/".join(str(share / 100) for share in ratio), "split_seed": seed}
    found = datasets.load(str(written.path), ReadOptions(**asked))
    assert set(found.splits) == set(names)
    assert found.classes == written.classes()
    ids, samples = written.ids["train"], written.content.splits["train"]
    part_of = {name: part for part, split in found.splits.items() for name in split.ids}
    assert sorted(part_of) == sorted(ids)
    assert sum(len(split) for split in found.splits.values()) == len(ids)
    for label in written.classes():
        own = [name for name, sample in zip(ids, samples, strict=True) if sample.label == label]
        dealt = [
            part_of[name] for name in sorted(own, key=lambda name: xxhash.xxh3_64_intdigest(f"{seed}/{name}".encode()))
        ]
        assert dealt == sorted(dealt, key=names.index)  # first those of train, then the next part
        assert set(dealt) == set(names)
        for part, share in zip(names, ratio, strict=True):
            assert abs(dealt.count(part) - share * len(own) / 100) <= 2
    for part, split in found.splits.items():
        rows = [ids.index(name) for name in split.ids]
        assert rows == [row for row, name in enumerate(ids) if part_of[name] == part]  # in their order
        assert [split.classes[label] for label in split.labels] == [samples[row].label for row in rows]
        for at, row in enumerate(rows):
            np.testing.assert_array_equal(np.asarray(split.image(at)), samples[row].picture.pixels)


@sample(30)
@given(
    content=grammar.contents(
        [*grammar.FORMS, *grammar.ALONE], ["class"], [("train",), ("train", "validation")], least=3
    ),
    ratio=st.sampled_from([(80, 20), (50, 50), (60, 20, 20), (40, 30, 30)]),
    seed=st.integers(0, 9),
)
def test_a_data_set_without_a_test_split_is_split_by_ratio(
    content: Content, ratio: tuple[int, ...], seed: int, counts: dict[str, Counter[str]]
) -> None:
    if content.form in grammar.ALONE:
        content = replace(content, splits={"train": content.splits["train"]})
    form = content.form + ", split by ratio" * (content.form in grammar.FORMS)
    with tempfile.TemporaryDirectory() as folder, counted(counts, form, valid=True) as count:
        check_parts((grammar.FORMS | grammar.ALONE)[content.form](content, Path(folder).resolve()), ratio, seed)
        count["right"] += 1


@pytest.mark.slow
@sample(60)
@given(one=spoils.spoilt())
def test_a_spoilt_data_set_is_refused_in_one_sentence(one: Spoilt, counts: dict[str, Counter[str]]) -> None:
    with tempfile.TemporaryDirectory() as folder, counted(counts, one.content.form, valid=False) as count:
        written = one.write(Path(folder).resolve())
        (check if spoils.FAULTS[one.fault].of_a_picture else refuse)(written)
        count["refused"] += 1


# --- processors ------------------------------------------------------------------------------------------------------


def prepared(folder: Path) -> list[np.ndarray]:
    """The pictures as mlfusion prepares them."""
    steps = preprocessing.read(folder)
    return [steps([image])[0].numpy() for image in processors.pictures()]


@sample(45)
@given(found=processors.settings(wrong_ones=0))
def test_a_processor_prepares_pictures_as_transformers_does(
    found: dict[str, Any], counts: dict[str, Counter[str]]
) -> None:
    with tempfile.TemporaryDirectory() as root:
        folder = processors.write(found, Path(root))
        expected = processors.by_transformers(folder)
        assume(expected is not None)
        with counted(counts, "processors", valid=True) as count:
            np.testing.assert_array_equal(np.stack(prepared(folder)), np.stack(expected))
            count["right"] += 1


@sample(45)
@given(found=processors.settings(wrong_ones=4))
def test_a_processor_of_wrong_settings_is_refused_in_one_sentence(
    found: dict[str, Any], counts: dict[str, Counter[str]]
) -> None:
    """What transformers takes in spite of them is prepared as it does, or refused."""
    with tempfile.TemporaryDirectory() as root:
        folder = processors.write(found, Path(root))
        expected = processors.by_transformers(folder)
        with counted(counts, "processors", valid=expected is not None) as count:
            with suppress(BadModel):
                pictures = prepared(folder)
                assert expected is not None, "transformers refuses these settings"
                np.testing.assert_array_equal(np.stack(pictures), np.stack(expected))
                count["right"] += 1
                return
            count["refused"] += 1
            with pytest.raises(BadModel, match=r"^[^\n]*allowed[^\n]*$"):
                prepared(folder)
