"""Saved probes: what was written is read, what was changed is refused, and new images get the scores of cached ones."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fits import fit_options
from huggingface_hub import ModelCard
from msgspec.structs import replace
from PIL import Image
from safetensors.numpy import load_file, save_file
from tiny import save_images, save_model

import mlfusion
from mlfusion import datasets
from mlfusion.errors import BadData, BadModel, ResultsUnusable
from mlfusion.probing import grids, protocol
from mlfusion.probing.saved import Backbone, Card, describe, load, readme, save
from mlfusion.probing.targets import Number, OneClass, SeveralLabels, Target
from mlfusion.probing.training.batches import Tokens
from mlfusion.results import Results, Selected
from mlfusion.specs.names import HEAD_NAMES, Head

SHORT = grids.Grid(learning_rates=(1e-2,), weight_decays=(1e-2,), dropouts=(0.1,), epochs=1, least_steps=20)


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(grids.SEARCH_GRIDS, "quick", SHORT)


def tokens(target: Target, images: int = 40, seed: int = 0) -> Tokens:
    rng = np.random.default_rng(seed)
    labels: Any = np.arange(images) % 3
    if target.kind == "labels":
        labels = (rng.random((images, 3)) < 0.5).astype(np.int64)
    if target.kind == "number":
        labels = 50 + 10 * rng.normal(size=images)
    return Tokens(rng.normal(size=(images, 4, 8)).astype(np.float32), labels)


def card(head: Head, target: Target, outcome: protocol.Outcome) -> Card:
    return Card(
        probe=f"cls+ap-2-layers/{head}",
        head=head,
        shape=outcome.shape,
        target_fields=describe(target),
        classes=("a", "ß", "c") if target.kind != "number" else (),
        backbone=Backbone(
            name="m",
            source="/m",
            weights="w",
            config="c",
            preprocess="p",
            hook="norm2",
            compute="float32",
            preparation="{}",
        ),
        layers=(2, 4),
        kinds=("cls", "ap"),
        dtype="float16",
        features=("a" * 16, "b" * 16),
        dataset="d",
        seed=0,
        selected=Selected.of(outcome.selected),
        metric=outcome.metric,
        scores={"val": outcome.val, "test": outcome.test, "train": outcome.train},
        versions={"torch": "2"},
        code="abc",
        created="2026-01-01T00:00:00+00:00",
    )


def saved(folder: Path, head: Head = "linear", target: Target | None = None) -> tuple[protocol.Outcome, Tokens]:
    target = target or OneClass(3)
    test = tokens(target, 20, seed=1)
    outcome = protocol.fit(head, tokens(target), lambda: test, target=target, options=fit_options(heads=2))
    save(folder, card(head, target, outcome), outcome.weights)
    return outcome, test


@pytest.mark.parametrize("head", HEAD_NAMES)
def test_every_probe_is_read_as_it_was_written(head: Head, tmp_path: Path) -> None:
    outcome, test = saved(tmp_path / "deep" / "probe", head)
    held, probe = load(tmp_path / "deep" / "probe")
    assert held == card(head, OneClass(3), outcome)
    assert held.target() == OneClass(3)
    predictions, attention = protocol.predict(probe, test, held.target())
    np.testing.assert_allclose(predictions, outcome.predictions, atol=1e-6)
    if outcome.attention is not None:
        np.testing.assert_allclose(attention, outcome.attention, atol=1e-6)
    assert sorted(path.name for path in (tmp_path / "deep" / "probe").iterdir()) == [
        "README.md",
        "card.json",
        "probe.safetensors",
    ]


@pytest.mark.parametrize("head", ["linear", "attentive", "ridge", "knn"])
@pytest.mark.parametrize("target", [SeveralLabels(3), Number(1, 50.0, 10.0)], ids=["labels", "number"])
def test_other_targets_are_kept_too(head: Head, target: Target, tmp_path: Path) -> None:
    outcome, test = saved(tmp_path / "probe", head, target)
    held, probe = load(tmp_path / "probe")
    assert held.target() == target
    np.testing.assert_allclose(
        protocol.predict(probe, test, held.target())[0], outcome.predictions, rtol=1e-5, atol=1e-5
    )


def test_saving_twice_keeps_the_first(tmp_path: Path) -> None:
    outcome, _ = saved(tmp_path / "probe")
    before = (tmp_path / "probe" / "card.json").read_bytes()
    save(tmp_path / "probe", card("linear", OneClass(3), outcome), {"weight": np.zeros(3)})
    assert (tmp_path / "probe" / "card.json").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["probe"]  # no draft is left


def sealed_digest(body: dict[str, Any]) -> str:
    """The digest of a card, as its format says: SHA-256 of the other fields as JSON with sorted keys."""
    rest = {name: value for name, value in body.items() if name != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def change(folder: Path, what: str) -> None:
    body = json.loads((folder / "card.json").read_text())
    held = load_file(folder / "probe.safetensors")
    if what == "tensors":
        save_file({name: np.array(value + 1) for name, value in held.items()}, folder / "probe.safetensors")
    elif what == "gone":
        (folder / "probe.safetensors").unlink()
    elif what == "torn":
        (folder / "card.json").write_text(json.dumps(body)[:-20])
    else:
        changes: dict[str, dict[str, Any]] = {
            "newer": {"format": 4},
            "older": {"format": 1},
            "shape": {"shape": body["shape"] | {"width": 9}},
            "head": {"head": "magic"},
            "target": {"target": {"kind": "colour"}},
            "classes": {"classes": ["a"]},
            "field": {"layers": None} | {"extra": 1},
            "list": {},
        }
        body |= changes[what]
        body["sha256"] = sealed_digest(body)
        text = json.dumps([] if what == "list" else body)
        (folder / "card.json").write_text(text)


@pytest.mark.parametrize("head", ["linear", "ridge", "knn", "v-jepa"])
@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("tensors", "is damaged: probe.safetensors is not the one that card.json names"),
        ("gone", "no probe in .*allowed: a folder with card.json and probe.safetensors"),
        ("torn", "cannot be read .*make it again with `mlfusion probe --save`"),
        ("newer", "is of format 4; this version reads format 3. Update"),
        ("older", "is of format 1; this version reads format 3. Make it again"),
        ("shape", "holds no probe that can be built"),
        ("head", "holds no probe that can be built .*no head named 'magic'"),
        ("target", "holds no probe that can be built"),
        ("classes", "holds no probe that can be built .*1 classes for 3 outputs"),
        ("field", "holds no probe that can be built"),
        ("list", "is damaged"),
    ],
)
def test_what_was_changed_is_refused(head: Head, what: str, message: str, tmp_path: Path) -> None:
    saved(tmp_path / "probe", head)
    change(tmp_path / "probe", what)
    with pytest.raises(ResultsUnusable, match=message):
        load(tmp_path / "probe")


SIZES = {"tokens": 4, "width": 8, "classes": 3, "heads": 2}
FORGED: list[tuple[Head, dict[str, Any], str]] = [
    ("attentive", {"shape": SIZES | {"heads": 0}}, "allowed: from 1 to"),
    ("attentive", {"shape": SIZES | {"heads": 10**9}}, "allowed: from 1 to"),
    ("attentive", {"shape": SIZES | {"heads": 3}}, ""),
    ("attentive", {"shape": SIZES | {"width": 2**24}}, "attentive has"),
    ("v-jepa", {"shape": SIZES | {"width": 2**24}}, "v-jepa has"),
    ("linear", {"shape": SIZES | {"tokens": 8}}, "8 tokens for 2 layers"),
    ("linear", {"shape": SIZES | {"classes": "3"}}, "Expected `int`"),
    ("linear", {"layers": []}, "length >= 1"),
    ("linear", {"kinds": []}, "length >= 1"),
    ("linear", {"kinds": ["all"]}, "are not those of cls"),
    ("linear", {"kinds": ["ap", "cls"]}, "are not those of cls"),
    ("linear", {"layers": [1, 4]}, "are not those of cls"),
    ("linear", {"head": "ridge"}, "are not those of cls"),
    ("linear", {"probe": "cls-last/linear; touch x"}, "no probe named"),
    ("linear", {"classes": [[1], [2], [3]]}, "Expected `str`"),
    ("linear", {"classes": "abc"}, "Expected `array`"),
    ("linear", {"classes": ["a", "a", "b"]}, "two classes have one name"),
    ("linear", {"classes": ["a", "b", "\ud83d"]}, ""),
    ("linear", {"features": ["../../x", "b" * 16]}, "matching regex"),
    ("linear", {"target": {"kind": "class", "outputs": 4}}, "a target of 4 outputs for 3"),
    ("linear", {"target": {"kind": "class", "outputs": 3, "smoothing": 2.0}}, "a target of 3 outputs"),
    ("linear", {"target": {"kind": "class", "outputs": 3, "more": 1}}, "a target has no more"),
    ("linear", {"extra": 1}, "unknown field `extra`"),
    ("linear", {"scores": {"test": float("nan")}}, "Expected `float`"),
    ("linear", {"scores": {"test": 0.5, "train": 0.5}}, "no score of val"),
    ("linear", {"head": 5}, "Expected `str`"),
    ("linear", {"dtype": 1e308}, "Expected `str`"),
    ("linear", {"kinds": [[]]}, "Expected `str`"),
]


@pytest.mark.parametrize(("head", "changes", "message"), FORGED)
def test_a_card_that_contradicts_itself_is_refused(
    head: Head, changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    """Also if its digest fits, as a forger's does."""
    saved(tmp_path / "probe", head)
    path = tmp_path / "probe" / "card.json"
    body = json.loads(path.read_text()) | changes
    path.write_text(json.dumps(body))
    with pytest.raises(ResultsUnusable, match=r"card.json does not match its digest"):
        load(tmp_path / "probe")
    path.write_text(json.dumps(body | {"sha256": sealed_digest(body)}))
    with pytest.raises(ResultsUnusable, match=f"holds no probe that can be built .*{message}"):
        load(tmp_path / "probe")
    long = json.loads(path.read_text())
    long["backbone"]["source"] = "m" * 10**6
    path.write_text(json.dumps(long | {"sha256": sealed_digest(long)}))
    with pytest.raises(ResultsUnusable):
        load(tmp_path / "probe")


@pytest.mark.parametrize("head", ["linear", "ridge", "knn", "attentive"])
@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("nan", "holds what is no finite number"),
        ("float64", "allowed: float32"),
        ("size", "holds no probe"),
        ("more", "has no tensor named another"),
        ("text", "holds no probe"),
        ("list", r"holds no probe .*Expected `object`, got `array`"),
        ("nested", "cannot be read"),
        ("link", "cannot be read"),
        ("pipe", "cannot be read"),
    ],
)
def test_tensors_that_no_head_has_are_refused(head: Head, what: str, message: str, tmp_path: Path) -> None:
    if what == "float64" and head == "knn":
        pytest.skip("a bank may have any type of number")
    saved(tmp_path / "probe", head)
    folder = tmp_path / "probe"
    path, body = folder / "probe.safetensors", json.loads((folder / "card.json").read_text())
    held = load_file(path)
    name = max(held, key=lambda name: held[name].size)
    value = np.array(held[name])
    changed = {
        "nan": {name: np.where(np.arange(value.size).reshape(value.shape) == 0, np.nan, value).astype(value.dtype)},
        "float64": {name: value.astype(np.float64)},
        "size": {name: value[:-1].copy()},
        "more": {"another": value},
    }.get(what)
    if changed:
        save_file(held | changed, path)
    elif what == "text":
        path.write_bytes(b"\x10\0\0\0\0\0\0\0no header at all")
    elif what == "list":
        path.write_bytes(b"\x02\0\0\0\0\0\0\0[]")
    elif what == "nested":
        (folder / "card.json").write_text("[" * 100_000)
    else:
        path.rename(tmp_path / "aside")
        os.mkfifo(path) if what == "pipe" else path.symlink_to(tmp_path / "aside")
    if what not in ("nested", "pipe"):
        body["tensors"] = hashlib.sha256(path.read_bytes()).hexdigest()
        (folder / "card.json").write_text(json.dumps(body | {"sha256": sealed_digest(body)}))
    with pytest.raises(ResultsUnusable, match=message):
        load(folder)


GOLDEN = sorted((Path(__file__).parent / "golden").glob("results-format-*/probes/*"))


@pytest.mark.parametrize("folder", GOLDEN, ids=lambda folder: f"{folder.parts[-3]}-{folder.name}")
def test_a_saved_probe_of_every_format_is_read(folder: Path) -> None:
    """A promise: a probe that a released version saved gives the same answers."""
    held, probe = load(folder)
    assert held.backbone.name == "formula-vit" and held.probe.startswith("cls-last/") and len(held.classes) == 10
    tokens = np.random.default_rng(0).normal(size=(3, 1, 128)).astype(np.float32)
    weights = load_file(folder / "probe.safetensors")
    predictions, _ = protocol.predict(probe, Tokens(tokens, np.zeros(3, np.int64)), held.target())
    unit = tokens[:, 0] / np.linalg.norm(tokens[:, 0], axis=1, keepdims=True)
    scores = unit @ weights["weight"].T + weights["bias"]
    assert predictions.argmax(1).tolist() == scores.argmax(1).tolist()


def test_a_folder_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ResultsUnusable, match=r"cannot save a probe in .*name another folder with --results"):
        saved(tmp_path / "file" / "probe")


# --- new images ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model("vit", tmp_path_factory.mktemp("model") / "tiny-vit")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_images(tmp_path_factory.mktemp("data") / "colours", {"train": 8, "test": 4})


def probed(model: Path, images: Path, names: str, **features: Any) -> list[tuple[Any, Path]]:
    """Each row with the folder of its probe; `features` are options of the extraction."""
    options = {name: features.pop(name) for name in ("cache", "log") if name in features}
    mlfusion.extract(str(model), str(images), tokens="cls,ap,all@last", **features)
    done = mlfusion.probe(str(images), model=str(model), probes=names, grid="quick", seeds=(0,), save=True, **options)
    return [(row, Path("results") / "probes" / row.id) for row in done.rows]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "making"),
    [("float16", {}), ("int8", {}), ("float16", {"preprocess": "fast", "compute": "bfloat16"})],
)
def test_new_images_get_the_scores_of_cached_ones(
    model: Path, images: Path, dtype: str, making: dict[str, Any]
) -> None:
    split = datasets.load(str(images)).split("test")
    files = [images / name for name in split.ids]
    names = "cls+ap-2-layers/attentive,all-tokens-last/efficient,ap-layer-1/ridge,cls+ap-all-layers/knn"
    for row, folder in probed(model, images, names, dtype=dtype, **making):
        made = mlfusion.predict(folder, files, top=3, batch_size=5)
        held = Results("results").arrays(row)["probabilities"]
        assert [one.image for one in made] == [str(file) for file in files]
        for one, expected in zip(made, held, strict=True):
            given = dict(one.top)
            np.testing.assert_allclose([given[name] for name in split.classes], expected, atol=2e-3)  # kept in float16
            assert list(given.values()) == sorted(given.values(), reverse=True)


@pytest.mark.parametrize(
    ("family", "suffix", "making", "reading"),
    [
        ("vit", "", {"size": 48}, None),
        ("vit", ":block,hidden_act=relu", {"preprocess": "paper+fast", "size": 56}, None),
        ("clip", ":projected", {"preprocess": "paper", "size": 40}, None),
        ("deit", ":mlp", {"size": 64, "compute": "bfloat16"}, mlfusion.ReadOptions(exif_transpose=True)),
        ("dinov2", ":attn", {"views": ("flip", "plain"), "size": 44}, None),
    ],
)
def test_new_images_are_made_as_the_cached_ones_were(
    family: str, suffix: str, making: dict[str, Any], reading: Any, images: Path, tmp_path: Path
) -> None:
    """At another size, hook point, with other settings, turned: the probe gives new files what it gives cached tokens."""
    word = f"{save_model(family, tmp_path / family)}{suffix}"
    mlfusion.extract(word, str(images), **making, read=reading)
    done = mlfusion.probe(str(images), model=word, probes="ap-all-layers/linear", grid="quick", seeds=(0,), save=True)
    [row] = done.rows
    card, head = load(Path("results/probes") / row.id)
    held = mlfusion.load_features(word, str(images), "test", tokens="ap")
    values = held.tokens.reshape(len(held.ids), -1, held.tokens.shape[-1]).astype(np.float32)
    expected, _ = protocol.predict(head, Tokens(values, held.labels), card.target())
    made = mlfusion.predict(Path("results/probes") / row.id, [images / name for name in held.ids], top=3)
    given = np.array([[dict(one.top)[name] for name in held.classes] for one in made])
    np.testing.assert_allclose(given, expected, atol=2e-3)  # a token's last bit in float16 may differ
    assert np.ptp(expected, axis=0).max() > 0.05  # and there is something to differ in


@pytest.mark.slow
def test_real_weights_at_another_size(shared: Path, tmp_path: Path) -> None:
    """DeiT-Ti at 288 pixels on photographs of textures: files as cached tokens."""
    [weights] = {path.parent for path in (shared / "weights").rglob("model.safetensors")}
    folder = tmp_path / "few"
    for split in ("train", "test"):
        classes = sorted(path for path in (shared / "dtd10" / split).iterdir() if path.is_dir())[:3]
        for each in classes:
            (folder / split / each.name).mkdir(parents=True)
            for picture in sorted(each.iterdir())[: 6 if split == "train" else 2]:
                (folder / split / each.name / picture.name).write_bytes(picture.read_bytes())
    [(row, probe)] = probed(weights, folder, "cls+ap-last/linear", size=288)
    ids = datasets.load(str(folder)).split("test").ids
    made = mlfusion.predict(probe, [folder / name for name in ids], top=3)
    given = [[dict(one.top)[name] for name in row.classes] for one in made]
    np.testing.assert_allclose(given, Results("results").arrays(row)["probabilities"], atol=2e-3)


def test_a_picture_that_is_too_large_is_refused_unless_more_is_allowed(model: Path, images: Path) -> None:
    [(_, folder)] = probed(model, images, "cls-last/linear")
    picture = next(images.rglob("*.png"))  # 40 x 36
    with pytest.raises(BadData, match="allowed are 1,000: raise --max-pixels"):
        mlfusion.predict(folder, [picture], max_pixels=1000)


def test_a_probe_is_not_put_on_another_backbone(model: Path, images: Path, tmp_path: Path) -> None:
    [(_, folder)] = probed(model, images, "cls-last/linear")
    picture = next(images.rglob("*.png"))
    other = save_model("vit", tmp_path / "other", seed=1)
    with pytest.raises(BadModel, match=r"other is not the backbone of this probe, tiny-vit from .*: weights differs"):
        mlfusion.predict(folder, [picture], model=str(other))
    same = save_model("vit", tmp_path / "same")
    settings = same / "preprocessor_config.json"
    assert mlfusion.predict(folder, [picture], model=str(same)) == mlfusion.predict(folder, [picture])
    settings.write_text(settings.read_text().replace("0.5, 0.6, 0.7", "0.5, 0.6, 0.8"))
    # How pictures are prepared is the probe's to say, and not that folder's.
    assert mlfusion.predict(folder, [picture], model=str(same)) == mlfusion.predict(folder, [picture])
    body = json.loads((folder / "card.json").read_text())
    body["backbone"]["preparation"] = body["backbone"]["preparation"].replace("0.7", "0.8")
    (folder / "card.json").write_text(json.dumps(body | {"sha256": sealed_digest(body)}))
    with pytest.raises(BadModel, match=r"preprocess differs\. Allowed: the same weights and preprocessing"):
        mlfusion.predict(folder, [picture])


def test_a_preparation_nested_deep_ends_in_no_traceback(model: Path, images: Path) -> None:
    """It is taken for that of a processor with rules of its own, whose digest alone counts: here that of the model."""
    [(_, folder)] = probed(model, images, "cls-last/linear")
    picture = next(images.rglob("*.png"))
    before = mlfusion.predict(folder, [picture])
    body = json.loads((folder / "card.json").read_text())
    body["backbone"]["preparation"] = "[" * 100_000
    (folder / "card.json").write_text(json.dumps(body | {"sha256": sealed_digest(body)}))
    assert mlfusion.predict(folder, [picture]) == before


def test_an_image_that_cannot_be_read_is_named(model: Path, images: Path, tmp_path: Path) -> None:
    [(_, folder)] = probed(model, images, "cls-last/linear")
    (tmp_path / "text.png").write_text("no picture")
    for name, why in (("text.png", "not an image"), ("absent.png", "No such file")):
        with pytest.raises(BadData, match=f"{name} cannot be read: .*{why}"):
            mlfusion.predict(folder, [tmp_path / name])


def test_a_probe_that_was_not_kept_is_trained_again_and_the_same(model: Path, images: Path) -> None:
    mlfusion.extract(str(model), str(images))
    options: dict[str, Any] = {"model": str(model), "probes": "cls-last/linear", "grid": "quick", "seeds": (0,)}
    first = mlfusion.probe(str(images), **options)
    assert not Path("results/probes").exists()
    said: list[str] = []
    second = mlfusion.probe(str(images), **options, save=True, log=said.append)
    assert any("1 of them are trained again" in line for line in said)
    assert second.trained == 0 and second.rows == first.rows
    assert len(Results("results").rows()) == 1
    held, probe = load(Path("results/probes") / first.rows[0].id)
    assert held.scores["test"] == first.rows[0].test
    assert sum(p.numel() for p in probe.parameters()) == first.rows[0].parameters
    third = mlfusion.probe(str(images), **options, save=True, log=said.append)
    assert third.rows == first.rows


def test_a_saved_probe_holds_nothing_that_is_executed(tmp_path: Path) -> None:
    saved(tmp_path / "probe", "attentive")
    raw = (tmp_path / "probe" / "probe.safetensors").read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    assert {one["dtype"] for one in header.values()} == {"F32"}
    assert torch.isfinite(torch.from_numpy(load_file(tmp_path / "probe" / "probe.safetensors")["query"])).all()


def test_a_saved_probe_has_a_card_that_the_hub_reads(model: Path, images: Path) -> None:
    [(row, folder)] = probed(model, images, "cls+ap-2-layers/attentive")
    card = ModelCard.load(folder / "README.md")
    [result] = card.data.eval_results
    assert (result.metric_type, result.metric_value) == ("balanced_accuracy", row.test)
    assert (result.dataset_name, result.dataset_split) == ("colours", "test")
    assert card.data.library_name == "mlfusion" and card.data.pipeline_tag == "image-classification"
    assert str(model.parent) not in card.content and str(images.parent) not in card.content
    assert card.data.base_model is None  # a folder: there is nothing on the hub to link to
    held, _ = load(folder)
    at_hub = replace(held, backbone=replace(held.backbone, source="facebook/dinov2-base"))
    assert ModelCard(readme(at_hub)).data.base_model == "facebook/dinov2-base"
    assert "blue, green, red" in card.text and "mlfusion predict --probe" in card.text
    hostile = replace(held, classes=("---", "a: b", "# c"), dataset="x: [y]\n---")
    assert ModelCard(readme(hostile)).data.eval_results[0].dataset_name == "x: [y]\n---"


def test_images_are_turned_as_those_that_the_probe_was_trained_on(model: Path, images: Path, tmp_path: Path) -> None:
    """A photograph held sideways, by a probe of upright images: as the same one without an orientation, turned by hand."""
    reading = mlfusion.ReadOptions(exif_transpose=True)
    mlfusion.extract(str(model), str(images), read=reading)
    mlfusion.probe(str(images), model=str(model), probes="cls-last/linear", grid="quick", seeds=(0,), save=True)
    [folder] = Path("results/probes").iterdir()
    picture = Image.open(next((images / "test").rglob("*.png")))
    exif = Image.Exif()
    exif[0x0112] = 6
    picture.save(tmp_path / "sideways.png", exif=exif)
    picture.transpose(Image.Transpose.ROTATE_270).save(tmp_path / "turned.png")
    sideways, turned = mlfusion.predict(folder, [tmp_path / "sideways.png", tmp_path / "turned.png"])
    assert dict(sideways.top) == pytest.approx(dict(turned.top), abs=1e-5)
