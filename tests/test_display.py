"""What objects show of themselves in a terminal and a notebook: one screen, whatever they hold and whoever named it."""

from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from tiny import save_images, save_model

import mlfusion
from mlfusion.results import Results
from mlfusion.system.display import Displayed

EVIL = "<script>alert(1)</script>\x1b[2J\n"
EVIL_NAME = "<script>alert(1)<_script>\\x1b[2J"


@pytest.fixture(scope="module")
def objects(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    root = tmp_path_factory.mktemp("display")
    model = str(save_model("vit", root / "vit"))
    data = save_images(root / "colours", {"train": 12, "test": 4})
    for split in ("train", "test"):
        (data / split / "red").rename(data / split / EVIL.replace("/", "_"))
    where = {"cache": root / "cache"}
    extracted = mlfusion.extract(model, str(data), **where)
    probed = mlfusion.probe(
        str(data),
        probes="ridge",
        grid="quick",
        seeds=(0, 1),
        save=True,
        results=root / "results",
        **where,
    )
    names = (model, str(data), "train")
    return {
        "extracted": extracted[0],
        "probed": probed,
        "results": Results(root / "results"),
        "predictor": mlfusion.load_probe(probed.rows[0].id, results=root / "results"),
        "features": mlfusion.load_features(*names, **where),
        "opened": mlfusion.open_features(*names, **where),
    }


FACTS = {
    "extracted": ["vit on colours/train", "cls+ap at layers 1-4", "36 images written", "0 reused"],
    "probed": ["2 rows, 2 of them trained now"],
    "results": ["2 rows in /"],
    "predictor": ["cls+ap-all-layers/ridge on vit, trained on colours: 3 classes (", "green"],
    "features": ["36 images", "tokens [36, 4, 2, 32] float16", "3 classes"],
    "opened": ["36 images", "tokens [36, 4, 2, 32] float16", "3 classes"],
}


@pytest.mark.parametrize("name", FACTS)
def test_a_repr_is_one_line_and_a_notebook_shows_one_screen(objects: dict[str, Any], name: str) -> None:
    shown = repr(objects[name])
    assert len(shown) < 400 and shown.isprintable() and all(fact in shown for fact in FACTS[name])
    html = objects[name]._repr_html_()
    assert len(html) < 5000 and html.replace("…", "").isprintable()
    tree = ElementTree.fromstring(f"<all>{html}</all>")
    assert {each.tag for each in tree.iter()} <= {"all", "div", "table", "thead", "tbody", "tr", "th", "td"}
    assert tree[0].text == shown


def test_tables_show_the_first_rows(objects: dict[str, Any]) -> None:
    def lines(name: str) -> list[list[str | None]]:
        tree = ElementTree.fromstring(f"<all>{objects[name]._repr_html_()}</all>")
        return [[cell.text for cell in line] for line in tree.iter("tr")]

    assert lines("probed")[0] == ["model", "dataset", "probe", "seed", "val", "test"]
    assert len(lines("probed")) == 3
    oldest, newest = objects["results"].rows()
    assert [line[0] for line in lines("results")] == ["id", newest.id, oldest.id]
    assert lines("features")[1] == [objects["features"].ids[0].replace("\x1b", "\\x1b").replace("\n", "\\n"), EVIL_NAME]
    card = objects["predictor"].card
    assert lines("predictor")[1] == ["test", f"{card.scores['test']:.4f}"]


class Many(Displayed):
    def summary(self) -> str:
        return "a & b\n"

    def lines(self) -> list[dict[str, object]]:
        return [{"n": n, "half": n / 2} for n in range(1000, 1030)]


def test_a_table_has_twenty_rows() -> None:
    assert repr(Many()) == "<Many: a & b\\n>"
    html = Many()._repr_html_()
    assert html.startswith("<div>&lt;Many: a &amp; b\\n&gt;</div><table>") and html.endswith("<div>and 10 more</div>")
    assert html.count("<tr>") == 21 and "<td>1,000</td><td>500.0000</td>" in html


def test_numbers_and_nothing_have_their_words(tmp_path: Path) -> None:
    assert repr(Results(tmp_path / "none")).endswith("none, which does not exist>") and not Results("none").lines()
    images = np.zeros((4, 8, 8), np.uint8)
    data = mlfusion.array_dataset(
        "n", {each: (images, np.arange(4) / 3) for each in ("train", "test")}, target="number"
    )
    model = str(save_model("vit", tmp_path / "vit"))
    mlfusion.extract(model, data, layers="last")
    features = mlfusion.load_features(model, "n", "train", layers="last")
    assert [line["label"] for line in features.lines()] == ["0", "0.333333", "0.666667", "1"]
