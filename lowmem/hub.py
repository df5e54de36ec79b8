"""Models on the Hugging Face hub: their ids, what they hold, and their files.

Files come through huggingface_hub into its own cache, so that a model which another tool has
downloaded is there already. Of that package only what its versions 0.25 to 1.x have in common is
used. They raise the errors of the HTTP library beneath, requests or httpx; none of them leaves
this module.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from lowmem import disk
from lowmem.errors import BackendError, CapacityError, InputError, LowmemError

logger = logging.getLogger(__name__)

_ID = re.compile(r"([A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9][A-Za-z0-9._-]*)(?:@(.+))?")
_ATTEMPTS = 3


@dataclass(frozen=True)
class HubModel:
    """A model's place on the hub.

    Attributes:
        name: ``ORG/NAME``.
        revision: A branch, a tag or a commit.
    """

    name: str
    revision: str = "main"

    def __str__(self) -> str:
        """As it is written: ``ORG/NAME``, or ``ORG/NAME@REVISION``."""
        return self.name if self.revision == "main" else f"{self.name}@{self.revision}"


@dataclass(frozen=True)
class Listing:
    """What a model holds at one revision.

    Attributes:
        commit: The revision's commit, 40 hex digits.
        sizes: File to its size in bytes, or to None where the hub does not say.
        blobs: File to the name of its content in the cache, of those that Git LFS keeps.
    """

    commit: str
    sizes: Mapping[str, int | None]
    blobs: Mapping[str, str]


def parse_id(text: str) -> HubModel | None:
    """Reads ``ORG/NAME`` or ``ORG/NAME@REVISION``; None for what cannot be one of these."""
    found = _ID.fullmatch(text)
    if found is None or text.endswith(".gguf"):
        return None
    return HubModel(found[1], found[2] or "main")


def listing(model: HubModel) -> Listing:
    """Asks the hub which files a model has; none is downloaded.

    Raises:
        InputError: There is no such model or revision, or this user may not have it.
        BackendError: The hub cannot be reached or does not answer.
    """
    from huggingface_hub import HfApi

    try:
        info = HfApi(endpoint=_endpoint()).model_info(
            model.name, revision=model.revision, files_metadata=True
        )
    except _errors() as error:
        raise _explained(error, model) from error
    if info.sha is None:
        raise BackendError(f"{_endpoint()} does not name the commit of {model}")
    files = info.siblings or ()
    return Listing(
        info.sha,
        {file.rfilename: file.size for file in files},
        {file.rfilename: file.lfs.sha256 for file in files if file.lfs is not None},
    )


def fetch(model: HubModel, file: str) -> Path:
    """Downloads one file, unless it is there.

    Where the connection breaks it is taken up again from there, a few times.

    Returns:
        Its path in the hub's cache: a link, in one directory with the other files of its commit.

    Raises:
        InputError: There is no such file, model or revision, this user may not have it, or the
            cache cannot be written.
        CapacityError: The disk is full.
        BackendError: The hub cannot be reached, or the connection broke again and again.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError

    for attempt in range(1, _ATTEMPTS + 1):
        try:
            path = hf_hub_download(model.name, file, revision=model.revision, endpoint=_endpoint())
            return Path(path)
        except _errors() as error:
            answered = isinstance(error, HfHubHTTPError) or not isinstance(error, _http_error())
            if answered or attempt == _ATTEMPTS:
                raise _explained(error, model, file) from error
            logger.warning("the connection broke and is tried again (%s of %s)", file, model)
    raise AssertionError("the last attempt returns or raises")


def check_room(model: HubModel, listing: Listing, files: Iterable[str]) -> None:
    """Checks that files of a model which are not in the cache yet would fit there.

    What has not changed since another commit is there, and is linked.

    Args:
        model: At a commit.
        listing: What it holds there.
        files: Those of it that are wanted.

    Raises:
        CapacityError: The disk has not enough room.
    """
    from huggingface_hub import constants, try_to_load_from_cache

    cache = Path(constants.HF_HUB_CACHE)
    blobs = cache / f"models--{model.name.replace('/', '--')}" / "blobs"

    def is_there(file: str) -> bool:
        found = try_to_load_from_cache(model.name, file, revision=model.revision)
        blob = listing.blobs.get(file)
        return isinstance(found, str) or (blob is not None and (blobs / blob).is_file())

    needed = sum(listing.sizes[file] or 0 for file in files if not is_there(file))
    disk.check_room(
        cache, needed, f"downloading {model.name}", "set HF_HOME to a directory on another disk"
    )


def _endpoint() -> str:
    """Where the hub is; read anew, since huggingface_hub reads it when it is imported."""
    from huggingface_hub import constants

    return (os.environ.get("HF_ENDPOINT") or constants.ENDPOINT).rstrip("/")


def _http_error() -> type[BaseException]:
    """The root of the HTTP library's errors: that of requests under 0.x, of httpx under 1.x."""
    from huggingface_hub.errors import HfHubHTTPError

    classes = HfHubHTTPError.__mro__
    root: type[BaseException] = [one for one in classes if one.__module__ != "builtins"][-1]
    return root


def _errors() -> tuple[type[BaseException], ...]:
    """Everything that huggingface_hub raises where a download goes wrong."""
    from huggingface_hub.errors import EntryNotFoundError, HFValidationError

    # RuntimeError is what hf_xet, the hub's own transport, raises for whatever befalls it.
    return (OSError, _http_error(), EntryNotFoundError, HFValidationError, RuntimeError)


def _explained(error: BaseException, model: HubModel, file: str | None = None) -> LowmemError:
    """The error in one sentence, with the way out."""
    from huggingface_hub import constants, errors

    found = not isinstance(error, errors.LocalEntryNotFoundError)
    if not found and error.__cause__ is not None:
        error = error.__cause__
    page = f"{_endpoint()}/{model.name}"
    if isinstance(error, errors.HFValidationError):
        return InputError(f"a hub id must be ORG/NAME or ORG/NAME@REVISION, got {str(model)!r}")
    if isinstance(error, errors.GatedRepoError):
        return InputError(
            f"{model.name} is given only to users who have agreed to its terms: agree at {page}, "
            "then log in with `hf auth login` or set HF_TOKEN"
        )
    if isinstance(error, errors.RepositoryNotFoundError):
        return InputError(
            f"there is neither a directory {model} nor a model {page} for this user: check the "
            "name; for a private model, log in with `hf auth login` or set HF_TOKEN"
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return InputError(
            f"{model.name} has no revision {model.revision!r}: {page}/commits/main lists them"
        )
    if isinstance(error, errors.EntryNotFoundError) and found:
        return InputError(f"{model} has no {file}: it is no model that transformers can load")
    if isinstance(error, errors.HfHubHTTPError):
        status = getattr(error.response, "status_code", None)
        if status in (401, 403):
            return InputError(
                f"{_endpoint()} refuses {model} (HTTP status {status}): log in with "
                "`hf auth login`, or set HF_TOKEN to a token that may read it"
            )
        return BackendError(
            f"{_endpoint()} answers with HTTP status {status} for {model}: try again later"
        )
    number = getattr(error, "errno", None)
    if number in disk.DISK_FULL:
        return CapacityError(
            f"the disk is full: {file} of {model.name} could not be downloaded to "
            f"{constants.HF_HUB_CACHE}; make room, or set HF_HOME to a directory on another disk"
        )
    if number is not None and getattr(error, "filename", None) is not None:
        return InputError(
            f"the hub's cache {constants.HF_HUB_CACHE} cannot be written "
            f"({os.strerror(number)}): set HF_HOME to another directory"
        )
    if file is not None and found:
        return BackendError(
            f"{file} of {model} could not be downloaded ({_reason(error)}): run the command "
            "again, which keeps the files that are there"
        )
    return BackendError(
        f"{_endpoint()} cannot be reached ({_reason(error)}): without it, give the directory "
        f"that {model} lies in"
    )


def _reason(error: BaseException) -> str:
    """The words of the error beneath all others, which says what failed and not who met it."""
    while beneath := error.__cause__ or error.__context__:
        error = beneath
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:200].rstrip(".")
