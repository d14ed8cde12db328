"""At the terminal: how much is said, in which colours, and what the shell completes."""

import os
import pty
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tiny import save_images, save_model

import mlfusion
from mlfusion import cli
from mlfusion.probing import grids

MLFUSION = [sys.executable, "-m", "mlfusion"]


@pytest.fixture(scope="module")
def cached(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of a small model on a few images."""
    root = tmp_path_factory.mktemp("cached")
    images = save_images(root / "colours", {"train": 5, "test": 2})
    mlfusion.extract(str(save_model("vit", root / "tiny-vit")), str(images), cache=root / "cache")
    return root


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Any:
    grid = grids.Grid(learning_rates=(1e-1,), weight_decays=(1e-2,), dropouts=(0.0,), epochs=1, least_steps=2)
    monkeypatch.setitem(grids.SEARCH_GRIDS, "quick", grid)

    def call(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["mlfusion", *words])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        out, err = capfd.readouterr()
        return int(ended.value.code or 0), out, err

    return call


def words(cached: Path) -> list[str]:
    probe = ["probe", "-d", str(cached / "colours"), "--cache", str(cached / "cache")]
    return [*probe, "--probe", "cls-last/linear", "--grid", "quick", "--seeds", "0"]


def test_quiet_says_results_and_errors_only(run: Any, cached: Path) -> None:
    code, loud, notes = run(*words(cached), "--results", "loud")
    assert code == 0 and "no forward pass" in notes
    code, out, err = run("--quiet", *words(cached), "--results", "quiet")
    assert code == 0 and err == ""
    assert re.sub(r"[\d.]+ s", "", out) == re.sub(r"[\d.]+ s", "", loud)
    code, out, err = run("--quiet", "probe", "-d", "nowhere")
    assert code == 1 and out == "" and err.startswith("error: no features of nowhere") and err.count("\n") == 1
    assert "no forward pass" in run(*words(cached), "--results", "again")[2]  # not for good


def test_verbose_says_what_goes_on_and_where_an_error_comes_from(run: Any, cached: Path) -> None:
    _, _, err = run("--verbose", *words(cached))
    assert re.search(
        r"\d\d:\d\d:\d\d,\d+ mlfusion.probing.evaluation: cls-last/linear seed 0: val [\d.]+, test [\d.]+", err
    )
    assert "mlfusion.probing.evaluation:" not in run(*words(cached), "--results", "other")[2]
    code, _, err = run("--verbose", "probe", "-d", "nowhere")
    assert code == 1 and "Traceback" in err and err.splitlines()[-1].startswith("error: no features of nowhere")
    assert run("--verbose", "--quiet", "ls", "models")[0] == 2


BAR = """
import time
from mlfusion.system import progress
progress.SILENCE = 0
with progress.track("work", 3, "steps") as bar:
    for _ in range(3):
        bar.advance()
        time.sleep(0.15)
"""
COLOUR = re.compile(rb"\x1b\[(?:\d+;)*(?:3[0-8]|4[0-8]|9[0-7]|10[0-7])[;m]")


def at_a_terminal(command: list[str], **environment: str) -> bytes:
    """What a command writes where it believes a person sits."""
    own, its = pty.openpty()
    base = {name: value for name, value in os.environ.items() if name not in ("NO_COLOR", "FORCE_COLOR", "CI")}
    child = subprocess.Popen(
        command, stdout=its, stderr=its, stdin=its, env=base | {"TERM": "xterm-256color"} | environment
    )
    os.close(its)
    said = b""
    while True:
        try:
            part = os.read(own, 4096)
        except OSError:  # how Linux says that the other end is closed
            break
        if not part:
            break
        said += part
    os.close(own)
    assert child.wait() == 0
    return said


@pytest.mark.slow
def test_no_color_means_none() -> None:
    command = [sys.executable, "-c", BAR]
    assert COLOUR.search(at_a_terminal(command))  # there are colours to leave out
    plain = at_a_terminal(command, NO_COLOR="1")
    assert b"work" in plain and not COLOUR.search(plain)
    assert b"work" not in at_a_terminal([sys.executable, "-c", BAR.replace("SILENCE = 0", "set_quiet(True)")])


def completed(*typed: str) -> list[str]:
    """What `mlfusion` offers a shell for the last word."""
    environment = {
        "_MLFUSION_COMPLETE": "complete_bash",
        "COMP_WORDS": " ".join(typed),
        "COMP_CWORD": str(len(typed) - 1),
    }
    done = subprocess.run(MLFUSION, env=os.environ | environment, capture_output=True, text=True, check=False)
    return done.stdout.split()


@pytest.mark.slow
def test_names_are_completed() -> None:
    assert completed("mlfusion", "res") == ["results"]
    assert completed("mlfusion", "results", "re") == ["rerun"]
    assert completed("mlfusion", "probe", "--model", "dinov2-vit-b") == ["dinov2-vit-b14"]
    assert "dtd" in completed("mlfusion", "extract", "--dataset", "d")
    assert completed("mlfusion", "probe", "--probe", "alf,aa") == ["alf,aat"]


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_is_shown_for_each_shell(shell: str) -> None:
    environment = os.environ | {"_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"}
    done = subprocess.run(
        [*MLFUSION, "--show-completion", shell], env=environment, capture_output=True, text=True, check=True
    )
    assert "_MLFUSION_COMPLETE=complete_" + shell in done.stdout and "mlfusion" in done.stdout


def test_bash_completes_by_the_script_that_is_shown(tmp_path: Path) -> None:
    (tmp_path / "mlfusion").write_text(f'#!/bin/sh\nexec {sys.executable} -m mlfusion "$@"\n')
    (tmp_path / "mlfusion").chmod(0o755)
    script = (
        "source <(_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION=1 mlfusion --show-completion bash); "
        "COMP_WORDS=(mlfusion results com); COMP_CWORD=2; _mlfusion_completion mlfusion; echo ${COMPREPLY[@]}"
    )
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run(["bash", "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["compare"]
