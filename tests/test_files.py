"""A checkpoint is one list of files: what is digested is what is read, and no other file of the folder matters."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import hub
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_models import at_hub
from tiny import save_images, save_model

import mlfusion
from mlfusion import models
from mlfusion.errors import BadModel
from mlfusion.extraction.request import Request
from mlfusion.extraction.run import fill
from mlfusion.models.backbone import Backbone
from mlfusion.workflows.doctor import doctor

PIXELS = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(3))


def features(folder: Path) -> torch.Tensor:
    """The last layer's tokens."""
    backbone = Backbone(models.locate(str(folder)))
    return backbone(PIXELS, [(backbone.depth, "all")])[backbone.depth, "all"]


def digest(folder: Path) -> str:
    return models.identify(models.locate(str(folder)), "{}").weights


def problem(folder: Path) -> str:
    """What `doctor` says of a model that cannot be used."""
    return next(finding.description for finding in doctor(str(folder)) if finding.state == "problem")


def as_pickle(folder: Path) -> Path:
    """The same tensors as pytorch_model.bin."""
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    return folder


def as_old_pickle(folder: Path) -> Path:
    """As torch wrote it before 1.6: no zip archive."""
    tensors = load_file(folder / "model.safetensors")
    torch.save(tensors, folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    (folder / "model.safetensors").unlink()
    return folder


def as_shards(folder: Path, stem: str = "model") -> Path:
    """The same tensors in two files and an index."""
    tensors = list(load_file(folder / "model.safetensors").items())
    (folder / "model.safetensors").unlink()
    weight_map = {}
    for number, part in enumerate((tensors[::2], tensors[1::2]), 1):
        name = f"{stem}-0000{number}-of-00002.safetensors"
        save_file(dict(part), folder / name, {"format": "pt"})
        weight_map |= {tensor: name for tensor, _ in part}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


# --- which files ------------------------------------------------------------------------------------------------------


def test_a_pickle_that_is_cut_short_is_refused(tmp_path: Path) -> None:
    file = as_old_pickle(save_model("vit", tmp_path / "m")) / "pytorch_model.bin"
    whole = file.read_bytes()
    for nbytes in range(0, len(whole), len(whole) // 20):
        file.write_bytes(whole[:nbytes])
        with pytest.raises(BadModel):
            models.weight_files(tmp_path / "m")


@pytest.mark.parametrize("form", [as_pickle, as_old_pickle, as_shards])
def test_weights_of_every_form_give_the_same_features(form: Callable[[Path], Path], tmp_path: Path) -> None:
    plain = save_model("vit", tmp_path / "plain")
    other = form(Path(shutil.copytree(plain, tmp_path / "other")))
    torch.testing.assert_close(features(other), features(plain), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("model.safetensors", "model.safetensors.index.json"),
        ("model.safetensors", "pytorch_model.bin"),
        ("model.safetensors.index.json", "pytorch_model.bin"),
        ("pytorch_model.bin", "weights.safetensors"),
    ],
)
def test_the_first_name_is_read_and_digested_as_transformers_does(first: str, second: str, tmp_path: Path) -> None:
    """Both hold a whole model; the second is of another seed."""
    forms = {"model.safetensors.index.json": as_shards, "pytorch_model.bin": as_pickle}
    read = forms.get(first, lambda folder: folder)(save_model("vit", tmp_path / "read"))
    alone, before = features(read), digest(read)
    other = forms.get(second, lambda folder: folder)(save_model("vit", tmp_path / "other", seed=1))
    for path in [*other.glob("*.safetensors*"), *other.glob("*.bin")]:
        shutil.copy(path, read / ("weights.safetensors" if second.startswith("weights") else path.name))
    torch.testing.assert_close(features(read), alone, rtol=0, atol=0)
    assert digest(read) == before


@pytest.mark.parametrize("form", [as_pickle, as_shards, lambda folder: folder], ids=["pickle", "shards", "one file"])
def test_other_files_change_neither_features_nor_identity(form: Callable[[Path], Path], tmp_path: Path) -> None:
    folder = form(save_model("vit", tmp_path / "m"))
    before, tokens = digest(folder), features(folder)
    save_file({"classifier.weight": torch.zeros(2, 32)}, folder / "head.safetensors")
    torch.save({"steps": torch.zeros(1)}, folder / "optimizer.bin")
    (folder / "training_args.bin").write_bytes(b"a pickle that is not read")
    (folder / "README.md").write_text("text")
    assert digest(folder) == before
    torch.testing.assert_close(features(folder), tokens, rtol=0, atol=0)


@pytest.mark.parametrize("form", [as_pickle, as_shards, lambda folder: folder], ids=["pickle", "shards", "one file"])
def test_every_file_that_is_read_is_in_the_identity(form: Callable[[Path], Path], tmp_path: Path) -> None:
    folder = form(save_model("vit", tmp_path / "m"))
    found = {digest(folder)}
    for file in models.weight_files(folder):
        held = load_file(file) if file.suffix == ".safetensors" else torch.load(file, weights_only=True)
        last = sorted(held)[-1]
        held[last] = held[last] + 1
        save_file(held, file, {"format": "pt"}) if file.suffix == ".safetensors" else torch.save(held, file)
        found.add(digest(folder))
    assert len(found) == 1 + len(models.weight_files(folder))


def without_index(folder: Path) -> None:
    as_shards(folder)
    (folder / "model.safetensors.index.json").unlink()


def without_a_shard(folder: Path) -> None:
    as_shards(folder)
    (folder / "model-00002-of-00002.safetensors").unlink()


def naming(name: object) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        (folder / "model.safetensors").rename(folder.parent / "outside.safetensors")
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": name}}))

    return spoil


def empty_index(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text("{}")


def other_name(folder: Path) -> None:
    body = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**body, "transformers_weights": "other.safetensors"}))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (without_index, "model-00001-of-00002.safetensors, model-00002-of-00002.safetensors may all be the weights"),
        (without_a_shard, "model-00002-of-00002.safetensors is missing, and the index names it"),
        (naming("../outside.safetensors"), "names '../outside.safetensors'; allowed: files of its own folder"),
        (naming("/outside.safetensors"), "names '/outside.safetensors'; allowed: files of its own folder"),
        (naming("sub\\outside.safetensors"), "allowed: files of its own folder"),
        (naming(3), "3 is missing"),
        (empty_index, "names no files"),
        (other_name, "holds no weights; allowed: other.safetensors"),
    ],
)
def test_a_list_that_is_not_clear_is_refused(spoil: Callable[[Path], None], message: str, tmp_path: Path) -> None:
    folder = save_model("vit", tmp_path / "m")
    spoil(folder)
    with pytest.raises(BadModel) as refusal:
        digest(folder)
    assert message in str(refusal.value)
    assert message in problem(folder)


@pytest.mark.long
def test_the_hub_is_asked_for_the_files_that_are_read_and_no_others(tmp_path: Path) -> None:
    folder = as_shards(save_model("vit", tmp_path / "m"))
    for name in ("pytorch_model.bin", "other.safetensors", "model.fp16.safetensors"):
        (folder / name).write_bytes(b"not to be downloaded")
    images = save_images(tmp_path / "d", {"train": 2, "test": 2})
    with hub.serving({"someone/tiny": folder}) as (endpoint, asked):
        said = at_hub(endpoint, tmp_path / "home", "extract", "-m", "someone/tiny", "-d", str(images))
    assert said.returncode == 0, said.stderr
    fetched = {path.rsplit("/", 1)[-1] for path in asked if "/resolve/" in path}
    weights = {"model.safetensors.index.json", *(file.name for file in models.weight_files(folder))}
    assert fetched == {"config.json", "preprocessor_config.json", *weights}


# --- weights that change ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", [as_pickle, as_shards, lambda folder: folder], ids=["pickle", "shards", "one file"])
@pytest.mark.parametrize("again", ["in place", "renamed"])
def test_weights_that_are_written_again_are_read_again(
    again: str, form: Callable[[Path], Path], tmp_path: Path
) -> None:
    """In one process, under the same path and with the same size."""
    images = save_images(tmp_path / "d", {"train": 2, "test": 2})
    folder = form(save_model("vit", tmp_path / "m"))
    found = []
    for seed in (0, 1):
        new = form(save_model("vit", tmp_path / f"new{seed}", seed=seed))
        for file in models.weight_files(new):
            if again == "in place":
                (folder / file.name).write_bytes(file.read_bytes())
            else:
                os.replace(file, folder / file.name)
        mlfusion.extract(str(folder), str(images), splits="train", cache=tmp_path / "cache")
        found.append(
            np.asarray(mlfusion.load_features(str(folder), str(images), "train", cache=tmp_path / "cache").tokens)
        )
    assert not np.allclose(found[0], found[1], atol=0.1)


def test_the_digest_of_old_files_follows_every_change(tmp_path: Path) -> None:
    """Also one that keeps the size and sets the old time."""
    folder = save_model("vit", tmp_path / "m")
    file = folder / "model.safetensors"
    os.utime(file, ns=(10**18, 10**18))
    before = digest(folder)
    body = bytearray(file.read_bytes())
    body[-1] ^= 1
    file.write_bytes(body)
    os.utime(file, ns=(10**18, 10**18))
    assert digest(folder) != before
    assert digest(folder) == digest(folder)


def test_weights_that_change_before_they_are_loaded_are_not_extracted(tmp_path: Path) -> None:
    """Their features would have the key of the weights that were there before."""
    images = save_images(tmp_path / "d", {"train": 2, "test": 2})
    folder = save_model("vit", tmp_path / "m")
    request = Request.of(str(folder), str(images))
    shutil.copy(save_model("vit", tmp_path / "new", seed=1) / "model.safetensors", folder)
    with pytest.raises(BadModel, match="the weights of m changed while they were read"):
        fill(request, cache=tmp_path / "cache")


# --- adapters and quantised weights -----------------------------------------------------------------------------------

ADAPTER = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"], "base_model_name_or_path": "m"}


def test_an_adapter_beside_its_base_is_refused(tmp_path: Path) -> None:
    folder = save_model("vit", tmp_path / "m")
    (folder / "adapter_config.json").write_text(json.dumps(ADAPTER))
    save_file({"base_model.model.x.lora_A.weight": torch.zeros(4, 32)}, folder / "adapter_model.safetensors")
    with pytest.raises(BadModel, match=r"holds an adapter \(adapter_config\.json, .*merge_and_unload"):
        digest(folder)
    assert "merge_and_unload" in problem(folder)


@pytest.mark.slow
def test_an_adapter_of_the_hub_is_refused(tmp_path: Path) -> None:
    folder = save_model("vit", tmp_path / "m")
    (folder / "adapter_config.json").write_text(json.dumps(ADAPTER))
    with hub.serving({"someone/tuned": folder}) as (endpoint, asked):
        said = at_hub(endpoint, tmp_path / "home", "extract", "-m", "someone/tuned", "-d", str(tmp_path))
    assert said.returncode == 1
    assert "holds an adapter" in said.stderr
    assert "Traceback" not in said.stderr
    assert not any("model.safetensors" in path for path in asked if "/resolve/" in path)


METHODS = ("bitsandbytes", "gptq", "awq", "quanto", "torchao", "hqq", "compressed-tensors", "fp8", "aqlm", "eetq")


@pytest.mark.parametrize("method", METHODS)
def test_a_configuration_of_quantised_weights_is_one_sentence(method: str, tmp_path: Path) -> None:
    folder = save_model("vit", tmp_path / "m")
    body = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps({**body, "quantization_config": {"quant_method": method, "bits": 4}})
    )
    with pytest.raises(
        BadModel, match=rf"says that the weights are quantised \({method}\).*allowed: weights in float32"
    ):
        digest(folder)
    with pytest.raises(BadModel, match="quantised"):
        Backbone(models.locate(str(folder)))
    assert f"quantised ({method})" in problem(folder)


@pytest.mark.parametrize("place", ["text_config", "vision_config"])
def test_a_part_of_quantised_weights_is_refused_too(place: str, tmp_path: Path) -> None:
    folder = save_model("clip", tmp_path / "m")
    body = json.loads((folder / "config.json").read_text())
    body[place]["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (folder / "config.json").write_text(json.dumps(body))
    with pytest.raises(BadModel, match=r"quantised \(gptq\)"):
        digest(folder)
