"""Runs what docs/cluster.md tells people to type, and its job files as a scheduler runs them: once for each index."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import save_images

PAGE = Path(__file__).parent.parent / "docs" / "cluster.md"


def blocks() -> list[tuple[str, str]]:
    """(name, code) of each block of shell code, in order; the name is empty for commands to type."""
    return [
        (name.strip(), code) for name, code in re.findall(r"^```bash([^\n]*)\n(.*?)^```", PAGE.read_text(), re.M | re.S)
    ]


def node(root: Path, **variables: str) -> dict[str, str]:
    """The environment of a node: a shared folder, a local disk, the command on the path."""
    folders = {"LAB": root / "lab", "TMPDIR": root / "local"}
    for folder in folders.values():
        folder.mkdir(exist_ok=True)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return os.environ | {name: str(folder) for name, folder in folders.items()} | {"PATH": path} | variables


def run(code: str, root: Path, environment: dict[str, str]) -> str:
    done = subprocess.run(["bash", "-ec", code], cwd=root, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{code}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.mark.long
def test_the_commands_and_jobs_of_the_page_run(tmp_path):
    birds = save_images(tmp_path / "birds", {"train": 8, "test": 4}, ["finch", "owl"])
    (tmp_path / "pairs.txt").write_text(f"formula-vit digits\nformula-vit {birds}\n")
    said: list[str] = []
    for name, code in blocks():
        if name == "hub":  # needs a network
            continue
        indices = re.findall(r"--array=(\d+)-(\d+)", code)
        for index in range(int(indices[0][0]), int(indices[0][1]) + 1) if indices else (0,):
            job = {"SLURM_ARRAY_TASK_ID": str(index), "SLURM_CPUS_PER_TASK": "1"} if indices else {}
            said.append(run(code, tmp_path, node(tmp_path, **job)))
    assert (tmp_path / "report.html").stat().st_size > 10_000
    rows = run('mlfusion results export rows.csv --results "$LAB/results" && cat rows.csv', tmp_path, node(tmp_path))
    for data, probe in [
        ("birds", "cls-last/linear"),
        ("digits", "cls+ap-all-layers/attentive"),
        ("digits", "cls-last/ridge"),
    ]:
        assert any(data in line and probe in line for line in rows.splitlines())
    entries = run('mlfusion cache ls --cache "$LAB/cache"', tmp_path, node(tmp_path))
    assert "all" in entries  # brought over from the local disk


def test_job_files_take_one_line_of_the_list_for_each_index():
    jobs = {name: code for name, code in blocks() if name.endswith(".sbatch")}
    [pairs] = re.findall(r"^```text\n(.*?)^```", PAGE.read_text(), re.M | re.S)
    assert sorted(jobs) == ["extract.sbatch", "probe.sbatch"]
    for name, code in jobs.items():
        assert f"--array=1-{len(pairs.splitlines())}" in code, name
        subprocess.run(["bash", "-n"], input=code, text=True, check=True)
