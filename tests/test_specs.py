"""Names, layers and keys: what must be equal, what must differ, and that what is printed can be read back."""

import dataclasses
import hashlib
import os
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlfusion.errors import UnknownName
from mlfusion.specs.identity import KINDS, OMIT_IF_DEFAULT, DataSpec, FeatureSpec, ModelSpec, digest
from mlfusion.specs.names import HEAD_NAMES, STUDY, layer_ranges, parse_layers, parse_probes, parse_tokens, token_words
from mlfusion.system.references import parse_model

MODEL = ModelSpec(
    weights="ab" * 32, revision=None, config="cd" * 8, preprocess="{}", name="m", family="vit", depth=12, width=192
)
DATA = DataSpec(content="ef" * 32, split="train", images=7, classes=("a", "b"), name="d")
SPEC = FeatureSpec(model=MODEL, data=DATA)


WRITTEN_OUT = (
    '{"data":{"classes":["a","b"],"content":"' + "ef" * 32 + '","images":7,"split":"train","type":"DataSpec"},'
    '"dtype":"float16","format":3,'
    '"model":{"compute":"float32","config":"'
    + "cd"
    * 8
    + '","depth":12,"hook":"norm2","preprocess":"{}","revision":null,'
    '"type":"ModelSpec","weights":"' + "ab" * 32 + '","width":192},"type":"FeatureSpec"}'
)


def test_the_key_is_the_same_on_every_machine():
    assert SPEC.key == hashlib.sha256(WRITTEN_OUT.encode()).hexdigest()[:16]
    code = (
        "from mlfusion.specs.identity import DataSpec, FeatureSpec, ModelSpec\n"
        f"print(FeatureSpec(model=ModelSpec(**{dataclasses.asdict(MODEL)}), data=DataSpec(**{dataclasses.asdict(DATA)})).key)"
    )
    env = {**os.environ, "PYTHONHASHSEED": "7"}
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=env)
    assert said.stdout.strip() == SPEC.key


@pytest.mark.parametrize(
    ("part", "field", "value"),
    [
        ("model", "weights", "00" * 32),
        ("model", "revision", "main"),
        ("model", "config", "00" * 8),
        ("model", "preprocess", '{"resample": 3}'),
        ("model", "hook", "block"),
        ("model", "compute", "bfloat16"),
        ("data", "content", "00" * 32),
        ("data", "split", "test"),
        ("data", "resplit", "0.8/0.2 seed 0"),
        ("data", "images", 8),
        ("data", "classes", ("a", "c")),
        (None, "dtype", "float32"),
        (None, "format", 4),
        ("model", "depth", 13),
        ("model", "width", 7),
    ],
)
def test_what_changes_the_numbers_changes_the_key(part, field, value):
    if part is None:
        changed = dataclasses.replace(SPEC, **{field: value})
    else:
        changed = dataclasses.replace(SPEC, **{part: dataclasses.replace(getattr(SPEC, part), **{field: value})})
    assert changed != SPEC
    assert changed.key != SPEC.key


def test_names_change_nothing():
    renamed = dataclasses.replace(
        SPEC, model=dataclasses.replace(MODEL, name="other"), data=dataclasses.replace(DATA, name="another")
    )
    assert renamed == SPEC
    assert renamed.key == SPEC.key


@pytest.mark.parametrize("spec", [MODEL, DATA, SPEC], ids=lambda spec: type(spec).__name__)
def test_a_new_option_at_its_default_changes_no_key(spec):
    """The same class with one field more: with the mark it is left out at its default, without the mark it is not."""
    values = {each.name: getattr(spec, each.name) for each in dataclasses.fields(spec)}

    def with_option(metadata: dict[str, bool] | None) -> type:
        option = ("option", str, dataclasses.field(default="off", metadata=metadata))
        return dataclasses.make_dataclass(type(spec).__name__, [option], bases=(type(spec),), frozen=True, kw_only=True)

    marked, unmarked = with_option(OMIT_IF_DEFAULT), with_option(None)
    assert digest(marked(**values)) == digest(spec)
    assert digest(marked(**values, option="on")) == digest(unmarked(**values, option="on")) != digest(spec)
    assert digest(unmarked(**values)) != digest(spec)


@given(st.sets(st.integers(0, 40), min_size=1))
def test_ranges_read_back(layers):
    assert set(parse_layers(layer_ranges(layers), 40)) == layers


def test_words_for_layers_and_tokens():
    assert parse_layers("all", 4) == (1, 2, 3, 4)
    assert parse_layers("0,2-3,last", 4) == (0, 2, 3, 4)
    assert parse_tokens("cls,all@2,4", "1", 4) == {(1, "cls"), (2, "all"), (4, "all")}
    assert parse_tokens("cls+ap@last", "all", 4) == {(4, "cls"), (4, "ap")}


@pytest.mark.parametrize("words", ["13", "1-13", "x", "", "2-", "-1"])
def test_layers_that_are_not_there(words):
    with pytest.raises(UnknownName, match="Known: 0-12"):
        parse_layers(words, 12)


@pytest.mark.parametrize(("depth", "four", "two"), [(12, (3, 6, 9, 12), (6, 12)), (24, (6, 12, 18, 24), (12, 24))])
def test_the_studys_layers(depth, four, two):
    """As the study combines them: blocks 3, 6, 9 and the final norm of 12."""
    layers = {probe.name: probe.representation.layers(depth) for probe in parse_probes("all", depth)}
    assert layers["cls+ap-4-layers/linear"] == four
    assert layers["cls+ap-2-layers/attentive"] == two
    assert layers["cls+ap-all-layers/attentive"] == tuple(range(1, depth + 1))
    assert layers["all-tokens-last/attentive"] == (depth,)


@pytest.mark.parametrize("name", [*STUDY, "ap-layer-7/linear", "cls+ap-layer-3/attentive"])
def test_a_probe_is_called_what_it_is_asked_by(name):
    assert [probe.name for probe in parse_probes(name, 12)] == [name]


def test_groups_of_probes():
    assert len(parse_probes("all", 12)) == 10
    assert [p.name for p in parse_probes("cls-each-layer/linear", 3)] == [f"cls-layer-{n}/linear" for n in (1, 2, 3)]
    assert parse_probes("ALF", 12) == parse_probes("cls+ap-all-layers/attentive", 12)
    assert len(parse_probes("alf,all", 12)) == 10


def test_layers_by_number():
    """A comma before a digit belongs to the layers, so that probes are still listed by commas."""
    [probe] = parse_probes("cls+ap-layers-6,9,12/linear", 12)
    assert probe.name == "cls+ap-layers-6,9,12/linear" and probe.representation.layers(12) == (6, 9, 12)
    assert parse_probes("cls+ap-layers-12,6,9-9/linear", 12) == (probe,)
    listed = "ridge,cls-layers-1-4,12/linear,{cls,ap}-layers-0,2/knn, cls+ap-{2,4}-layers/linear"
    assert [probe.name for probe in parse_probes(listed, 12)] == [
        "cls+ap-all-layers/ridge",
        "cls-layers-1-4,12/linear",
        "cls-layers-0,2/knn",
        "ap-layers-0,2/knn",
        "cls+ap-2-layers/linear",
        "cls+ap-4-layers/linear",
    ]
    assert [probe.name for probe in parse_probes("cls-layers-7/linear", 12)] == ["cls-layer-7/linear"]
    for wrong in ("cls-layers-9,13/linear", "cls-layers-/linear", "cls-layers-1--2/linear", "cls-layers-a/linear"):
        with pytest.raises(UnknownName, match="Known: "):
            parse_probes(wrong, 12)


@given(st.sets(st.integers(0, 12), min_size=2), st.permutations(["alf", "cls-last/linear"]))
def test_layers_by_number_read_back(layers, others):
    name = f"cls+ap-layers-{','.join(map(str, sorted(layers, reverse=True)))}/linear"
    made = parse_probes(",".join([others[0], name, others[1]]), 12)
    assert made[1].representation.layers(12) == tuple(sorted(layers))
    assert parse_probes(made[1].name, 12) == (made[1],)


@pytest.mark.parametrize("head", HEAD_NAMES)
def test_a_head_alone_reads_all_layers(head):
    assert parse_probes(head, 12) == parse_probes(f"cls+ap-all-layers/{head}", 12)
    assert [probe.heads for probe in parse_probes("attentive:h8,alf:h8", 12)] == [8]
    with pytest.raises(UnknownName, match="Did you mean ridge"):
        parse_probes("rigde", 12)


@pytest.mark.parametrize("name", ["cls-lst/linear", "cls-last/linea", "cls+cls", "", "cls-layer-13/linear"])
def test_unknown_probes_are_refused_with_what_there_is(name):
    with pytest.raises(UnknownName, match="Known: "):
        parse_probes(name, 12)


KINDS_AND_LAYERS = st.sets(st.tuples(st.integers(0, 12), st.sampled_from(KINDS)), min_size=1)


@given(KINDS_AND_LAYERS)
def test_words_for_tokens_read_back(pairs):
    assert parse_tokens(token_words(pairs), "1", 12) == pairs


@pytest.mark.parametrize("name", ["grid4-last/attentive", "cls+max-all-layers/linear", "ap+grid2-layer-3/attentive"])
def test_probes_of_other_kinds_are_called_what_they_are_asked_by(name):
    [probe] = parse_probes(name, 12)
    assert probe.name == name
    assert probe.representation.spatial == ("grid" in name)


@pytest.mark.parametrize(
    ("word", "parts"),
    [
        ("clip-vit-b16", ("clip-vit-b16", "norm2", ())),
        ("a/b:block", ("a/b", "block", ())),
        ("embedded:formula-vit:mlp", ("embedded:formula-vit", "mlp", ())),
        ("m:b=true,attn,a=0.5,c=gelu", ("m", "attn", (("a", 0.5), ("b", True), ("c", "gelu")))),
    ],
)
def test_words_for_models(word, parts):
    asked = parse_model(word)
    assert (asked.name, asked.hook, asked.settings) == parts
    assert parse_model(str(asked)) == asked
    assert parse_model(asked.name).with_defaults(asked.hook, asked.settings) == asked
    assert asked.with_defaults("block", ()).hook == (asked.hook if asked.hook != "norm2" else "block")


# Of the embedded model. Where this changes, every cache misses: only other weights or a new format version may.
GOLDEN = {
    "weights": "41568c8e6d6fae1a0cf0aa41ba716828e8338a63fe4901b985e7c8eccb0950f5",
    "revision": None,
    "config": "33b3742e2e812115",
    "preprocess": '{"crop_rounding": "floor", "image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5], "kernel": "pil", '
    '"resample": "bilinear", "rescale_factor": 0.00392156862745098, "size": {"height": 48, "width": 48}}',
    "hook": "norm2",
    "compute": "float32",
}
REAL = """
from dataclasses import asdict
from mlfusion.extraction.request import Request
jobs = Request.of("formula-vit", "digits").jobs
model, keys = asdict(jobs[0].spec.model), [job.spec.key for job in jobs]
"""


@pytest.mark.slow
def test_the_key_of_real_weights_and_images_is_the_same_in_every_process():
    """From files to key, whatever Python's own hashes are; and of the model, each part of it is what it was."""
    exec(REAL, here := {})
    assert {name: here["model"][name] for name in GOLDEN} == GOLDEN
    said = subprocess.run(
        [sys.executable, "-c", f"{REAL}print(*keys)"],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONHASHSEED": "4711"},
    )
    assert said.stdout.split() == here["keys"]
    assert len(set(here["keys"])) == 2
