"""Every recipe that ships is sound and says what it costs; every fault of one that is not is told at once."""

import re
from pathlib import Path

import pytest

from mlfusion import cli, recipe
from mlfusion.errors import BadRecipe

PIPELINES = Path(__file__).parent.parent / "pipelines"


@pytest.mark.parametrize("path", sorted(PIPELINES.glob("*.toml")), ids=lambda p: p.name)
def test_every_recipe_says_how_to_run_it_what_it_costs_and_what_to_expect(path):
    head = path.read_text().split("\n\n")[0]
    for word in ("# Run:", "# Cost:", "# Expect:"):
        assert re.search(f"^{word} +\\S+", head, re.M), word
    assert path.name in head or "make demo" in head


@pytest.mark.parametrize("path", sorted(set(PIPELINES.glob("*.toml")) - {PIPELINES / "formula-vit.toml"}), ids=str)
def test_every_recipe_of_both_stages_loads(path):
    assert recipe.load(path).models


def test_the_recipes_readme_names_every_recipe_and_every_key():
    import dataclasses

    text = (PIPELINES / "README.md").read_text()
    assert set(re.findall(r"\]\((\w[\w-]*\.toml)\)", text)) == {path.name for path in PIPELINES.glob("*.toml")}
    assert set(re.findall(r"^\| `(\w+)` \|", text, re.M)) == {f.name for f in dataclasses.fields(recipe.Recipe)}


def test_the_default_recipe_is_what_the_commands_default_to():
    default = recipe.load(PIPELINES / "default.toml")
    assert (default.models, default.datasets) == ((cli.MODEL,), (cli.DATASET,))


def test_every_fault_is_told_at_once(tmp_path):
    file = tmp_path / "bad.toml"
    file.write_text(
        'models = "clip"\nhead = 3\nseeds = [0, -1]\ngrid = "huge"\nprobes = ["cls-lst/linear"]\ntokens = "cls,patch"\n'
    )
    with pytest.raises(BadRecipe) as caught:
        recipe.load(file)
    for words in (
        "bad.toml",
        "unknown key 'head'; allowed: models",
        "datasets is missing",
        "models = 'clip': allowed is a list",
        "seeds = [0, -1]",
        "grid = 'huge': allowed are paper, quick",
        "Did you mean cls-last/linear",
        "no token kind named 'patch'",
    ):
        assert words in str(caught.value)


@pytest.mark.parametrize(("text", "words"), [("models = [", "is not TOML"), (None, "no recipe can be read")])
def test_what_is_no_recipe(text, words, tmp_path):
    if text is not None:
        (tmp_path / "x.toml").write_text(text)
    with pytest.raises(BadRecipe, match=words):
        recipe.load(tmp_path / "x.toml")
