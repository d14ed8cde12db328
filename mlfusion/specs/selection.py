"""Defines the options that select cache entries and results, once, as fields of frozen classes.

`specs.options` holds those of the two stages.
"""

from dataclasses import dataclass
from typing import Literal

from mlfusion.specs.definitions import Options, option
from mlfusion.specs.kinds import TIMES, amount, checked, flag, one_of, path, text, whole
from mlfusion.specs.names import parse_layers, parse_tokens
from mlfusion.specs.options import FORMATS, GRID_NAMES, MAX_DEPTH, FormatName, GridName


@dataclass(frozen=True, kw_only=True)
class EntryFilter(Options):
    """Options that select entries of the cache; by default all."""

    model: str | None = option(None, text(), "Only entries of this model.", effect="bit", short="m")
    dataset: str | None = option(None, text(), "Only entries of this data set.", effect="bit", short="d")
    split: str | None = option(None, text(), "Only entries of this split: train or test.", effect="bit")


@dataclass(frozen=True, kw_only=True)
class EmbeddingOptions(Options):
    """Options that select the cached tokens of one split."""

    split: str | None = option(
        None, text(), "Cached split, such as test; all for images without labels; default: the only one.", effect="bit"
    )
    layers: str = option(
        "last",
        checked(lambda words: parse_layers(words, MAX_DEPTH)),
        "Layers: all (1..L), last, or a list such as 1-4,12.",
        effect="bit",
    )
    tokens: str = option(
        "cls",
        checked(lambda words: parse_tokens(words, "all", MAX_DEPTH)),
        "Token kinds (mlfusion ls tokens), comma-separated.",
        effect="bit",
    )
    view: str = option("plain", text(), "View of the images, such as flip or crop1.", effect="bit")


@dataclass(frozen=True, kw_only=True)
class CopyOptions(Options):
    """Options for copying entries to another cache."""

    entries: EntryFilter = EntryFilter()
    format: FormatName | None = option(
        None, one_of(FORMATS), "File format of the copies: zarr or hdf5; default: unchanged.", effect="bit"
    )


@dataclass(frozen=True, kw_only=True)
class PruneOptions(Options):
    """Options that select the cache entries to remove."""

    entries: EntryFilter = EntryFilter()
    older: int | None = option(
        None,
        amount(TIMES, example="30d"),
        "Only entries that have not been used for this time, such as 30d or 8w.",
        effect="bit",
    )
    size: int | None = option(
        None,
        amount(),
        "Remove the entries used longest ago until the cache has at most this size, such as 20GB.",
        effect="bit",
    )
    unneeded: str | None = option(
        None, path(), "Only entries that no row in this folder of results needs.", effect="bit"
    )
    dry_run: bool = option(False, flag(), "Print what would be removed and remove nothing.", effect="bit")


@dataclass(frozen=True, kw_only=True)
class SettingFilter(Options):
    """Options that select rows of any probe."""

    model: str | None = option(None, text(), "Only rows of this model.", effect="bit", short="m")
    dataset: str | None = option(None, text(), "Only rows on this data set.", effect="bit", short="d")
    grid: GridName | None = option(None, one_of(GRID_NAMES), "Only rows of this grid: paper or quick.", effect="bit")


@dataclass(frozen=True, kw_only=True)
class RowFilter(Options):
    """Options that select rows of the results; by default all."""

    setting: SettingFilter = SettingFilter()
    probe: str | None = option(None, text(), "Only rows of this probe.", effect="bit")


@dataclass(frozen=True, kw_only=True)
class BestOptions(Options):
    """Options that decide which stored probe is the best."""

    rows: RowFilter = RowFilter()
    by: Literal["val", "test"] = option(
        "val", one_of(("val", "test")), "Score that decides: val (the validation part) or test.", effect="bit"
    )
    max_params: int | None = option(None, whole(0), "Only probes with at most this many parameters.", effect="bit")


@dataclass(frozen=True, kw_only=True)
class ReportOptions(Options):
    """Options for the output of a report, beside the table in the terminal."""

    html: str | None = option(None, path(), "Write one self-contained HTML page to this file.", effect="bit")
    figures: str | None = option(
        None,
        path(),
        "Write every figure (SVG, PNG, CSV) and table (Markdown, LaTeX, CSV) to this folder.",
        effect="bit",
    )
    markdown: str | None = option(None, path(), "Write the tables as Markdown to this file.", effect="bit")
    against: Literal["paper"] | None = option(
        None, one_of(("paper",)), "Compare the scores with published scores; the only choice is paper.", effect="bit"
    )
    cka: bool = option(
        False,
        flag(),
        "Draw the similarity of each layer with the last (linear and RBF CKA), from cached features.",
        effect="bit",
    )
    long: bool = option(
        False, flag(), "Print one table for each model and data set, with parameters and times.", effect="bit"
    )
