"""The notebook is a notebook, holds no outputs, and its ten cells run as they stand, on the embedded default."""

import ast
import json
from pathlib import Path
from typing import Any

import pytest

NOTEBOOK = Path(__file__).parent.parent / "docs" / "tour.ipynb"


def cells(kind: str) -> list[dict[str, Any]]:
    body = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    assert (body["nbformat"], body["nbformat_minor"]) == (4, 5) and body["metadata"]["kernelspec"]["name"] == "python3"
    assert len({cell["id"] for cell in body["cells"]}) == len(body["cells"])
    return [cell for cell in body["cells"] if cell["cell_type"] == kind]


def test_it_has_ten_cells_and_nobodys_outputs() -> None:
    code = cells("code")
    assert len(code) == 10
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in code)
    numbered = ["".join(cell["source"])[:5] for cell in cells("markdown")[1:]]
    assert [text.split("*")[2] for text in numbered] == [f"{number}." for number in range(1, 11)]


def run(source: str, held: dict[str, Any]) -> Any:
    """Like a kernel: all of it, and the value of the last expression."""
    tree = ast.parse(source)
    last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, "cell", "exec"), held)
    return eval(compile(ast.Expression(last.value), "cell", "eval"), held) if isinstance(last, ast.Expr) else None


@pytest.mark.long
def test_its_cells_run_in_order() -> None:
    held: dict[str, Any] = {}
    shown = [run("".join(cell["source"]), held) for cell in cells("code")]
    assert shown[0] == [1442, 355]
    assert shown[1][0] == (355, 8, 2, 128)
    assert shown[2][8] == pytest.approx(1) and shown[2][1] < shown[2][7]  # the nearer, the liker
    assert shown[3] == 6
    tests = shown[4]["test"]
    assert tests["cls+ap-all-layers/attentive"] > tests["cls-last/linear"] > 0.85
    assert shown[5].to_numpy().sum() == pytest.approx(1, abs=0.01)
    a, b, images, _ = shown[6]
    assert images.value == pytest.approx(a.mean - b.mean, abs=2e-3) and images.low < images.value < images.high
    assert 0 < shown[7][0] < 0.3 and shown[7][1].to_numpy().sum() == 355
    assert shown[8][0].top[0][1] > 0.3
    assert shown[9] is True and Path("results/tour.html").stat().st_size > 10_000
