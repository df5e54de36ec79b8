"""Vectors of many texts, a part at a time, so that a pass that was ended goes on where it was.

Finished parts lie in the user's cache until the report that asked for them is complete. They are
found by everything that decides a vector or its speed: artifact, plan, texts, machine, versions
and the code itself.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import shutil
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import cache as remembered
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import lowmem
from lowmem import cache
from lowmem.artifact import strict_json
from lowmem.data import Row
from lowmem.measure import Record, package_versions

logger = logging.getLogger(__name__)

Vectors = NDArray[np.float32]
Run = Callable[[Sequence[Row]], tuple[Vectors, Record]]
PART_SECONDS = 120.0
"""A part is made to take about this long: the most that is lost, and enough to hide loading."""


class Parts:
    """The finished parts of one report."""

    def __init__(self) -> None:
        """Starts with what earlier, unfinished reports have left."""
        self._folders: set[Path] = set()

    def embed(
        self,
        identity: Mapping[str, Any],
        rows: Sequence[Row],
        tokens: Sequence[int],
        first_tokens: int,
        run: Run,
        on_texts: Callable[[int], None] = lambda texts: None,
    ) -> tuple[Vectors, Record]:
        """Vectors of the texts, those of finished parts from the cache.

        The longest texts go first: what does not fit into memory shows at once.

        Args:
            identity: What decides the vectors besides versions and code.
            rows: The texts.
            tokens: Length of each.
            first_tokens: Least tokens of a part; the speed of the first decides the others.
            run: Embeds some of the texts.
            on_texts: Told how many texts have just been finished.

        Returns:
            float32 [texts, d] in the order of ``rows``, and all parts in one record.
        """
        folder = self._folder(identity)
        order = sorted(range(len(rows)), key=lambda place: -tokens[place])
        vectors: Vectors | None = None
        records: list[Record] = []
        wanted, start = first_tokens, 0
        while start < len(order):
            file = folder / f"{start}.npz"
            part = _read(file)
            if part is None:
                stop = _end(order, tokens, start, wanted)
                part = run([rows[place] for place in order[start:stop]])
                _write(file, *part)
            found, record = part
            if vectors is None:
                vectors = np.empty((len(rows), found.shape[1]), np.float32)
            vectors[order[start : start + len(found)]] = found
            start += len(found)
            records.append(record)
            wanted = max(first_tokens, int(PART_SECONDS * record.tokens_per_second))
            on_texts(len(found))
        assert vectors is not None
        return vectors, _together(records)

    def value(self, identity: Mapping[str, Any], name: str, make: Callable[[], Any]) -> Any:
        """A JSON value that goes with a pass, from the cache or made now.

        Args:
            identity: As in :meth:`embed`.
            name: What the value is called.
            make: Gives it.
        """
        file = self._folder(identity) / f"{name}.json"
        try:
            return json.loads(file.read_bytes())
        except (OSError, ValueError):
            made = make()
        _keep(file, json.dumps(made).encode())
        return made

    def _folder(self, identity: Mapping[str, Any]) -> Path:
        folder = cache.directory() / "parts" / cache_key(identity)
        self._folders.add(folder)
        return folder

    def forget(self) -> None:
        """Removes the parts: the report they were kept for is complete."""
        for folder in self._folders:
            shutil.rmtree(folder, ignore_errors=True)


def cache_key(identity: Mapping[str, Any]) -> str:
    """Name in the cache of what an identity, the packages and this code have made."""
    content = {**identity, "versions": package_versions(), "code": _code_sha256()}
    return hashlib.sha256(strict_json.canonical(content)).hexdigest()[:32]


@remembered
def _code_sha256() -> str:
    """Of this package's modules: an edited kernel must not meet the vectors of the old one."""
    digest = hashlib.sha256()
    for path in sorted(Path(lowmem.__path__[0]).rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _end(order: Sequence[int], tokens: Sequence[int], start: int, wanted: int) -> int:
    """Where a part ends that begins at ``start`` and is to have about so many tokens."""
    stop, total = start, 0
    while stop < len(order) and (stop == start or total + tokens[order[stop]] <= wanted):
        total += tokens[order[stop]]
        stop += 1
    return stop


def _read(file: Path) -> tuple[Vectors, Record] | None:
    try:
        with file.open("rb") as opened, np.load(opened, allow_pickle=False) as stored:
            vectors: Vectors = stored["vectors"]
            return vectors, Record(**json.loads(stored["record"].tobytes()))
    except OSError:
        return None
    except (ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as error:
        logger.warning("%s is damaged and is made anew: %s", file, error)
        return None


def _write(file: Path, vectors: Vectors, record: Record) -> None:
    buffer = io.BytesIO()
    about = np.frombuffer(json.dumps(asdict(record)).encode(), np.uint8)
    np.savez(buffer, vectors=vectors, record=about)
    _keep(file, buffer.getvalue())


def _keep(file: Path, content: bytes) -> None:
    try:
        file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with cache.replacing(file) as opened:
            opened.write(content)
    except OSError as error:  # a cache that cannot be written only costs the time of the next pass
        logger.warning("parts cannot be kept in %s: %s", file.parent, error.strerror)


def _together(records: Sequence[Record]) -> Record:
    return Record(
        texts=sum(record.texts for record in records),
        tokens=sum(record.tokens for record in records),
        load_seconds=max(record.load_seconds for record in records),
        seconds=[sum(sum(record.seconds) for record in records)],
        waited_seconds=sum(record.waited_seconds for record in records),
        token_pairs=sum(record.token_pairs for record in records),
        peak_host_bytes=max(record.peak_host_bytes for record in records),
        peak_device_bytes=max(record.peak_device_bytes for record in records),
        versions=records[-1].versions,
    )
