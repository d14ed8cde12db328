"""Finds the best probe among stored results, which a user would otherwise look for in a long list."""

from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from mlfusion.errors import BadData
from mlfusion.results.database import Results
from mlfusion.results.rows import Row
from mlfusion.specs.selection import BestOptions


@dataclass(frozen=True)
class Best:
    """The best probe of some results, and its seed with the best score."""

    row: Row
    mean: float  # score over the seeds, a fraction, by which the probe was chosen
    seeds: int
    folder: Path | None  # of the trained probe; None if it was not kept


def best(results: Results, options: BestOptions) -> Best:
    """The probe with the highest mean score over its seeds; of equal ones that with fewer parameters.

    The score is the one on the validation part, by which nothing was tested; by the test score, the best of many probes is
    better than it would be on other images.

    Raises:
        ResultsUnusable: there are no results.
        BadData: the results are of several data sets, metrics or protocols, or all probes have more parameters.
    """
    rows = results.require(**options.rows.changed())
    for name in ("dataset", "metric", "protocol"):
        if len(values := sorted({str(getattr(row, name)) for row in rows})) > 1:
            raise BadData(
                f"the results are of several {name}s ({', '.join(values)}), whose scores have no best one; choose one with "
                "--dataset, --model or --grid, or remove the others with mlfusion results rm"
            )
    probes: dict[tuple[str, ...], list[Row]] = defaultdict(list)
    for row in rows:
        if options.max_params is None or row.parameters <= options.max_params:
            probes[row.model, row.probe, row.grid, *row.made_from, row.options()].append(row)
    if not probes:
        fewest = min(row.parameters for row in rows)
        raise BadData(f"every probe has more than {options.max_params:,} parameters; the smallest has {fewest:,}")

    def score(row: Row) -> float:
        return row.val if options.by == "val" else row.test

    means = {key: fmean(map(score, seeds)) for key, seeds in probes.items()}
    chosen = max(probes, key=lambda key: (means[key], -probes[key][0].parameters))
    row = max(probes[chosen], key=score)
    folder = results.probe_folder(row)
    return Best(row, means[chosen], len(probes[chosen]), folder if folder.is_dir() else None)
