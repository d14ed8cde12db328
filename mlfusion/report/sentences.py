"""Results in sentences, which claim no more than the rows show."""

from collections import Counter
from collections.abc import Iterable, Sequence
from statistics import fmean

from mlfusion.report.numbers import count, enumerated, p_value, percent, plus_minus, points
from mlfusion.report.summary import ALF, MARKS, ComparisonGroup, LayerAttention, metric_name, replaced
from mlfusion.results import Row
from mlfusion.specs.names import BASELINE
from mlfusion.statistics import Spread
from mlfusion.statistics.verdicts import NOT_TOLD, Word, enumerate_rare
from mlfusion.system.progress import duration
from mlfusion.system.text import one_line
from mlfusion.system.words import plural

CASES = "(a model on a data set)"
VERDICTS: dict[Word, str] = {
    "gain": "help",
    "no clear difference": "make no clear difference",
    "loss": "do not help",
    NOT_TOLD: "cannot be told to help or not",
}


def opening(groups: Sequence[ComparisonGroup]) -> str:
    """The page's first sentence: the answer for one model and data set, or the counts of several."""
    if len(groups) == 1:
        return answer(groups[0])
    gains = [
        (group, group.baseline, group.main, group.main.gain)
        for group in groups
        if group.baseline and group.main and group.main.gain
    ]
    if not gains:
        return (
            f"Whether the intermediate layers help is open: in none of the {len(groups)} cases {CASES} were both {BASELINE} "
            "and a probe over several layers run."
        )
    head = _counted([group.verdict.word for group, *_ in gains])
    if len({group.metric for group, *_ in gains}) > 1:
        return f"{head}; their scores are of several metrics, so they have no mean."
    probes = list(dict.fromkeys(main.probe for _, _, main, _ in gains))
    verb = "reaches" if len(probes) == 1 else "reach"
    mean, base = fmean(main.test.mean for _, _, main, _ in gains), fmean(base.test.mean for _, base, *_ in gains)
    means = [gain.mean for *_, gain in gains]
    return (
        f"{head}: on average {enumerated(probes)} {verb} {_whole_percent(mean)} against {_whole_percent(base)} for {BASELINE} "
        f"({points(fmean(means))} points, from {points(min(means))} to {points(max(means))})."
    )


def _counted(words: Sequence[Word]) -> str:
    """The number of cases in which the intermediate layers help."""
    cases, helped = len(words), words.count("gain")
    if helped == cases > 1:
        return f"The intermediate layers help in all {helped} cases {CASES}"
    verdicts = enumerated([f"{VERDICTS[one]} in {words.count(one)}" for one in VERDICTS if one in words])
    return f"Of {cases} cases {CASES}, the intermediate layers {verdicts}"


def warnings(groups: Sequence[ComparisonGroup]) -> list[str]:
    """Warnings before a comparison: metrics, versions of the code, precisions or protocols that differ."""
    texts = []
    metrics = list(dict.fromkeys(metric_name(group.metric) for group in groups))
    if len(metrics) > 1:
        texts.append(
            f"The rows have {len(metrics)} metrics ({enumerated(metrics)}); nothing is compared or averaged across them."
        )
    scores = [score for group in groups for score in group.scores]
    for name, (mark, text) in MARKS.items():
        if marked := sum(name in score.other for score in scores):
            texts.append(f"{plural(marked, 'score was', 'scores were')} {text} (marked {mark}).")
    return [*texts, *rare_notes(groups), *protocol_notes(groups)]


def protocol_notes(groups: Sequence[ComparisonGroup]) -> list[str]:
    """One sentence about rows of several protocols, between which no gain is counted; none for rows of one."""
    counts = Counter(group.protocol for group in groups for _ in group.rows)
    if len(counts) < 2:
        return []
    listed = enumerated([f"{plural(counts[n], 'row', 'rows')} of protocol {n}" for n in sorted(counts)])
    return [f"Protocols measure differently ({listed}): no gain is counted between them, and they share no table."]


def replaced_notes(rows: Iterable[Row]) -> list[str]:
    """One sentence about the rows that are left out for later ones, with the settings that changed; none if all count."""
    pairs = replaced([row.renamed(one_line) for row in rows])
    if not pairs:
        return []
    changes = [
        f"{name} {getattr(old, name)}, then {getattr(new, name)}"
        for old, new in pairs
        for name in MARKS
        if getattr(old, name) != getattr(new, name)
    ]
    listed = f" ({'; '.join(dict.fromkeys(changes))})" * bool(changes)
    left_out = plural(len(pairs), "older row is", "older rows are")
    return [f"{left_out} left out: the same probe, seed and features were run again later{listed}."]


def answer(group: ComparisonGroup) -> str:
    """Whether the intermediate layers help on this data set with this model, with scores, gain and seeds."""
    place = f"On {group.dataset}, with {group.name.replace(f' on {group.dataset}', '')}"
    main, baseline = group.main, group.baseline
    if main is None:
        return f"{place}, whether the intermediate layers help is open: no probe read several layers. {_best(group)}"
    reached = f"{main.probe} reaches {_whole_percent(main.test.mean)}"
    if baseline is None:
        return f"{place}, {reached}; {BASELINE} is not among these results, so whether the intermediate layers help is open."
    against = f"{reached} against {_whole_percent(baseline.test.mean)} for {BASELINE}"
    if main.gain is None:
        return f"{place}, {against}; they share no seed, so whether the intermediate layers help is open."
    gain = _gain_text(group, main.gain)
    if group.verdict.word == NOT_TOLD:
        return (
            f"{place}, {against} ({gain}); whether the intermediate layers help cannot be told: {group.verdict.reason}."
        )
    return f"{place}, the intermediate layers {VERDICTS[group.verdict.word]}: {against} ({gain})."


def short_answer(group: ComparisonGroup) -> str:
    """The answer as one item of a list under the opening sentence."""
    main, baseline = group.main, group.baseline
    if main is None or main.gain is None or baseline is None:
        return answer(group)
    verdict = {
        "gain": "",
        "no clear difference": ": no clear difference",
        "loss": ": they do not help",
        NOT_TOLD: f": it cannot be told whether they help ({group.verdict.reason})",
    }[group.verdict.word]
    scores = f"{_whole_percent(main.test.mean)} against {_whole_percent(baseline.test.mean)}"
    return f"{group.name}: {scores} ({_gain_text(group, main.gain)}){verdict}."


def rare_notes(groups: Iterable[ComparisonGroup]) -> list[str]:
    """One sentence for each data set with classes so rare in test that no gain in a mean over classes can be told."""
    notes = {
        f"{group.dataset}: {enumerate_rare(group.rare)}; a difference in {metric_name(group.metric)} would rest on so few."
        for group in groups
        if group.rare
    }
    return sorted(notes)


def chance_level(groups: Sequence[ComparisonGroup]) -> str:
    """The score that random guesses would get, for each metric."""
    classes = sorted({len(group.first.classes) for group in groups if group.metric == "balanced_accuracy"})
    ends = list(dict.fromkeys([classes[-1], classes[0]] if classes else []))
    share = " to ".join(percent(1 / n) for n in ends)
    levels = {
        "balanced_accuracy": f"a balanced accuracy of {share}\N{NO-BREAK SPACE}% ({' to '.join(map(str, ends))} classes)",
        "mean_average_precision": "a mean average precision equal to the share of images that have a label",
        "r2": "an R² of 0, which the mean of all numbers has",
    }
    metrics = dict.fromkeys(group.metric for group in groups)
    return f"Random guesses get {enumerated([levels[metric] for metric in metrics if metric in levels])}."


def attention(group: ComparisonGroup, tokens: LayerAttention) -> str:
    """The layer with the largest share of the attention, compared with an even share."""
    shares, deepest = tokens.by_layer, max(tokens.by_layer)
    peak = max(shares, key=lambda layer: shares[layer])
    at_peak = {kind: share for (layer, kind), share in zip(tokens.tokens, tokens.mean, strict=True) if layer == peak}
    even = len(at_peak) / len(tokens.tokens)
    kind = max(at_peak, key=lambda kind: at_peak[kind]).upper()
    place = ", the last" if peak == deepest else f" of {group.first.depth}"
    probe = "" if tokens.probe == ALF else f", {tokens.probe}"
    return (
        f"{group.name}{probe}: attention peaks at layer {peak}{place}, with {_whole_percent(shares[peak], 0)} of it, "
        f"mostly on {kind} (an even share would be {_whole_percent(even)}); layers before the last get "
        f"{_whole_percent(sum(tokens.mean) - shares[deepest], 0)}."
    )


def best_layers(group: ComparisonGroup) -> str:
    """The layer with the best validation score of each layer-by-layer series, and its test score."""
    best = []
    for name, layers in group.by_layer.items():
        layer, score = max(layers.items(), key=lambda item: item[1].val.mean)
        gain = f", {points(score.gain.mean)} points" if score.gain and not score.is_baseline else ""
        best.append(f"layer {layer} for {name} ({_whole_percent(score.test.mean)} on test{gain})")
    return f"{group.name}: the best single layer by validation is {enumerated(best)}."


def basis(groups: Sequence[ComparisonGroup]) -> str:
    """The numbers of models, data sets, probes and seeds behind the answer, and the time of probing."""
    rows = [row for group in groups for row in group.rows]
    fields = {"model": "model", "data set": "dataset", "probe": "probe", "seed": "seed"}
    counts = [plural(len({getattr(row, field) for row in rows}), name, f"{name}s") for name, field in fields.items()]
    return f"{', '.join(counts)}; {duration(sum(row.seconds for row in rows))} of probing."


def _whole_percent(value: float, digits: int = 1) -> str:
    """'97.1 %' that no line break splits."""
    return f"{percent(value, digits)}\N{NO-BREAK SPACE}%"


def _gain_text(group: ComparisonGroup, gain: Spread) -> str:
    """'+4.5 ± 0.7 points, 2 seeds; p 0.012 of balanced accuracy over 120 test images'."""
    seeds = "one seed, so no deviation is known" if gain.sd is None else f"{gain.n} seeds"
    text = f"{points(gain.mean)}{plus_minus(gain.sd)} points, {seeds}"
    if group.verdict.p is None or group.verdict.word == NOT_TOLD:
        return text
    groups, images = group.first.groups, group.first.images.test
    units = f"{count(images)} test images" if groups is None else plural(groups.test, "test group")
    return f"{text}; p {p_value(group.verdict.p)} of {metric_name(group.metric)} over {units}"


def _best(group: ComparisonGroup) -> str:
    """The best probe that was run, for a question without an answer."""
    best = max(group.scores, key=lambda score: score.val.mean)
    which = "the only one" if len(group.scores) == 1 else f"the best of {len(group.scores)} by validation"
    return f"{best.probe}, {which}, reaches {_whole_percent(best.test.mean)}."
