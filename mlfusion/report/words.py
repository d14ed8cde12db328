"""What the numbers say in words: an answer that claims no more than the rows show."""

from collections.abc import Sequence
from statistics import fmean

from mlfusion.report.summary import ALF, DAGGER, Block, LayerAttention, count, listed, metric_name, percent, points
from mlfusion.specs import BASELINE
from mlfusion.statistics import Spread


def opening(held: Sequence[Block]) -> str:
    """The page's first sentence: the answer for one model and data set, or the tally of several."""
    if len(held) == 1:
        return answer(held[0])
    told = [block for block in held if block.answer and block.answer.gain]
    gains = [(block.baseline, score, score.gain) for block in told if (score := block.answer) and score.gain]
    if not gains:
        return (
            f"Whether the intermediate layers help is open: in none of the {len(held)} cases (a model on a data set) "
            f"were both {BASELINE} and a probe over several layers run."
        )
    helped, hurt = (sum(direction(block) == way for block in told) for way in (1, -1))
    tally = [(helped, "help"), (len(gains) - helped - hurt, "make no clear difference"), (hurt, "do not help")]
    said = listed([f"{verdict} in {cases}" for cases, verdict in tally if cases])
    head = f"Of {len(gains)} cases (a model on a data set), the intermediate layers {said}"
    if helped == len(gains) > 1:
        head = f"The intermediate layers help in all {helped} cases (a model on a data set)"
    if len({block.metric for block in told}) > 1:
        return f"{head}; their scores are of several metrics, so they have no mean."
    probes = list(dict.fromkeys(score.probe for _, score, _ in gains))
    names, verb = listed(probes), "reaches" if len(probes) == 1 else "reach"
    mean, base = fmean(score.test.mean for _, score, _ in gains), fmean(b.test.mean for b, *_ in gains if b)
    low, high = min(gain.mean for *_, gain in gains), max(gain.mean for *_, gain in gains)
    average = points(fmean(gain.mean for *_, gain in gains))
    return (
        f"{head}: on average {names} {verb} {_whole(mean)} against {_whole(base)} for {BASELINE} "
        f"({average} points, from {points(low)} to {points(high)})."
    )


def warnings(held: Sequence[Block]) -> list[str]:
    """What a reader must know before comparing: metrics, grids or versions of the code that differ."""
    said = []
    metrics = list(dict.fromkeys(metric_name(block.metric) for block in held))
    if len(metrics) > 1:
        said.append(
            f"The rows have {len(metrics)} metrics ({listed(metrics)}); nothing is compared or averaged across them."
        )
    marked = [score for block in held for score in block.scores if score.other_code]
    if marked:
        which = f"{len(marked)} {'score was' if len(marked) == 1 else 'scores were'}"
        said.append(
            f"{which} made by another version of the code than the baseline that the gain is counted from (marked {DAGGER})."
        )
    return said


def answer(block: Block) -> str:
    """Do the intermediate layers help, on this data set with this model? With scores, gain and seeds."""
    place = f"On {block.dataset}, with {block.name.replace(f' on {block.dataset}', '')}"
    found, baseline = block.answer, block.baseline
    if found is None:
        return f"{place}, whether the intermediate layers help is open: no probe read several layers. {_top(block)}"
    reached = f"{found.probe} reaches {_whole(found.test.mean)}"
    if baseline is None:
        return f"{place}, {reached}; {BASELINE} was not run, so whether the intermediate layers help is open."
    against = f"{reached} against {_whole(baseline.test.mean)} for {BASELINE}"
    if found.gain is None:
        return f"{place}, {against}; they share no seed, so whether the intermediate layers help is open."
    verdict = {1: "help", 0: "make no clear difference", -1: "do not help"}[direction(block)]
    return f"{place}, the intermediate layers {verdict}: {against} ({_gained(block, found.gain)})."


def brief(block: Block) -> str:
    """The answer as one item of a list under the opening sentence."""
    found, baseline = block.answer, block.baseline
    if found is None or found.gain is None or baseline is None:
        return answer(block)
    verdict = {1: "", 0: ": no clear difference", -1: ": they do not help"}[direction(block)]
    scores = f"{_whole(found.test.mean)} against {_whole(baseline.test.mean)}"
    return f"{block.name}: {scores} ({_gained(block, found.gain)}){verdict}."


def direction(block: Block) -> int:
    """1 for a gain, -1 for a loss, 0 where it is no more than seeds or the choice of test images make by chance."""
    gain = block.answer.gain if block.answer else None
    if gain is None or abs(gain.mean) <= max(gain.sd or 0, block.chance or 0):
        return 0
    return 1 if gain.mean > 0 else -1


def guessing(held: Sequence[Block]) -> str:
    """What scores are to be read against: what each metric gives to guesses."""
    classes = sorted({len(block.rows[0].classes) for block in held if block.metric == "balanced_accuracy"})
    ends = list(dict.fromkeys([classes[-1], classes[0]] if classes else []))
    share = " to ".join(percent(1 / n) for n in ends)
    said = {
        "balanced_accuracy": f"a balanced accuracy of {share}\N{NO-BREAK SPACE}% ({' to '.join(map(str, ends))} classes)",
        "mean_average_precision": "a mean average precision as high as the share of images that have a label",
        "r2": "an R² of 0, which the mean of all numbers has",
    }
    there = dict.fromkeys(block.metric for block in held)
    return f"Guessing gives {listed([said[metric] for metric in there if metric in said])}."


def attention(held: LayerAttention, block: Block) -> str:
    """Which layer the probe turns to most, set against an even spread."""
    shares = held.by_layer
    at_peak = {kind: share for (layer, kind), share in zip(held.tokens, held.mean, strict=True) if layer == held.peak}
    even = len(at_peak) / len(held.tokens)
    through = max(at_peak, key=lambda kind: at_peak[kind]).upper()
    place = ", the last" if held.peak == max(shares) else f" of {block.depth}"
    whose = "" if held.probe == ALF else f", {held.probe}"
    return (
        f"{block.name}{whose}: attention peaks at layer {held.peak}{place}, with {_whole(shares[held.peak], 0)} of it, mostly "
        f"through {through} (an even spread would give {_whole(even)}); layers before the last get "
        f"{_whole(held.before_last, 0)}."
    )


def best_layers(block: Block) -> str:
    """Of each layer-by-layer series the layer a user would have chosen, by validation, and what it gives on test."""
    said = []
    for name, layers in block.by_layer.items():
        layer, score = max(layers.items(), key=lambda item: item[1].val.mean)
        gain = f", {points(score.gain.mean)} points" if score.gain and not score.is_baseline else ""
        said.append(f"layer {layer} for {name} ({_whole(score.test.mean)} on test{gain})")
    return f"{block.name}: the best single layer by validation is {listed(said)}."


def _whole(value: float, digits: int = 1) -> str:
    """'97.1 %', which no line break parts."""
    return f"{percent(value, digits)}\N{NO-BREAK SPACE}%"


def _gained(block: Block, gain: Spread) -> str:
    spread = "one seed: its spread is not known" if gain.sd is None else f"{gain.n} seeds"
    deviation = "" if gain.sd is None else f" ± {percent(gain.sd)}"
    images = block.rows[0].images.test
    if block.chance is None:
        chance = f"; how much {count(images)} test images leave to chance, mlfusion results compare tells"
    else:
        within = abs(gain.mean) <= block.chance
        chance = f"; chance makes about ±{percent(block.chance)} with {count(images)} test images" * within
    return f"{points(gain.mean)}{deviation} points, {spread}{chance}"


def _top(block: Block) -> str:
    """What was run, where the answer was not."""
    best = max(block.scores, key=lambda score: score.val.mean)
    which = "the only one" if len(block.scores) == 1 else f"the best of {len(block.scores)} by validation"
    return f"{best.probe}, {which}, reaches {_whole(best.test.mean)}."
