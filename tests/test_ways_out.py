"""One hostile name as class, data set, model and folder of results, through every command and into every file."""

import base64
import csv
import gzip
import json
import re
import shutil
import subprocess
import sys
import xml.etree.ElementTree
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pyarrow.parquet
import pytest
from rows import study
from tiny import save_features, save_images, save_model

from mlfusion import cli
from mlfusion.probing import grids
from mlfusion.report import table, write_figures, write_markdown, write_page
from mlfusion.results import Results, export
from mlfusion.store import Names
from mlfusion.store.records import Groups
from mlfusion.system import text
from mlfusion.workflows.prediction import Prediction
from mlfusion.workflows.prediction_files import FORMATS, writing

NAME = "=1+1\x1b[2J\x07[red][b]'`$(touch OWNED)`\n<img src=x onerror=alert(1)>|\u202e&"
HIDDEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff\ufffe\uffff]")
LONG = f"{NAME}/</script>{{{{7*7}}}}\ufffe"
"""What only a row of an import can be called: no file has such a name."""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model and a data set of hostile names."""
    root = tmp_path_factory.mktemp("hostile")
    images = save_images(root / "plain", {"train": 8, "test": 8})
    for split in ("train", "test"):
        folders = sorted((images / split).iterdir())
        folders[0].rename(images / split / NAME)
    images.rename(root / NAME)
    save_model("vit", root / "tiny-vit").rename(root / f"m{NAME}")
    return root


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Any:
    grid = grids.Grid(learning_rates=(1e-1,), weight_decays=(1e-2,), dropouts=(0.0,), epochs=1, least_steps=2)
    monkeypatch.setitem(grids.SEARCH_GRIDS, "quick", grid)

    def call(*words: str, code: int = 0) -> str:
        monkeypatch.setattr(sys, "argv", ["mlfusion", *words])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        out, err = capfd.readouterr()
        assert (ended.value.code or 0) == code, (words, err)
        for stream in (out, err):
            assert not HIDDEN.search(stream), (words, HIDDEN.findall(stream))
        if "--json" in words and out:
            json.loads(out, parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))
        assert "Traceback" not in err, (words, err)
        return out + err

    return call


def commands_in(said: str) -> list[str]:
    """What a reader may paste: the lines `name: mlfusion …`, and what stands between backticks."""
    lines = re.findall(r"^(?:extract|probe|rerun): (mlfusion .*)$", said, re.M)
    return [*lines, *re.findall(r"(mlfusion [a-z]+ (?:(?!mlfusion|\n).)*)", said)]


def paste(commands: list[str], folder: Path) -> None:
    """Run commands in a shell in which `mlfusion` does nothing: nothing else may happen either."""
    for one in commands:
        for line in {one, one.rstrip(".`"), one.partition("`, or")[0]}:
            subprocess.run(["bash", "-c", f"mlfusion() {{ :; }}\n{line}"], cwd=folder, capture_output=True, check=False)
    assert not list(folder.rglob("OWNED"))


class Tags(HTMLParser):
    """The elements of a page, with their attributes."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


def read_files(folder: Path) -> dict[str, int]:
    """Read what was written, each by its kind; returns how many there were of each."""
    kinds: dict[str, int] = {}
    for path in sorted(file for file in folder.rglob("*") if file.is_file()):
        kinds[path.suffix] = kinds.get(path.suffix, 0) + 1
        if path.suffix in (".png", ".parquet"):
            continue
        written = path.read_text(encoding="utf-8")
        if path.suffix == ".html":
            packed = re.findall(r'<script type="text/plain" id="\w+">(.*?)</script>', written)
            unpacked = "".join(gzip.decompress(base64.b64decode(one)).decode() for one in packed)
            written = re.sub("(?s)<script>.*?</script>", "<script></script>", written)  # our own and libraries'
            assert len(packed) == 2 and not HIDDEN.search(unpacked)
        if path.stem != "rows":  # an export is for programs: its texts are exact
            assert not HIDDEN.search(written), path
        if path.suffix == ".svg":
            root = xml.etree.ElementTree.fromstring(written)
            assert not [one for one in root.iter() if one.tag.endswith(("script", "foreignObject"))]
        elif path.suffix == ".csv":
            cells = [cell for line in csv.reader(written.splitlines(keepends=True)) for cell in line]
            assert not [one for one in cells if one[:1] in "=@\t\r" and one], path
            assert not [one for one in cells if one[:1] in ("+", "-") and not re.fullmatch(r"[-+][\d.e-]+", one)], path
        elif path.suffix == ".md":
            body = written.split("\n---\n", 1)[-1] if written.startswith("---\n") else written
            assert "<img" not in body and "](http" not in body and not re.search(r"(?<!\\)`\$\(", body), path
        elif path.suffix == ".html":
            tags = Tags(written).found
            assert not [tag for tag in tags if any(name.startswith("on") for name in tag[1])]
            assert sum(tag == "script" for tag, _ in tags) == 6, "the page's own"
        elif path.suffix == ".jsonl":
            for line in written.splitlines():
                json.loads(line)
    return kinds


@pytest.mark.long
def test_a_hostile_name_acts_in_no_command(
    place: Path, run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "400")
    model, data, results = str(place / f"m{NAME}"), str(place / NAME), f"r{NAME}"
    extract = ("extract", "-m", model, "-d", data, "--cache", "cache", "--tokens", "cls,ap,all@last")
    probes = "cls-last/linear,cls+ap-all-layers/attentive,cls-each-layer/linear"
    probe = ("probe", "-d", data, "-m", model, "--cache", "cache", "--grid", "quick", "--results", results)
    nothing = (("results", "ls", "--results", results), ("report", results), ("probe", "-d", data, "--cache", "cache"))
    said = "".join(run(*words, code=1) for words in nothing)
    said += "".join(run("data", data, *more) for more in ((), ("--check",), ("--json",)))
    said += "".join(run(*extract, *more) for more in ((), ("--json",)))
    said += "".join(
        run("cache", *words, "--cache", "cache") for words in (("ls",), ("ls", "--json"), ("du",), ("verify",))
    )
    said += run("plan", *extract[1:]) + run("cache", "explain", *extract[1:-2])
    said += run(*probe, "--probe", probes, "--seeds", "0,1", "--save") + run(
        *probe, "--probe", "cls-last/linear", "--json"
    )
    rows = {one.probe: one for one in Results(results).rows() if one.seed == 0}
    linear = rows["cls-last/linear"].id
    for words in (
        ("ls",),
        ("ls", "--json"),
        ("show", linear),
        ("show", linear, "--json"),
        ("compare", "cls+ap-all-layers/attentive", "cls-last/linear"),
        ("rerun", linear, "--cache", "cache"),
        *(("export", f"out/rows.{kind}") for kind in export.FORMATS),
    ):
        said += run("results", *words, "--results", results)
    said += run("results", "rerun", linear, "--cache", "nowhere", "--results", results, code=1)
    said += run("results", "rank", "--results", results, code=1)  # of one data set
    said += run("results", "import", "out/rows.jsonl", "--results", "other")
    said += run(
        "report", results, "--html", "out/report.html", "--figures", "out/figures", "--markdown", "out/report.md"
    )
    said += run("report", results, "--long") + run("report", results, "--against", "paper")
    attentive = rows["cls+ap-all-layers/attentive"].id
    said += run("attend", attentive, "--results", results, "--cache", "cache", "--out", "out/attend")
    picture = str(next(Path(data, "test", NAME).iterdir()))
    saved = Path(results, "probes", linear)
    said += run("predict", picture, "--probe", str(saved)) + run("predict", picture, "--probe", str(saved), "--json")
    said += "".join(
        run("predict", picture, "--probe", str(saved), "--out", f"out/predicted/rows.{kind}") for kind in FORMATS
    )
    recipe = f"{NAME}.toml"
    study = {"models": [model], "datasets": [data], "probes": ["cls-last/linear"], "grid": "quick", "seeds": [0, 1]}
    Path(recipe).write_text("\n".join(f"{name} = {json.dumps(value)}" for name, value in study.items()))
    pages = ("--html", "out/run.html", "--markdown", "out/run.md")
    said += run("run", recipe, "--dry-run", "--cache", "cache") + run(
        "run", recipe, "--cache", "cache", "--results", results, *pages
    )
    said += run("data", data, "--group-pattern", "/(.[^/]*)/", "--json") + run(
        "data", data, "--group-pattern", f"({re.escape(NAME)}[^/]*/[^/]*)x", code=1
    )
    shutil.copy(saved / "README.md", "out/README.md")
    assert "\\x1b[2J" in said and "\\u202e" in said and "[red][b]" in said  # shown, and as they are called
    paste(commands_in(said), tmp_path)
    kinds = read_files(Path("out"))
    assert {".csv", ".jsonl", ".parquet", ".html", ".md", ".svg", ".png", ".tex"} <= kinds.keys()


def hostile_cache(root: Path) -> None:
    """Features of a hostile model and data set, whose groups have hostile names too."""
    random = np.random.default_rng(0)
    for split, images in (("train", 60), ("test", 30)):
        labels = np.arange(images) % 3
        tokens = random.normal(size=(images, 2, 4)) + labels[:, None, None]
        entry = save_features(root, split, tokens, labels, (NAME, "b", f"-{NAME}"))
        groups = Groups(tuple(f"{NAME}{split}{row // 2}" for row in range(images)))
        sources = {"model_source": NAME, "dataset_source": NAME, "reading": NAME}
        grouped = {"groups": groups.digest, "grouped_by": NAME}
        entry.add_alias(Names(model=f"m{NAME}", dataset=NAME, **sources, **grouped), groups=groups)


@pytest.mark.slow
def test_a_hostile_name_acts_in_no_command_on_a_cache_or_results(
    run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "400")
    cache, results = f"c{NAME}", f"r{NAME}"
    hostile_cache(Path(cache))
    named = ("-m", f"m{NAME}", "-d", NAME)
    said = run("advise", *named, "--cache", cache, "--probe", "all-tokens-last/linear,all-tokens-last/ridge")
    for words in (
        *(("ls",), ("ls", "--json"), ("du",), ("verify",), ("path",), ("path", "--model", f"m{NAME}")),
        *(
            ("embeddings", f"out/e.{kind}", *named, "--layers", "last", "--tokens", "all")
            for kind in ("npy", "parquet")
        ),
        *(("export", f"x{NAME}"), ("export", f"x{NAME}", "--json"), ("prune", "--dry-run", "--model", f"m{NAME}")),
    ):
        said += run("cache", *words, *(("--split", "test") if words[0] == "embeddings" else ()), "--cache", cache)
    said += run("cache", "import", cache, "--cache", f"y{NAME}") + run("cache", "import", f"x{NAME}", "--cache", "y")
    said += run("doctor", f"m{NAME}", code=1) + run("doctor", f"m{NAME}", "--cache", cache, "--json", code=1)
    probe = ("probe", *named, "--cache", cache, "--probe", "all-tokens-last/linear", "--results", results)
    said += run(*probe, "--grid", "quick", "--seeds", "0,1", "--track", "tensorboard:out/runs")
    rows = [row.id for row in Results(results).rows()]
    for words in (
        *(("best",), ("best", "--json"), ("track", "tensorboard:out/later"), ("rm", rows[0], "--yes")),
        *(("export", f"out/rows.{kind}", "--by-class") for kind in export.FORMATS),
    ):
        said += run("results", *words, "--results", results)
    said += run("cache", "prune", "--model", f"m{NAME}", "--cache", cache)
    assert "\\x1b[2J" in said and "\\u202e" in said and "[red][b]" in said
    paste(commands_in(said), tmp_path)
    shutil.rmtree("out/runs"), shutil.rmtree("out/later")  # of TensorBoard's own form, which escapes in the browser
    Path("out/e.npy").unlink()
    assert read_files(Path("out")) == {".csv": 1, ".jsonl": 1, ".parquet": 2}


def test_predictions_of_a_hostile_name_are_exact_or_escaped(tmp_path: Path) -> None:
    """A path may have bytes that are no UTF-8; JSON has an escape for them, a table an escape of ours."""
    images = [LONG, "a\udcff.png"]
    for kind in FORMATS:
        with writing(tmp_path / f"p.{kind}") as write:
            for image in images:
                write(Prediction(image, ((NAME, 0.75), ("@b", 0.25)), None))
    lines = [json.loads(line) for line in (tmp_path / "p.jsonl").read_text().splitlines()]
    assert [one["image"] for one in lines] == images and lines[0]["top"][0]["class"] == NAME
    table = pyarrow.parquet.read_table(tmp_path / "p.parquet").to_pylist()
    assert [one["image"] for one in table] == [LONG, "a\\udcff.png"] and table[1]["class_2"] == "@b"
    with (tmp_path / "p.csv").open(newline="") as file:
        cells = list(csv.reader(file))
    assert cells[1][:2] == [f"'{LONG}", f"'{NAME}"] and cells[2][0] == "a\\udcff.png" and cells[2][3] == "'@b"
    with writing(tmp_path / "n.jsonl") as write:
        write(Prediction("x", (), float("inf")))
    assert json.loads((tmp_path / "n.jsonl").read_text(), parse_constant=pytest.fail) == {"image": "x", "number": None}


def hostile_rows() -> list[Any]:
    names = {"model": LONG, "dataset": LONG, "code": LONG, "versions": {LONG: LONG}, "classes": [LONG, "b"]}
    names |= {"device": LONG, "groups": {"column": LONG, "train": 50, "test": 20, "digests": ["a" * 16, "b" * 16]}}
    scores = {"cls-last/linear": [0.5, 0.6], "cls+ap-all-layers/attentive": [0.7, 0.8]}
    return study(scores, **names)


@pytest.mark.slow
def test_a_name_that_no_file_has_acts_in_no_file(tmp_path: Path) -> None:
    rows = hostile_rows()
    results = Results(tmp_path / "results")
    results.take(rows)
    labels = np.arange(4000) % 2
    results.keep_arrays(rows[2], {"labels": labels, "probabilities": np.eye(2, dtype=np.float32)[labels]})
    out = tmp_path / "out"
    write_page(rows, out / "page.html", results=results)
    write_markdown(rows, out / "page.md")
    write_figures(rows, out / "figures")
    for kind in ("csv", "jsonl"):
        export.write(rows, out / f"rows.{kind}")
    assert read_files(out)[".svg"] > 3
    again = Results(tmp_path / "again")
    assert again.take_from(out / "rows.jsonl").taken == len(rows) and again.rows() == rows  # JSON lines are exact


def test_a_table_for_the_terminal_has_no_controls(capsys: pytest.CaptureFixture[str]) -> None:
    """Of no text in a row: neither of its names nor of what it was made with, which a note about replaced rows tells."""
    from rich.console import Console

    rows = hostile_rows()
    later = [msgspec.structs.replace(row, code=f"{row.code}2", device="cpu", id=f"{row.id}2") for row in rows]
    for long in (False, True):
        Console(width=300).print(table([*rows, *later], width=300, long=long))
        said = capsys.readouterr().out
        assert "older rows are left out" in said and "(groups by =1+1\\x1b[2J" in said and not HIDDEN.search(said)


def test_a_table_for_the_terminal_has_no_markup(capsys: pytest.CaptureFixture[str]) -> None:
    """Also where a reader prints it by a console of their own, which reads markup."""
    from rich.console import Console

    sets = [f"plants [{unit}]" for unit in ("g", "cm", "/b", "link=http://x")]
    rows = [one for name in sets for one in study({"cls-last/linear": [0.5]}, dataset=name, model="[red]m")]
    for long in (False, True):
        Console(width=300).print(table(rows, width=300, long=long))
        said = capsys.readouterr().out
        assert all(name in said for name in sets) and "[red]m" in said


@pytest.mark.parametrize(
    ("way", "expected"),
    [
        (text.one_line, r"a\x1b[0m\n\u202e|<b>`[x](y)*"),
        (text.markdown, r"a\\x1b\[0m\\n\\u202e\|&lt;b&gt;\`\[x\](y)\*"),
        (text.code_span, "``" + r"a\x1b[0m\n\u202e\|<b>`[x](y)*" + "``"),
        (text.json_text, r'"a\u001b[0m\n\u202e|<b>`[x](y)*"'),
    ],
)
def test_each_way_out_escapes_what_would_act_there(way: Any, expected: str) -> None:
    assert way("a\x1b[0m\n\u202e|<b>`[x](y)*") == expected


def test_json_has_no_nan_and_csv_no_formula() -> None:
    body = {"a": [float("nan"), 1.5, (float("inf"),)], "b": "x"}
    assert json.loads(text.json_text(body)) == {"a": [None, 1.5, [None]], "b": "x"}
    assert [text.csv_cell(cell) for cell in ("=1", "+1", "@x", "-1", -1, 0.5, "a=1", None)] == [
        *("'=1", "'+1", "'@x", "'-1", -1, 0.5, "a=1", None)
    ]


def test_commands_print_by_one_way_alone() -> None:
    """No command calls print or typer.echo itself: what is printed passes `output`."""
    for path in Path(cli.__file__).parent.glob("*.py"):
        if path.name not in ("output.py", "reference.py"):  # the second writes our own page
            assert not re.search(r"typer\.echo|\bprint\(|sys\.std(out|err)", path.read_text()), path.name
