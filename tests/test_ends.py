"""How commands end where something runs out or others reach in: one sentence, the right status, nothing planted is used."""

import json
import logging
import os
import resource
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from rows import study
from tiny import save_images, save_model

import mlfusion
from mlfusion.embedded import pretrain
from mlfusion.errors import BadOption, MlfusionError
from mlfusion.report import write_markdown
from mlfusion.results import Results

FULL = Path("/dev/full")


def mlfusion_command(*words: str, **options: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(  # type: ignore[call-overload]
        [sys.executable, "-m", "mlfusion", *words], stderr=subprocess.PIPE, text=True, check=False, **options
    )


@pytest.fixture
def results(tmp_path: Path) -> Path:
    Results(tmp_path / "results").take(
        study({"cls-last/linear": [0.5, 0.6], "cls+ap-all-layers/attentive": [0.7, 0.8]})
    )
    return tmp_path / "results"


@pytest.mark.slow
@pytest.mark.skipif(not FULL.exists(), reason="needs /dev/full, which Linux has")
@pytest.mark.parametrize(
    "words", [("results", "ls"), ("results", "ls", "--json"), ("report",), ("--help",), ("--version",)]
)
def test_a_full_output_is_one_sentence(results: Path, words: tuple[str, ...]) -> None:
    options = {"results": ["--results", str(results)], "report": [str(results)]}.get(words[0], [])
    with FULL.open("w") as full:
        ended = mlfusion_command(*words, *options, stdout=full)
    assert ended.returncode == 1
    assert (
        ended.stderr.startswith("error: cannot write to standard output: No space left")
        and ended.stderr.count("\n") == 1
    )


@pytest.mark.slow
def test_a_terminal_of_ascii_gets_ascii(results: Path) -> None:
    rows = study({"cls-last/linear": [0.5, 0.6]}, model="vit-ü", dataset="日本")
    Results(results).take([*rows])
    plain = os.environ | {"PYTHONIOENCODING": "ascii", "COLUMNS": "200"}
    ended = mlfusion_command("report", str(results), stdout=subprocess.PIPE, env=plain)
    assert ended.returncode == 0 and ended.stdout.isascii() and "+-" in ended.stdout and "vit-\\xfc" in ended.stdout
    ended = mlfusion_command("results", "ls", "--json", "--results", str(results), stdout=subprocess.PIPE, env=plain)
    assert {one["dataset"] for one in json.loads(ended.stdout)["results"]} == {"digits", "日本"}


def test_a_report_is_written_whole_or_not_at_all(results: Path, tmp_path: Path) -> None:
    rows = Results(results).rows()
    page = write_markdown(rows, tmp_path / "nowhere" / "report.md")
    before = page.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
    try:
        with pytest.raises(MlfusionError, match=r"cannot write the report to .*File too large"):
            write_markdown(rows, page)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert page.read_bytes() == before and [path.name for path in page.parent.iterdir()] == ["report.md"]
    target = tmp_path / "elsewhere.md"
    target.write_text("not ours")
    page.unlink()
    page.symlink_to(target)
    write_markdown(rows, page)  # the link is replaced, not followed
    assert target.read_text() == "not ours" and page.read_bytes() == before
    with pytest.raises(MlfusionError, match="File name too long"):
        write_markdown(rows, tmp_path / ("a" * 300 + ".md"))


@pytest.mark.slow
def test_skipped_images_are_told_where_rows_are_taken(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    images = save_images(tmp_path / "colours", {"train": 5, "test": 4})
    for path in sorted((images / "test").rglob("*.png"))[:3]:
        path.write_text("no image")
    model = str(save_model("vit", tmp_path / "tiny-vit"))
    mlfusion.extract(model, str(images), cache=tmp_path / "cache", skip_bad=True)
    with caplog.at_level(logging.WARNING):
        features = mlfusion.load_features("tiny-vit", "colours", "test", cache=tmp_path / "cache")
    assert len(features.labels) == 9 and "3 of 12 test images of colours are left out" in caplog.text
    caplog.clear()
    mlfusion.load_features("tiny-vit", "colours", "train", cache=tmp_path / "cache")
    assert "left out" not in caplog.text


RECIPE = Path(__file__).parent.parent / "pipelines" / "formula-vit.toml"


def test_a_checkpoint_that_another_planted_is_not_trained_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The work folder is ours alone: a folder of others, or a link, is refused before anything in it is read."""
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("a planted file was read"))
    digest = pretrain.load_recipe(RECIPE).digest
    work = tmp_path / f".model.{digest}"
    work.mkdir()
    (work / "checkpoint.pt").write_bytes(b"planted")
    work.chmod(0o777)
    with pytest.raises(BadOption, match=r"others may write to it.*mlfusion pretrain RECIPE --out FOLDER"):
        pretrain.pretrain(RECIPE, tmp_path / "model")
    if os.getuid() == 0:
        work.chmod(0o700)
        os.chown(work, 65534, 65534)
        with pytest.raises(BadOption, match="belongs to another user"):
            pretrain.pretrain(RECIPE, tmp_path / "model")
    shutil.rmtree(work)
    (tmp_path / "theirs").mkdir()
    work.symlink_to(tmp_path / "theirs")
    with pytest.raises(BadOption, match="is no folder"):
        pretrain.pretrain(RECIPE, tmp_path / "model")
    work.unlink()

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(pretrain, "pattern_bank", stop)
    with pytest.raises(KeyboardInterrupt):
        pretrain.pretrain(RECIPE, tmp_path / "model")
    assert stat.S_IMODE(work.stat().st_mode) == 0o700


INTERRUPTED = """
import runpy, sys

class Finder:
    def find_spec(self, name, *_):
        if name == sys.argv[1]:
            raise KeyboardInterrupt

sys.meta_path.insert(0, Finder())
runpy.run_module("mlfusion", run_name="__main__")
"""


@pytest.mark.parametrize("module", ["mlfusion.cli", "mlfusion.cli.output", "typer"])
def test_an_interrupt_while_the_program_is_loaded_is_quiet(module: str) -> None:
    ended = subprocess.run([sys.executable, "-c", INTERRUPTED, module], capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stdout, ended.stderr) == (130, "", "")


@pytest.mark.long
def test_python_without_docstrings_is_named_as_the_cause(tmp_path: Path) -> None:
    model, images = save_model("vit", tmp_path / "m"), save_images(tmp_path / "d", {"train": 2, "test": 2})
    words = ("extract", "-m", str(model), "-d", str(images), "--cache", str(tmp_path / "cache"))
    ended = subprocess.run(
        [sys.executable, "-OO", "-m", "mlfusion", *words], capture_output=True, text=True, check=False
    )
    assert ended.returncode == 1
    assert ended.stderr.startswith("error: transformers reads its own docstrings") and "without -OO" in ended.stderr
