"""The journey at the command line: both stages and the report, exit codes, JSON alone on standard output, plain errors."""

import json
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import save_images, save_model

from mlfusion import cli
from mlfusion.probing import evaluation, grids
from mlfusion.results import Results
from mlfusion.specs.names import HEAD_NAMES, STUDY

BASELINE, ALF = "cls-last/linear", "cls+ap-all-layers/attentive"


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return str(save_model("vit", tmp_path_factory.mktemp("model") / "tiny-vit"))


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> str:
    return str(save_images(tmp_path_factory.mktemp("data") / "colours", {"train": 8, "test": 4}))


@pytest.fixture
def short_grid(monkeypatch):
    """The quick grid, cut shorter: these tests are about what is said and kept, not about scores."""
    grid = grids.Grid(learning_rates=(1e-1, 1e-2), weight_decays=(1e-2,), dropouts=(0.0,), epochs=2, least_steps=10)
    monkeypatch.setitem(grids.SEARCH_GRIDS, "quick", grid)


class Said:
    """What a command wrote and how it ended."""

    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err

    @property
    def json(self):
        return json.loads(self.out)


@pytest.fixture
def run(monkeypatch, capfd):
    def call(*words: str) -> Said:
        monkeypatch.setattr(sys, "argv", ["mlfusion", *words])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        out, err = capfd.readouterr()
        return Said(ended.value.code or 0, out, err)

    return call


@pytest.mark.slow
def test_the_whole_journey(run, model, images, short_grid):
    extracted = run("extract", "--model", model, "--dataset", images, "--tokens", "cls,ap,all@last", "--json")
    assert extracted.code == 0
    features = extracted.json["features"]
    assert [
        set(one)
        >= {
            "model",
            "dataset",
            "split",
            "images",
            "layers",
            "tokens",
            "dtype",
            "key",
            "path",
            "bytes",
            "images_written",
            "images_reused",
            "forward_passes",
            "seconds",
        }
        for one in features
    ] == [True] * 2
    assert [one["images"] for one in features] == [24, 12]
    assert features[0]["layers"] == [1, 2, 3, 4]
    assert Path(features[0]["path"]).is_dir()

    again = run("extract", "--model", model, "--dataset", images, "--json").json["features"]
    assert [one["forward_passes"] for one in again] == [0, 0]

    words = ("probe", "--dataset", images, "--grid", "quick", "--seeds", "0,1", "--json")
    probed = run(*words, "--model", model)
    assert probed.code == 0
    assert "reused from the cache" in probed.err
    results = probed.json["results"]
    assert len(results) == 20
    assert {row["probe"] for row in results} == set(STUDY)
    for row in results:
        assert set(row) >= {
            "model",
            "dataset",
            "probe",
            "seed",
            "metric",
            "val",
            "test",
            "metrics",
            "selected",
            "parameters",
            "seconds",
            "features",
        }
        assert 0 <= row["val"] <= 1
        assert 0 <= row["test"] <= 1
        assert row["test"] == row["metrics"]["balanced_accuracy"]
        assert row["features"] == [one["key"] for one in features]

    repeated = run(*words)  # every model whose features are cached: here the same one
    assert repeated.json["results"] == results
    assert f"20 of 20 results are in {Path('results').absolute()} already" in repeated.err

    reported = run("report", "--html", "page.html")
    assert reported.code == 0
    assert ALF in reported.out.replace("\n", "")
    assert Path("page.html").stat().st_size > 100_000


def test_rows_lead_home_and_keep_their_attention(run, model, images, short_grid):
    run("extract", "-m", model, "-d", images)
    run("probe", "-d", images, "--grid", "quick", "--seeds", "0", "--probe", "alf,cls-last/linear")
    results = Results("results")
    by_probe = {row.probe: row for row in results.rows()}
    alf = by_probe[ALF]
    assert alf.attention.layers == (1, 1, 2, 2, 3, 3, 4, 4)
    assert alf.attention.kinds == ("cls", "ap") * 4
    assert sum(alf.attention.mean) == pytest.approx(1, abs=1e-3)
    kept = results.arrays(alf)
    assert kept["attention"].shape == (12, 8)
    assert kept["probabilities"].shape == (12, 3)
    assert kept["attention"].astype(float).mean(0) == pytest.approx(alf.attention.mean, abs=1e-3)
    assert kept["labels"].tolist() == [0] * 4 + [1] * 4 + [2] * 4
    right = (kept["probabilities"].argmax(1) == kept["labels"]).mean()
    assert alf.metrics.accuracy == pytest.approx(right)
    assert by_probe[BASELINE].attention is None
    assert alf.parameters > by_probe[BASELINE].parameters == 3 * 33


def test_the_cache_serves_stage_two_without_images_or_model(run, tmp_path, short_grid):
    images = save_images(tmp_path / "d e", {"train": 4, "test": 3})
    model = save_model("vit", tmp_path / "m")
    run("extract", "-m", str(model), "-d", str(images))
    refused = run("probe", "-d", str(images), "--probe", "aat")
    assert f"--dataset '{images}' --tokens all@4" in refused.err
    model.rename(tmp_path / "gone")
    images.rename(tmp_path / "gone-too")
    said = run("probe", "-d", str(tmp_path / "d e"), "--grid", "quick", "--seeds", "0", "--probe", BASELINE, "--json")
    assert len(said.json["results"]) == 1


def test_deleting_the_cache_loses_no_result(run, model, images, short_grid):
    import shutil

    run("extract", "-m", model, "-d", images)
    run("probe", "-d", images, "--grid", "quick", "--seeds", "0", "--probe", BASELINE)
    shutil.rmtree("cache")
    assert run("report").code == 0


def test_of_a_data_set_that_changed_the_features_extracted_last_are_used(run, model, tmp_path, short_grid):
    import shutil

    images = save_images(tmp_path / "d", {"train": 4, "test": 3})
    shutil.copytree(images, tmp_path / "as-it-was")

    def keys(*words: str) -> tuple[list[str], str]:
        extracted = run("extract", "-m", model, "-d", str(images), "--json").json["features"]
        said = run("probe", "-d", str(images), "--grid", "quick", "--seeds", "0", "--probe", BASELINE, "--json")
        assert said.json["results"][0]["features"] == [one["key"] for one in extracted]
        return said.json["results"][0]["features"], said.err

    first, told = keys()
    assert "other sets" not in told
    for split in ("train", "test"):
        shutil.copy(images / split / "red" / "000.png", images / split / "red" / "001.png")
    second, told = keys()
    assert not set(first) & set(second)
    assert "1 other set of features has these names; those extracted last are used" in told
    shutil.rmtree(images)
    shutil.copytree(tmp_path / "as-it-was", images)
    assert keys()[0] == first  # reused, not computed again, and meant again


@pytest.mark.slow
def test_all_and_more_by_name(run, model, images, short_grid):
    run("extract", "-m", model, "-d", images)
    words = ("probe", "-d", images, "--grid", "quick", "--seeds", "0", "--json")
    said = run(*words, "--probe", "all,cls-each-layer/linear").json["results"]
    assert {row["probe"] for row in said} == {*STUDY, *(f"cls-layer-{n}/linear" for n in range(1, 5))} - {
        "all-tokens-last/attentive"
    }


def test_more_seeds_run_only_those(run, model, images, short_grid):
    run("extract", "-m", model, "-d", images)
    words = ("probe", "-d", images, "--grid", "quick", "--probe", f"{BASELINE},cls+ap-last/linear")
    run(*words, "--seeds", "0")
    said = run(*words, "--seeds", "0,1")
    assert f"2 of 4 results are in {Path('results').absolute()} already" in said.err
    assert len(Results("results").rows()) == 4


def test_probes_that_the_cache_cannot_serve(run, model, images, short_grid):
    run("extract", "-m", model, "-d", images, "--layers", "3,4")
    words = ("probe", "-d", images, "--model", model, "--grid", "quick", "--seeds", "0")
    refused = run(*words, "--probe", "aat")
    assert refused.code == 1
    assert "lack all of layers 4; run: mlfusion extract" in refused.err
    command = refused.err.split("run: ")[1].split()
    said = run(*words, "--probe", "all", "--json")
    assert said.code == 0
    assert {row["probe"] for row in said.json["results"]} == {BASELINE, "cls+ap-last/linear", "cls+ap-last/attentive"}
    assert said.err.count("is left out, its tokens are not cached; to have it: mlfusion extract") == 7
    assert run(*command[1:]).code == 0  # what the error said to type
    assert run(*words, "--probe", "aat").code == 0


@pytest.mark.slow
def test_a_recipe_runs_both_stages_and_the_report(run, model, images, short_grid):
    Path("mine.toml").write_text(
        f'models = ["{model}"]\ndatasets = ["{images}"]\ntokens = "cls,ap,all@last"\ngrid = "quick"\nseeds = [3]\n'
        'probes = ["cls-last/linear", "alf", "aat", "ap-each-layer/linear"]\n'
    )
    said = run("run", "mine.toml", "--json")
    assert said.code == 0
    assert Path(said.json["html"]).is_file()
    assert len(said.json["results"]) == 7
    assert sum(one["forward_passes"] for one in said.json["features"]) > 0
    again = run("run", "mine.toml", "--json").json
    assert again["results"] == said.json["results"]
    assert sum(one["forward_passes"] for one in again["features"]) == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("extract", "-m", "clip-vit-b61"), "Did you mean clip-vit-b16"),
        (("extract", "-m", "clip-vit-b16"), "hub cannot be reached"),
        (("extract", "-m", "nobody/nothing"), "hub cannot be reached"),
        (("extract", "-d", "digit"), "Did you mean digits or"),
        (("extract", "-d", "dtd"), "hub cannot be reached"),
        (("extract", "-d", "."), "allowed: train/<class>"),
        (("extract", "-m", "."), "no config.json"),
        (("extract", "--format", "npz"), "--format npz: allowed are zarr, hdf5"),
        (("probe", "-d", "dtd"), "Run: mlfusion extract --model MODEL --dataset dtd"),
        (("probe", "--grid", "fast"), "--grid fast: allowed are paper, quick"),
        (("probe", "--seeds", "0,0"), "--seeds 0,0: 0 comes twice"),
        (("report",), "no results"),
        (("run", "nowhere.toml"), "no recipe can be read"),
        (("ls", "model"), "Did you mean models?"),
    ],
)
def test_what_a_user_can_mend_is_one_line_and_exit_code_1(run, words, message):
    said = run(*words)
    assert said.code == 1
    assert said.out == ""
    lines = [line for line in said.err.splitlines() if line]
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    assert message in lines[0]


@pytest.mark.parametrize("words", [("extract", "--bogus"), ("nothing",), ("extract", "--batch-size", "many")])
def test_wrong_usage_is_exit_code_2(run, words):
    assert run(*words).code == 2


def test_the_version_is_told(run):
    said = run("--version")
    assert said.code == 0
    assert said.out.startswith("mlfusion 0.")


def test_features_made_unlike_are_not_mixed(run, model, images, short_grid):
    run("extract", "-m", model, "-d", images, "--split", "train", "--dtype", "float32")
    run("extract", "-m", model, "-d", images, "--split", "test")
    said = run("probe", "-d", images, "--grid", "quick")
    assert said.code == 1
    assert "made unlike" in said.err


@pytest.mark.parametrize("what", ["models", "datasets", "probes"])
def test_listings(run, what):
    rows = run("ls", what, "--json").json[what]
    assert rows
    shown = run("ls", what)
    assert all(row["name"] in shown.out for row in rows)


def test_data_describes_a_data_set(images, run, tmp_path):
    told = run("data", images, "--json").json
    assert (told["dataset"], told["form"], told["target"]) == (Path(images).name, "class folders", "class")
    assert told["classes"] == ["blue", "green", "red"]
    train = told["splits"][0]
    assert (train["split"], train["checked"]) == ("train", None)
    assert train["first_ids"] == [f"train/blue/{i:03d}.png" for i in range(3)]
    assert train["labels"] == {"fewest": train["images"] // 3, "most": train["images"] // 3}
    assert run("data", "digits").out.startswith("digits: embedded\n")  # what it is, once
    said = run("data", images)
    assert "train/blue/000.png" in said.out
    assert "blue, green, red" in said.out


def test_data_names_images_that_cannot_be_read_and_those_in_two_splits(run, tmp_path):
    root = save_images(tmp_path / "set", {"train": 3, "test": 2})
    (root / "train" / "red" / "001.png").write_bytes(b"no image")
    shutil.copy(root / "train" / "blue" / "000.png", root / "test" / "red" / "twin.png")
    shutil.copy(root / "train" / "blue" / "000.png", root / "train" / "green" / "twin.png")
    train, test = run("data", str(root), "--check", "--json").json["splits"]
    assert train["checked"]["unreadable"] == {"train/red/001.png": "not an image"}
    assert (train["checked"]["repeated"], test["checked"]["repeated"]) == (1, 0)
    assert test["checked"]["elsewhere"] == {"train": 1}
    assert train["checked"]["smallest"] == [36, 40]
    said = run("data", str(root), "--check")
    assert "train/red/001.png: not an image" in said.out
    assert "byte for byte in train too: 1 image of test" in said.out


def test_how_a_data_set_is_read_is_said_by_options(model, run, tmp_path):
    root = save_images(tmp_path / "set", {"train": 6})
    rows = [f"{path.relative_to(root)},{i % 2},{i / 4 + 1}" for i, path in enumerate(sorted(root.rglob("*.png")))]
    (root / "all.csv").write_text("\n".join(["path,kind,weight", *rows]))
    words = ("-d", str(root / "all.csv"), "--label-column", "weight", "--carve", "0.5/0.5", "--carve-seed", "4")
    refused = run("extract", "-m", model, "-d", str(root / "all.csv"))
    assert refused.code == 1
    assert "--label-column, one of: path (text), kind (whole number), weight (number)" in refused.err
    done = run("extract", "-m", model, *words, "--layers", "1", "--json").json["features"]
    assert [(one["dataset"], one["split"], one["images"]) for one in done] == [
        ("all:weight~0.5-0.5~4", split, 9) for split in ("train", "test")
    ]
    assert [
        one["state"] for one in run("cache", "explain", "-m", model, *words, "--layers", "1", "--json").json["splits"]
    ] == [
        "whole",
        "whole",
    ]
    planned = run("plan", "-m", model, *words, "--layers", "1", "--trial", "0", "--json").json
    assert [one["key"] for one in planned["splits"]] == [one["key"] for one in done]
    assert run("data", *words[1:], "--json").json["target"] == "number"


def test_help_starts_nothing_heavy():
    code = (
        "import sys\nsys.argv = ['mlfusion', '--help']\nfrom mlfusion.cli import main\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\n"
        "print([m for m in ('torch', 'transformers', 'zarr', 'datasets', 'altair', 'numpy') if m in sys.modules])"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert said.stdout.strip().endswith("[]")


@pytest.mark.slow
def test_a_report_needs_no_torch(model, images, run, short_grid):
    run("extract", "-m", model, "-d", images)
    run("probe", "-d", images, "--grid", "quick", "--seeds", "0", "--probe", BASELINE)
    code = (
        "import sys\nsys.argv = ['mlfusion', 'report', '--html', 'p.html']\nfrom mlfusion.cli import main\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\n"
        "print([m for m in ('torch', 'transformers', 'zarr', 'datasets') if m in sys.modules])"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path.cwd())
    assert said.stdout.strip().endswith("[]")


def test_a_stopped_run_says_that_it_goes_on(run, monkeypatch):
    def stop(*_args, **_kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(evaluation, "probe", stop)
    said = run("probe")
    assert said.code == 130
    assert "the same command goes on from here" in said.err


def test_a_bug_is_a_traceback(monkeypatch):
    def broken(*_args, **_kwargs):
        raise RuntimeError("a bug")

    monkeypatch.setattr(evaluation, "probe", broken)
    monkeypatch.setattr(sys, "argv", ["mlfusion", "probe"])
    with pytest.raises(RuntimeError, match="a bug"):
        cli.main()


def test_a_kept_probe_classifies_new_images(run, model, images, short_grid):
    run("extract", "--model", model, "--dataset", images)
    kept = run(
        "probe", "--dataset", images, "--probe", f"{BASELINE},{ALF}", "--grid", "quick", "--seeds", "0", "--save"
    )
    assert kept.code == 0
    assert kept.err.count("is kept in") == 2
    folder = sorted(Path("results/probes").iterdir())[0]
    pictures = [str(path) for path in sorted(Path(images, "test").rglob("*.png"))[:2]]
    said = run("predict", "--probe", str(folder), "--top", "2", *pictures)
    assert said.code == 0
    lines = said.out.splitlines()
    assert [line.partition(": ")[0] for line in lines] == pictures
    assert all(line.count(" %") == 2 for line in lines)
    body = run("predict", "--probe", str(folder), "--json", pictures[0]).json
    top = body["predictions"][0]["top"]
    assert {one["class"] for one in top} == {"blue", "green", "red"}
    assert sum(one["probability"] for one in top) == pytest.approx(1, abs=1e-5)
    wrong = run("predict", "--probe", "nowhere", pictures[0])
    assert wrong.code == 1
    assert wrong.err.startswith(f"error: no probe in '{Path.cwd()}/nowhere'; allowed:")
    empty = run("predict", "--probe", "", pictures[0])
    assert empty.code == 1 and empty.err.startswith("error: the folder of the probe is an empty text; allowed:")


def test_extract_ends_with_the_next_command(run, model, images, short_grid, tmp_path):
    """It is run as it is printed, by the names that a label column or a split ratio gives."""
    root = Path(images)
    rows = [f"{path.relative_to(root)},{i % 2}" for i, path in enumerate(sorted(root.rglob("*.png")))]
    (root / "kinds.csv").write_text("\n".join(["path,kind", *rows]))
    for words in ((), ("--cache", str(tmp_path / "other cache"))):
        for data in ([images], [str(root / "kinds.csv"), "--label-column", "kind", "--split-ratio", "0.7/0.3"]):
            said = run("extract", "-m", model, "-d", *data, "--layers", "last", *words)
            assert said.code == 0 and said.err.splitlines()[-1].startswith("next: mlfusion probe --dataset ")
            following = shlex.split(said.err.splitlines()[-1].removeprefix("next: mlfusion "))
            done = run(*following, "--probe", "cls-last/ridge", "--seeds", "0", "--json")
            assert done.code == 0 and len(done.json["results"]) == 1
    assert "next:" not in run("extract", "-m", model, "-d", images, "--split", "test", "--layers", "1").err
    (root / "kinds.csv").unlink()


def test_messages_name_places_in_full(run, tmp_path):
    """What is looked for at another place than meant is seen from the message alone."""
    for words, place in (
        (("cache", "ls"), "no features in {}/cache, which does not exist"),
        (("cache", "ls", "--cache", "typo"), "no features in {}/typo, which does not exist"),
        (("cache", "du"), "no features in {}/cache, which does not exist"),
        (("probe", "-d", "digits"), "no features of digits in {}/cache (which does not exist)"),
        (("results", "ls"), "no results: '{}/results' does not exist"),
        (("predict", "x.png", "--probe", "p"), "no probe in '{}/p'"),
    ):
        assert place.format(tmp_path) in run(*words).err


def test_few_shots_halving_and_smoothing_make_rows_of_their_own(run, model, images, short_grid):
    run("extract", "--model", model, "--dataset", images)
    probe = ("probe", "--dataset", images, "--probe", BASELINE, "--grid", "quick", "--seeds", "0,1", "--json")
    rows = {}
    for words in ((), ("--shots", "2,4"), ("--halving",), ("--smoothing", "0.1")):
        said = run(*probe, *words)
        assert said.code == 0
        rows[words] = [row["id"] for row in said.json["results"]]
    assert [len(ids) for ids in rows.values()] == [2, 4, 2, 2]
    assert len({name for ids in rows.values() for name in ids}) == 10
    held = {row.id: row for row in Results("results").rows()}
    assert [held[name].images.train for name in rows["--shots", "2,4"]] == [6, 6, 12, 12]
    assert [held[name].shots for name in rows["--shots", "2,4"]] == [2, 2, 4, 4]
    assert all(held[name].halving for name in rows["--halving",])
    table = run("report", "results").out
    assert "(2 shots)" in table and "(halving)" in table
    assert run(*probe, "--shots", "1").err.startswith("error: --shots 1: allowed is a list of whole numbers from 2")
    assert "class 'blue' has 8 training images" in run(*probe, "--shots", "9").err
    assert "--smoothing 1.0: allowed is from 0 to below 1" in run(*probe, "--smoothing", "1").err


@pytest.mark.slow
@pytest.mark.parametrize("head", HEAD_NAMES)
def test_every_head_has_a_name_at_the_command_line(run, model, images, short_grid, head):
    run("extract", "--model", model, "--dataset", images)
    said = run("probe", "--dataset", images, "--probe", f"cls+ap-all-layers/{head}", "--grid", "quick", "--seeds", "0")
    assert said.code == 0, said.err
    assert run("report", "results", "--html", "page.html").code == 0
    assert head in run("ls", "probes").out


@pytest.mark.slow
def test_a_hook_point_and_settings_go_through_both_stages(run, model, images, short_grid):
    words = ("--dataset", images, "--hook", "block", "--set", "hidden_act=relu", "--tokens", "grid2@last,ap@3-4")
    extracted = run("extract", "--model", model, *words, "--json")
    assert extracted.code == 0, extracted.err
    assert {one["model"] for one in extracted.json["features"]} == {"tiny-vit:block,hidden_act=relu"}
    whole = run("cache", "explain", "--model", model, *words, "--json").json["splits"]
    assert [one["state"] for one in whole] == ["whole", "whole"]
    plain = run("cache", "explain", "--model", model, "--dataset", images, "--json").json["splits"]
    assert [one["state"] for one in plain] == ["absent", "absent"]
    assert {d["field"] for d in plain[0]["differences"]} == {"model.hook", "model.config"}
    planned = run("plan", "--model", model, *words, "--json").json
    assert planned["bytes_to_write"] == 0
    word = f"{model}:block,hidden_act=relu"
    probed = run(
        "probe", "--model", word, "--dataset", images, "--probe", "ap+grid2-last/attentive", "--grid", "quick", "--json"
    )
    assert probed.code == 0, probed.err
    assert probed.json["results"][0]["model"] == "tiny-vit:block,hidden_act=relu"
    lacking = run("probe", "--model", word, "--dataset", images, "--probe", "cls-last/linear", "--grid", "quick")
    assert f"mlfusion extract --model {word} --dataset {images} --tokens cls@4" in lacking.err


@pytest.mark.parametrize(("what", "word"), [("tokens", "grid7"), ("hooks", "projected"), ("models", "dinov3-vit-b16")])
def test_what_there_is_to_choose_from(run, what, word):
    assert word in run("ls", what).out
    assert word in {row["name"] for row in run("ls", what, "--json").json[what]}
