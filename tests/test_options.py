"""Options are defined once: what is typed, printed, written in a recipe or documented is made from the same definitions."""

import dataclasses
import importlib
import inspect
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer
from hypothesis import given, settings
from hypothesis import strategies as st
from tiers import examples
from tiny import save_images, save_model
from typer.testing import CliRunner

import mlfusion
from mlfusion import cli
from mlfusion.cli import reference
from mlfusion.cli.options import with_options
from mlfusion.errors import BadOption
from mlfusion.probing import grids
from mlfusion.specs.definitions import (
    EFFECTS,
    Options,
    all_definitions,
    command,
    definitions,
    distribute,
    from_words,
    nested_classes,
)
from mlfusion.specs.identity import COMPUTES, DTYPES, HOOKS
from mlfusion.specs.options import (
    FORMATS,
    GRID_NAMES,
    LABEL_KINDS,
    PRECISIONS,
    PREPARATIONS,
    ComputeOptions,
    FeatureOptions,
    ReadOptions,
    RunOptions,
    SearchOptions,
    StorageOptions,
    TrainingOptions,
)
from mlfusion.specs.selection import PruneOptions

ROOT = Path(__file__).parent.parent

# --- what every option says of itself --------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", reference.option_classes())
def test_every_field_is_defined_and_classified(kind: type[Options]) -> None:
    fields = {field.name for field in dataclasses.fields(kind)}
    assert fields == {name for name, _ in definitions(kind)} | set(nested_classes(kind))
    for name, one in definitions(kind):
        assert one.effect in EFFECTS, name
        assert re.match(r"[A-Z]", one.help), f"the help of {name} is a sentence"
        assert not re.match(r"(Of|That|Which|As|Where|Likewise)\b", one.help), name
        assert one.help.endswith("."), name
    assert kind.__dataclass_params__.frozen


def test_no_name_means_two_options_of_one_stage() -> None:
    for kinds in ((FeatureOptions, ComputeOptions), (SearchOptions, TrainingOptions, StorageOptions)):
        names = [word for kind in kinds for one in all_definitions(kind).values() for word in (one.name, *one.former)]
        assert len(names) == len(set(names))


def documented(section: str) -> dict[str, str]:
    """Option → its class, in a table of docs/method.md."""
    text = (ROOT / "docs" / "method.md").read_text().partition(f"### `{section}`")[2].partition("\n#")[0]
    return dict(re.findall(r"^\| `?([^|`]+?)`? \| ([^|]+?) \|", text, re.M))


@pytest.mark.parametrize(
    ("section", "kinds"),
    [
        ("mlfusion extract", (FeatureOptions, ComputeOptions)),
        ("mlfusion probe", (SearchOptions, TrainingOptions, StorageOptions)),
    ],
)
def test_the_pages_table_classifies_every_option_and_the_machine(
    section: str, kinds: tuple[type[Options], ...]
) -> None:
    """A field that is added to a class needs a row; and the row says what the definition says."""
    short = {"key": "in the key", "stream": "names streams", "id": "in the id"}
    table = documented(section)
    for kind in kinds:
        for name, one in all_definitions(kind).items():
            assert table.get(f"--{one.flag}") == short.get(one.effect, EFFECTS[one.effect]), name
    for name in ("threads", "memory" if section == "mlfusion extract" else "batch size"):
        assert table[name] in {"equal to rounding", "equal to the bit", "in the id"}


def test_the_reference_page_is_what_the_definitions_give() -> None:
    assert (ROOT / "docs" / "reference.md").read_text() == reference.page(), (
        "python -m mlfusion.cli.reference > docs/reference.md"
    )


# --- what is printed is read again -----------------------------------------------------------------------------------

TEXT = st.text(
    st.characters(codec="utf-8", exclude_characters="\0", exclude_categories=("Cs",)), min_size=1, max_size=8
)
SETTING = st.one_of(
    TEXT.filter(lambda text: "," not in text),
    st.integers(-(10**6), 10**6),
    st.floats(allow_nan=False, allow_infinity=False),
    st.booleans(),
    st.none(),
)
READ: Any = st.builds(
    ReadOptions,
    image_column=st.none() | TEXT,
    label_column=st.none() | TEXT,
    id_column=st.none() | TEXT,
    image_root=st.none() | TEXT,
    target=st.none() | st.sampled_from(LABEL_KINDS),
    split_ratio=st.sampled_from([None, "0.8/0.2", "80/10/10"]),
    split_seed=st.integers(0, 99),
    group_column=st.none() | TEXT,
    group_pattern=st.sampled_from([None, "(p\\d+)_", "-(.)"]),
    exif_transpose=st.booleans(),
    window=st.sampled_from([None, "auto", "0,4095"]),
    max_pixels=st.integers(1, 10**9),
    config=st.none() | TEXT,
    stream=st.booleans(),
)
FEATURES: Any = st.builds(
    FeatureOptions,
    read=READ,
    splits=st.sampled_from([("train", "test"), ("train", "test=validation"), ("test",)]),
    layers=st.sampled_from(["all", "last", "1-4,12", "0"]),
    tokens=st.sampled_from(["cls,ap", "all@last", "cls+ap@1-3,grid4@6,12"]),
    hook=st.none() | st.sampled_from(HOOKS),
    settings=st.dictionaries(st.from_regex(r"[a-z_]{1,6}", fullmatch=True), SETTING, max_size=3),
    preprocess=st.sampled_from(PREPARATIONS),
    size=st.none() | st.integers(1, 2000),
    views=st.lists(st.sampled_from(["plain", "flip", "crop1", "crop12"]), min_size=1, unique=True),
    view_seed=st.integers(0, 99),
    compute=st.sampled_from([*COMPUTES, "auto"]),
    dtype=st.sampled_from(DTYPES),
)
COMPUTE: Any = st.builds(
    ComputeOptions,
    device=st.sampled_from(["auto", "cpu", "cuda:1"]),
    batch_size=st.none() | st.integers(1, 512),
    workers=st.integers(0, 64),
    format=st.sampled_from(FORMATS),
    skip_bad=st.booleans(),
)
SEARCH: Any = st.builds(
    SearchOptions,
    grid=st.sampled_from(GRID_NAMES),
    seeds=st.lists(st.integers(0, 10**6), min_size=1, unique=True),
    shots=st.lists(st.none() | st.integers(2, 64), min_size=1, unique=True),
    halving=st.booleans(),
    smoothing=st.floats(0, 1, exclude_max=True),
    drop_duplicates=st.booleans(),
    precision=st.sampled_from(PRECISIONS),
)
TRAINING: Any = st.builds(
    TrainingOptions, device=st.sampled_from(["cpu", "mps"]), memory=st.none() | st.integers(1, 10**13)
)


def typed(line: str, **kinds: type[Options]) -> dict[str, Options]:
    """The options that a command with these classes gets from a printed line."""
    got: dict[str, Options] = {}

    def run(**options: Any) -> None:
        got.update(options)

    parameters = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, annotation=kind) for name, kind in kinds.items()
    ]
    run.__signature__ = inspect.Signature(parameters)
    app = typer.Typer()
    app.command()(with_options(run))
    done = CliRunner().invoke(app, shlex.split(line)[2:])
    assert done.exit_code == 0, done.output
    return got


@pytest.mark.slow
@settings(max_examples=examples(60), deadline=None)
@given(FEATURES, COMPUTE)
def test_stage_one_is_read_as_it_is_printed(features: FeatureOptions, compute: ComputeOptions) -> None:
    line = command("extract", [*features.words(), *compute.words()])
    assert from_words(FeatureOptions, features.words()) == features
    assert typed(line, features=FeatureOptions, compute=ComputeOptions) == {"features": features, "compute": compute}


@settings(max_examples=examples(60), deadline=None)
@given(SEARCH, TRAINING)
def test_stage_two_is_read_as_it_is_printed(search: SearchOptions, training: TrainingOptions) -> None:
    line = command("probe", [*search.words(), *training.words()])
    assert typed(line, search=SearchOptions, training=TrainingOptions) == {"search": search, "training": training}


def test_words_that_are_no_option_are_refused() -> None:
    for words in (["--colour", "red"], ["--split-seed", "x"], ["--label-column"]):
        with pytest.raises(BadOption):
            from_words(ReadOptions, words)
    assert from_words(ReadOptions, ["--carve", "0.8/0.2", "--upright"]) == ReadOptions(
        split_ratio="0.8/0.2", exif_transpose=True
    )


def test_what_is_at_its_default_is_not_printed() -> None:
    for kind in reference.option_classes():
        assert kind().words() == []


def test_a_former_name_is_understood_and_not_shown() -> None:
    line = "mlfusion x --carve 0.8/0.2 --carve-seed 3 --upright --view flip,plain"
    got = typed(line, features=FeatureOptions)["features"]
    read = ReadOptions(split_ratio="0.8/0.2", split_seed=3, exif_transpose=True)
    assert got == FeatureOptions(read=read, views=("flip", "plain"))
    shown = CliRunner().invoke(cli.app, ["extract", "--help"]).output
    assert "--split-ratio" in shown and "--carve" not in shown
    done = CliRunner().invoke(cli.app, ["extract", "--carve", "0.8/0.2", "--split-ratio", "0.5/0.5"])
    assert done.exit_code == 1 and "are one option" in done.output


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SearchOptions(grid="huge"), "--grid huge: allowed are paper, quick"),
        (lambda: SearchOptions(seeds="0,x"), "--seeds 0,x: allowed is a list of whole numbers from 0, such as 0,1,2"),
        (lambda: SearchOptions(shots=(1,)), "--shots 1: allowed is a list of whole numbers from 2"),
        (lambda: SearchOptions(smoothing=1), "--smoothing 1: allowed is from 0 to below 1"),
        (lambda: TrainingOptions(memory="4"), "--memory 4: allowed is a number with one of kB, MB, GB, TB"),
        (lambda: ComputeOptions(device="tpu"), "--device tpu: allowed are auto, cpu, cuda"),
        (lambda: FeatureOptions(layers="first"), "--layers first: no layer named 'first'"),
        (lambda: FeatureOptions(views="plain,side"), "--views plain,side: no view named 'side'"),
        (lambda: ReadOptions(split_ratio="0.9/0.2"), "--split-ratio 0.9/0.2: allowed are shares of train/test"),
        (lambda: PruneOptions(older="30"), "--older 30: allowed is a number with one of h, d, w, such as 30d"),
        (lambda: RunOptions(seeds=[]), "--seeds : allowed is a list of whole numbers"),
        (lambda: mlfusion.extract("m", "d", layer="last"), "no option named 'layer'. Did you mean layers?"),
        (lambda: mlfusion.extract("m", "d", foo=1, bar=2), "no option named 'foo', 'bar'."),
        (lambda: mlfusion.extract("m", "d", view="flip", views="plain"), "views is given twice, by another name too"),
        (lambda: FeatureOptions(read=None), "read is None; allowed is a value of ReadOptions"),
        (lambda: FeatureOptions(splits="=test"), "--split =test: allowed are names of splits"),
        (lambda: FeatureOptions(splits="train="), "--split train=: allowed are names of splits"),
        (lambda: FeatureOptions(settings={"a": float("nan")}), "a = nan: allowed are text without commas"),
        (lambda: FeatureOptions(settings={"a": "b,c"}), "a = 'b,c': allowed are text without commas"),
        (lambda: FeatureOptions(settings=(("a", 1), (1, 2))), "1 names no setting; allowed are names such as"),
        (lambda: SearchOptions(seeds=[0, 2**63]), "allowed is a list of whole numbers from 0, such as 0,1,2, not 9223"),
        (lambda: SearchOptions(shots="all,all"), "--shots all,all: 'all' comes twice"),
        (lambda: mlfusion.plan("m", "d", trial=float("nan")), "--trial nan: allowed is a number of seconds from 0"),
        (lambda: mlfusion.probe("digits", probes=[]), "--probe names no probe; allowed are names"),
        (lambda: mlfusion.plan("m", "d", trial=-5), "--trial -5: allowed is a number of seconds from 0"),
        (
            lambda: mlfusion.extract("m", "d", read=ReadOptions(split_ratio="0.5/0.5"), split_ratio="0.9/0.1"),
            "split_ratio is a field of read, which is given too",
        ),
    ],
)
def test_a_wrong_value_is_refused_with_what_is_allowed(make: Any, message: str) -> None:
    with pytest.raises(BadOption, match=re.escape(message)):
        make()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["extract", "--batch-size", "0"], "--batch-size 0: allowed are whole numbers from 1"),
        (["extract", "--size", "0"], "--size 0: allowed are whole numbers from 1"),
        (["advise", "--images", "0"], "--images 0: allowed are whole numbers from 1"),
        (["extract", "--split-seed", "0", "--carve-seed", "5"], "--split-seed and --carve-seed are one option"),
    ],
)
def test_nought_and_nothing_are_values_too(words: list[str], message: str) -> None:
    done = CliRunner().invoke(cli.app, words)
    assert done.exit_code == 1 and message in " ".join(str(done.exception or done.output).split()) + done.output


def test_python_knows_every_name_that_the_command_line_knows() -> None:
    [options] = distribute(
        {"view": 3, "carve": "0.8/0.2", "split": "train", "set": {"hidden_act": "relu"}}, FeatureOptions
    )
    assert options == FeatureOptions(
        views=("plain", "flip", "crop1"),
        splits=("train",),
        settings=(("hidden_act", "relu"),),
        read=ReadOptions(split_ratio="0.8/0.2"),
    )


# --- what rows print makes them again --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str, str]:
    """A model, a folder of images, and a table of the same images with two columns of labels."""
    root = tmp_path_factory.mktemp("a place with 'quotes'")
    model, images = save_model("vit", root / "tiny vit"), save_images(root / "colours", {"train": 10, "test": 4})
    table = root / "table"
    table.mkdir()
    for split, name in (("train", "train"), ("test", "test"), ("test", "validation")):
        files = sorted((images / split).rglob("*.png"))
        lines = [f"{n},{path.relative_to(images)},{path.parent.name},{n % 2}" for n, path in enumerate(files)]
        (table / f"{name}.csv").write_text("\n".join(["number,where,colour,odd", *lines]) + "\n")
    return str(model), str(images), str(table)


TABLE = {"image_column": "where", "id_column": "number"}
CASES: list[tuple[bool, dict[str, Any], dict[str, Any]]] = [
    (False, {}, {}),
    (True, {**TABLE, "label_column": "odd"}, {"shots": (4,)}),
    (True, {**TABLE, "label_column": "colour", "splits": "train,test=validation"}, {"seeds": (3,)}),
    (False, {"split_ratio": "0.7/0.3", "split_seed": 5}, {"smoothing": 0.1}),
    (False, {"size": 48, "views": "plain,flip", "dtype": "int8"}, {"halving": True}),
    (False, {"preprocess": "fast", "compute": "bfloat16", "hook": "block"}, {"precision": "bfloat16"}),
    (False, {"settings": {"hidden_act": "relu"}, "exif_transpose": True, "dtype": "float32"}, {"grid": "paper"}),
]


@pytest.mark.slow
@pytest.mark.parametrize(("tabular", "features", "search"), CASES)
def test_the_printed_commands_give_the_same_keys_and_ids(
    tabular: bool,
    features: dict[str, Any],
    search: dict[str, Any],
    sources: tuple[str, str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    grid = grids.Grid(learning_rates=(1e-1,), weight_decays=(1e-2,), dropouts=(0.0,), epochs=2, least_steps=5)
    monkeypatch.setitem(grids.SEARCH_GRIDS, "quick", grid)
    monkeypatch.setitem(grids.SEARCH_GRIDS, "paper", grid)
    model, images, table = sources
    options = {**({"image_root": images} if tabular else {}), **features}
    mlfusion.extract(model, table if tabular else images, tokens="cls,ap", **options)
    asked = {"grid": "quick", "seeds": (0,), **search}
    done = mlfusion.probe(
        table if tabular else images, model=None, probes="cls-last/linear,cls-layer-1/linear", **asked
    )
    fresh = tmp_path / "fresh"
    fresh.mkdir()
    monkeypatch.chdir(fresh)
    for row in done.rows:
        for line in (row.extract_command(), row.probe_command()):
            ran = CliRunner().invoke(cli.app, shlex.split(line)[1:])
            assert ran.exit_code == 0, (line, ran.output)
    again = mlfusion.Results("results").rows()
    assert {row.id for row in again} == {row.id for row in done.rows}
    assert {row.features for row in again} == {row.features for row in done.rows}
    assert {row.test for row in again} == {row.test for row in done.rows}


# --- every command is a function -------------------------------------------------------------------------------------


def resolve(dotted: str) -> Any:
    """The object of a dotted name; attributes of the package before its modules."""
    found: Any = mlfusion
    name = "mlfusion"
    for part in dotted.split(".")[1:]:
        name += f".{part}"
        try:
            found = getattr(found, part) if not inspect.ismodule(getattr(found, part, None)) else None
        except AttributeError:
            found = None
        found = found if found is not None else importlib.import_module(name)
    return found


def test_every_command_has_its_python_call() -> None:
    assert set(reference.CALLS) == {name for name, _ in reference.commands()}
    for dotted in reference.CALLS.values():
        assert callable(resolve(dotted)), dotted
        assert inspect.getdoc(resolve(dotted)), dotted


@pytest.mark.parametrize("name", [name for name, _ in reference.commands()])
def test_every_help_is_made_of_sentences(name: str) -> None:
    found = dict(reference.commands())[name]
    texts = [found.help, *(param.help for param in found.params if not param.hidden and param.name != "help")]
    for text in texts:
        words = " ".join((text or "").split())
        assert re.match(r"[A-Z]", words), words
        assert not re.match(r"(Of|That|Which|As|Where|Likewise|How)\b", words), words
