"""The example of the slices: near copies of a picture on both sides make scores that no new patient would get.

With --group-column the score is the truth; without it a warning names the column.
"""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny import save_model
from typer.testing import CliRunner

import mlfusion
from mlfusion import cli
from mlfusion.errors import BadData
from mlfusion.results import Results, Row, arrays
from mlfusion.workflows import advice

PROBES = ["cls+ap-all-layers/ridge", "cls+ap-all-layers/knn"]
QUICK = {"grid": "quick", "seeds": (0,)}


def save_slices(root: Path, pictures: list[tuple[str, np.ndarray]], copies: int = 4) -> str:
    """Slices: near crops of each picture, which is a patient; a table with path, label and patient."""
    root.mkdir(parents=True)
    with open(root / "slices.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["path", "label", "patient"])
        for number, (label, pixels) in enumerate(pictures):
            for copy in range(copies):
                name = f"{number:03d}-{copy}.png"
                Image.fromarray(pixels[copy : copy + 40, copy : copy + 40]).resize((32, 32)).save(root / name)
                writer.writerow([name, label, f"p{number:03d}"])
    return str(root / "slices.csv")


def noise(patients: int = 40) -> list[tuple[str, np.ndarray]]:
    """Patients whose pictures have nothing to do with their labels: the truth is one half."""
    random = np.random.default_rng(0)
    small = random.integers(0, 256, (patients, 6, 6, 3), np.uint8)
    pictures = [np.asarray(Image.fromarray(one).resize((44, 44), Image.Resampling.BICUBIC)) for one in small]
    return [("ab"[number % 2], pixels) for number, pixels in enumerate(pictures)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_model("vit", tmp_path_factory.mktemp("m") / "m"))


def study(model: str, place: str, **options: object) -> list[Row]:
    extracted = mlfusion.extract(model, place, label_column="label", split_ratio="0.6/0.4", **options)
    return mlfusion.probe(extracted[0].entry.spec.data.name, model=model, probes=PROBES, **QUICK).rows


def test_slices_of_noise_score_highly_by_image_and_by_chance_by_patient(
    model: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    place = save_slices(tmp_path / "set", noise())
    by_image = study(model, place)
    assert "--group-column patient keeps them together" in caplog.text
    caplog.clear()
    by_patient = study(model, place, group_column="patient")
    assert "--group-column" not in caplog.text
    assert min(row.test for row in by_image) > 0.9
    assert max(row.test for row in by_patient) < 0.75
    row = by_patient[0]
    assert row.groups is not None and (row.groups.column, row.groups.train, row.groups.test) == ("patient", 24, 16)
    assert by_image[0].groups is None and "groups by patient" in row.options()
    found = Results("results").arrays(row)["groups"]
    assert len(set(found.tolist())) == 16 and (np.bincount(found) == 4).all()
    for wrong, message in ((found % 15, "not as many"), (found - 1, "not as many"), (found * 1.0, "ask for none")):
        with pytest.raises(ValueError, match=message):
            arrays.check(row, {"groups": wrong})
    with pytest.raises(ValueError, match="ask for none"):
        arrays.check(by_image[0], {"groups": np.arange(by_image[0].images.test)})


def test_groups_are_in_the_id_and_a_rerun_has_them(model: str, tmp_path: Path) -> None:
    """The same features, split by the data set itself, with groups and without."""
    place = save_slices(tmp_path / "set", noise(24))
    table = Path(place)
    lines = table.read_text().splitlines()
    rows = [f"{line},{'test' if line.split(',')[2] > 'p015' else 'train'}" for line in lines[1:]]
    table.write_text("\n".join([lines[0] + ",split", *rows]) + "\n")
    mlfusion.extract(model, place, label_column="label")
    [plain] = mlfusion.probe(place, model=model, probes=PROBES[:1], **QUICK).rows
    mlfusion.extract(model, place, label_column="label", group_column="patient")
    [grouped] = mlfusion.probe(place, model=model, probes=PROBES[:1], **QUICK).rows
    assert grouped.features == plain.features and grouped.id != plain.id
    assert plain.val > 0.9 and grouped.val < plain.val - 0.2
    for row in (plain, grouped):
        assert mlfusion.rerun(row.id).same
    assert mlfusion.probe(place, model=model, probes=PROBES[:1], **QUICK).trained == 0
    features = mlfusion.load_features(model, place, "test", layers="last")
    assert features.groups == tuple(name[:3].join(["p", ""]) for name in features.ids)
    mlfusion.extract(model, place, label_column="label")
    assert mlfusion.probe(place, model=model, probes=PROBES[:1], **QUICK).rows == [plain]


def test_too_few_groups_of_a_class_are_refused_with_the_counts(model: str, tmp_path: Path) -> None:
    pictures = [("a" if number else "b", pixels) for number, (_, pixels) in enumerate(noise(8))]
    place = save_slices(tmp_path / "set", pictures)
    with pytest.raises(BadData, match=r"class 'b' has images of 1 group \(of 8 in all\), too few to part"):
        mlfusion.extract(model, place, label_column="label", split_ratio="0.6/0.4", group_column="patient")
    pictures = [("b" if number in (1, 5) else "a", pixels) for number, (_, pixels) in enumerate(noise(8))]
    place = save_slices(tmp_path / "other", pictures)
    with pytest.raises(BadData, match=r"class 'b' has training images of 1 group \(of \d in all\); allowed: enough"):
        study(model, place, group_column="patient")


def test_a_recipe_with_groups_finds_its_rows_again(model: str, tmp_path: Path) -> None:
    place = save_slices(tmp_path / "set", noise(16))
    fields = {"label_column": "label", "group_column": "patient", "split_ratio": "0.6/0.4"}
    lines = [f'{name} = "{value}"' for name, value in fields.items()]
    lines += [
        f'models = ["{model}"]',
        f'datasets = ["{place}"]',
        f'probes = ["{PROBES[0]}"]',
        'grid = "quick"',
        "seeds = [0]",
    ]
    (tmp_path / "recipe.toml").write_text("\n".join(lines))
    first = mlfusion.run(str(tmp_path / "recipe.toml"))
    again = mlfusion.run(str(tmp_path / "recipe.toml"))
    assert [row.groups.column for row in first.rows if row.groups] == ["patient"]
    assert (first.trained, again.trained) == (1, 0) and again.rows == first.rows


def test_the_table_of_a_data_set_counts_groups(tmp_path: Path) -> None:
    place = save_slices(tmp_path / "set", noise(16))
    words = ["data", place, "--label-column", "label", "--group-column", "patient", "--split-ratio", "0.5/0.5"]
    printed = CliRunner().invoke(cli.app, words).output
    assert "split anew 0.5/0.5 seed 0 by group" in printed and "groups" in printed
    found = json.loads(CliRunner().invoke(cli.app, [*words, "--json"]).stdout)
    assert found["grouped_by"] == "patient" and [one["groups"] for one in found["splits"]] == [8, 8]


@pytest.mark.slow
def test_a_pilot_keeps_patients_together(model: str, tmp_path: Path) -> None:
    place = save_slices(tmp_path / "set", noise())
    options = {"label_column": "label", "split_ratio": "0.8/0.2"}
    scores = {}
    for column in (None, "patient"):
        extracted = mlfusion.extract(model, place, group_column=column, tokens="cls,ap,all@last", **options)
        name = extracted[0].entry.spec.data.name
        found = advice.advise(model, name, mlfusion.PilotOptions(images=100), probes=PROBES[:1])
        scores[column] = found.candidates[0].score
    assert scores[None].value > 0.85 and scores["patient"].value < 0.75
    assert scores["patient"].high - scores["patient"].low > 1.5 * (scores[None].high - scores[None].low)


@pytest.mark.slow
def test_slices_of_photographs(shared: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Crops of flowers as slices: by image nearly all are right, by picture much fewer."""
    files = sorted((shared / "flowers5" / "train").glob("*/*.jpg"))[::4]
    pictures = [(file.parent.name, np.asarray(Image.open(file).convert("RGB").resize((44, 44)))) for file in files]
    place = save_slices(tmp_path / "set", pictures)
    by_image = study("formula-vit", place)
    assert "--group-column patient keeps them together" in caplog.text
    by_patient = study("formula-vit", place, group_column="patient")
    assert min(row.test for row in by_image) > 0.8
    assert all(a.test > b.test + 0.25 for a, b in zip(by_image, by_patient, strict=True))
