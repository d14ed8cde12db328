"""Every recipe that ships is sound and says what it costs; every fault of one that is not is told at once, with its line."""

import re
from pathlib import Path

import pytest

from mlfusion import cli, datasets, models
from mlfusion.errors import BadRecipe
from mlfusion.specs.definitions import all_definitions
from mlfusion.specs.names import parse_tokens
from mlfusion.specs.options import FeatureOptions, SearchOptions
from mlfusion.system.references import parse_model
from mlfusion.workflows import recipe

PIPELINES = Path(__file__).parent.parent / "pipelines"
EVERY = sorted(PIPELINES.rglob("*.toml"))
STUDIES = [path for path in EVERY if path.name != "formula-vit.toml"]
PAPER = [path for path in EVERY if path.parent.name == "paper"]


def named(path: Path) -> str:
    return path.relative_to(PIPELINES).as_posix()


@pytest.mark.parametrize("path", EVERY, ids=named)
def test_every_recipe_says_how_to_run_it_what_it_costs_and_what_to_expect(path):
    opening, said = recipe.about(path)
    assert opening
    assert set(said) == {"Run", "Cost", "Expect"}
    assert all(said.values())
    assert named(path) in said["Run"] or "make demo" in said["Run"]


def test_a_recipe_without_a_head_says_nothing_of_itself(tmp_path):
    path = tmp_path / "x.toml"
    path.write_text('models = ["formula-vit"]\n# no head\n')
    assert recipe.about(path) == ("", {})
    path.write_text('# A: b.\n#\n# Run:    x\n#         y\nmodels = ["formula-vit"]\n')
    assert recipe.about(path) == ("A: b.", {"Run": "x y"})


@pytest.mark.parametrize("path", STUDIES, ids=named)
def test_every_recipe_of_both_stages_loads(path, tmp_path):
    text = path.read_text()
    for place in re.findall(r'"\$DATA/([^"]+)"', text):
        (tmp_path / place).mkdir(parents=True)
    assert ("--data" in recipe.about(path)[1]["Run"]) == ("$DATA" in text)
    loaded = recipe.load(path, data=tmp_path)
    for depth in (8, 12, 24):
        probes, pairs = loaded.probes_and_tokens(depth)
        assert {pair for probe in probes for pair in probe.representation.pairs(depth)} <= pairs


@pytest.mark.parametrize("path", PAPER, ids=named)
def test_what_the_papers_recipes_cost_is_reckoned_from_the_catalogue(path):
    """An image of 224 pixels has (224 / patch)² patches and a CLS token; a number takes two bytes."""
    asked, nbytes, passes = recipe.load(path), 0, 0
    images = sum(datasets.CATALOGUE[name].train_images for name in asked.datasets)
    for name in asked.models:
        row = models.CATALOGUE[name]
        every = {"cls": 1, "ap": 1, "all": (row.image_px // row.patch_px) ** 2 + 1}
        nbytes += images * 2 * row.width * sum(every[kind] for _, kind in asked.probes_and_tokens(row.depth)[1])
        passes += images
    size = f"{nbytes / 1e12:.2f} TB" if nbytes >= 1e12 else f"{nbytes / 1e9:.0f} GB"
    cost = recipe.about(path)[1]["Cost"]
    assert f"{size} of cache" in cost
    assert f"{passes / 1e6:.1f} million images" in cost
    assert re.search(rf"\(paper/{path.name}\).*\| {size} \|", (PIPELINES / "README.md").read_text())


def test_the_papers_recipes_cover_its_models_and_data_sets(shared):
    published = (shared.parent / "reference" / "paper_datasets.csv").read_text().splitlines()[1:]
    whole = recipe.load(PIPELINES / "paper" / "table1.toml")
    assert set(whole.datasets) == {line.partition(",")[0] for line in published}
    scores = (shared.parent / "reference" / "paper_balanced_accuracy.csv").read_text().splitlines()[1:]
    assert set(whole.models) == {line.partition(",")[0] for line in scores}
    assert {probe.name for probe in whole.probes_and_tokens(12)[0]} == {line.split(",")[2] for line in scores}


def test_the_recipes_readme_names_every_recipe_and_every_key():
    text = (PIPELINES / "README.md").read_text()
    assert set(re.findall(r"\]\((\w[\w/-]*\.toml)\)", text)) == {named(path) for path in EVERY}
    assert set(re.findall(r"`(\w+)`", " ".join(re.findall(r"^\| (`[^|]+`) \|", text, re.M)))) == {*recipe.NAMES}


def test_the_default_recipe_is_what_the_commands_default_to():
    default = recipe.load(PIPELINES / "default.toml")
    assert (default.models, default.datasets) == ((cli.MODEL,), (cli.DATASET,))


def test_what_is_asked_for_follows_from_the_probes(tmp_path):
    file = tmp_path / "x.toml"
    file.write_text(
        'models = ["$DATA/m"]\ndatasets = ["digits"]\nprobes = ["{cls,ap}-layer-2/linear", "aat:h4"]\nshots = [4, "all"]\n'
    )
    (tmp_path / "m").mkdir()
    loaded = recipe.load(file, data=tmp_path)
    assert loaded.models == (str(tmp_path / "m"),)
    assert loaded.search.shots == (4, None)
    probes, pairs = loaded.probes_and_tokens(4)
    assert [probe.name for probe in probes] == [
        "cls-layer-2/linear",
        "ap-layer-2/linear",
        "all-tokens-last/attentive:h4",
    ]
    assert [probe.heads for probe in probes] == [None, None, 4]
    assert pairs == parse_tokens("cls+ap@2,all@4", "all", 4)


def test_of_all_probes_those_are_asked_for_that_named_tokens_serve():
    asked = recipe.Recipe.of(["m"], ["d"], tokens="cls,ap", layers="last")
    assert [probe.name for probe in asked.probes_and_tokens(12)[0]] == [
        "cls-last/linear",
        "cls+ap-last/linear",
        "cls+ap-last/attentive",
    ]


BAD = """\
models = ["clip-vit-b16", "clip-vit-b17"]   # clip-vit-b17 is none
head = 3
seeds = [0, -1]
grid = "huge"
probes = [
    "all",
    "cls-lst/linear",
    "cls-last/linear:h8",
    "{cls,ap}-last/linear", "ap-last/linear",
]
tokens = "cls,patch"
shots = [1]
halving = "yes"
datasets = [
    "digits",
    "$DATA/mine",
    "digits",
]
smoothing = 1

[more]
seeds = [7]
"""


def test_every_fault_is_told_at_once_with_its_line(tmp_path):
    file = tmp_path / "bad.toml"
    file.write_text(BAD)
    with pytest.raises(BadRecipe) as caught:
        recipe.load(file)
    said = str(caught.value)
    assert said.startswith(f"{file}: line 1: no model named 'clip-vit-b17'. Did you mean clip-vit-b16")
    for words in (
        "line 2: unknown key 'head'; allowed: models, datasets",
        "line 3: seeds = [0, -1]",
        "line 4: grid = 'huge': allowed are paper, quick",
        "line 7: no probe named 'cls-lst/linear'. Did you mean cls-last/linear",
        "line 8: no probe named 'cls-last/linear:h8'",
        "line 9: probes: 'ap-last/linear' twice",
        "line 11: tokens = 'cls,patch': no token kind named 'patch'",
        "line 12: shots = [1]",
        "line 13: halving = 'yes'",
        "line 15: datasets: 'digits' twice",
        "line 16: '$DATA/mine' lies in a folder of yours; say which: --data DIR",
        "line 19: smoothing = 1",
        "line 21: unknown key 'more'",
    ):
        assert words in said
    assert said.count("line ") == 14
    with pytest.raises(BadRecipe, match=re.escape(f"line 16: there is no {tmp_path / 'mine'}")):
        recipe.load(file, data=tmp_path)


MORE_BAD = """\
models = ["formula-vit:blok", "$DATA/m:block"]
datasets = ["digits"]
hook = "blok"
preprocess = "slow"
size = 0
views = ["flip", "crop0", "flip"]
view_seed = -1
compute = "int8"
dtype = "float8"
format = "csv"
split = "train,validation"
image_column = 3
image_root = "$DATA/nowhere"
target = "colour"
carve = "0.9/0.2"
carve_seed = 1.5
upright = 1
max_pixels = 0
config = ""
stream = "no"
skip_bad = 0

[set]
eps = 1e-6
act = ["gelu"]
"""


def test_every_fault_of_how_features_are_made_and_data_is_read_is_told_too(tmp_path):
    (tmp_path / "m").mkdir()
    file = tmp_path / "bad.toml"
    file.write_text(MORE_BAD)
    with pytest.raises(BadRecipe) as caught:
        recipe.load(file, data=tmp_path)
    said = str(caught.value)
    for words in (
        "line 1: no hook point named 'blok'. Did you mean block",
        "line 3: hook = 'blok': allowed are norm2, block, attn, mlp, projected",
        "line 4: preprocess = 'slow': allowed are exact, fast, paper, paper+fast",
        "line 5: size = 0: allowed are whole numbers from 1",
        "line 6: views = ['flip', 'crop0', 'flip']: no view named 'crop0'",
        "'flip' comes twice",
        "line 6: views = ['flip', 'crop0', 'flip']: \"plain\" must be among them",
        "line 7: view_seed = -1: allowed are whole numbers from 0",
        "line 8: compute = 'int8': allowed are float32, bfloat16, float16, auto",
        "line 9: dtype = 'float8': allowed are float16, bfloat16, float32, int8",
        "line 10: format = 'csv': allowed are zarr, hdf5",
        "line 11: split = 'train,validation': allowed are train,test and, say, train,test=validation",
        "line 12: image_column = 3: allowed is text in quotes",
        f"line 13: there is no {tmp_path / 'nowhere'}",
        "line 14: target = 'colour': allowed are class, labels, number",
        "line 15: carve = '0.9/0.2': allowed are shares of train/test or train/validation/test",
        "line 16: carve_seed = 1.5",
        "line 17: upright = 1: allowed are true and false",
        "line 18: max_pixels = 0",
        "line 19: config = ''",
        "line 20: stream = 'no'",
        "line 21: skip_bad = 0",
        "act = ['gelu']: allowed are text, numbers, true and false",
    ):
        assert words in said
    assert said.count("line ") == 22


def test_a_hook_point_and_settings_are_of_every_model_that_says_nothing_else(tmp_path):
    (tmp_path / "m").mkdir()
    file = tmp_path / "x.toml"
    file.write_text(
        'models = ["formula-vit", "$DATA/m:mlp", "clip-vit-b16:hidden_act=relu"]\ndatasets = ["digits"]\n'
        'hook = "block"\nset = { hidden_act = "gelu", layer_norm_eps = 1e-5, qkv_bias = true }\n'
        'image_root = "$DATA/m"\n'
    )
    loaded = recipe.load(file, data=tmp_path)
    rest = "hidden_act=gelu,layer_norm_eps=1e-05,qkv_bias=true"
    assert loaded.model_refs == (
        f"formula-vit:block,{rest}",
        f"{tmp_path}/m:mlp,{rest}",
        f"clip-vit-b16:block,{rest.replace('gelu', 'relu')}",
    )
    assert [parse_model(word).settings for word in loaded.model_refs[:2]] == [loaded.features.settings] * 2
    assert loaded.features.read.image_root == str(tmp_path / "m")
    plain = recipe.Recipe.of(["formula-vit", "m:block"], ["digits"])
    assert plain.model_refs == plain.models


def test_a_recipe_can_say_whatever_the_two_stages_can_be_told():
    """But how fast: device, batches and workers are the machine's, and change no number."""
    decisive = {one.name for kind in (FeatureOptions, SearchOptions) for one in all_definitions(kind).values()}
    assert decisive | {"models", "datasets", "probes", "format", "skip_bad"} == set(recipe.NAMES)
    former = {
        old for kind in (FeatureOptions, SearchOptions) for one in all_definitions(kind).values() for old in one.former
    }
    assert former == {"carve", "carve_seed", "upright", "view"} == set(recipe.KEYS) - set(recipe.NAMES)


def test_a_former_key_beside_the_present_one_is_a_fault(tmp_path):
    path = tmp_path / "r.toml"
    path.write_text(
        'models = ["formula-vit"]\ndatasets = ["digits"]\nsplit_seed = 3\ncarve_seed = 5\nimage_root = ""\ngrid = "huge"\n'
    )
    with pytest.raises(BadRecipe) as caught:
        recipe.load(path)
    assert "line 4: split_seed and carve_seed are one option; keep one of them" in str(caught.value)
    assert "line 5: image_root = '': allowed is a path" in str(caught.value)
    assert "line 6: grid = 'huge'" in str(caught.value)


def test_what_is_missing_has_no_line(tmp_path):
    (tmp_path / "x.toml").write_text('models = "clip"\n')
    with pytest.raises(BadRecipe, match=r"x.toml: datasets is missing; line 1: models = 'clip': allowed is a list"):
        recipe.load(tmp_path / "x.toml")


@pytest.mark.parametrize(("text", "words"), [("models = [", "is not TOML"), (None, "no recipe can be read")])
def test_what_is_no_recipe(text, words, tmp_path):
    if text is not None:
        (tmp_path / "x.toml").write_text(text)
    with pytest.raises(BadRecipe, match=words):
        recipe.load(tmp_path / "x.toml")
