"""Gains over models and data sets as box plots: by probe, model, token kind, number of heads (figures 2, 3, A10, A12)."""

from collections.abc import Iterator, Sequence
from statistics import fmean

from mlfusion.report.figures.boxes import MIN_FOR_BOX, Dot, Line, LineGroup, box_panels, describe, grouped
from mlfusion.report.figures.drawing import Figure, Record, series_legend
from mlfusion.report.numbers import percent, points
from mlfusion.report.studies import Study
from mlfusion.report.summary import ALF, ComparisonGroup, Score, head_of, heads_of
from mlfusion.specs.names import ALIASES, BASELINE
from mlfusion.statistics.datasets import MIN_DATASETS, GainTest, gain_tests

COMPARED = {ALIASES["aat"]: "AAT", "cls+ap-all-layers/linear": "linear, all layers", ALF: "ALF"}
"""The three probes that the study compares with each other over models."""

KIND_NAMES = {"cls": "CLS", "ap": "AP", "cls+ap": "CLS + AP"}

GAIN_AXIS = "gain, points"


def by_probe(study: Study) -> Figure | None:
    """Figure 2: for each model, each probe's gains over the data sets; None if no probe has a gain."""
    probes = [probe for probe in study.probes if _gains(study, probe)]
    if not probes:
        return None
    heads = heads_of(probes)
    views: list[tuple[str, list[LineGroup]]] = []
    tests: list[Record] = []
    for model in study.models:
        gains = {probe: dots for probe in probes if (dots := _gains(study, probe, model=model))}
        fractions = {probe: [dot.x / 100 for dot in dots] for probe, dots in gains.items()}
        tested = {test.name: test for test in gain_tests(fractions)}
        tests += [_test(model, one) for one in tested.values()]
        most = max(map(len, gains.values()), default=0)
        groups = []
        for probe, dots in gains.items():
            star = " *" if tested[probe].significant else ""
            text = _mean_text(_scores(study, probe, model), dots, most) + star
            groups.append(LineGroup("", [Line(probe, heads.index(head_of(probe)), dots, text)]))
        base = _scores(study, BASELINE, model)
        if groups and base:
            views.append((f"{model}: baseline {fmean(dot.x for dot in base):.1f} % (n = {len(base)})", groups))
    return Figure(
        "gains-by-probe",
        "Gain of each probe over the baseline",
        f"Gain on test in points over {BASELINE}, whose mean {study.metric} stands above each panel. "
        f"{_caption('data set')} At the right: mean score (mean gain); n counts data sets. {_test_caption(tests)}",
        f"Gains over {BASELINE} in {len(study.groups)} cases. "
        + describe(LineGroup(title, [line for group in groups for line in group.lines]) for title, groups in views),
        box_panels(views, GAIN_AXIS, zero=True),
        _numbers(study, [BASELINE, *probes]),
        series_legend(heads, shown={head_of(probe) for probe in probes}),
        more_numbers={"tests": tests},
    )


def by_model(study: Study) -> Figure | None:
    """Figure 3: absolute scores of the baseline beside gains of three probes, model by model; None for one model."""
    shown = [probe for probe in COMPARED if _gains(study, probe)]
    base = {model: dots for model in study.models if (dots := _scores(study, BASELINE, model))}
    if not shown or len(base) < 2:
        return None
    means = {model: f"{fmean(dot.x for dot in dots):.1f}" for model, dots in base.items()}
    absolute = [LineGroup(model, [Line("", 0, dots, means[model])]) for model, dots in base.items()]
    gained = grouped(
        (model, Line("", i, gains, _mean_text(_scores(study, probe, model), gains, len(dots))))
        for model, dots in base.items()
        for i, probe in enumerate(shown, 1)
        if (gains := _gains(study, probe, model=model))
    )
    return Figure(
        "gains-by-model",
        "Scores of the baseline, and gains of each model",
        f"Left: {study.metric} of {BASELINE}. Right: gains on test in points. {_caption('data set')} At the right: mean score "
        "(mean gain).",
        describe([*absolute, *gained]),
        [
            *box_panels([(BASELINE, absolute)], f"{study.metric} on test, %", zero=False),
            *box_panels([("Gain over it", gained)], GAIN_AXIS, zero=True),
        ],
        _numbers(study, [BASELINE, *shown]),
        series_legend([BASELINE, *(COMPARED[probe] for probe in shown)]),
        columns=2,
    )


def by_token(study: Study) -> Figure | None:
    """Figure A10: CLS, AP or both, for every (layers, head) with AP and another kind; over all data sets, then one by one."""
    pooled = _by_kind(study)
    if not pooled:
        return None

    def lines(dataset: str | None) -> Iterator[tuple[str, Line]]:
        for rest, probes in pooled.items():
            for i, kind in enumerate(KIND_NAMES):
                dots = _gains(study, probes[kind], dataset=dataset, baseline=True) if kind in probes else []
                yield rest, Line("", i, dots, _mean_and_n(dots))

    views = [("All", grouped(lines(None)))]
    if len(study.datasets) > 1:
        views += [(name, groups) for name in study.datasets if (groups := grouped(lines(name)))]
    probes = [probe for by_kind in pooled.values() for probe in by_kind.values()]
    shown = {KIND_NAMES[kind] for by_kind in pooled.values() for kind in by_kind}
    return Figure(
        "tokens",
        "CLS, AP, or both",
        f"Gain on test in points over {BASELINE}. {_caption('model on a data set')} At the right: mean.",
        describe(views[0][1]),
        box_panels(views, GAIN_AXIS, zero=True),
        _numbers(study, [BASELINE, *probes]),
        series_legend(list(KIND_NAMES.values()), shown),
    )


def by_heads(study: Study) -> Figure | None:
    """Figure A12: an attentive probe's gains by its number of heads; None if no case was run with two numbers."""
    by_probe: dict[str, dict[int, dict[str, Dot]]] = {}
    numbers: list[Record] = []
    for group in study.groups:
        for score in group.probes:
            heads, case = score.attention_heads, f"{group.model}, {group.dataset}"
            if heads is not None and score.gain:
                counts = by_probe.setdefault(score.probe.partition(":")[0], {})
                counts.setdefault(heads, {})[case] = _dot(case, score, group)
                numbers.append(_number(group, score).extended(heads=heads))
    by_probe = {probe: counts for probe, counts in by_probe.items() if len(_comparable(counts)) > 1}
    if not by_probe:
        return None
    groups = grouped(
        (probe, Line(f"{heads} heads", i, dots, _mean_and_n(dots)))
        for probe, counts in by_probe.items()
        for i, heads in enumerate(_comparable(counts))
        if (dots := list(counts[heads].values()))
    )
    return Figure(
        "heads",
        "Number of attention heads",
        f"Gain on test in points over {BASELINE}. {_caption('model on a data set')} At the right: mean gain.",
        describe(groups),
        box_panels([("", groups)], GAIN_AXIS, zero=True),
        [number for number in numbers if str(number["probe"]).partition(":")[0] in by_probe],
    )


def _dot(label: str, score: Score, group: ComparisonGroup) -> Dot:
    gain = 100 * score.gain.mean if score.gain else 0.0
    compared = f" against {percent(group.baseline.test.mean, 2)} %" if group.baseline and not score.is_baseline else ""
    return Dot(label, gain, f"{percent(score.test.mean, 2)} %{compared}")


def _gains(
    study: Study, probe: str, *, model: str | None = None, dataset: str | None = None, baseline: bool = False
) -> list[Dot]:
    """A dot for each group of a model or data set, labelled by what is not given.

    The baseline's gain is zero by definition; with `baseline` it has dots all the same.
    """
    dots = []
    for group in study.groups:
        score = study.score(group, probe)
        if model not in (None, group.model) or dataset not in (None, group.dataset) or score is None:
            continue
        if score.gain and (baseline or not score.is_baseline):
            label = group.dataset if model else group.model if dataset else f"{group.model}, {group.dataset}"
            dots.append(_dot(label, score, group))
    return dots


def _scores(study: Study, probe: str, model: str) -> list[Dot]:
    """A dot for each data set of a model: the test score in percent."""
    return [
        Dot(group.dataset, 100 * score.test.mean, "")
        for group in study.groups
        if group.model == model and (score := study.score(group, probe))
    ]


def _by_kind(study: Study) -> dict[str, dict[str, str]]:
    """{layers and head: {token kind: probe}} for probes run with AP and another kind that have a gain."""
    by_probe: dict[str, dict[str, str]] = {}
    for probe in study.probes:
        for kind in KIND_NAMES:
            if probe.startswith(f"{kind}-"):
                by_probe.setdefault(probe.removeprefix(f"{kind}-"), {})[kind] = probe
    return {
        rest: probes
        for rest, probes in by_probe.items()
        if "ap" in probes and len(probes) > 1 and any(_gains(study, probe) for probe in probes.values())
    }


def _comparable(counts: dict[int, dict[str, Dot]]) -> list[int]:
    """Numbers of heads that were run on a case with another number; other numbers cannot be compared."""
    return sorted(
        heads
        for heads, cases in counts.items()
        if any(other != heads and set(cases) & set(counts[other]) for other in counts)
    )


def _caption(dot: str) -> str:
    return (
        f"A dot is one {dot} (mean over seeds); the box holds the middle half with its median, whiskers reach to 1.5 times its "
        f"length (from {MIN_FOR_BOX} values on)."
    )


def _test_caption(tests: Sequence[Record]) -> str:
    if any(test["q"] is not None for test in tests):
        return (
            "* marks gains at q < 0.05 (one-sided Wilcoxon signed-rank test over data sets, Benjamini-Hochberg over a model's "
            "probes)."
        )
    return f"Nothing is tested: a test needs {MIN_DATASETS} data sets."


def _mean_text(scores: Sequence[Dot], gains: Sequence[Dot], most: int) -> str:
    """'76.4 (+4.1)': mean score over the same cases, mean gain; and n if other lines have more cases."""
    labels = {dot.label for dot in gains}
    few = f"; n = {len(gains)}" if len(gains) < most else ""
    score, gain = fmean(dot.x for dot in scores if dot.label in labels), fmean(dot.x for dot in gains)
    return f"{score:.1f} ({points(gain / 100)}{few})"


def _mean_and_n(dots: Sequence[Dot]) -> str:
    return f"{points(fmean(dot.x for dot in dots) / 100)} (n = {len(dots)})" if dots else ""


def _numbers(study: Study, probes: Sequence[str]) -> list[Record]:
    return [_number(group, score) for group in study.groups for score in group.probes if score.probe in probes]


def _number(group: ComparisonGroup, score: Score) -> Record:
    gain = score.gain
    return Record(
        model=group.model,
        dataset=group.dataset,
        probe=score.probe,
        test=100 * score.test.mean,
        test_sd=None if score.test.sd is None else 100 * score.test.sd,
        gain=None if gain is None else 100 * gain.mean,
        gain_sd=None if gain is None or gain.sd is None else 100 * gain.sd,
        seeds=score.test.n,
    )


def _test(model: str, test: GainTest) -> Record:
    record = Record(model=model, probe=test.name, n=test.n, mean=100 * test.mean, median=100 * test.median)
    return record.extended(p=test.p, q=test.q, significant="yes" if test.significant else "", refused=test.refused)
