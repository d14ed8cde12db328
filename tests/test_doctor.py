"""The doctor: what is sound is said to be, what is not is named with what to do, and nothing is downloaded."""

import json
import shutil
from pathlib import Path

import hub
import huggingface_hub
import pytest
import zoo
from tiny import save_model
from typer.testing import CliRunner

from mlfusion import cli, models
from mlfusion.workflows import doctor


def findings(model: str | None = None) -> dict[str, doctor.Finding]:
    return {one.check: one for one in doctor.doctor(model, device="cpu")}


def test_the_machine_alone_is_looked_at_offline():
    found = findings()
    assert list(found) == ["libraries", "device", "kernels", "memory", "cache", "hub"]
    assert "HF_HUB_OFFLINE is set" in found["hub"].description
    assert found["hub"].advice == "unset HF_HUB_OFFLINE to download models"


@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler here, so nothing that had to be compiled")
def test_where_there_is_a_compiler_the_kernels_are_compiled():
    """Installation goes on without them: a mistake in their source would otherwise be seen by nobody."""
    assert "not compiled" not in findings()["kernels"].description


def test_a_model_is_followed_as_far_as_its_first_features(tmp_path):
    folder = zoo.save("DINOv2, registers", tmp_path / "m")
    found = findings(f"{folder}:block")
    assert all(one.state != "problem" for one in found.values())
    assert found["blocks"].description == "3 in encoder.layer; the second norm is norm2; the final norm is layernorm"
    assert found["tokens"].description.startswith("cls (1), ap (1), registers (4), max (1)")
    assert found["hook points"].description.endswith("attn (layers 1-3), mlp (layers 1-3)")
    assert found["features"].state == "ok"


@pytest.mark.parametrize(
    ("model", "check", "message"),
    [
        ("clip-vit-b61", "name", "Did you mean clip-vit-b16"),
        ("clip-vit-b16:blok", "name", "Did you mean block"),
        ("clip-vit-b16", "copy", "not on this machine"),
    ],
)
def test_what_is_wrong_is_named_and_ends_with_exit_code_1(model, check, message):
    said = CliRunner().invoke(cli.app, ["doctor", model, "--json"])
    assert said.exit_code == 1
    body = json.loads(said.stdout)
    assert body["sound"] is False
    [one] = [one for one in body["findings"] if one["check"] == check]
    assert one["state"] == "problem"
    assert message in one["found"]
    assert one["do"]


def test_weights_that_are_missing_are_found(tmp_path):
    folder = save_model("vit", tmp_path / "m")
    (folder / "model.safetensors").unlink()
    assert "holds no weights" in findings(str(folder))["model"].description


def at(endpoint: str, home: Path, monkeypatch) -> None:
    """This process takes `endpoint` for the hub and has an empty home."""
    for name, value in {"ENDPOINT": endpoint, "HF_HUB_OFFLINE": False, "HF_HUB_CACHE": str(home)}.items():
        monkeypatch.setattr(huggingface_hub.constants, name, value)
    monkeypatch.setattr(huggingface_hub.HfApi, "__init__", _to(endpoint, huggingface_hub.HfApi.__init__))


def _to(endpoint: str, build):
    return lambda self, *args, **words: build(self, *args, **{**words, "endpoint": endpoint})


def test_the_hub_is_asked_what_a_download_takes_and_whether_one_may(tmp_path, monkeypatch):
    folder = save_model("vit", tmp_path / "m")
    with hub.serving({"someone/tiny": folder}, gated=("someone/locked",)) as (endpoint, asked):
        at(endpoint, tmp_path / "home", monkeypatch)
        found = findings("someone/tiny")
        locked = findings("someone/locked")["access"]
        absent = findings("someone/nothing")["access"]
        remote = models.hub.fetch_info("someone/tiny", "tiny", None)
    weights = ("config.json", "preprocessor_config.json", "model.safetensors")
    assert remote.nbytes == sum((folder / name).stat().st_size for name in weights)
    assert remote.revision == hub.COMMIT
    assert "not pinned" in found["name"].description
    assert (found["access"].state, found["access"].advice) == ("ok", "mlfusion extract -m someone/tiny")
    assert (locked.state, "hf auth login" in locked.advice) == ("problem", True)
    assert "no model 'someone/nothing'" in absent.description
    assert not any("resolve" in path for path in asked)  # nothing was downloaded


def test_a_hub_that_is_not_there_is_said_so(tmp_path, monkeypatch):
    at("http://127.0.0.1:9", tmp_path, monkeypatch)
    found = findings("openai/clip-vit-base-patch32")
    assert found["hub"].state == "note"
    assert "cannot be reached" in found["hub"].description
    assert "cannot be reached" in found["access"].description
