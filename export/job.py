"""The variants that an export has to write, and what of them a killed one has left.

Only the weights are ever kept: all other files of a variant are small and are written again.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from torch import get_num_threads

from export.identity import SourceIdentity
from export.journal import Finished
from export.layout import Layout
from export.sources import Source
from export.writer import holds
from lowmem.artifact import strict_json
from lowmem.artifact.contract import Contract
from lowmem.artifact.formats import Format
from lowmem.artifact.tensors import SINGLE_FILE
from lowmem.hardware import probe
from lowmem.progress import Progress


@dataclass(frozen=True)
class Job:
    """One variant to be written."""

    name: str
    recipe: Mapping[str, Any]
    formats: Mapping[str, Format]
    layout: Layout | None  # None where the source's own files are linked

    @property
    def is_calibrated(self) -> bool:
        """Whether texts decide its codes, and not the weights alone."""
        return str(self.recipe.get("calibration", "none")) != "none"

    @property
    def file(self) -> str:
        """The file that is written by its layout, as a path in the workspace."""
        return f"{self.name}/{SINGLE_FILE}"


def work_digest(
    identity: SourceIdentity, contract: Contract, jobs: Sequence[Job], *, copy: bool, device: str
) -> str:
    """Digest of all that decides the bytes of the weights."""
    variants = {
        job.name: {
            "recipe": dict(job.recipe),
            "header": hashlib.sha256(job.layout.header).hexdigest() if job.layout else None,
        }
        for job in jobs
    }
    work: dict[str, Any] = {
        "versions": {name: version(name) for name in ("lowmem", "numpy", "torch")},
        "gguf": version("gguf") if find_spec("gguf") is not None else None,
        "source": identity.sha256,
        "contract": contract.to_json(),
        "variants": variants,
        "copy": copy,
        "device": device,
    }
    if any(job.is_calibrated for job in jobs):
        # Sums depend on the processor's kind, and on how many threads share them.
        machine = probe()
        work["processor"] = [machine.cpu_name, *machine.cpu_features, get_num_threads()]
        work["cards"] = [gpu.name for gpu in machine.gpus] if device != "cpu" else []
    return hashlib.sha256(strict_json.canonical(work)).hexdigest()


def kept_files(
    finished: Finished,
    jobs: Sequence[Job],
    source: Source,
    partial: Path,
    progress: Progress,
) -> list[str]:
    """The files that a killed export has begun; none of them if one byte is not as journaled."""
    layouts = {job.file: job.layout for job in jobs if job.layout is not None}
    shards = {
        f"{job.name}/{shard.name}": shard.stat().st_size
        for job in jobs
        if job.layout is None
        for shard in source.shards or ()
    }
    written = by_file(finished)
    for done, (file, checksums) in enumerate(written.items()):
        progress("checking what a killed export has left", done, len(written))
        path = partial / file
        if file in layouts:
            sound = holds(path, layouts[file], checksums)
        else:  # its bytes are compared with the source's in the end
            sound = path.is_file() and path.stat().st_size == shards.get(file)
        if not sound or path.is_symlink() or path.parent.is_symlink():
            return []
    return list(written)


def by_file(finished: Finished) -> dict[str, dict[str, int]]:
    """All checksums of each file, whatever step they come from."""
    written: dict[str, dict[str, int]] = {}
    for files in finished.values():
        for file, checksums in files.items():
            written.setdefault(file, {}).update(checksums)
    return written
