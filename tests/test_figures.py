"""Figures, tables and their files: each number against one worked out here from the rows, by other means."""

import csv
import json
import re
import statistics
import sys
from itertools import product
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import scipy.stats
from msgspec.structs import replace
from PIL import Image
from rows import study
from scipy.spatial.distance import pdist, squareform
from tiny import save_images, save_model
from typer.testing import CliRunner, Result

import mlfusion
from mlfusion.analysis.similarity import similarity_to_last
from mlfusion.cli import app
from mlfusion.errors import BadData, MlfusionError, Unavailable
from mlfusion.report import Picture, Strip, early_and_late, overlay, page, published, tables, write_figures, write_page
from mlfusion.report.catalogue import GROUP_FIGURES, STUDY_FIGURES, ReportData, figure_files
from mlfusion.report.figures import classification, cost, gains, ranks, seeds
from mlfusion.report.figures.accuracy import accuracy
from mlfusion.report.figures.attention import attention
from mlfusion.report.figures.drawing import Record, series
from mlfusion.report.figures.layers import by_layer
from mlfusion.report.sections import sections
from mlfusion.report.studies import Study, domain, studies
from mlfusion.report.summary import comparison_groups
from mlfusion.results import Results, Row, Selected
from mlfusion.specs.names import HEAD_NAMES, STUDY
from mlfusion.system.text import markdown

ALF, BASE, AAT = "cls+ap-all-layers/attentive", "cls-last/linear", "all-tokens-last/attentive"
LINEAR = "cls+ap-all-layers/linear"
SETS = ("gtsrb", "stl10", "eurosat", "dtd", "svhn", "pets", "mine")
MODELS = ("vit-b16", "clip-vit-b16")


def drawn_rows(
    models: tuple[str, ...] = MODELS, sets: tuple[str, ...] = SETS, seeds: int = 3, seed: int = 0
) -> list[Row]:
    """Rows whose scores are drawn: baseline, ALF, AAT and the linear probe over all layers."""
    random = np.random.default_rng(seed)
    rows = []
    for model, dataset in product(models, sets):
        base = random.uniform(0.5, 0.9)
        scores = {
            probe: [float(base + lift + random.normal(0, 0.01)) for _ in range(seeds)]
            for probe, lift in ((BASE, 0.0), (LINEAR, 0.02), (ALF, 0.04), (AAT, random.normal(0.03, 0.03)))
        }
        rows += study(scores, model=model, dataset=dataset)
    return rows


def whole(rows: list[Row]) -> Study:
    [one] = studies(comparison_groups(rows))
    return one


def mean_of(rows: list[Row], field: str = "test", **wanted: object) -> float:
    return statistics.mean(getattr(row, field) for row in rows if all(getattr(row, k) == v for k, v in wanted.items()))


def gains_of(rows: list[Row], model: str, probe: str) -> dict[str, float]:
    """{data set: mean gain in points} straight from the rows."""
    found = {}
    for dataset in dict.fromkeys(row.dataset for row in rows):
        place = {"model": model, "dataset": dataset}
        found[dataset] = 100 * (mean_of(rows, probe=probe, **place) - mean_of(rows, probe=BASE, **place))
    return found


# --- box plots -------------------------------------------------------------------------------------------------------


def test_boxes_hold_the_middle_half_and_whiskers_the_values_within_reach() -> None:
    rows = drawn_rows()
    figure = gains.by_probe(whole(rows))
    assert figure
    assert [panel.title.split(":")[0] for panel in figure.panels] == [
        "clip-vit-b16",
        "vit-b16",
    ]  # as the catalogue has them
    for panel, model in zip(figure.panels, ("clip-vit-b16", "vit-b16"), strict=True):
        base = 100 * statistics.mean(mean_of(rows, model=model, dataset=d, probe=BASE) for d in SETS)
        assert panel.title == f"{model}: baseline {base:.1f} % (n = 7)"
        box = next(r for r in panel.records if r["what"] == "box" and r["label"] == ALF)
        values = sorted(gains_of(rows, model, ALF).values())
        quartiles = statistics.quantiles(values, n=4, method="inclusive")
        assert [box["q1"], box["median"], box["q3"]] == pytest.approx(quartiles)
        reach = 1.5 * (quartiles[2] - quartiles[0])
        inside = [v for v in values if quartiles[0] - reach <= v <= quartiles[2] + reach]
        assert [box["low"], box["high"]] == pytest.approx([inside[0], inside[-1]])
        dots = {r["label"]: r["x"] for r in panel.records if r["what"] == "dot" and r["series"] == 2}
        assert len(dots) == 7
        text = [str(r["text"]) for r in panel.records if r["what"] == "value"]
        score = 100 * statistics.mean(mean_of(rows, model=model, dataset=d, probe=ALF) for d in SETS)
        assert any(t.startswith(f"{score:.1f} (+{statistics.mean(values):.1f})") for t in text)


def test_a_box_of_few_values_is_its_dots() -> None:
    figure = gains.by_probe(whole(drawn_rows(sets=SETS[:4])))
    assert figure
    kinds = {str(r["what"]) for panel in figure.panels for r in panel.records}
    assert "box" not in kinds and {"dot", "median"} <= kinds
    assert "Nothing is tested: a test needs 6 data sets" in figure.note


def test_gains_are_tested_by_wilcoxon_adjusted_by_benjamini_and_hochberg() -> None:
    rows = drawn_rows()
    figure = gains.by_probe(whole(rows))
    assert figure
    for model in MODELS:
        found = {str(t["probe"]): t for t in figure.more_numbers["tests"] if t["model"] == model}
        p = {}
        for probe in found:
            held = list(gains_of(rows, model, probe).values())
            p[probe] = scipy.stats.wilcoxon(held, alternative="greater", method="exact").pvalue
            assert found[probe]["p"] == pytest.approx(p[probe])
        ordered = sorted(p, key=lambda probe: p[probe])
        q = 1.0
        for rank in range(len(ordered), 0, -1):  # by hand, from the largest p down
            q = min(q, p[ordered[rank - 1]] * len(ordered) / rank)
            assert found[ordered[rank - 1]]["q"] == pytest.approx(q)
            assert (found[ordered[rank - 1]]["significant"] == "yes") == (q < 0.05)
        panel = next(panel for panel in figure.panels if panel.title.startswith(f"{model}:"))
        stars = sum(str(r.get("text", "")).endswith("*") for r in panel.records)
        assert stars == sum(t["significant"] == "yes" for t in found.values()) > 0


def test_models_are_set_side_by_side_with_their_own_scores_beside_the_gains() -> None:
    rows = drawn_rows()
    figure = gains.by_model(whole(rows))
    assert figure
    absolute, gained = figure.panels
    assert [r["text"] for r in absolute.records if r["what"] == "name"] == ["clip-vit-b16", "vit-b16"]
    assert sum(r["what"] == "dot" for r in absolute.records) == 14
    assert sum(r["what"] == "dot" for r in gained.records) == 3 * 14
    assert len(figure.numbers) == 4 * 14
    assert gains.by_model(whole(drawn_rows(MODELS[:1]))) is None


def test_token_kinds_and_heads_are_compared_where_they_were_run() -> None:
    scores = {BASE: [0.9], "ap-last/linear": [0.7], "cls+ap-last/linear": [0.92], "cls+ap-last/attentive": [0.93]}
    rows = study(scores) + study(scores, dataset="dtd")
    figure = gains.by_token(whole(rows))
    assert figure
    assert [panel.title for panel in figure.panels] == ["All", "dtd", "digits"]
    text = [r["text"] for r in figure.panels[0].records if r["what"] == "value"]
    assert text == ["0.0 (n = 2)", "\N{MINUS SIGN}20.0 (n = 2)", "+2.0 (n = 2)"]
    assert gains.by_token(whole(study({BASE: [0.9], "cls+ap-last/linear": [0.92]}))) is None

    rows = study({BASE: [0.9], ALF: [0.95]})
    for heads, score in ((4, 0.93), (24, 0.96)):
        [one] = study({ALF: [score]})
        rows.append(replace(one, id=f"h{heads}", probe=f"{ALF}:h{heads}", selected=Selected(lr=0.1, heads=heads)))
    assert gains.by_heads(whole(rows[:3])) is None  # one number is no comparison, and rows without one do not count
    figure = gains.by_heads(whole(rows))
    assert figure
    assert [r["text"] for r in figure.panels[0].records if r["what"] == "name"] == [ALF, "4 heads", "24 heads"]
    assert [r["x"] for r in figure.panels[0].records if r["what"] == "dot"] == pytest.approx([3, 6])


# --- what else a study shows -----------------------------------------------------------------------------------------


def test_cost_averages_like_with_like() -> None:
    rows = drawn_rows(MODELS[:1], SETS[:3])
    rows += study({"cls+ap-2-layers/linear": [0.5]}, model=MODELS[0], dataset=SETS[0])  # on one data set alone
    figure = cost.cost(whole(rows))
    assert figure
    shown = {r["probe"]: r for r in figure.numbers}
    assert set(shown) == {BASE, LINEAR, ALF, AAT, "cls+ap-2-layers/linear"}
    assert {r["n"] for r in figure.numbers} == {1}  # only there do all of them have a score
    for probe, record in shown.items():
        assert record["test"] == pytest.approx(100 * mean_of(rows, dataset=SETS[0], probe=probe))
    assert cost.cost(whole(study({BASE: [0.9]}))) is None


def test_deviation_over_seeds_and_train_against_test() -> None:
    rows = drawn_rows()
    figure = seeds.seeds(whole(rows))
    assert figure
    for record in figure.numbers:
        each = []
        for model in MODELS:
            tests = [
                r.test for r in rows if (r.model, r.dataset, r.probe) == (model, record["dataset"], record["probe"])
            ]
            each.append(100 * statistics.stdev(tests))
        assert (record["sd"], record["highest"]) == pytest.approx((statistics.mean(each), max(each)))
        assert (record["models"], record["seeds"]) == (2, "3")
    assert seeds.seeds(whole(drawn_rows(seeds=1))) is None
    figure = seeds.train_test(whole(rows))
    assert figure
    for record in figure.numbers:
        place = {"dataset": record["dataset"], "probe": record["probe"]}
        assert record["train"] == pytest.approx(100 * mean_of(rows, "train", **place))
        assert record["test"] == pytest.approx(100 * mean_of(rows, **place))


def test_ranks_and_the_bars_that_join_them() -> None:
    rows = drawn_rows()
    figure = ranks.ranks(whole(rows))
    assert figure
    probes = [BASE, LINEAR, ALF, AAT]
    means = [[mean_of(rows, dataset=d, probe=p) for p in probes] for d in SETS]
    expected = dict(zip(probes, scipy.stats.rankdata(-np.array(means), axis=1).mean(0), strict=True))
    assert {r["probe"]: r["mean_rank"] for r in figure.numbers} == pytest.approx(expected)
    critical = float(re.findall(r"difference of ([\d.]+)", figure.note)[0])
    # Demšar's table: q of four classifiers at 0.05 is 2.569
    assert critical == pytest.approx(2.569 * (4 * 5 / (6 * 7)) ** 0.5, abs=0.006)
    for bar in (r for r in figure.panels[0].records if r["what"] == "group"):
        assert bar.number("end") - bar.number("rank") <= critical
    assert ranks.ranks(whole(drawn_rows(sets=SETS[:5]))) is None


@pytest.mark.slow
def test_unlike_rows_get_studies_of_their_own() -> None:
    rows = drawn_rows(sets=SETS[:2])
    several = study({BASE: [0.3], ALF: [0.4]}, dataset="voc2007", metric="mean_average_precision")
    first, second = studies(comparison_groups([*rows, *several]))
    assert (first.name, second.name) == ("balanced accuracy", "mean average precision")
    assert "voc2007" not in first.datasets
    text = page.page(ReportData([*rows, *several]))
    assert "The rows have 2 metrics (balanced accuracy and mean average precision); nothing is compared" in text
    assert "gains-by-probe-mean-average-precision" not in text  # one case has no study to draw
    shots = studies(comparison_groups([*rows, *study({BASE: [0.3]}, dataset="dtd", shots=4)]))
    assert [one.name for one in shots] == ["no options", "4 shots"]


@pytest.mark.parametrize("count", [8, 24])
def test_no_two_lines_of_a_figure_look_alike(count: int) -> None:
    kinds = [f"{kind}-layer-{{}}/{head}" for kind in ("cls", "ap", "cls+ap") for head in HEADS_BY_LAYER]
    rows = study({BASE: [0.5]} | {kind.format(layer): [0.5] for kind in kinds[:count] for layer in (1, 2)})
    figure = by_layer(comparison_groups(rows))
    assert figure
    looks = [(entry.colour, entry.symbol) for entry in figure.legend]
    assert len(looks) == len(set(looks)) == count
    assert [colour for colour, _ in looks[:6]] == [1, 2, 3, 4, 5, 6]  # all colours before the second of any
    shapes = [
        one["encoding"]["shape"]["scale"]["range"]
        for one in figure.panels[0].spec["layer"]
        if "shape" in one.get("encoding", {})
    ]
    assert shapes == [[symbol for _, symbol in looks]]  # the points look as the legend says


def test_a_head_has_one_mark_in_every_figure() -> None:
    """Whatever other heads a figure shows: each has a colour and a symbol of its own, the same in legend and points."""
    looks: dict[str, set[tuple[int, str]]] = {}
    for heads in (
        HEAD_NAMES[:3],
        ("linear", "knn", "ridge"),
        ("logistic", "aim"),
        HEAD_NAMES[::-1],
    ):
        scores = {BASE: [0.5]} | {f"cls+ap-last/{head}": [0.5 + 0.01 * n] for n, head in enumerate(heads)}
        rows = [row for dataset in SETS[:3] for row in study(scores, dataset=dataset)]
        made = [accuracy(comparison_groups(rows)), cost.cost(whole(rows)), gains.by_probe(whole(rows))]
        for figure in made:
            assert figure
            for entry in figure.legend:
                looks.setdefault(entry.label, set()).add((entry.colour, entry.symbol))
            for panel in figure.panels if figure is not made[2] else ():  # the lines of the third are numbered
                for layer in panel.spec["layer"]:
                    shapes = layer.get("encoding", {}).get("shape", {}).get("scale", {"domain": heads})
                    assert set(heads) <= set(shapes["domain"])  # each has a mark
    del looks[BASE], looks["± over seeds"]
    assert set(HEAD_NAMES) <= set(looks) and all(len(each) == 1 for each in looks.values())
    assert len({look for each in looks.values() for look in each}) == len(looks)


def test_thirty_six_series_look_different() -> None:
    looks = [series(position) for position in range(37)]
    assert len(set(looks[:36])) == 36 and looks[36] == looks[0]


HEADS_BY_LAYER = ("linear", "ridge", "logistic", "knn", "attentive", "abmil", "simpool", "v-jepa")


def test_other_code_than_the_baselines_is_marked() -> None:
    rows = study({BASE: [0.9, 0.91], ALF: [0.95, 0.96], LINEAR: [0.92, 0.93]})
    rows = [replace(row, code="later" if row.probe == ALF else "abc") for row in rows]
    [group] = comparison_groups(rows)
    assert [score.probe for score in group.scores if score.other] == [ALF]
    text = page.page(ReportData(rows))
    assert "1 score was made by another version of the code" in re.sub("<[^>]+>", "", text)
    assert "(marked \N{DAGGER})" in text


# --- tables ----------------------------------------------------------------------------------------------------------


SEVEN = ("vit-s16", "vit-b16", "vit-l16", "clip-vit-b16", "clip-vit-b32", "clip-vit-l14", "dinov2-vit-b14")


def test_bold_is_what_is_not_significantly_worse_than_the_best() -> None:
    rows = drawn_rows(SEVEN, SETS[:3])
    score_table = tables.by_significance(whole(rows))
    marks = {(r["dataset"], r["probe"]): r["mark"] for r in score_table.numbers}
    seen = set()
    for dataset in SETS[:3]:
        scores = {
            p: [mean_of(rows, model=m, dataset=dataset, probe=p) for m in SEVEN] for p in (BASE, LINEAR, ALF, AAT)
        }
        best = max(scores, key=lambda p: statistics.mean(scores[p]))
        for probe, held in scores.items():
            worse = (
                probe != best
                and scipy.stats.wilcoxon(np.subtract(scores[best], held), alternative="greater").pvalue < 0.05
            )
            assert marks[dataset, probe] == ("" if worse else "bold")
            seen.add(worse)
    assert seen == {True, False}
    assert "nothing is tested with fewer than 6 models" in tables.by_significance(whole(rows[: len(rows) // 2])).note


def test_ranks_of_the_table_and_gains_over_models() -> None:
    rows = drawn_rows()
    score_table = tables.by_rank(whole(rows))
    assert [name for name, _ in score_table.domains] == sorted(
        {domain(d) for d in SETS}, key=[n for n, _ in score_table.domains].index
    )
    by_rank: dict[str, list[float]] = {}
    for dataset in SETS:
        means = {p: mean_of(rows, dataset=dataset, probe=p) for p in (BASE, LINEAR, ALF, AAT)}
        for rank, probe in enumerate(sorted(means, key=lambda p: -means[p]), 1):
            by_rank.setdefault(probe, []).append(rank)
            [held] = [r for r in score_table.numbers if (r["dataset"], r["probe"]) == (dataset, probe)]
            assert held["mark"] == {1: "bold", 2: "underline"}.get(rank, "")
            assert held["test"] == pytest.approx(100 * means[probe])
            if probe != BASE:
                each = [gains_of(rows, model, probe)[dataset] for model in MODELS]
                assert (held["gain"], held["gain_sd"]) == pytest.approx((statistics.mean(each), statistics.stdev(each)))
    last = {r["probe"]: r["rank"] for r in score_table.numbers if r["dataset"] == "mean rank"}
    assert last == pytest.approx({probe: statistics.mean(held) for probe, held in by_rank.items()})
    assert tables.ranks({"a": 1.0, "b": 2.0, "c": 1.0, "d": 0.0}) == {"a": 2.5, "b": 1.0, "c": 2.5, "d": 4.0}


def test_a_probe_of_fewer_models_is_said_to_be_and_neither_marked_nor_averaged() -> None:
    rows = [r for r in drawn_rows(SEVEN, SETS[:2]) if r.probe != AAT or r.model in MODELS or r.dataset == SETS[1]]
    rows = [replace(r, test=r.test / 2 + 0.5) if r.probe == AAT else r for r in rows]  # by far the best
    score_table = tables.by_significance(whole(rows))
    cells = {
        label: dict(zip(score_table.columns, held, strict=True))
        for _, lines in score_table.domains
        for label, held in lines
    }
    assert cells[SETS[0]][AAT].shown[1].endswith("; n = 2")
    assert cells[SETS[0]][AAT].mark == "" and cells[SETS[1]][AAT].mark == "bold"
    [(_, foot)] = score_table.foot
    assert [cell.test is None for cell in foot] == [probe == AAT for probe in score_table.columns]
    assert "Scores of fewer models (n) are not marked" in score_table.note


def test_tables_as_text_are_whole_and_safe() -> None:
    rows = drawn_rows() + study({BASE: [0.9], ALF: [0.95]}, model="vit-b16", dataset="50%_of|it & $x{}\\")
    study_in_markdown = whole([one.renamed(markdown) for one in rows])
    in_markdown = [draw(study_in_markdown) for draw in (tables.by_significance, tables.by_rank)]
    in_markdown.append(tables.of_model(study_in_markdown, "vit-b16"))
    for score_table in (
        tables.by_significance(whole(rows)),
        tables.by_rank(whole(rows)),
        tables.of_model(whole(rows), "vit-b16"),
    ):
        escaped = next(one for one in in_markdown if one.name == score_table.name)
        lines = [line for line in tables.markdown(escaped).splitlines() if line.startswith("|")]
        assert {len(re.findall(r"(?<!\\)\|", line)) for line in lines} == {len(score_table.columns) + 2}
        tex = tables.latex(score_table)
        assert r"50\%\_of|it \& \$x\{\}\textbackslash{}" in tex
        body = tex[tex.index(r"\toprule") : tex.index(r"\bottomrule")]
        for line in body.split(r"\\")[:-1]:
            if "multicolumn" not in line:
                assert len(re.findall(r"(?<!\\)&", line)) == len(score_table.columns)
        bare = re.sub(r"\\[{}]", "", tex)
        assert bare.count("{") == bare.count("}")
        assert len(re.findall(r"(?<!\\)\$", tex)) % 2 == 0


# --- attention, layers, images ---------------------------------------------------------------------------------------


def test_attention_rows_are_grouped_by_domain_on_one_scale() -> None:
    rows = drawn_rows()
    figure = attention(whole(rows).select())
    domains = [("stl10", "Natural (multi-domain)"), ("gtsrb", "Natural (single-domain)"), ("pets", ""), ("svhn", "")]
    domains += [("eurosat", "Specialized"), ("dtd", "Structured"), ("mine", "Others")]
    ends = set()
    for panel in figure.panels:
        heads = {str(r["row"]): str(r["group"]) for r in panel.records if r["layer"] == 1 and r["kind"] == "CLS"}
        assert list(heads) == [name for name, _ in domains]
        assert heads == dict(domains)
        ends.add(json.dumps(panel.spec["layer"][0]["encoding"]["color"]["scale"]["domain"]))
    assert len(ends) == 1
    for dataset, kind, layer in product(SETS, ("CLS", "AP"), (1, 4)):
        held = [
            a.mean[list(zip(a.kinds, a.layers, strict=True)).index((kind.lower(), layer))]
            for r in rows
            if r.dataset == dataset and r.model == "vit-b16" and r.probe == ALF and (a := r.attention)
        ]
        [cell] = [
            n
            for n in figure.numbers
            if (n["model"], n["dataset"], n["layer"]) == ("vit-b16", dataset, layer) and str(n["kind"]).upper() == kind
        ]
        assert cell["share"] == pytest.approx(100 * statistics.mean(held))


def test_every_row_of_attention_is_named_and_another_probe_than_alf_too() -> None:
    rows = study({ALF: [0.9]}, dataset="one") + study({"cls+ap-2-layers/attentive": [0.9]}, dataset="two")
    [panel] = attention(whole(rows).select()).panels
    assert [r["name"] for r in panel.records if "name" in r] == ["one", "two, cls+ap-2-layers/attentive"]
    assert [r["top"] for r in panel.records if "top" in r] == ["CLS tokens", "AP tokens"]


def test_a_mean_of_fewer_cases_than_others_says_so() -> None:
    rows = study({BASE: [0.8], ALF: [0.9], LINEAR: [0.85]}, dataset="one") + study(
        {BASE: [0.6], ALF: [0.7]}, dataset="two"
    )
    figure = gains.by_probe(whole(rows))
    assert figure
    text = [r["text"] for r in figure.panels[0].records if r["what"] == "value"]
    assert text == ["85.0 (+5.0; n = 1)", "80.0 (+10.0)"]


def test_similarity_of_layers_is_that_of_the_gram_matrices(tmp_path: Path) -> None:
    model, data = save_model("vit", tmp_path / "m"), save_images(tmp_path / "d", {"train": 3, "test": 4})
    done = mlfusion.extract(str(model), str(data), cache=tmp_path / "cache")
    test = next(one for one in done if one.entry.spec.data.split == "test")
    depth = test.entry.spec.model.depth
    scores = {f"cls-layer-{layer}/linear": [0.5] for layer in range(1, depth + 1)}
    rows = study(scores, depth=depth, model="m", dataset="d", features=["gone", test.entry.key])
    found = similarity_to_last(rows, cache=tmp_path / "cache")["m", "d"]
    features = mlfusion.load_features(str(model), str(data), "test", cache=tmp_path / "cache")
    for k, kind in enumerate(("cls", "ap")):
        assert [found[kernel][kind][depth] for kernel in ("linear", "rbf")] == pytest.approx([1, 1])
        for layer in range(1, depth + 1):
            held = [features.tokens[:, at - 1, k].astype(np.float64) for at in (layer, depth)]
            assert found["linear"][kind][layer] == pytest.approx(literal_cka(*grams(*held)), abs=1e-6)
            assert found["rbf"][kind][layer] == pytest.approx(literal_cka(*grams(*held, sigma=0.2)), abs=1e-6)
    said: list[str] = []
    assert (
        similarity_to_last(
            study(scores, depth=depth, features=["gone", "gone"]), cache=tmp_path / "cache", log=said.append
        )
        == {}
    )
    assert "are not in" in said[0]
    figure = by_layer(comparison_groups(rows), {("m", "d"): found})
    drawn = {(r["label"], r["layer"]): r["cka"] for r in figure.panels[0].records if str(r["what"]).startswith("cka")}
    assert len(drawn) == 2 * 2 * depth
    assert drawn["cls, linear CKA", 1] == found["linear"]["cls"][1]
    assert drawn["ap, RBF CKA", 1] == found["rbf"]["ap"][1]
    kept = {(r.get("kernel"), r.get("label"), r["layer"]) for r in figure.numbers if "cka" in r}
    assert len(kept) == 2 * 2 * depth and {kernel for kernel, *_ in kept} == {"linear", "rbf"}
    assert [entry.symbol for entry in figure.legend][-2:] == ["dotted", "dash-dot"]


def grams(*held: np.ndarray, sigma: float | None = None) -> list[np.ndarray]:
    """Linear, or of an RBF as wide as `sigma` times the median distance."""
    if sigma is None:
        return [x @ x.T for x in held]
    far = [pdist(x) for x in held]
    return [squareform(np.exp(-0.5 * (d / (sigma * np.median(d))) ** 2)) + np.eye(len(held[0])) for d in far]


def literal_cka(a: np.ndarray, b: np.ndarray) -> float:
    """Unbiased HSIC of Song et al. (2012) as it is printed: Gram matrices without their diagonals."""

    def hsic(k: np.ndarray, m: np.ndarray) -> float:
        k, m, n = k - np.diag(np.diag(k)), m - np.diag(np.diag(m)), len(k)
        one = np.ones(n)
        middle = (one @ k @ one) * (one @ m @ one) / ((n - 1) * (n - 2))
        return (np.trace(k @ m) + middle - 2 / (n - 2) * one @ k @ m @ one) / (n * (n - 3))

    return float(hsic(a, b) / np.sqrt(hsic(a, a) * hsic(b, b)))


def test_confusions_and_calibration_come_from_what_rows_keep(tmp_path: Path) -> None:
    rows = study({BASE: [0.7, 0.7], ALF: [0.8, 0.9]}, classes=["ape", "bee", "cat"], images={"train": 9, "test": 6})
    results = Results(tmp_path)
    labels = np.array([0, 0, 1, 1, 2, 2])
    taken = np.array([0, 1, 1, 1, 2, 1])  # an ape and a cat taken for a bee
    probabilities = np.full((6, 3), 0.1, np.float16)
    probabilities[np.arange(6), taken] = 0.8
    for row in rows:
        if row.probe == ALF:
            results.append(row, {"labels": labels, "probabilities": probabilities})
    found = classification.predictions(comparison_groups(rows), results)
    assert found and found.seeds == 2
    assert found.counts.tolist() == [[2, 2, 0], [0, 4, 0], [0, 2, 2]]
    assert classification.confusions(found) == [("ape", "bee", 2, "50.0"), ("cat", "bee", 2, "50.0")]
    [(name, curve)] = found.calibrations  # the baseline kept nothing
    assert name == ALF
    assert curve.ece == pytest.approx(abs(8 / 12 - 0.8), abs=1e-3)  # two thirds right, 0.8 sure
    matrix, reliability = classification.figures(found)
    assert {(r["true"], r["predicted"]): r["share"] for r in matrix.numbers}["ape", "bee"] == 50
    assert [r["images"] for r in reliability.numbers] == [12]
    assert classification.predictions(comparison_groups(rows), Results(tmp_path / "empty")) is None


def test_a_map_is_drawn_where_it_points_and_the_image_is_left_elsewhere() -> None:
    image = Image.fromarray(np.full((64, 64, 3), (200, 100, 50), np.uint8))
    attention = np.zeros((8, 8))
    attention[2, 5] = 0.7
    drawn = np.asarray(overlay(image, attention)).astype(int)
    grey = int(np.asarray(image.convert("L"))[0, 0])
    assert (drawn[48, 10] == grey).all()  # far away: the image, in grey
    change = np.abs(drawn - grey).sum(-1)
    top = np.unravel_index(change.argmax(), change.shape)
    assert np.abs(np.array(top) - (20, 44)).max() <= 4
    assert (np.asarray(overlay(image, np.zeros((3, 5)))) == grey).all()
    for wrong in (np.zeros(4), np.array([[np.nan]]), np.array([[-1.0]])):
        with pytest.raises(BadData, match="finite and not negative"):
            overlay(image, wrong)


def test_the_earliest_and_the_latest_images_are_found() -> None:
    layers = [1, 1, 2, 2, 3, 3]
    at = np.array([1.2, 2.9, 2.0, 1.1, 2.5])
    attention = np.zeros((5, 6))
    for i, mean in enumerate(at):  # shares of two neighbouring layers that give the mean
        low = int(np.floor(mean))
        attention[i, 2 * (low - 1)], attention[i, 2 * low] = low + 1 - mean, mean - low
    image = Image.new("RGB", (4, 4))
    early, late = early_and_late(attention, layers, lambda i: Picture(image, f"image {i}"), 2)
    assert [p.caption for p in early.pictures] == ["image 3, layer 1.1", "image 0, layer 1.2"]
    assert [p.caption for p in late.pictures] == ["image 1, layer 2.9", "image 4, layer 2.5"]
    assert "(the last layer is 3; the median is 2.0)" in early.description
    alike = np.tile([0.1, 0.1, 0.3, 0.1, 0.3, 0.1], (5, 1)).astype(np.float16)
    alike[2] += np.float16(0.001)  # less than the digits that are shown
    assert early_and_late(alike, layers, lambda _: Picture(image)) == ()
    with pytest.raises(BadData, match="over 6 tokens"):
        early_and_late(attention[:, :5], layers, lambda _: Picture(image))


# --- the published numbers -------------------------------------------------------------------------------------------


def test_the_published_numbers_are_those_of_the_papers_table() -> None:
    known = published.published_scores()
    models, sets = {key[0] for key in known}, {key[1] for key in known}
    assert (len(known), len(models), len(sets), {key[2] for key in known}) == (1290, 9, 19, set(STUDY))
    # Baseline and gains over nine models as the paper's table 1 prints them.
    for dataset, base, alf, aat, linear in (
        ("cars", 77.81, 6.35, 8.97, -0.86),
        ("svhn", 56.06, 27.25, 30.31, 24.40),
        ("stl10", 99.29, 0.04, 0.01, 0.03),
        ("dtd", 75.99, 4.05, 1.41, 4.04),
    ):
        assert 100 * statistics.mean(known[m, dataset, BASE] for m in models) == pytest.approx(base, abs=0.006)
        for probe, gain in ((ALF, alf), (AAT, aat), (LINEAR, linear)):
            each = [100 * (known[m, dataset, probe] - known[m, dataset, BASE]) for m in models]
            assert statistics.mean(each) == pytest.approx(gain, abs=0.011)


def test_differences_from_the_published_scores_are_flagged() -> None:
    theirs = published.published_scores()["vit-b16", "dtd", BASE], published.published_scores()["vit-b16", "dtd", ALF]
    rows = study(
        {BASE: [theirs[0] + 0.03, theirs[0] + 0.031], ALF: [theirs[1] + 0.002, theirs[1] + 0.004]},
        model="vit-b16",
        dataset="dtd",
    )
    rows += study(
        {AAT: [0.1, 0.9]}, model="vit-b16", dataset="dtd"
    )  # far off, but so are its own seeds from each other
    rows += study({BASE: [0.5]}, model="mine", dataset="dtd")
    found = published.compare(comparison_groups(rows))
    assert [(one.score.probe, one.flagged) for one in found] == [(BASE, True), (ALF, False), (AAT, False)]
    assert found[0].difference == pytest.approx(0.0305)
    said = published.summarize(found)
    assert said.startswith("3 scores are in common with the published ones")
    assert "1 model, 1 data set" in said and "1 is flagged" in said
    assert "Rows of the quick grid are not a fair comparison" in said
    nothing = published.compare(comparison_groups(study({BASE: [0.5]})))
    assert nothing == [] and published.figure(nothing) is None
    assert published.summarize(nothing).startswith("No score is in common with the published ones")
    assert published.compare(comparison_groups(study({BASE: [0.5]}, model="vit-b16", dataset="dtd", shots=4))) == []


# --- one list, two uses ----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_every_figure_of_the_list_is_on_the_page_and_among_the_files() -> None:
    rows = drawn_rows()
    for model, dataset in product(MODELS, SETS):
        rows += study({"ap-last/linear": [0.5], "cls-layer-1/linear": [0.4]}, model=model, dataset=dataset)
        for heads in (4, 24):
            [one] = study({f"{ALF}:h{heads}": [0.9]}, model=model, dataset=dataset)
            rows.append(replace(one, selected=Selected(lr=0.1, heads=heads)))
    data = ReportData(rows)
    on_page = {section.name: [figure.name for figure in section.figures] for section in sections(data, "x.html")}
    files = [name for name, _ in figure_files(data, paper=False)]
    [only] = data.studies
    for one in STUDY_FIGURES:
        figure = one.draw(only)
        assert figure is not None and figure.name in on_page[one.section] and figure.name in files
    for each in GROUP_FIGURES:
        figure = each.draw(only.select(), data, None)
        names = only.models if each.one_per == "model" else only.datasets
        assert figure is not None and {f"{figure.name}-{name}" for name in names} <= set(files)
        assert each.section is None or each.section in on_page


def test_a_record_cannot_be_changed_and_an_absent_value_is_no_number() -> None:
    record = Record(probe=BASE, test=1, gain=None)
    assert record.number("test") == 1.0 and record["gain"] is None
    for name in ("gain", "probe"):
        with pytest.raises(TypeError, match=f"{name} of a record is .* not a number"):
            record.number(name)
    with pytest.raises(TypeError):
        record["test"] = 2
    assert dict(record.extended(test=2).without("gain")) == {"probe": BASE, "test": 2} and record["test"] == 1


# --- files -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_every_figure_is_a_drawing_a_picture_and_its_numbers(tmp_path: Path) -> None:
    rows = study({BASE: [0.9, 0.91], ALF: [0.95, 0.96], "cls-layer-1/linear": [0.5, 0.6]}, model="org/vit b")
    strip = Strip("Where", "It looks.", (Picture(Image.new("RGB", (8, 8)), "one", np.eye(4)),), "looks")
    made = write_figures(rows, tmp_path / "new" / "figures", pictures={"digits": [strip]}, paper=True)
    names = {path.name for path in made}
    figures = ["gains-by-probe", "cost", "seeds", "train-test", "attention-org-vit-b", "scores-org-vit-b"]
    figures += ["accuracy-digits", "layers-digits", "digits-looks"]
    expected = {f"{name}.{kind}" for name in figures for kind in ("svg", "png", "csv")} | {"gains-by-probe-tests.csv"}
    expected |= {f"table-1-{style}.{kind}" for style in ("significance", "ranks") for kind in ("md", "tex", "csv")}
    assert names == expected
    assert {path.name for path in (tmp_path / "new" / "figures").iterdir()} == expected  # no draft is left
    for path in made:
        if path.suffix == ".svg":
            text = " ".join(ElementTree.parse(path).getroot().itertext())
            assert "NaN" not in text and len(text) > 10
        elif path.suffix == ".png":
            with Image.open(path) as image:
                assert min(image.size) > 200
                assert len(image.convert("RGB").getcolors(1 << 24) or []) > 3
        elif path.suffix == ".csv":
            assert list(csv.DictReader(path.read_text().splitlines()))
    held = {
        r["probe"]: r
        for r in csv.DictReader((tmp_path / "new" / "figures" / "accuracy-digits.csv").read_text().splitlines())
    }
    assert float(held[ALF]["test"]) == pytest.approx(95.5)
    assert float(held[ALF]["gain"]) == pytest.approx(5.0)


def test_a_study_of_several_metrics_has_files_of_both(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mlfusion.report.files.svg", lambda figure: figure.name)
    monkeypatch.setattr("mlfusion.report.files.png", lambda drawn: b"")
    rows = study({BASE: [0.9], ALF: [0.95]}) + study({BASE: [0.3], ALF: [0.4]}, metric="r2")
    names = {path.name for path in write_figures(rows, tmp_path)}
    assert {"gains-by-probe.balanced-accuracy.svg", "gains-by-probe.R2.svg"} <= names


def test_where_figures_cannot_be_written_or_drawn_it_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = study({BASE: [0.9]})
    with pytest.raises(MlfusionError, match=r"no results to report.*mlfusion probe"):
        write_figures([], tmp_path)
    monkeypatch.setattr("mlfusion.report.files.svg", lambda figure: "")
    monkeypatch.setattr("mlfusion.report.files.png", lambda drawn: b"")
    (tmp_path / "file").touch()
    with pytest.raises(MlfusionError, match="cannot write the report to"):
        write_figures(rows, tmp_path / "file")
    monkeypatch.setitem(sys.modules, "vl_convert", None)
    with pytest.raises(Unavailable, match=r"vl_convert.*pip install 'mlfusion\[report\]'"):
        write_figures(rows, tmp_path / "other")


def test_the_command_writes_figures_and_sets_scores_beside_the_published(tmp_path: Path) -> None:
    results = Results(tmp_path / "results")
    theirs = published.published_scores()["vit-b16", "dtd", BASE]
    for row in study({BASE: [theirs + 0.05, theirs + 0.051]}, model="vit-b16", dataset="dtd"):
        results.append(row)
    said = typed("report", str(tmp_path / "results"), "--figures", str(tmp_path / "figures"), "--against", "paper")
    assert said.exit_code == 0, said.output
    assert re.search(r"vit-b16 +dtd +cls-last/linear +[\d.]+ ± 0\.1 +[\d.]+ +\+5\.\d +flagged", said.output)
    files = {path.name for path in (tmp_path / "figures").iterdir()}
    assert f"figures: {len(files)} files in {tmp_path / 'figures'}" in said.output.replace("\n", "")
    assert {"against-paper.csv", "accuracy-dtd.svg", "table-1-ranks.tex"} <= files
    wrong = typed("report", str(tmp_path / "results"), "--against", "papers")
    assert wrong.exit_code == 1
    assert "--against papers: allowed are paper" in wrong.output
    nothing = typed("report", str(tmp_path / "nothing"), "--figures", str(tmp_path / "f"))
    assert nothing.exit_code == 1
    assert "no results" in nothing.output and not (tmp_path / "f").exists()


def typed(*words: str) -> Result:
    """A command of mlfusion, and how it ended."""
    return CliRunner().invoke(app, list(words))


@pytest.mark.long
def test_the_page_of_a_study_as_large_as_the_papers_stays_small(tmp_path: Path) -> None:
    rows: list[Row] = []
    random = np.random.default_rng(0)
    known = published.published_scores()
    sets = [*dict.fromkeys(key[1] for key in known), "imagenet1k"]
    for model, dataset in product(dict.fromkeys(key[0] for key in known), sets):
        depth = 24 if "-l1" in model else 12
        layered = [f"{kind}-layer-{layer}/linear" for kind in ("cls", "ap") for layer in range(1, depth + 1)]
        rows += study(
            {p: random.uniform(0.5, 0.99, 2).tolist() for p in (*STUDY, *layered)},
            model=model,
            dataset=dataset,
            depth=depth,
        )
    assert len(rows) > 15_000
    path = write_page(rows, tmp_path / "page.html")
    assert path.stat().st_size < 6e6
