"""Counts in words: nothing that is printed says "1 images"."""

import re
from pathlib import Path

import pytest

import mlfusion
from mlfusion.cli.output import print_extracted
from mlfusion.system.words import plural

PACKAGE = Path(mlfusion.__file__).parent
NOUNS = "images|rows|results|entries|forward passes|files|steps|tensors"


@pytest.mark.parametrize(
    ("number", "text"), [(0, "0 passes"), (1, "1 pass"), (2, "2 passes"), (12345, "12,345 passes")]
)
def test_one_is_singular(number: int, text: str) -> None:
    assert plural(number, "pass", "passes") == text
    assert plural(number, "row") == text.replace("passes", "rows").replace("pass", "row")


def test_an_extraction_of_one_image_is_told_in_the_singular() -> None:
    told: list[str] = []
    names = "images_written images_reused images_skipped forward_passes bytes"
    print_extracted(
        dict.fromkeys(names.split(), 1)
        | dict.fromkeys(("model", "dataset", "split", "limit", "key"), "x")
        | {"view": "plain", "images_per_second": 1.0, "skipped": {}},
        told.append,
    )
    assert "1 image written" in told[0] and "1 forward pass;" in told[0]
    assert not re.search(rf"\b1 ({NOUNS})", " ".join(told))


def test_printed_counts_of_the_command_line_have_a_singular() -> None:
    """Of the files that print results: a number in a text is not followed by a fixed plural."""
    wrong = re.compile(rf"\{{[^{{}}]*:,\}} ({NOUNS})\b|\{{len\([^{{}}]*\}} ({NOUNS})\b")
    files = [*(PACKAGE / "cli").glob("*.py"), PACKAGE / "workflows/study.py", PACKAGE / "probing/evaluation.py"]
    assert {path.name: found[0] for path in files if (found := wrong.search(path.read_text()))} == {}
