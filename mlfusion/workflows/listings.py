"""Lists the available choices: models and data sets of the catalogues, probes, token kinds and hook points."""

from collections.abc import Iterator
from typing import Any

from mlfusion.errors import UnknownName
from mlfusion.specs.identity import ABOUT_HOOKS, ABOUT_KINDS
from mlfusion.specs.names import ABOUT_HEADS, ALIASES, ALL_LAYERS, BASELINE, HEAD_NAMES, STUDY, STUDY_HEADS


def listing(what: str) -> list[dict[str, Any]]:
    """The rows of one list: 'models', 'datasets', 'probes', 'tokens' or 'hooks'.

    Raises:
        UnknownName: there is no such list.
    """
    if what not in LISTINGS:
        raise UnknownName("listing", what, LISTINGS)
    return list(LISTINGS[what]())


def _models() -> Iterator[dict[str, Any]]:
    from mlfusion.models import CATALOGUE

    for row in CATALOGUE.values():
        yield {
            "name": row.name,
            "family": row.family,
            "layers": row.depth,
            "width": row.width,
            "pixels": row.image_px,
            "patch": row.patch_px,
            "licence": row.licence,
            "gated": "gated" if row.gated else "",
            "source": row.source,
            "revision": row.revision or "",
            "about": f"the study's; {row.about}" if row.study else row.about,
        }


def _datasets() -> Iterator[dict[str, Any]]:
    from mlfusion.datasets import CATALOGUE

    for row in CATALOGUE.values():
        yield {
            "name": row.name,
            "train_images": row.train_images,
            "test_images": row.test_images,
            "classes": row.classes,
            "domain": row.domain,
            "terms": row.terms,
            "source": row.source,
        }


def _probes() -> Iterator[dict[str, Any]]:
    known = {name: alias.upper() for alias, name in ALIASES.items()} | {BASELINE: "the baseline"}
    for name in STUDY:
        yield {"name": name, "known_as": known.get(name, "")}
    for name in ("cls-each-layer/linear", "ap-each-layer/linear"):
        yield {"name": name, "known_as": "one probe a layer"}
    yield {"name": "cls+ap-3-layers/linear", "known_as": "any number of evenly spaced layers"}
    yield {"name": "cls+ap-layers-6,9,12/linear", "known_as": "any layers by number, as 1-4,12"}
    yield {"name": "grid4-last/attentive", "known_as": "any kinds of mlfusion ls tokens, joined by +"}
    for head in HEAD_NAMES:
        if head not in STUDY_HEADS:
            yield {"name": f"{ALL_LAYERS}/{head}", "known_as": f"{head} for short: {ABOUT_HEADS[head]}"}


def _tokens() -> Iterator[dict[str, Any]]:
    yield from ({"name": name, "about": about} for name, about in ABOUT_KINDS.items())


def _hooks() -> Iterator[dict[str, Any]]:
    yield from ({"name": name, "about": about} for name, about in ABOUT_HOOKS.items())


LISTINGS = {"models": _models, "datasets": _datasets, "probes": _probes, "tokens": _tokens, "hooks": _hooks}
