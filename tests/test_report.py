"""The report says what the rows say: its numbers against ones worked out here, by other means."""

import ast
import base64
import gzip
import io
import json
import re
import shutil
import statistics
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from msgspec.structs import replace
from rich.console import Console
from rows import key, row, stored, study

from mlfusion.errors import MlfusionError, Unavailable
from mlfusion.report import markdown, table, tables, write_markdown, write_page
from mlfusion.report import page as of_page
from mlfusion.report.catalogue import ReportData
from mlfusion.report.figures.accuracy import accuracy
from mlfusion.report.numbers import percent, points
from mlfusion.report.sentences import answer, opening
from mlfusion.report.studies import studies
from mlfusion.report.summary import comparison_groups
from mlfusion.results import Results, Row
from mlfusion.system.progress import duration

ALF = "cls+ap-all-layers/attentive"
BASE = "cls-last/linear"
LINEAR = "cls+ap-all-layers/linear"

SENT = 1e-5  # a page sends six digits

SCORES = {
    BASE: [0.900, 0.910, 0.935],
    ALF: [0.943, 0.951, 0.980],
    "cls+ap-all-layers/linear": [0.931, 0.925],
    "all-tokens-last/attentive": [0.95, 0.94, 0.96],
    "cls-layer-1/linear": [0.5, 0.52, 0.54],
    "cls-layer-2/linear": [0.7, 0.6, 0.65],
    "ap-layer-1/linear": [0.45, 0.47, 0.46],
}


def shown(rows: list[Row], results: Results | None = None, width: int = 120, *, long: bool = False) -> str:
    """What the terminal shows."""
    console = Console(file=io.StringIO(), width=width, color_system=None)
    console.print(table(rows, results=results, width=width, long=long))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


class Page(HTMLParser):
    """A page's tables as {id: [[(text, value), …], …]}, its other text, its elements, its figures' specifications."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tables: dict[str, list[list[tuple[str, str | None]]]] = {}
        self.text = ""
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.figures: dict[str, dict] = {}  # {panel: its specification, records as {"records": […]} among its datasets}
        self.grids: dict[str, list[dict]] = {}  # {table to explore: its rows by the columns' titles}
        self._cells: list[list[tuple[str, str | None]]] | None = None
        self._cell: tuple[str, str | None] | None = None
        self._raw: dict[str, str | None] | None = None
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        held = dict(attrs)
        self.elements.append((tag, held))
        if tag == "table":
            self._cells = self.tables.setdefault(str(held.get("id")), [])
        elif tag == "tr" and self._cells is not None:
            self._cells.append([])
        elif tag in ("td", "th"):
            self._cell = ("", held.get("data-value"))
        elif tag in ("script", "style"):
            self._raw = held

    def handle_endtag(self, tag: str) -> None:
        if tag in ("td", "th") and self._cells is not None and self._cell is not None:
            self._cells[-1].append((self._cell[0].strip(), self._cell[1]))
            self._cell = None
        elif tag in ("script", "style"):
            self._raw = None

    def handle_data(self, data: str) -> None:
        if self._raw is not None:
            if self._raw.get("id") in ("figures", "tables"):
                held = json.loads(gzip.decompress(base64.b64decode(data)))
                if self._raw["id"] == "figures":
                    self.figures = {name: _opened(panel, held["specs"]) for name, panel in held["panels"].items()}
                else:
                    self.grids = {name: _lines(grid) for name, grid in held.items()}
        elif self._cell is not None:
            self._cell = (self._cell[0] + data, self._cell[1])
        else:
            self.text += data


def _opened(panel: dict, specs: list[dict]) -> dict:
    rows = [{k: v for k, v in zip(panel["keys"], row, strict=True) if v is not None} for row in panel["rows"]]
    return specs[panel["spec"]] | {"datasets": {"records": rows}}


def _lines(grid: dict) -> list[dict]:
    """Rows of a grid as {title: value}, words in place of their numbers."""
    return [
        {c["title"]: c["words"][v] if "words" in c else v for c, v in zip(grid["columns"], row, strict=True)}
        for row in grid["rows"]
    ]


def page(rows: list[Row], results: Results | None = None, **options: str) -> str:
    """The page's HTML."""
    return of_page.page(ReportData(rows, results), **options)


def line_of(text: str, probe: str) -> str:
    return next(line for line in text.splitlines() if line.startswith(probe))


def numbers(text: str) -> list[float]:
    return [float(n.replace("\N{MINUS SIGN}", "-")) for n in re.findall(r"[-+\N{MINUS SIGN}]?\d+(?:\.\d+)?", text)]


def records(spec: dict, **wanted: object) -> list[dict]:
    """A panel's records that have these values."""
    return [r for r in spec["datasets"]["records"] if all(r.get(k) == v for k, v in wanted.items())]


def test_terminal_table_shows_means_deviations_and_gains_paired_by_seed() -> None:
    text = shown(study(SCORES))
    for probe, tests in SCORES.items():
        found = numbers(line_of(text, probe).removeprefix(probe))
        assert found[0] == pytest.approx(100 * statistics.mean(tests), abs=0.0501)
        assert found[1] == pytest.approx(100 * statistics.stdev(tests), abs=0.0501)
        if probe == BASE:
            assert "baseline" in line_of(text, probe)
            continue
        gains = [test - base for test, base in zip(tests, SCORES[BASE], strict=False)]  # seeds in common
        assert found[2] == pytest.approx(100 * statistics.mean(gains), abs=0.0501)
        assert found[3] == pytest.approx(100 * statistics.stdev(gains), abs=0.0501)
        assert found[4] == pytest.approx(100 * (statistics.mean(tests) - 0.01), abs=0.0501)
        assert found[-1] == len(tests)


def test_gains_pair_seeds_and_not_places() -> None:
    base = study({BASE: [0.5, 0.7]})
    other = [row("x", probe=ALF, seed=1, test=0.71, features=base[0].features)]
    score = comparison_groups([*base, *other])[0].scores[-1]
    assert score.gain is not None
    assert (score.gain.mean, score.gain.n, score.gain.sd) == (pytest.approx(0.01), 1, None)


def test_terminal_table_fits_eighty_columns() -> None:
    text = shown(study(SCORES), width=80)
    assert "…" not in text
    assert max(map(len, text.splitlines())) <= 80


def test_one_seed_has_no_deviation_and_says_so(tmp_path: Path) -> None:
    rows = study({BASE: [0.9], ALF: [0.95]})
    text = shown(rows, stored(tmp_path, rows))
    assert "±" not in text
    assert "one seed" in text
    assert Page(page(rows)).grids["scores"][-1]["Test, %"] == [0.95, None]


def test_the_pages_tables_hold_the_same_numbers() -> None:
    parsed = Page(page(study(SCORES)))
    heads = [cell for cell, _ in parsed.tables["scores"][0]]
    assert heads[:8] == ["Probe", "Test, %", "Gain, points", "Val., %", "Train, %", "Parameters", "Time", "Seeds"]
    lines = {line["Probe"]: line for line in parsed.grids["scores"]}
    assert set(lines) == {probe for probe in SCORES if "-layer-" not in probe}
    assert {line["Probe"] for line in parsed.grids["layer-scores"]} == {probe for probe in SCORES if "-layer-" in probe}
    for probe, line in lines.items():
        tests = SCORES[probe]
        assert line["Test, %"] == pytest.approx([statistics.mean(tests), statistics.stdev(tests)], rel=SENT)
        gains = [test - base for test, base in zip(tests, SCORES[BASE], strict=False)]
        if probe != BASE:
            assert line["Gain, points"] == pytest.approx([statistics.mean(gains), statistics.stdev(gains)], rel=SENT)
        assert line["Seeds"] == len(tests)
    assert lines[BASE]["Gain, points"] == "baseline"


def test_every_row_is_listed_with_its_hyper_parameters() -> None:
    rows = study(SCORES)
    by_id = {line["Row"]: line for line in Page(page(rows)).grids["rows"]}
    assert len(by_id) == len(rows)
    for held in rows:
        line = by_id[held.id]
        assert line["Test"] == pytest.approx(held.test)
        assert (line["Learning rate"], line["Weight decay"]) == (held.selected.lr, 1e-06)
        assert "Penalty" not in line  # no row has one


def test_figures_hold_the_rows_numbers() -> None:
    rows = study(SCORES)
    figures = Page(page(rows)).figures
    assert {"accuracy-0", "attention-0", "layers-0"} <= set(figures)
    dots = {r["probe"]: r for r in records(figures["accuracy-0"])}
    for probe, dot in dots.items():
        mean, sd = 100 * statistics.mean(SCORES[probe]), 100 * statistics.stdev(SCORES[probe])
        assert (dot["test"], dot["low"], dot["high"]) == pytest.approx((mean, mean - sd, mean + sd), rel=SENT)
        assert dot["baseline"] == pytest.approx(100 * statistics.mean(SCORES[BASE]), rel=SENT)
    held = [r.attention for r in rows if r.probe == ALF and r.attention]
    cells = {(r["layer"], r["kind"]): r for r in records(figures["attention-0"])}
    assert len(cells) == len(held[0].mean) == 8
    for i, (layer, kind) in enumerate(zip(held[0].layers, held[0].kinds, strict=True)):
        cell = cells[layer, kind.upper()]
        assert cell["share"] == pytest.approx(100 * statistics.mean(h.mean[i] for h in held), rel=SENT)
        assert f"± {100 * statistics.mean(h.sd[i] for h in held):.2f}" in cell["spread"]
    assert sum(cell["share"] for cell in cells.values()) == pytest.approx(100, rel=SENT)
    by_layer = {(r["series"], r["layer"]): r["test"] for r in records(figures["layers-0"], what="layer")}
    expected = {("cls/linear", 1): "cls-layer-1/linear", ("cls/linear", 2): "cls-layer-2/linear"}
    expected |= {("ap/linear", 1): "ap-layer-1/linear", ("cls/linear", 4): BASE}  # the last layer is the baseline's
    assert by_layer == {
        key: pytest.approx(100 * statistics.mean(SCORES[probe]), rel=SENT) for key, probe in expected.items()
    }


def test_the_peak_of_the_attention_is_named() -> None:
    rows = study({BASE: [0.9, 0.91], ALF: [0.95, 0.96]})
    shares = dict.fromkeys(range(1, 5), 0.0)
    for held in (r.attention for r in rows if r.attention):
        for layer, mean in zip(held.layers, held.mean, strict=True):
            shares[layer] += mean / 2
    peak = max(shares, key=lambda layer: shares[layer])
    text = " ".join(Page(page(rows)).text.split())
    place = ", the last" if peak == 4 else " of 4"
    assert f"attention peaks at layer {peak}{place}, with {100 * shares[peak]:.0f} %" in text
    assert f"layers before the last get {100 * (1 - shares[4]):.0f} %" in text


ANSWERS = [
    ({BASE: [0.930], ALF: [0.971]}, r"help: cls\+ap-all-layers/attentive reaches 97.1 % against 93.0 %.*\+4.1 points"),
    ({BASE: [0.90, 0.92], ALF: [0.95, 0.96]}, r"layers help: .*95.5 % against 91.0 %.*\(\+4.5 ± 0.7 points, 2 seeds;"),
    ({BASE: [0.95, 0.96], ALF: [0.90, 0.92]}, r"do not help: .*\(−4.5 ± 0.7 points"),
    ({BASE: [0.95, 0.96], ALF: [0.96, 0.954]}, r"make no clear difference: .*\(\+0.2 ± 1.1 points"),
    ({BASE: [0.95], ALF: [0.95]}, r"\(0.0 points, one seed.*cannot be told: the two differ on 0 of 4,000 test images"),
    (
        {ALF: [0.95]},
        r"ALF reaches 95.0 %; cls-last/linear is not among these results, so whether .* is open".replace("ALF", r"\S+"),
    ),
    ({BASE: [0.95]}, r"is open: no probe read several layers\. cls-last/linear, the only one, reaches 95.0 %"),
    # by validation (here the order of the test scores), and only where ALF was not run
    (
        {BASE: [0.9], "cls+ap-2-layers/linear": [0.93], "cls+ap-4-layers/linear": [0.92]},
        r"help: cls\+ap-2-layers/linear",
    ),
    ({BASE: [0.9], ALF: [0.91], "cls+ap-4-layers/linear": [0.99]}, rf"help: {re.escape(ALF)}"),
]


@pytest.mark.parametrize(("scores", "said"), ANSWERS)
def test_the_answer_claims_what_the_rows_show(scores: dict[str, list[float]], said: str, tmp_path: Path) -> None:
    rows = study(scores)
    results = stored(tmp_path, rows)
    text = answer(comparison_groups(rows, results)[0]).replace("\N{NO-BREAK SPACE}", " ")
    assert text.startswith("On digits, with a-vit, ")
    assert re.search(said, text), text
    for report in (Page(page(rows, results)).text, shown(rows, results)):
        assert " ".join(text.split()) in " ".join(report.split())  # lines and kinds of space aside


def test_a_gain_within_what_few_test_images_leave_to_chance_is_not_called_one(tmp_path: Path) -> None:
    """Of 120 images four are right by the one probe alone, of 1,200 forty: all one way, so that p is 2 / 2⁴⁰."""
    scores = {BASE: [0.867, 0.867], ALF: [0.90, 0.90]}
    rows = study(scores, images={"train": 240, "test": 120})
    text = answer(comparison_groups(rows, stored(tmp_path / "few", rows))[0])
    assert "cannot be told: the two differ on 4 of 120 test images; 6 are needed." in text
    rows = study(scores, images={"train": 240, "test": 1200})
    text = answer(comparison_groups(rows, stored(tmp_path / "many", rows))[0])
    assert "layers help" in text
    assert "p < 0.001 of balanced accuracy over 1\N{NARROW NO-BREAK SPACE}200 test images" in text


def test_a_gain_that_rests_on_seven_images_of_a_class_is_not_called_one(tmp_path: Path) -> None:
    """Seven images of 120: everybody who reads the answer is told, wherever it stands."""
    rows = study({BASE: [0.6], ALF: [0.8]}, images={"train": 240, "test": 120}, classes=["benign", "malignant"])
    results = stored(tmp_path / "results", rows, shares=(113 / 120, 7.01 / 120))
    [group] = comparison_groups(rows, results)
    assert (group.verdict.word, group.verdict.direction) == ("cannot be told", None)
    for text in (answer(group), shown(rows, results), markdown(rows, results=results), Page(page(rows, results)).text):
        assert "7 test images of malignant" in " ".join(text.split())
        assert "layers help:" not in text
    assert opening([group, group]).startswith(
        "Of 2 cases (a model on a data set), the intermediate layers cannot be told"
    )


def test_nothing_is_called_a_gain_without_the_predictions(tmp_path: Path) -> None:
    rows = study({BASE: [0.6], ALF: [0.8]})
    assert "cannot be told: the folder of results" in answer(comparison_groups(rows)[0])
    results = stored(tmp_path, rows)
    shutil.rmtree(results.root / "arrays")
    [group] = comparison_groups(rows, results)
    assert group.verdict.word == "cannot be told" and "arrays" in group.verdict.reason


@pytest.mark.slow
def test_guesses_are_told_of_every_metric() -> None:
    rows = study({BASE: [0.4], ALF: [0.5]}, dataset="ten", classes=list("0123456789"))
    rows += study({BASE: [0.4], ALF: [0.5]}, dataset="four", classes=list("0123"))
    text = Page(page(rows)).text
    assert "Random guesses get a balanced accuracy of 10.0 to 25.0\N{NO-BREAK SPACE}% (10 to 4 classes)." in text
    assert "Accuracy per probe" in text
    rows += study({BASE: [0.4], ALF: [0.5]}, dataset="ages", metric="r2")
    rows += study({BASE: [0.4], ALF: [0.5]}, dataset="scenes", metric="mean_average_precision")
    text = Page(page(rows)).text
    assert "an R² of 0, which the mean of all numbers has and a mean average precision equal to the share" in text
    assert "Accuracy per probe" not in text and "Score per probe" in text
    assert "cannot be told to help or not in 4" in text and "their scores are of several metrics" in text


def test_another_version_of_the_code_is_marked_wherever_a_gain_stands() -> None:
    rows = study({BASE: [0.8], ALF: [0.9], LINEAR: [0.85]}, dataset="one")
    rows = [replace(one, code="later") if one.probe == ALF else one for one in rows]
    said = "† made by another version of the code than the baseline"
    [group] = comparison_groups(rows)
    score_table = tables.by_rank(studies([group])[0])
    texts = {"terminal": shown(rows), "markdown": markdown(rows), "table": tables.markdown(score_table)}
    for name, text in texts.items():
        marked = [line for line in text.splitlines() if "†" in line]
        assert said in marked[0 if name == "table" else -1], name
        assert sum("+10.0 †" in line for line in marked) == 1, name
    assert tables.latex(score_table).count(r"+10.0 $\dagger$") == 1 and r"$\dagger$ made by" in tables.latex(
        score_table
    )
    assert {one["probe"]: one["other_code"] for one in score_table.numbers if "test" in one} == {
        BASE: "",
        ALF: "yes",
        LINEAR: "",
    }
    [figure] = [accuracy([group])]
    assert {one["probe"]: one["other_code"] for one in figure.numbers} == {BASE: "", ALF: "yes", LINEAR: ""}
    rows = [replace(one, code="abc") for one in rows]
    assert "†" not in shown(rows) + markdown(rows)


def test_another_precision_is_marked_wherever_a_gain_stands() -> None:
    rows = study({BASE: [0.8], ALF: [0.9], LINEAR: [0.85]}, dataset="one")
    rows = [replace(one, precision="bfloat16") if one.probe == BASE else one for one in rows]
    rows = [replace(one, code="later") if one.probe == LINEAR else one for one in rows]
    said = "‡ trained in another precision than the baseline that its gain is counted from"
    [group] = comparison_groups(rows)
    score_table = tables.by_rank(studies([group])[0])
    for text in (shown(rows), markdown(rows), tables.markdown(score_table)):
        assert (
            "+10.0 ‡" in text
            and "+5.0 †‡" in text
            and f"{said} (precision: float32 against bfloat16)" in " ".join(text.split())
        )
    assert r"+5.0 $\dagger$$\ddagger$" in tables.latex(score_table)
    assert {one["probe"]: one["other_precision"] for one in score_table.numbers if "test" in one} == {
        BASE: "",
        ALF: "yes",
        LINEAR: "yes",
    }
    assert "2 scores were trained in another precision" in Page(page(rows)).text


def test_no_gain_is_counted_over_a_baseline_of_another_protocol() -> None:
    rows = study({BASE: [0.5], ALF: [0.8]}, dataset="one")
    older = [replace(one, protocol=1) if one.probe == BASE else one for one in rows]
    groups = comparison_groups(older)
    assert sorted(group.name for group in groups) == ["a-vit on one (protocol 1)", "a-vit on one (protocol 2)"]
    assert [score.gain for group in groups for score in group.scores if score.probe == ALF] == [None]
    assert len(studies(groups)) == 2
    told = (
        "Protocols measure differently (1 row of protocol 1 and 1 row of protocol 2): no gain is counted between them"
    )
    for text in (shown(older), markdown(older), Page(page(older)).text):
        assert "+30.0" not in text and told in " ".join(text.split())
    text = shown(rows)
    assert "+30.0" in text and "protocol" not in text


def many(*names: str, model: str = "a-vit") -> list[Row]:
    """Gains that differ by data set: 1 point on the first, 2 on the second, and so on."""
    rows = []
    for number, name in enumerate(names, 1):
        scores = {BASE: [0.5, 0.6], LINEAR: [0.52, 0.62], ALF: [0.5 + number / 100, 0.6 + number / 100]}
        rows += study(scores, dataset=name, model=model)
    return rows


def test_more_than_two_data_sets_stand_beside_each_other(tmp_path: Path) -> None:
    names = ("one", "two", "three", "four")
    rows = many(*names) + many(*names[:3], model="another-vit")
    rows = [row for row in rows if not (row.dataset == "two" and row.model == "a-vit" and row.probe == LINEAR)]
    text = shown(rows, stored(tmp_path, rows))
    first, second = (part.splitlines() for part in text.split("\n\n")[:2])
    assert first[0].split() == ["a-vit", "balanced", "accuracy,", "%,", "and", "gain", "in", "points,", "2", "seeds"]
    assert first[1].split() == [*names, "mean"]
    assert {line.split()[0]: line.split()[1:] for line in first[2:]} == {
        BASE: ["55.0"] * 5,
        ALF: ["56.0", "+1.0", "57.0", "+2.0", "58.0", "+3.0", "59.0", "+4.0", "57.5", "+2.5"],
        LINEAR: ["57.0", "+2.0", "57.0", "+2.0", "57.0", "+2.0"],  # not run on one, so without a mean
    }
    assert second[1].split() == [*names[:3], "mean"]
    assert (
        "The intermediate layers help in all 7 cases (a model on a data set)" in text
        and "mlfusion report --long" in text
    )
    assert "param." not in text and "param." in shown(rows, long=True)
    assert "param." in shown(many("one", "two"))  # two have a table each
    ends = {len(line) for line in first[1:]}
    assert len(ends) == 1  # numbers stand below each other


@pytest.mark.parametrize("width", [60, 80, 140])
def test_data_sets_that_no_line_holds_go_on_below(width: int) -> None:
    names = [f"data-set-{n}" for n in range(12)]
    lines = shown(many(*names), width=width).splitlines()
    assert max(map(len, lines)) <= width
    heads = [word for line in lines for word in line.split() if word.startswith("data-set-")]
    assert heads == names
    assert sum(line.startswith(ALF) for line in lines) > 1


def test_seeds_that_the_baseline_lacks_leave_the_answer_open() -> None:
    rows = [*study({BASE: [0.9]}), row("x", probe=ALF, seed=5, test=0.95, features=study({BASE: [0.9]})[0].features)]
    assert "share no seed" in answer(comparison_groups(rows)[0])
    page(rows)


def test_several_cases_are_tallied_each_with_its_scores(tmp_path: Path) -> None:
    rows = study({BASE: [0.90, 0.91], ALF: [0.95, 0.96]}, dataset="one")
    rows += study({BASE: [0.80, 0.81], ALF: [0.79, 0.80]}, dataset="two")
    rows += study({BASE: [0.70, 0.71]}, dataset="three")
    results = stored(tmp_path, rows)
    held = comparison_groups(rows, results)
    text = opening(held).replace("\N{NO-BREAK SPACE}", " ")
    assert text.startswith(
        "Of 2 cases (a model on a data set), the intermediate layers help in 1 and do not help in 1:"
    )
    assert f"reaches 87.5 % against 85.5 % for {BASE} (+2.0 points, from \N{MINUS SIGN}1.0 to +5.0)" in text
    parsed = Page(page(rows, results))
    assert "a-vit on two: 79.5 % against 80.5 %" in " ".join(parsed.text.replace("\N{NO-BREAK SPACE}", " ").split())
    assert {"accuracy-0", "accuracy-1", "accuracy-2"} <= set(parsed.figures)  # panels of one figure
    assert opening(held[2:]) == answer(held[2])
    assert "in none of the 2 cases" in opening([held[2], held[2]])
    assert "help in all 2 cases" in opening([held[0], held[0]])


def test_only_like_is_compared_with_like() -> None:
    quick, paper = study({BASE: [0.9]}), study({ALF: [0.95]}, grid="paper")
    held = comparison_groups([*quick, *paper])
    assert [group.name for group in held] == ["a-vit on digits (quick grid)", "a-vit on digits (paper grid)"]
    assert held[1].scores[0].gain is None
    other = study({ALF: [0.95]}, features=["e1" * 8, "70" * 8])
    assert [group.name for group in comparison_groups([*quick, *other])][
        1
    ] == "a-vit on digits (features e1e1e1+707070)"


def test_of_one_probe_and_seed_the_last_row_counts_and_the_other_is_told() -> None:
    rows = [*study({BASE: [0.5]}), row("again", test=0.9, features=study({BASE: [0.5]})[0].features, code="later")]
    held = comparison_groups(rows)
    assert held[0].scores[0].test.mean == 0.9
    assert "1 older row is left out" in Page(page(rows)).text


def test_every_table_says_which_precision_was_left_out_for_another() -> None:
    narrow = study({BASE: [0.5, 0.6]})
    rows = [*(replace(one, precision="bfloat16") for one in narrow), *study({BASE: [0.7, 0.8]})]
    rows = [replace(one, id=f"{n:016x}") for n, one in enumerate(rows)]
    told = "2 older rows are left out: the same probe, seed and features were run again later"
    told += " (precision bfloat16, then float32)."
    assert told in Page(page(rows)).text
    assert told in markdown(rows)
    assert told in " ".join(shown(rows).split())
    assert "left out" not in shown(narrow)


def test_what_was_run_can_be_run_again() -> None:
    """By the words that find model and data set again, with the options of the rows; folders of the machine are not named."""
    rows = study(SCORES) + study({BASE: [0.9], "cls-layer-1/linear": [0.5]}, depth=1, model="my model")
    parsed = Page(page(rows, name="out.html"))
    assert "mlfusion extract --model org/a-vit --dataset digits --tokens cls+ap@1-4,all@4" in parsed.text
    asked = "--grid quick --seeds 0,1 --precision float32"
    assert f"mlfusion probe --model org/a-vit --dataset digits --probe cls+ap-all-layers/linear {asked}" in parsed.text
    assert f"--probe {BASE},cls-each-layer/linear --grid quick --seeds 0 --precision float32" in parsed.text
    sources = replace(rows[0].sources, model="/secret/place/my vit", options=("--image-root", "/secret/x"))
    parsed = Page(page([replace(row, sources=sources) for row in rows], name="out.html"))
    assert "--model 'DIR/my vit'" in parsed.text and "--image-root DIR/x" in parsed.text
    assert "secret" not in parsed.text
    assert "mlfusion report --html out.html" in parsed.text
    for word in ("abc", "numpy"):
        assert word in parsed.text
    [run, _] = parsed.grids["runs"]
    assert (run["Images"], run["Features"]) == (
        "100 + 4\N{NARROW NO-BREAK SPACE}000",
        f"{key('a-vit-digits-train')} {key('a-vit-digits-test')}",
    )


def test_names_cannot_break_out_of_the_page() -> None:
    evil = "</script><script>alert(1)</script><img src=x onerror=alert(2)> on {{ 7*7 }}"
    rows = study(SCORES, model=evil, dataset=evil, code=evil, versions={evil: evil})
    rows[0] = replace(rows[0], id="fine")
    harmless, parsed = Page(page(study(SCORES))), Page(page(rows, title=evil, name=evil))
    for tag in ("script", "img", "svg", "th"):
        assert sum(t == tag for t, _ in parsed.elements) == sum(t == tag for t, _ in harmless.elements)
    assert evil in parsed.text
    assert records(parsed.figures["attention-0"])[0]["row"] == f"{evil} on {evil}"
    assert not any(name.startswith("on") for _, held in parsed.elements for name in held)


def test_nothing_is_loaded_from_the_network() -> None:
    html = page(study(SCORES))
    for tag, held in Page(html).elements:
        assert tag not in ("iframe", "object", "embed", "base", "img")
        for name in ("src", "href", "srcset", "data", "action"):
            assert not (held.get(name) or "data:").startswith(("http", "//", "/", ".")), (tag, held)
        if tag == "meta" and held.get("http-equiv"):
            assert str(held["content"]).startswith("default-src 'none';")
            assert "http" not in str(held["content"])
    styles = "".join(re.findall(r"<style>(.*?)</style>", html, re.DOTALL))
    assert "@import" not in styles
    assert all(place.startswith("data:") for place in re.findall(r"url\(['\"]?([^)]*)", styles))
    assert len(html.encode()) < 2_000_000


def test_the_drawing_code_is_there_once_however_many_figures() -> None:
    one = len(page(study(SCORES)))
    several = len(page([row for name in "abc" for row in study(SCORES, dataset=name)]))
    assert several - one < one / 4


def test_one_row_makes_a_whole_report() -> None:
    for probe in (BASE, ALF, "all-tokens-last/attentive", "ap-layer-3/linear"):
        rows = study({probe: [0.5]})
        assert probe in shown(rows)
        parsed = Page(page(rows))
        assert "1 model, 1 data set, 1 probe, 1 seed" in parsed.text
        assert ("attention-0" in parsed.figures) == (probe == ALF)
        assert ("accuracy-0" in parsed.figures) != ("layers-0" in parsed.figures)


def test_the_same_rows_give_the_same_page(tmp_path: Path) -> None:
    first = write_page(study(SCORES), tmp_path / "new" / "report.html")
    before = first.read_bytes()
    assert write_page(study(SCORES), str(first)).read_bytes() == before
    assert [p.name for p in first.parent.iterdir()] == ["report.html"]


def test_no_rows_and_no_place_are_told_with_what_to_type(tmp_path: Path) -> None:
    for report in (table, lambda rows: write_page(rows, tmp_path / "x.html")):
        with pytest.raises(MlfusionError, match=r"no results to report.*mlfusion probe --dataset digits"):
            report([])
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    for place in (tmp_path / "file" / "x.html", tmp_path / "folder"):
        with pytest.raises(MlfusionError, match=f"cannot write the report to '{place}'.*mlfusion report --html"):
            write_page(study({BASE: [0.5]}), place)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "folder"]


@pytest.mark.parametrize("missing", ["altair", "vl_convert", "itables"])
def test_without_the_extra_the_page_says_what_to_install(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(Unavailable, match=rf"{missing}.*pip install 'mlfusion\[report\]'"):
        page(study({BASE: [0.5]}))
    assert BASE in shown(study({BASE: [0.5]}))


def test_the_terminal_table_needs_neither_torch_nor_the_extra() -> None:
    heavy = ("torch", "pandas", "scipy", "altair", "vl_convert", "itables", "jinja2")
    code = f"import sys, mlfusion.report; print([m for m in {heavy} if m in sys.modules])"
    assert ast.literal_eval(subprocess.check_output([sys.executable, "-c", code], text=True)) == []


def test_numbers_read_well() -> None:
    assert [percent(v) for v in (0.9712, 1.0)] == ["97.1", "100.0"]
    assert [points(v) for v in (0.041, -0.041, 0.0, -0.0002)] == ["+4.1", "\N{MINUS SIGN}4.1", "0.0", "0.0"]
    assert [duration(s) for s in (0.04, 9.96, 59.6, 75, 3600, 4020)] == [
        "0.0 s",
        "10 s",
        "1 min",
        "1 min 15 s",
        "1 h 0 min",
        "1 h 7 min",
    ]


def test_markdown_is_written_whole(tmp_path: Path) -> None:
    rows = study(SCORES)
    path = write_markdown(rows, tmp_path / "new" / "tables.md")
    assert path.read_text(encoding="utf-8") == markdown(rows)
    assert [each.name for each in path.parent.iterdir()] == ["tables.md"]


def test_markdown_says_what_the_terminal_says() -> None:
    text = markdown(study({BASE: [0.90, 0.92], ALF: [0.95, 0.96]}))
    assert f"| `{BASE}` | 91.0 ± 1.4 | baseline |" in text
    assert f"| `{ALF}` | 95.5 ± 0.7 | +4.5 ± 0.7 |" in text
    assert len({line.count("|") for line in text.splitlines() if line.startswith("|")}) == 1
