"""What a page of findings says is what the rows and arrays say, worked out here by other means."""

import re
import shutil

import numpy as np
import pytest
from rows import study as rows_of
from scipy import stats

from mlfusion.report import findings
from mlfusion.results import Results

BASE, ALF = "cls-last/linear", "cls+ap-all-layers/attentive"


@pytest.fixture
def kept(tmp_path) -> tuple[list, Results]:
    """Seven data sets, two seeds; ALF gains 3 points on all but one, over images that can be counted."""
    results, rows = Results(tmp_path / "results"), []
    random = np.random.default_rng(0)
    for number in range(7):
        gain = 0.03 * (1 + number / 10) if number else -0.01
        scores = {BASE: [0.70, 0.72], ALF: [0.70 + gain, 0.72 + gain]}
        for one in rows_of(scores, model="vit", dataset=f"set{number}", protocol=2, images={"train": 100, "test": 200}):
            labels = np.repeat([0, 1], 100)
            right = random.random(200) < one.test
            probabilities = np.eye(2)[np.where(right, labels, 1 - labels)].astype(np.float16)
            results.append(one, {"labels": labels, "probabilities": probabilities})
            rows.append(one)
    return rows, results


def page(kept) -> str:
    rows, results = kept
    return findings.page_text(rows, results, title="A study", about="Of seven sets.", command="mlfusion run x.toml")


def test_gains_and_their_test_over_data_sets(kept):
    text = page(kept)
    assert text.startswith("# A study\n\nOf seven sets.\n\n```\nmlfusion run x.toml\n```\n")
    gains = [0.03 * (1 + n / 10) if n else -0.01 for n in range(7)]
    # exact, by going through all signs
    ranks = stats.rankdata(np.abs(gains))
    signs = np.array(np.meshgrid(*[[0, 1]] * 7)).reshape(7, -1).T
    p = (signs @ ranks >= ranks[np.array(gains) > 0].sum()).mean()
    assert f"| `{ALF}` | +{100 * np.mean(gains):.1f} | {p:.3f} | {p:.3f} |" in text
    assert f"On average +{100 * np.mean(gains):.1f} points over 7 cases" in text
    assert "| set0 | 71.0 | 70.0 | −1.0 | ± 0.0 |" in text.replace(" vit |", "", 1)


def test_what_is_the_users_own_has_no_controls_either(kept):
    rows, results = kept
    text = findings.page_text(rows, results, title="a\x1b[2J", about="b\u202e", command="mlfusion run 'x\n```\x07'")
    assert text.startswith("# a\\x1b[2J\n\nb\\u202e\n\n```\nmlfusion run 'x\\n```\\x07'\n```\n")


def test_scores_and_time_are_the_rows_own(kept):
    text = page(kept)
    [line] = [line for line in text.splitlines() if line.startswith("| set6 |") and "(" in line]
    assert re.findall(r"[\d.]+", line)[1:3] == ["71.0", "1.4"]
    assert "75.8" in line  # 71.0 + 4.8
    assert "28 rows in total, 42 s of probing." in text
    assert "| vit | `cls-last/linear` | 1\N{NARROW NO-BREAK SPACE}000 | 1.5 s |" in text


def test_without_arrays_there_is_no_interval_and_nothing_is_made_up(kept):
    _, results = kept
    shutil.rmtree(results.root / "arrays")
    text = page(kept)
    assert "| vit | set6 | 71.0 | 75.8 | +4.8 | ± 0.0 | | | cannot be told |" in text
    assert "over 7 cases: cannot be told in 7." in text
    assert text.count("vit on set6: ") == 1  # and why


def test_one_case_alone_is_still_told(kept):
    rows, results = kept
    text = page(([one for one in rows if one.dataset == "set1"], results))
    assert "On average +3.3 points over 1 case: " in text
    assert "signed-rank" not in text
