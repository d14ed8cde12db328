"""Common ground of all tests: one thread (tiny heads on many threads crawl), no network, checked shapes, the real data."""

import os
from pathlib import Path

for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ.setdefault(variable, "1")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["COLUMNS"] = "160"

import jaxtyping
import pytest
import torch
from axes import modules_with_axes

torch.set_num_threads(1)

SHARED = Path(__file__).parent.parent.parent / "shared" / "data"

jaxtyping.install_import_hook(modules_with_axes(), "axes.check")  # before anything of mlfusion is imported


@pytest.fixture(scope="session")
def shared() -> Path:
    """Real weights and photographs, which lie beside a checkout of the project's own developers and nowhere else."""
    if not SHARED.is_dir():
        pytest.skip("needs ../shared/data (real weights and images), which is not part of the project")
    return SHARED


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Each test works in a folder of its own, with a cache of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFUSION_CACHE", raising=False)
    return tmp_path
