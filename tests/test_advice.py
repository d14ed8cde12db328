"""A pilot scores every image once, by a probe that did not see it; its advice follows from its scores and from nothing else."""

import shutil
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny import save_images, save_model

import mlfusion
from mlfusion.errors import BadData
from mlfusion.probing import costs, grids, protocol
from mlfusion.probing.targets import target_of
from mlfusion.probing.training.batches import Tokens
from mlfusion.specs.names import BASELINE, parse_probes
from mlfusion.specs.options import PilotOptions
from mlfusion.statistics import verdicts
from mlfusion.system.progress import Bar
from mlfusion.workflows import advice

PROBES = (BASELINE, "cls+ap-all-layers/ridge", "aat:h2")


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return str(save_model("vit", tmp_path_factory.mktemp("model") / "tiny-vit"))


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> str:
    return str(save_images(tmp_path_factory.mktemp("data") / "colours", {"train": 9, "test": 4}))


@pytest.fixture(autouse=True)
def short_grid(monkeypatch):
    grid = grids.Grid(learning_rates=(1e-1, 1e-2), weight_decays=(1e-2,), dropouts=(0.0,), epochs=2, least_steps=20)
    monkeypatch.setitem(grids.SEARCH_GRIDS, "quick", grid)


@given(counts=st.lists(st.integers(3, 40), min_size=2, max_size=6), images=st.integers(6, 120), seed=st.integers(0, 9))
def test_a_pilot_takes_alike_many_of_each_class_and_leaves_each_out_once(counts, images, seed):
    labels = np.random.default_rng(seed).permutation(np.repeat(np.arange(len(counts)), counts))
    rows = advice.sample_rows(labels, images, seed)
    assert (np.diff(rows) > 0).all()
    each = max(4, images // len(counts))
    assert np.bincount(labels[rows]).tolist() == [min(count, each) for count in counts]
    parts = advice.folds(labels[rows], seed)
    dealt = np.array([np.bincount(parts[labels[rows] == c], minlength=advice.FOLDS) for c in range(len(counts))])
    assert dealt.sum() == len(rows)
    assert (dealt.max(1) - dealt.min(1) <= 1).all()


@pytest.mark.slow
def test_what_is_advised_from_the_cache_is_what_is_advised_without_it(model, images):
    afresh = advice.advise(model, images, PilotOptions(images=18), probes=PROBES)
    assert not Path("cache").exists()
    mlfusion.extract(model, images, tokens="cls,ap,all@last")
    cached = advice.advise(model, images, PilotOptions(images=18), probes=PROBES)
    assert (afresh.cached, cached.cached) == (False, True)
    assert [c.score for c in afresh.candidates] == [c.score for c in cached.candidates]
    assert [c.gain for c in afresh.candidates] == [c.gain for c in cached.candidates]
    assert (afresh.images, afresh.train_images) == (18, 27)
    # 39 images of 32 numbers of two bytes: one token, 2 x 4 of them, 17
    assert [c.bytes for c in afresh.candidates] == [39 * 64 * tokens for tokens in (1, 8, 17)]
    assert [c.bytes for c in cached.candidates] == [0, 0, 0]
    assert all(c.extract_seconds > 0 for c in afresh.candidates)
    assert all(c.probe_seconds > 0 for c in cached.candidates)


def test_no_image_is_scored_by_a_probe_that_saw_it(model, images, monkeypatch):
    fitted: list[tuple[set[str], set[str]]] = []
    fit = protocol.fit

    def watched(head, train, test, **words):
        fitted.append((set(train.ids), set(test().ids)))
        return fit(head, train, test, **words)

    monkeypatch.setattr(protocol, "fit", watched)
    said = advice.advise(model, images, PilotOptions(images=18), probes=PROBES[:1])
    assert len(fitted) == advice.FOLDS
    assert not any(seen & left_out for seen, left_out in fitted)
    left_out = [name for _, names in fitted for name in names]
    assert len(left_out) == len(set(left_out)) == said.images
    assert all(name.startswith("train/") for name in left_out)


@pytest.mark.parametrize("zero", [0.0, 1e9])
def test_a_pilot_on_numbers_does_not_depend_on_where_their_unit_has_its_zero(zero):
    random = np.random.default_rng(0)
    values = random.standard_normal((60, 1, 8)).astype(np.float32)
    labels = zero + values[:, 0, :2].sum(1).astype(np.float64)
    probes = parse_probes("cls-last/ridge", 2)
    pilot = advice._Pilot(
        model="a-vit",
        dataset="ages",
        depth=2,
        probes=probes,
        labels=labels,
        groups=None,
        target=target_of(labels, 0),
        train_images=60,
        all_images=80,
        cached=probes[0].representation.pairs(2),
        bytes_of={},
        seconds_each=0.0,
        tokens=lambda probe: Tokens(values, labels),
    )
    [found] = advice._candidates(pilot, advice._cross_validate(pilot, 0))
    assert found.score.value > 0.9 and found.score.low > 0.85


@pytest.mark.slow
def test_a_pilot_finds_the_layer_that_knows(model, tmp_path, monkeypatch):
    """Tokens of which one layer knows the class and the last does not: that layer is advised, and its lead is sure."""
    data = save_images(tmp_path / "d", {"train": 20, "test": 4})
    mlfusion.extract(model, str(data))
    random = np.random.default_rng(0)

    def made_up(entry, rows, groups):
        labels = entry.samples.labels[rows]

        def tokens(probe) -> Tokens:
            values = random.standard_normal((len(rows), 1, 32)).astype(np.float32)
            if probe.representation.at == "layer-2":
                values[np.arange(len(rows)), 0, labels] += 9
            return Tokens(values, labels, tuple(entry.samples.ids[row] for row in rows))

        return tokens

    monkeypatch.setattr(advice, "_reader", made_up)
    said = advice.advise(model, str(data), probes=(BASELINE, "cls-layer-2/ridge"))
    assert said.best is said.cheapest_equivalent
    assert said.best.probe == "cls-layer-2/ridge"
    assert said.best.score.value > 0.95
    assert said.best.gain.low > 0.3
    assert said.candidates[0].behind.low > 0.3


def candidate(probe, value, word, seconds):
    lead = None if word is None else verdicts.Verdict(word, "x")
    score = advice.Interval(value, value, value, 0.95, 9)
    return advice.Candidate(
        probe=probe,
        score=score,
        gain=None,
        behind=None,
        lead=lead,
        bytes=0,
        extract_seconds=seconds,
        probe_seconds=seconds,
    )


def test_the_cheapest_of_those_that_cannot_be_told_apart_is_enough():
    held = (
        candidate("poor", 0.5, "gain", 1),
        candidate("cheap", 0.75, "no clear difference", 2),
        candidate("best", 0.8, None, 30),
        candidate("dear", 0.79, "cannot be told", 90),
    )
    said = advice.Advice(
        model="m",
        dataset="d",
        metric="x",
        images=9,
        train_images=9,
        test_images=0,
        cached=True,
        candidates=held,
        seconds=1,
    )
    assert (said.best.probe, said.cheapest_equivalent.probe) == ("best", "cheap")
    assert said.to_json()["use"] == "best"


def test_a_class_that_cannot_be_parted_is_refused(model, tmp_path):
    data = save_images(tmp_path / "few", {"train": 2, "test": 1})
    with pytest.raises(BadData, match="fewer than 3 images"):
        advice.advise(model, str(data))
    with pytest.raises(BadData, match="--images 2: allowed are 6 and more"):
        advice.advise(model, str(data), PilotOptions(images=2))
    shutil.rmtree(data)


def test_progress_counts_work_and_not_fits(model, images, monkeypatch):
    """A probe's share of the whole is that of its time, so that the time left is right while the slow ones are to come."""
    seen: list[int] = []

    class Recorded(Bar):
        def to(self, done, total=None):
            seen.append(done)
            super().to(done, total)

    monkeypatch.setattr(advice, "track", lambda *words: closing(Recorded(*words)))
    seconds = {"linear": 2.0, "attentive": 60.0, "ridge": 0.5}
    monkeypatch.setattr(costs, "seconds", lambda probe, problem, search: seconds[probe.head])
    bars: list[Bar] = []
    monkeypatch.setattr(Recorded, "__init__", lambda self, *words: (bars.append(self), Bar.__init__(self, *words))[1])
    advice.advise(model, images, PilotOptions(images=24), probes="cls-last/linear,alf,ridge")
    assert bars[0].total == 3 * 100 * (4 + 120 + 1) and seen == sorted(seen) and seen[-1] == bars[0].total
    for fits, done in ((1, 400), (3, 1200), (4, 13200), (6, 37200), (9, 37500)):
        assert done in seen, fits
    assert len({each for each in seen if 1200 < each < 13200}) > 5  # it moves during a slow fit
