"""What the house promises of itself: which rooms open onto which, what is exported, what the Makefile and README say."""

import ast
import importlib
import re
import subprocess
from pathlib import Path

import numpy as np
import pytest
import zarr
from tiny import save_images, save_model

import mlfusion
from mlfusion import cli

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "mlfusion"

# Who may import whom. Neither wing imports the other: extraction and probing meet in the store, and only workflows has both.
SHARED = {"errors", "shapes", "specs", "system"}  # any room above them may import these
DOORS: dict[str, set[str]] = {
    "errors": set(),
    "shapes": set(),
    "specs": {"errors"},
    "system": {"errors", "specs"},
    "models": SHARED,
    "datasets": SHARED,
    "store": SHARED,
    "results": SHARED,
    "extraction": SHARED | {"store", "models", "datasets"},
    "probing": SHARED | {"store", "results", "statistics"},
    "statistics": SHARED | {"results"},
    "report": SHARED | {"results", "statistics", "models", "datasets"},
    "analysis": SHARED | {"results", "statistics", "report", "store", "models", "datasets"},
    "workflows": SHARED | {"extraction", "probing", "store", "results", "statistics", "models", "datasets"},
    "embedded": SHARED,
}
HEAVY: dict[str, set[str]] = {  # libraries that only these rooms may name
    "transformers": {"models", "embedded"},
    "zarr": set(),
    "zarrs": set(),  # like tensorstore it starts threads that no fork survives; readers work in forks
    "tensorstore": set(),
    "h5py": {"store"},
    "datasets": {"datasets"},
    "altair": {"report"},
    "vl_convert": {"report"},
    "itables": {"report"},
    "sklearn": {"datasets", "statistics"},
    "scipy": {"statistics"},
    "joblib": {"probing"},
    "pandas": {"results"},
    "sqlite3": {"results"},
    "wandb": {"results"},
    "mlflow": {"results"},
    "torch": {"models", "extraction", "probing", "store", "system", "results", "workflows", "embedded", "shapes"},
}


def rooms() -> dict[str, list[Path]]:
    found: dict[str, list[Path]] = {}
    for path in PACKAGE.rglob("*.py"):
        inner = path.relative_to(PACKAGE)
        name = inner.parts[0] if len(inner.parts) > 1 else inner.stem
        if name not in ("__init__", "__main__", "cli"):
            found.setdefault(name, []).append(path)
    return found


def imports(path: Path) -> set[str]:
    """The modules that a file names; relative imports and a bare `import mlfusion` would hide some, and are not used."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.module and not node.level, f"{path}: a relative import"
            names.update([node.module] if node.module != "mlfusion" else [f"mlfusion.{a.name}" for a in node.names])
        elif isinstance(node, ast.Import):
            assert "mlfusion" not in [alias.name for alias in node.names], f"{path}: import mlfusion"
            names.update(alias.name for alias in node.names)
    return names


def test_every_room_has_its_doors_written_down():
    assert set(rooms()) == set(DOORS)


@pytest.mark.parametrize("room", sorted(DOORS))
def test_rooms_open_only_onto_their_neighbours(room):
    for path in rooms()[room]:
        inside = {name.split(".")[1] for name in imports(path) if name.startswith("mlfusion.")} - {room, "shapes"}
        assert inside <= DOORS[room], path.name


@pytest.mark.parametrize("library", sorted(HEAVY))
def test_heavy_libraries_have_a_home(library):
    users = {room for room, paths in rooms().items() for p in paths for n in imports(p) if n.split(".")[0] == library}
    assert users <= HEAVY[library]


def test_every_module_opens_with_a_sentence_of_its_own():
    openings: dict[str, Path] = {}
    for path in PACKAGE.rglob("*.py"):
        said = ast.get_docstring(ast.parse(path.read_text())) or ""
        opening = said.partition("\n\n")[0]
        assert re.search(r"[.:]$", opening), f"{path}: {opening!r} is no sentence"
        assert len(opening.split()) >= 5, f"{path}: {opening!r} says too little"
        assert openings.setdefault(opening, path) == path, f"{path} opens as {openings[opening]} does"


# --- size ------------------------------------------------------------------------------------------------------------

LINES, FUNCTION_LINES = 450, 60
# What is larger, and what would make it smaller. An exception that is no longer needed has to go.
LONG_FILES: dict[str, str] = {}
LONG_FUNCTIONS: dict[str, str] = {}
# Comments that switch a check off, by file. No file may have more of them, and one that has fewer gets its lower number.
SWITCHED_OFF = {
    "cli/options.py": 1,
    "datasets/columns.py": 1,
    "datasets/hub.py": 1,
    "datasets/tars.py": 1,
    "models/preprocessing/steps.py": 1,
    "probing/jobs.py": 1,
    "probing/training/optimizer.py": 1,
    "report/figures/charts.py": 2,
    "results/arrays.py": 1,
    "store/features.py": 2,
    "store/reader.py": 3,
    "workflows/advice.py": 1,
}
OFF = re.compile(r"#\s*(?:noqa|type:\s*ignore|ruff:\s*noqa|mypy:|fmt:\s*off)")


def named(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


def functions(path: Path) -> dict[str, int]:
    """Lines of every function, its docstring included."""
    found = [
        node
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
    ]
    return {f"{named(path)}::{node.name}": (node.end_lineno or 0) - node.lineno + 1 for node in found}


def test_files_and_functions_are_short():
    files = {named(path): len(path.read_text().splitlines()) for path in PACKAGE.rglob("*.py")}
    assert {name for name, lines in files.items() if lines > LINES} == set(LONG_FILES)
    lengths = [item for path in PACKAGE.rglob("*.py") for item in functions(path).items()]
    assert {name for name, lines in lengths if lines > FUNCTION_LINES} == set(LONG_FUNCTIONS)


def test_few_checks_are_switched_off_and_ever_fewer():
    found = {named(path): len(OFF.findall(path.read_text())) for path in sorted(PACKAGE.rglob("*.py"))}
    assert {name: count for name, count in found.items() if count} == SWITCHED_OFF


# --- what is exported, and what pages say ----------------------------------------------------------------------------


def test_exports_are_there_and_sorted():
    assert mlfusion.__all__ == sorted(mlfusion.__all__)
    for name in mlfusion.__all__:
        assert callable(getattr(mlfusion, name))
    importlib.import_module("mlfusion.extraction.run")  # importing the rooms must not put modules in place of functions
    assert callable(mlfusion.extract)
    assert callable(mlfusion.probe)


def targets() -> list[str]:
    return re.findall(r"^([a-z-]+):.*##", (ROOT / "Makefile").read_text(), re.M)


@pytest.mark.parametrize("target", ["demo", "study", "extract", "probe", "run", "report", "models", "datasets"])
def test_targets_call_commands_that_exist(target):
    said = subprocess.run(
        ["make", "-n", target, "MODEL=m", "DATASET=a b"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    words = re.search(r"/mlfusion (\w+)", said)
    assert words
    assert words[1] in {command.callback.__name__ for command in cli.app.registered_commands}
    if target in ("extract", "probe"):
        assert "--model 'm' --dataset 'a b'" in said


def test_make_alone_lists_every_target():
    said = subprocess.run(["make"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert all(re.search(f"^{target} ", said, re.M) for target in targets())


def test_the_readme_names_what_exists():
    text = (ROOT / "README.md").read_text()
    for target in re.findall(r"(?:^|`)make ([a-z]+)", text, re.M):
        assert target in targets(), target
    for command in re.findall(r"(?:^|`)mlfusion ([a-z]+)", text, re.M):
        assert command in {c.callback.__name__ for c in cli.app.registered_commands} | {"cache", "results"}, command
    for group, app in {"cache": cli.cache_app, "results": cli.results_app}.items():
        for command in re.findall(rf"(?:^|`)mlfusion {group} ([a-z]+)", text, re.M):
            assert command in {c.name or c.callback.__name__ for c in app.registered_commands}, command
    [tree] = fenced(ROOT / "README.md", "tree")
    assert len(tree.splitlines()) <= 15


PAGES = [
    path
    for pattern in ("*.md", "docs/**/*.md", "pipelines/*.md", "cache/README.md", "mlfusion/**/*.md")
    for path in sorted(ROOT.glob(pattern))
]


def headings(page: Path) -> set[str]:
    """The anchors of a page, as GitHub makes them of its headings."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S)
    return {re.sub(r"[^\w -]", "", line.lower()).replace(" ", "-") for line in re.findall(r"^#+ (.+)", text, re.M)}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_the_links_of_a_page_lead_somewhere(page):
    for path, anchor in re.findall(r"\]\(([^)#:\s]*)#?([^)\s:]*)\)", page.read_text()):
        goal = page.parent / path if path else page
        assert goal.exists(), path
        assert not anchor or anchor in headings(goal), f"{path}#{anchor}"


def fenced(path: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", path.read_text(), re.M | re.S)


def test_the_caches_readme_shows_the_tree_that_is_written(tmp_path):
    model, data = save_model("vit", tmp_path / "m"), save_images(tmp_path / "d", {"train": 3, "test": 2})
    [one] = mlfusion.extract(str(model), str(data), splits="train", tokens="cls,ap,all@last", cache=tmp_path / "cache")
    mlfusion.extract(str(model), str(data), splits="train", tokens="ap@0", cache=tmp_path / "cache", format="hdf5")

    def general(path: Path) -> str:
        text = path.relative_to(tmp_path / "cache").as_posix().replace(one.entry.key, "KEY")
        return re.sub(r"(names|runs)/\w+\.json", r"\1/ID.json", text)

    written = {general(path) for path in (tmp_path / "cache").rglob("*") if path.is_file()}
    [tree] = fenced(ROOT / "cache" / "README.md", "tree")
    described = {line.split("  ")[0].strip() for line in tree.splitlines() if line.strip()}
    assert described == written


def test_the_code_in_the_caches_readme_runs(tmp_path, monkeypatch):
    model, data = save_model("vit", tmp_path / "m"), save_images(tmp_path / "d", {"train": 3, "test": 2})
    cache = tmp_path / "cache"
    [one] = mlfusion.extract(str(model), str(data), splits="train", cache=cache)
    mlfusion.extract(str(model), str(data), splits="train", tokens="ap@0", cache=cache, format="hdf5")
    monkeypatch.chdir(tmp_path)
    held: dict[str, np.ndarray] = {}
    for code in fenced(ROOT / "cache" / "README.md", "python"):
        exec(code.replace("KEY", one.entry.key), held)
    np.testing.assert_array_equal(held["tokens"], one.entry.read([1, 2, 3, 4], ["cls", "ap"]))
    np.testing.assert_array_equal(held["first"], one.entry.read([0], ["ap"]))
    assert held["labels"].tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert held["ids"] == list(one.entry.samples.ids)
    for dtype in ("bfloat16", "int8"):
        [coarse] = mlfusion.extract(str(model), str(data), splits="train", cache=cache, dtype=dtype)
        stored = zarr.open_group(coarse.entry.path / "tokens", mode="r")["cls.ap.L1-4"][:]
        np.testing.assert_array_equal(held[f"from_{dtype}"](stored), coarse.entry.read([1, 2, 3, 4], ["cls", "ap"]))


@pytest.mark.slow
def test_the_code_in_the_readme_runs_on_the_embedded_default(capsys):
    """The real model on the real digits, offline: what the README shows first."""
    [code] = fenced(ROOT / "README.md", "python")
    exec(code, held := {})
    assert held["features"].tokens.shape == (1442, 8, 2, 128)
    said = dict(line.split() for line in capsys.readouterr().out.splitlines())
    assert float(said["cls-last/linear"]) > 0.95
    assert float(said["cls+ap-all-layers/attentive"]) > 0.97
