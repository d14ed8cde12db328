"""Common ground of all tests: one thread (tiny heads on many threads crawl), no network, checked shapes, tiers, real data."""

import os
from pathlib import Path

for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ.setdefault(variable, "1")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["COLUMNS"] = "160"

import hypothesis
import jaxtyping
import plain
import pytest
import tiers
import torch
from axes import modules_with_axes

torch.set_num_threads(1)
if plain.PLAIN:
    plain.hide()  # before anything of mlfusion is imported

SHARED = Path(__file__).parent.parent.parent / "shared" / "data"

jaxtyping.install_import_hook(modules_with_axes(), "axes.check")  # before anything of mlfusion is imported

hypothesis.settings.register_profile("short", deadline=None)
hypothesis.settings.register_profile("long", max_examples=1000, deadline=None)
hypothesis.settings.load_profile("long" if tiers.LONG else "short")


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


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave long and slow tests to their tiers; note which tests need the real data."""
    absent = {"long": not tiers.LONG, "slow": not tiers.SLOW}
    later = [item for item in items if any(absent.get(mark.name) for mark in item.iter_markers())]
    items[:] = [item for item in items if item not in later]
    config.hook.pytest_deselected(items=later)
    for item in items:
        if "shared" in getattr(item, "fixturenames", ()):
            item.user_properties.append(("needs", "shared"))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say what depends on the machine: the tests that need the real data, and those for whose long form there was no time."""

    def tests(outcome: str, what: str) -> set[str]:
        found = terminalreporter.stats.get(outcome, [])
        return {r.nodeid for r in found if what in dict(getattr(r, "user_properties", ()))}

    ran, skipped = tests("passed", "needs") | tests("failed", "needs"), tests("skipped", "needs")
    if skipped:
        terminalreporter.line(f"tests that need ../shared/data, which is not there, and were skipped: {len(skipped)}")
    if ran:
        terminalreporter.line(f"tests that need ../shared/data, and ran: {len(ran)}")
    if cut := tests("passed", "cut") | tests("failed", "cut"):
        terminalreporter.line(
            f"tests that ran in their short form, as the {tiers.MINUTES:g} minutes were over: {len(cut)}"
        )
