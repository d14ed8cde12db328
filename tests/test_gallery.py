"""Pictures of the right images with the right words, drawn where the arrays say; what cannot be drawn is said."""

import sys

import numpy as np
import pytest
from rows import row
from tiny import save_images, save_model

import mlfusion
from mlfusion import cli
from mlfusion.analysis import gallery
from mlfusion.errors import BadData
from mlfusion.probing import grids
from mlfusion.results import Results


@pytest.fixture(scope="module")
def probed(tmp_path_factory):
    """One model on one data set: AAT, ALF and the baseline."""
    root = tmp_path_factory.mktemp("gallery")
    model, data = save_model("vit", root / "m"), save_images(root / "d", {"train": 4, "test": 5})
    mlfusion.extract(str(model), str(data), tokens="cls,ap,all@last", cache=root / "cache")
    grid = grids.SEARCH_GRIDS["quick"]
    grids.SEARCH_GRIDS["quick"] = grids.Grid(
        learning_rates=(1e-2,), weight_decays=(1e-2,), dropouts=(0.0,), epochs=2, least_steps=10
    )
    try:
        words = {"grid": "quick", "seeds": (0,), "cache": root / "cache", "results": root / "results"}
        done = mlfusion.probe(str(data), probes="aat,alf,cls-last/linear", **words)
    finally:
        grids.SEARCH_GRIDS["quick"] = grid
    return root, {one.probe: one for one in done.rows}


AAT, ALF = "all-tokens-last/attentive", "cls+ap-all-layers/attentive"


def test_maps_are_drawn_on_images_of_every_class(probed):
    root, rows = probed
    results = Results(root / "results")
    [strip] = gallery.of_row(rows[AAT], results, cache=root / "cache", count=4)
    arrays = results.arrays(rows[AAT])
    assert [one.caption.split(",")[0] for one in strip.pictures] == ["blue", "blue", "green", "red"]
    for one, number in zip(strip.pictures, (0, 1, 5, 10), strict=True):
        assert one.attention.shape == (4, 4)
        np.testing.assert_allclose(one.attention.ravel(), arrays["attention"][number, 1:].astype(float))
        taken = rows[AAT].classes[arrays["probabilities"][number].argmax()]
        true = rows[AAT].classes[arrays["labels"][number]]
        assert one.caption == (true if true == taken else f"{true}, taken for {taken}")


def test_what_is_read_early_and_what_late(probed):
    root, rows = probed
    results = Results(root / "results")
    early, late = gallery.of_row(rows[ALF], results, cache=root / "cache", count=3)
    shares = results.arrays(rows[ALF])["attention"].astype(np.float64)
    at = np.sort(shares @ np.repeat([1, 2, 3, 4], 2) / shares.sum(1))
    said = [[one.caption.rsplit("layer ", 1)[1] for one in strip.pictures] for strip in (early, late)]
    assert said == [[f"{v:.1f}" for v in at[:3]], [f"{v:.1f}" for v in at[::-1][:3]]]


def test_a_study_has_the_strips_of_each_data_set(probed):
    root, rows = probed
    said: list[str] = []
    found = gallery.of_study(list(rows.values()), Results(root / "results"), cache=root / "cache", log=said.append)
    assert [strip.title for strip in found["d"]] == [
        "Attention on patches",
        "Attention in early layers",
        "Attention in late layers",
    ]
    assert said == []
    assert gallery.of_study(list(rows.values()), Results(root / "results"), cache=root / "no", log=said.append) == {}
    assert len(said) == 2
    assert "not in the cache" in said[0]


def test_a_probe_that_does_not_attend_is_refused(probed):
    root, _ = probed
    with pytest.raises(BadData, match="attends to neither"):
        gallery.of_row(row(), Results(root / "results"))


@pytest.mark.parametrize(
    ("labels", "count", "want"),
    [([0, 0, 0, 1, 1, 2], 3, [0, 3, 5]), ([0, 0, 0, 1, 1, 2], 5, [0, 1, 3, 4, 5]), ([1, 1], 9, [0, 1])],
)
def test_examples_are_of_many_classes(labels, count, want):
    assert gallery.examples(np.array(labels), count) == want


def test_attention_that_is_the_same_for_all_images_is_said_and_not_drawn(probed, monkeypatch, capfd):
    root, rows = probed
    results, row = Results(root / "results"), rows[ALF]
    arrays = results.arrays(row)
    try:
        results.keep_arrays(row, arrays | {"attention": np.full_like(arrays["attention"], 1 / 8)})
        with pytest.raises(
            BadData, match=r"does not depend on the image \(mean layer 2\.5 for all\), so none is read early"
        ):
            gallery.of_row(row, results, cache=root / "cache")
        monkeypatch.setattr(sys, "argv", ["mlfusion", "attend", row.id, "--results", str(root / "results")])
        with pytest.raises(SystemExit):
            cli.main()
        assert capfd.readouterr().out == (
            "the attention does not depend on the image: its mean layer is 2.5 for each of 15 images\n"
        )
    finally:
        results.keep_arrays(row, arrays)


def test_attend_at_the_command_line(probed, monkeypatch, capfd, tmp_path):
    root, rows = probed

    def call(*words: str) -> tuple[int, str, str]:
        place = ("--results", str(root / "results"), "--cache", str(root / "cache"))
        monkeypatch.setattr(sys, "argv", ["mlfusion", "attend", *words, *place])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return (ended.value.code or 0, *capfd.readouterr())

    code, out, _ = call(rows[AAT].id[:8], "--out", str(tmp_path / "drawn"))
    assert code == 0
    assert "maps of 4 by 4 patches over 15 images" in out
    assert {path.name for path in (tmp_path / "drawn").iterdir()} == {"map-m.png", "map-m.svg"}
    code, out, _ = call(rows[ALF].id)
    assert code == 0
    assert "mean layer of 15 images" in out
    code, _, err = call(rows["cls-last/linear"].id)
    assert code == 1
    assert "does not attend" in err
