"""Runs every command of docs/medical.md, on made scans of 16 bits whose slices belong to patients."""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

PAGE = Path(__file__).parent.parent / "docs" / "medical.md"
PATIENTS, SLICES, MALIGNANT = 40, 3, 10


def scans(folder: Path) -> None:
    """Twelve-bit slices in files of 16 bits, a malignant one with a brighter spot, and their table."""
    random = np.random.default_rng(0)
    lines = ["path,label,patient"]
    across, down = np.meshgrid(np.arange(48), np.arange(48))
    for patient in range(PATIENTS):
        name, sick = f"p{patient:02}", patient < MALIGNANT
        (folder / name).mkdir()
        tissue = 900 + 300 * random.random() + 200 * np.sin(across / random.uniform(3, 9) + down / random.uniform(3, 9))
        x, y = random.integers(14, 34, 2)
        for place in range(SLICES):
            spot = (1400 if sick else 500) * np.exp(-((across - x) ** 2 + (down - y) ** 2) / (20 + 5 * place))
            pixels = np.clip(tissue + spot + random.normal(0, 60, (48, 48)), 0, 4095).astype(np.uint16)
            Image.fromarray(pixels).save(folder / name / f"s{place}.png")
            lines.append(f"{name}/s{place}.png,{'malignant' if sick else 'benign'},{name}")
    (folder / "scans.csv").write_text("\n".join(lines) + "\n")


def commands() -> list[str]:
    blocks = re.findall(r"^```bash\n(.*?)^```", PAGE.read_text(), re.M | re.S)
    return [line for block in blocks for line in block.splitlines() if line]


@pytest.mark.long
def test_the_commands_of_the_page_lead_to_a_verdict(tmp_path):
    scans(tmp_path)
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    said: dict[str, str] = {}
    for code in commands():
        done = subprocess.run(["bash", "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, f"{code}\n{done.stdout}\n{done.stderr}"
        said[" ".join(code.split()[1:3])] = done.stdout + done.stderr
    assert re.search(r"split +images +groups", said["data scans.csv"])
    assert "values use" in said["data scans.csv"]  # the hint to --window
    assert "chosen on: validation (24 images)" in said["probe --dataset"]
    assert "cannot be told: 8 test groups" in said["results compare"]  # ten malignant patients are too few
    assert "malignant" in (tmp_path / "report.html").read_text()


def test_every_command_of_the_page_is_one_of_the_program():
    assert len(commands()) >= 6
    assert all(line.startswith("mlfusion ") for line in commands())
