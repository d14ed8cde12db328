"""Names, ids and folders all end as a folder; the real download against a hub of our own; refusals by name."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import hub
import pytest
from tiny import save_images, save_model

from mlfusion import models
from mlfusion.errors import BadModel, Unavailable, UnknownName
from mlfusion.models import preprocessing


def at_hub(endpoint: str, home: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """`mlfusion …` in a process that takes `endpoint` for the hub and has an empty home."""
    env = {**os.environ, "HF_ENDPOINT": endpoint, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"}
    del env["HF_HUB_OFFLINE"]
    return subprocess.run([sys.executable, "-m", "mlfusion", *words], env=env, capture_output=True, text=True)


@pytest.mark.long
def test_a_model_of_the_hub_is_downloaded_once_and_pinned_to_its_commit(tmp_path):
    folder = save_model("vit", tmp_path / "m")
    (folder / "pytorch_model.bin").write_bytes(b"a pickle that must not be fetched")
    (folder / "run_me.py").write_text("raise SystemExit")
    images = save_images(tmp_path / "d", {"train": 2, "test": 2})
    words = ("extract", "-m", "someone/tiny", "-d", str(images), "--split", "train", "--json")
    with hub.serving({"someone/tiny": folder}) as (endpoint, asked):
        first = at_hub(endpoint, tmp_path / "home", *words)
        assert first.returncode == 0, first.stderr
        fetched = {path.rsplit("/", 1)[-1] for path in asked}
        again = at_hub(endpoint, tmp_path / "home", *words)
    [one] = json.loads(first.stdout)["features"]
    assert one["model"] == "tiny"
    assert {"config.json", "model.safetensors", "preprocessor_config.json"} <= fetched
    assert not {"pytorch_model.bin", "run_me.py"} & fetched
    body = json.loads((Path(one["path"]) / "entry.json").read_text())
    assert body["model"]["revision"] == hub.COMMIT
    [repeated] = json.loads(again.stdout)["features"]
    assert (repeated["key"], repeated["forward_passes"]) == (one["key"], 0)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("someone/locked", "someone/locked is gated: ask for access at"),
        ("someone/nothing", "the hub has no model 'someone/nothing'"),
    ],
)
def test_what_the_hub_refuses_is_said_with_what_to_do(word, message, tmp_path):
    with hub.serving({}, gated=("someone/locked",)) as (endpoint, _):
        said = at_hub(endpoint, tmp_path, "extract", "-m", word)
    assert said.returncode == 1
    assert message in said.stderr
    assert "hf auth login" in said.stderr
    assert "Traceback" not in said.stderr


def test_a_name_of_the_catalogue_needs_the_hub_or_says_so():
    with pytest.raises(Unavailable, match=r"clip-vit-b16 is not on this machine.*--model formula-vit"):
        models.locate("clip-vit-b16")


def test_unknown_names_offer_the_nearest():
    with pytest.raises(UnknownName, match="Did you mean dinov2-vit-b14"):
        models.locate("dinov2-b14")


@pytest.mark.parametrize(
    ("lost", "message"),
    [
        ("config.json", "has no config.json"),
        ("model.safetensors", "holds no weights"),
        ("preprocessor_config.json", "no image processor"),
    ],
)
def test_a_folder_that_lacks_something_says_what(lost, message, tmp_path):
    folder = save_model("vit", tmp_path / "m")
    (folder / lost).unlink()
    with pytest.raises(BadModel, match=message):
        models.identify(models.locate(str(folder)), preprocessing.read(folder).key())


def test_a_configuration_that_is_not_one(tmp_path):
    folder = save_model("vit", tmp_path / "m")
    (folder / "config.json").write_text('{"model_type": "no-such-thing"}')
    with pytest.raises(BadModel, match=r"config\.json cannot be read"):
        models.identify(models.locate(str(folder)), "{}")


def test_the_catalogue_holds_the_studys_eleven_and_the_embedded_one_as_it_is():
    rows = models.CATALOGUE
    assert [name for name, row in rows.items() if row.study] == [
        *("clip-vit-b32", "clip-vit-b16", "clip-vit-l14", "dinov2-vit-s14", "dinov2-vit-b14", "dinov2-vit-l14"),
        *("vit-s16", "vit-b16", "vit-l16", "mae-vit-b16", "mae-vit-l16"),
    ]
    row = rows[models.EMBEDDED]
    checkpoint = models.locate(models.EMBEDDED)
    spec = models.identify(checkpoint, preprocessing.read(checkpoint.folder).key())
    assert (row.depth, row.width) == (spec.depth, spec.width)
    assert models.shape(checkpoint).patch_px == row.patch_px
    assert json.loads(spec.preprocess)["size"] == {"height": row.image_px, "width": row.image_px}


def test_rows_of_the_catalogue_are_whole():
    rows = list(models.CATALOGUE.values())
    assert len({row.source for row in rows}) == len(rows)
    for row in rows:
        assert row.embedded or re.fullmatch("[0-9a-f]{40}", row.revision or ""), row.name
        assert row.licence, row.name
        assert row.about, row.name
        assert row.image_px % row.patch_px == 0 or row.name.endswith("14-384"), row.name


ROW = """
import json, sys
from pathlib import Path
from huggingface_hub import get_safetensors_metadata, hf_hub_download
from mlfusion import models
from mlfusion.models import checkpoints, hub, preprocessing
row = models.CATALOGUE[sys.argv[1]]
said = hub.fetch_info(row.source, row.name, row.revision) if not row.gated or hub.logged_in() else None
if said is None:
    raise SystemExit("gated")
for name in ("config.json", "preprocessor_config.json"):
    try:
        folder = Path(hf_hub_download(row.source, name, revision=row.revision)).parent
    except Exception as err:
        print(err, file=sys.stderr)
if checkpoints.layout(folder) == "timm":  # the tensors' shapes, without the tensors
    held = get_safetensors_metadata(row.source, revision=row.revision)
    shapes = {k: tuple(t.shape) for one in held.files_metadata.values() for k, t in one.tensors.items()}
    checkpoints.shapes_of, models.weight_files = lambda _: shapes, lambda _: []
shape = models.shape(models.Checkpoint(folder, row.name, row.source, row.revision))
pixels = preprocessing.read(folder).pixels
print(json.dumps([shape.depth, shape.width, shape.patch_px, pixels[0], said.gated, said.licence]))
"""


@pytest.mark.network
@pytest.mark.parametrize("name", [name for name, row in models.CATALOGUE.items() if not row.embedded])
def test_a_row_of_the_catalogue_is_what_the_hub_has(name):
    """Against the repository's own configuration, at the commit that the row names."""
    row, env = models.CATALOGUE[name], {**os.environ}
    env.pop("HF_HUB_OFFLINE", None)
    said = subprocess.run([sys.executable, "-c", ROW, name], env=env, capture_output=True, text=True)
    if "cannot be reached" in said.stderr or said.stderr.strip() == "gated":
        pytest.skip(f"{row.source} cannot be read from here")
    assert said.returncode == 0, said.stderr
    *numbers, gated, licence = json.loads(said.stdout)
    assert numbers == [row.depth, row.width, row.patch_px, row.image_px]
    assert gated == row.gated
    assert licence in (None, "other") or licence.replace("-", " ") in row.licence.lower().replace("-", " ")
