"""The page in a real browser: figures are drawn, tables sort and filter, nothing fails, is fetched, or overflows."""

import base64
import hashlib
import re
import shutil
import subprocess
from html import escape
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rows import study

from mlfusion.report import Picture, Strip, write_page
from mlfusion.results import Results

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine to open the page with")

ALF = "cls+ap-all-layers/attentive"
BASE = "cls-last/linear"
SCORES = {
    BASE: [0.90, 0.92],
    "cls+ap-last/linear": [0.91, 0.918],
    ALF: [0.95, 0.96],
    **{
        f"{kind}-layer-{layer}/linear": [0.1 * layer + 0.4, 0.1 * layer + 0.41]
        for kind in ("cls", "ap")
        for layer in (1, 2, 3)
    },
}
SETS = ("gtsrb", "dtd", "<script>throw 1</script>")
MODELS = {"a-vit": 4, "deep": 12}
PROBES = [probe for probe in SCORES if "-layer-" not in probe]

# Measured in the page itself once it has drawn, so that one run of the browser tells everything.
WITNESS = """<script>
(async () => {
  const until = async test => { while (!test()) await new Promise(go => setTimeout(go, 50)); };
  const root = document.documentElement, out = parent.document.documentElement.dataset;
  await until(() => root.dataset.figuresDrawn !== undefined);
  out.drawnAtFirst = root.dataset.figuresDrawn; out.tablesAtFirst = root.dataset.tables;
  const place = document.querySelector("#scores"), table = dataTables.jQuery(place).DataTable();
  const shown = column => table.column(column, { search: "applied", order: "applied", page: "all" }).data().toArray();
  const words = column => [...place.querySelectorAll(`tbody tr td:nth-child(${column + 1})`)].map(cell => cell.textContent);
  const heads = [...place.querySelectorAll("thead th")];
  const rest = () => new Promise(go => setTimeout(go, 100));  // the library sorts and filters once a click is over
  const click = async head => { head.querySelector(".dt-column-title").click(); await rest(); };
  const order = () => words(2).join("|");
  out.heads = heads.map(head => head.querySelector(".dt-column-title").textContent).join("|");
  out.first = order(); out.firstSorted = heads[3].getAttribute("aria-sort");
  out.focusable = heads[3].querySelector("[tabindex='0']") !== null || heads[3].tabIndex === 0;
  out.gains = words(4).join("|");
  await click(heads[2]); out.byProbe = order(); out.byProbeSorted = heads[2].getAttribute("aria-sort");
  await click(heads[3]); out.byTest = order(); out.byTestSorted = heads[3].getAttribute("aria-sort");
  await click(heads[3]); out.byTestAgain = order(); out.address = location.hash;
  out.sortedHeads = place.querySelectorAll("[aria-sort]").length;
  const filter = place.querySelector("[aria-label='filter by Data set']");
  filter.click();
  await until(() => document.querySelector(".dtcc-list-buttons .dtcc-button"));
  const choices = [...document.querySelectorAll(".dtcc-list-buttons .dtcc-button")];
  out.choices = choices.map(choice => choice.textContent.trim()).join("|");
  choices.find(choice => choice.textContent.includes("dtd")).click();
  await rest();
  out.filtered = [...new Set(words(1))].join("|"); out.filteredRows = words(1).length;
  choices.find(choice => choice.textContent.includes("dtd")).click();
  document.body.click();
  await rest();
  const find = document.querySelector("#scores_wrapper input[type=search]");
  find.value = "deep attentive"; find.dispatchEvent(new Event("input", { bubbles: true }));
  await until(() => words(0).length < 18);
  out.found = [...new Set(words(0))].join("|") + " " + [...new Set(words(2))].join("|");
  document.querySelectorAll("details").forEach(part => { part.open = true; });
  const wanted = document.querySelectorAll(".figure").length;
  await until(() => Number(root.dataset.drawn) === wanted);
  out.wanted = wanted; out.tables = root.dataset.tables; out.errors = root.dataset.errors; out.failures = failures.join(" ");
  out.wide = root.scrollWidth; out.window = innerWidth; out.fetched = performance.getEntriesByType("resource").length;
  const drawn = [...document.querySelectorAll(".figure svg")];
  out.svgs = drawn.length;
  out.fewest = Math.min(...drawn.map(svg => svg.querySelectorAll("path, text").length));
  out.overflowing = drawn.filter(svg => svg.getBoundingClientRect().right > innerWidth).length;
  const written = [...document.querySelectorAll(".figure text")].filter(text => text.textContent);
  out.smallest = Math.min(...written.map(text => parseFloat(getComputedStyle(text).fontSize)));
  out.paper = getComputedStyle(document.body).backgroundColor;
  const loaded = [...document.querySelectorAll(".strip img")];
  loaded.forEach(image => { image.loading = "eager"; });
  await until(() => loaded.every(image => image.complete));
  out.pictures = loaded.filter(image => image.naturalWidth > 0).length + " of " + loaded.length;
  out.witnessed = "yes";
})().catch(error => { parent.document.documentElement.dataset.witnessed = String(error.stack); });
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
            "--virtual-time-budget=60000",
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
    found = dict(re.findall(r'data-([\w-]+)="([^"]*)"', root[0])) | {"console": console}
    assert found.get("witnessed") == "yes", str(found)
    return found


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page of two models on three data sets with the witness in it; a name that needs escaping is one of them."""
    folder = tmp_path_factory.mktemp("page")
    rows = [
        row
        for name in SETS
        for model, depth in MODELS.items()
        for row in study(SCORES, model=model, dataset=name, depth=depth)
    ]
    results = Results(folder / "results")
    for row in rows:
        kept = row.dataset == "gtsrb" and row.probe in (BASE, ALF)
        labels = np.arange(4000) % 2
        sure = np.where(np.arange(4000) % 7 == 0, 0.3, 0.9)  # of the right class
        probabilities = np.where(np.eye(2)[labels] == 1, sure[:, None], 1 - sure[:, None]).astype(np.float16)
        if kept:
            results.append(row, {"probabilities": probabilities, "labels": labels})
    image = Image.fromarray(np.arange(16 * 16 * 3, dtype=np.uint8).reshape(16, 16, 3))
    strip = Strip("Where it looks", "Attention.", (Picture(image, "plain"), Picture(image, "seen", np.eye(4))), "looks")
    path = write_page(rows, folder / "report.html", results=results, pictures={"gtsrb": [strip]})
    head, _, tail = path.read_text().rpartition("</body>")
    script = WITNESS.removeprefix("<script>").removesuffix("</script>")
    allowed = f"script-src 'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"
    path.write_text(f"{head}{WITNESS}</body>{tail}".replace("script-src", allowed, 1))
    return path


@pytest.fixture(scope="module")
def narrow(report: Path) -> Path:
    """The page in a frame as wide as a telephone: a headless window is not made narrower than 500 pixels."""
    path = report.with_name("narrow.html")
    frame = f'<iframe style="width:400px; height:2000px; border:0" srcdoc="{escape(report.read_text())}"></iframe>'
    path.write_text(f"<!doctype html><html lang=en><body>{frame}")
    return path


@pytest.mark.parametrize(("width", "dark"), [(1280, False), (400, True)])
def test_figures_are_drawn_without_an_error_and_nothing_is_fetched(
    report: Path, narrow: Path, tmp_path: Path, width: int, dark: bool
) -> None:
    flags = ("--blink-settings=preferredColorScheme=0",) if dark else ()
    found = opened(narrow if width == 400 else report, tmp_path, flags=flags)
    assert found["console"] == ""
    assert (found["errors"], found["failures"], found["fetched"]) == ("0", "", "0")
    assert int(found["svgs"]) == int(found["wanted"]) > int(found["drawn-at-first"]) > 5  # what is closed waits
    assert int(found["tables"]) > int(found["tables-at-first"]) > 1
    assert int(found["fewest"]) > 10
    assert float(found["smallest"]) >= 10
    assert (int(found["window"]), int(found["wide"])) == (width, width)  # the page does not scroll sideways
    assert found["overflowing"] == "0"
    assert found["pictures"] == "3 of 3"
    red = int(re.findall(r"\d+", found["paper"])[0])
    assert red < 60 if dark else red > 200


def test_no_script_but_the_pages_own_acts(report: Path, tmp_path: Path) -> None:
    """A handler, a script and a link that a name would bring, were it not escaped."""
    act = "document.documentElement.dataset.acted = 1"
    planted = f"<img src='data:,' onerror='{act}'><script>{act}</script><svg onload='{act}'></svg><header>"
    path = tmp_path / "planted.html"
    path.write_text(report.read_text().replace("<header>", planted, 1))
    found = opened(path, tmp_path / "profile")
    assert "acted" not in found
    assert found["console"].count("Content Security Policy") == 3


def test_headings_and_the_address_sort_and_filters_filter(report: Path, tmp_path: Path) -> None:
    found = opened(report, tmp_path, address="#sort=scores.3.ascending")
    assert found["heads"].split("|")[:5] == ["Model", "Data set", "Probe", "Test, %", "Gain, points"]
    probes = sorted(PROBES, key=lambda probe: sum(SCORES[probe]))
    often = [probe for probe in probes for _ in range(6)]  # all cases have the same scores
    assert (found["first"].split("|"), found["first-sorted"]) == (often, "ascending")  # by the address
    assert found["focusable"] == "true"
    assert found["gains"].split("|") == ["baseline"] * 6 + ["+0.4 ± 0.8"] * 6 + ["+4.5 ± 0.7"] * 6
    assert found["by-probe-sorted"] == "ascending"
    assert sorted(set(found["by-probe"].split("|"))) == sorted(PROBES)
    assert [p for i, p in enumerate(found["by-probe"].split("|")) if i % 6 == 0] == sorted(PROBES)
    assert (found["by-test"].split("|"), found["by-test-sorted"]) == (often[::-1], "descending")
    assert (found["by-test-again"].split("|"), found["address"]) == (often, "#sort=scores.3.ascending")
    assert found["sorted-heads"] == "1"
    assert len(found["choices"].split("|")) == 3
    assert (found["filtered"], found["filtered-rows"]) == ("dtd", "6")
    assert found["found"] == f"deep {ALF}"
