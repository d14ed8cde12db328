"""Models of the Hugging Face hub: finds and downloads their files, and asks the hub about a repository."""

import fnmatch
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlfusion.errors import Unavailable
from mlfusion.models import files
from mlfusion.models.catalogue import EMBEDDED
from mlfusion.models.files import CONFIGURATION, INDEX, WEIGHTS


@dataclass(frozen=True)
class RepositoryInfo:
    """The hub's information about a repository."""

    revision: str  # the commit requested, or the newest
    nbytes: int  # size of a download of configuration and weights
    licence: str | None
    gated: bool


def download(hub_id: str, reference: str, revision: str | None) -> Path:
    """Download a snapshot of configuration and weights, as safetensors if the repository has them → its folder.

    Raises:
        Unavailable: no network, no such repository or commit, a gated one, or one without weights.
    """
    from huggingface_hub import snapshot_download

    def snapshot(*names: str) -> Path:
        with _translate_errors(hub_id, reference, revision):
            return Path(snapshot_download(hub_id, revision=revision, allow_patterns=[*CONFIGURATION, *names]))

    # The configuration tells the names. A repository may hold the weights in four formats: only the first is downloaded.
    folder = snapshot()
    files.refuse_adapter(folder)
    for pattern in (patterns := files.patterns(folder)):
        name = files.choose(_names(snapshot(pattern)), [pattern])
        if name is not None:
            return snapshot(name, *files.shards(folder / name)) if name.endswith(INDEX) else folder
    raise Unavailable(
        f"the weights of {reference} are not on this machine, and the hub gave none ({', '.join(patterns)}); connect and "
        "try again, or give another --model"
    )


def find_local(hub_id: str, revision: str | None) -> Path | None:
    """The folder of a complete snapshot on this machine, if there is one; the network is not used."""
    from huggingface_hub import errors, snapshot_download

    try:
        folder = Path(snapshot_download(hub_id, revision=revision, local_files_only=True))
    except (errors.LocalEntryNotFoundError, errors.HFValidationError):
        return None
    names = set(_names(folder))
    return folder if files.candidates(names, files.patterns(folder)) and names & set(CONFIGURATION) else None


def fetch_info(hub_id: str, reference: str, revision: str | None) -> RepositoryInfo:
    """Ask the hub about a repository, and check that you may read it.

    Raises:
        Unavailable: no network, no such repository or commit, or a gated one that you may not read.
    """
    from huggingface_hub import HfApi

    with _translate_errors(hub_id, reference, revision):
        info = HfApi().model_info(hub_id, revision=revision, files_metadata=True, timeout=10)
        if info.gated:
            HfApi().auth_check(hub_id)
    sizes = {file.rfilename: file.size or 0 for file in info.siblings or []}
    names = [name for name in sizes if "/" not in name]
    weights = files.candidates(names, WEIGHTS["open_clip" if "config.json" not in names else "transformers"])
    # What an index names is known after its download; by convention it is model-00001-of-00002.safetensors and so on.
    for stem, _, suffix in [name.removesuffix(INDEX).rpartition(".") for name in weights if name.endswith(INDEX)]:
        weights = [*weights, *fnmatch.filter(names, f"{stem}-*-of-*.{suffix}")]
    licence = info.card_data.get("license") if info.card_data else None
    return RepositoryInfo(
        revision=info.sha or "",
        nbytes=sum(sizes[name] for name in set(names) & {*weights, *CONFIGURATION}),
        licence=licence if isinstance(licence, str) else None,
        gated=bool(info.gated),
    )


def _names(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir()]


def logged_in() -> bool:
    """Whether this machine has a token for the hub; the token is not shown or sent."""
    from huggingface_hub import get_token

    return get_token() is not None


def offline() -> bool:
    """Whether access to the hub is switched off (HF_HUB_OFFLINE)."""
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


def cache_folder() -> Path:
    """The folder of the snapshots."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


@contextmanager
def _translate_errors(hub_id: str, reference: str, revision: str | None) -> Iterator[None]:
    """Translate the errors of the hub and of the network to `Unavailable`, inside the with statement."""
    from huggingface_hub import errors

    # The error that the hub's client raises without a network belongs to its HTTP library, which depends on its version.
    http: Any = next(base for base in errors.HfHubHTTPError.__mro__ if base.__name__ == "HTTPError")
    try:
        yield
    except errors.RevisionNotFoundError as err:
        raise Unavailable(
            f"{hub_id} has no commit {revision} any more; give {hub_id} with --model for its newest state"
        ) from err
    except errors.GatedRepoError as err:
        raise Unavailable(
            f"{hub_id} is gated: ask for access at https://huggingface.co/{hub_id}, then run `hf auth login`"
        ) from err
    except (errors.RepositoryNotFoundError, errors.HFValidationError) as err:
        raise Unavailable(
            f"the hub has no model {hub_id!r} that you may read; look at `mlfusion ls models`, or log in with "
            "`hf auth login`"
        ) from err
    except (errors.LocalEntryNotFoundError, http, ConnectionError, TimeoutError, OSError) as err:
        raise Unavailable(
            f"{reference} is not on this machine and the hub cannot be reached ({type(err).__name__}); connect, or give a "
            f"folder with --model, or try the embedded model: --model {EMBEDDED}"
        ) from err
