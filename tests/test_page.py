"""The page in a real browser: figures are drawn, tables sort, nothing fails, nothing is fetched, nothing overflows."""

import re
import shutil
import subprocess
from html import escape
from pathlib import Path

import pytest
from rows import study

from mlfusion.report import write_page

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine to open the page with")

ALF = "cls+ap-all-layers/attentive"
BASE = "cls-last/linear"
SCORES = {
    BASE: [0.90, 0.92],
    "cls+ap-last/linear": [0.91, 0.915],
    ALF: [0.95, 0.96],
    **{
        f"{kind}-layer-{layer}/linear": [0.1 * layer + 0.4, 0.1 * layer + 0.41]
        for kind in ("cls", "ap")
        for layer in (1, 2, 3)
    },
}

# Measured in the page itself once it has drawn, so that one run of the browser tells everything.
WITNESS = """<script>
(function look() {
  if (document.documentElement.dataset.figuresDrawn === undefined) return setTimeout(look, 50);
  const root = document.documentElement, out = parent.document.documentElement.dataset;
  out.figuresDrawn = root.dataset.figuresDrawn; out.errors = root.dataset.errors;
  out.wide = root.scrollWidth; out.window = innerWidth; out.fetched = performance.getEntriesByType("resource").length;
  const drawn = [...document.querySelectorAll(".figure svg")];
  out.marks = drawn.map(svg => svg.querySelectorAll("path, text").length).join(" ");
  out.overflowing = drawn.filter(svg => svg.getBoundingClientRect().right > innerWidth).length;
  out.paper = getComputedStyle(document.body).backgroundColor;
  if (parent !== window) return;  // in a frame only the layout is looked at
  const heads = document.querySelectorAll("#scores thead button"), test = heads[2].parentElement;
  const probes = () => [...document.querySelectorAll("#scores tbody th")];
  const order = () => probes().map(head => head.firstChild.textContent).join("|");
  out.first = order(); out.firstSorted = test.getAttribute("aria-sort");
  heads[2].focus(); out.focusable = document.activeElement === heads[2];
  heads[1].click(); out.byProbe = order(); out.byProbeSorted = heads[1].parentElement.getAttribute("aria-sort");
  heads[2].click(); out.byTest = order(); out.byTestSorted = test.getAttribute("aria-sort");
  heads[2].click(); out.byTestAgain = order(); out.address = location.hash;
  heads[3].click(); out.byGain = order(); out.sortedHeads = document.querySelectorAll("#scores [aria-sort]").length;
})();
</script>"""


def opened(path: Path, profile: Path, *, address: str = "", flags: tuple[str, ...] = ()) -> dict[str, str]:
    """The attributes that the page and the witness set on <html>; the browser's own complaints under 'console'."""
    assert CHROMIUM
    done = subprocess.run(
        [
            CHROMIUM,
            "--headless=new",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-quic",
            "--no-first-run",
            "--disable-background-networking",
            "--disable-component-update",
            "--disable-sync",
            "--disable-extensions",
            "--enable-logging=stderr",
            f"--user-data-dir={profile}",
            "--hide-scrollbars",
            "--window-size=1280,2000",
            "--virtual-time-budget=20000",
            *flags,
            "--dump-dom",
            f"{path.as_uri()}{address}",
        ],
        capture_output=True,
        text=True,
        timeout=180,
        check=True,
    )
    root = re.search(r"<html[^>]*>", done.stdout)
    assert root, done.stderr
    console = "\n".join(line for line in done.stderr.splitlines() if "CONSOLE" in line)
    return dict(re.findall(r'data-([\w-]+)="([^"]*)"', root[0])) | {"console": console}


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page of two data sets with the witness in it; a name that needs escaping is one of them."""
    rows = study(SCORES) + study(SCORES, dataset="<script>throw 1</script>", model="deep", depth=12)
    path = write_page(rows, tmp_path_factory.mktemp("page") / "report.html")
    head, _, tail = path.read_text().rpartition("</body>")
    path.write_text(f"{head}{WITNESS}</body>{tail}")
    return path


@pytest.fixture(scope="module")
def narrow(report: Path) -> Path:
    """The page in a frame as wide as a telephone: a headless window is not made narrower than 500 pixels."""
    path = report.with_name("narrow.html")
    frame = f'<iframe style="width:400px; height:2000px; border:0" srcdoc="{escape(report.read_text())}"></iframe>'
    path.write_text(f"<!doctype html><html lang=en><body>{frame}")
    return path


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [1280, 400])
def test_figures_are_drawn_without_an_error_and_nothing_is_fetched(
    report: Path, narrow: Path, tmp_path: Path, width: int, dark: bool
) -> None:
    flags = ("--blink-settings=preferredColorScheme=0",) if dark else ()
    found = opened(narrow if width == 400 else report, tmp_path, flags=flags)
    assert found["console"] == ""
    assert (found["figures-drawn"], found["errors"], found["fetched"]) == ("5", "0", "0")
    marks = [int(number) for number in found["marks"].split()]
    assert len(marks) == 5
    assert min(marks) > 10
    assert (int(found["window"]), int(found["wide"])) == (width, width)  # the page does not scroll sideways
    assert found["overflowing"] == "0"
    red = int(re.findall(r"\d+", found["paper"])[0])
    assert red < 60 if dark else red > 200


def test_headings_and_the_address_sort(report: Path, tmp_path: Path) -> None:
    found = opened(report, tmp_path, address="#sort=scores.2.ascending")
    probes = sorted((probe for probe in SCORES if "-layer-" not in probe), key=lambda probe: sum(SCORES[probe]))
    twice = [probe for probe in probes for _ in range(2)]  # both data sets have the same scores
    assert (found["first"].split("|"), found["first-sorted"]) == (twice, "ascending")  # by the address
    assert found["focusable"] == "true"
    named = [probe for probe in (BASE, ALF, "cls+ap-last/linear") for _ in range(2)]  # Unicode's order: '-' before '+'
    assert (found["by-probe"].split("|"), found["by-probe-sorted"]) == (named, "ascending")
    assert (found["by-test"].split("|"), found["by-test-sorted"]) == (twice[::-1], "descending")
    assert (found["by-test-again"].split("|"), found["address"]) == (twice, "#sort=scores.2.ascending")
    assert (found["by-gain"].split("|"), found["sorted-heads"]) == (twice[::-1], "1")
