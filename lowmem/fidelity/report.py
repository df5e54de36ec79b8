"""The report: what a plan's vectors are, beside those of the reference.

Each plan runs in a process of its own over the same texts as the reference. Reports on the
built-in texts lie in the bundle, bound to the artifact by hash, and they alone decide which plans
are faithful enough.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lowmem import cache
from lowmem.artifact import strict_json, verdict
from lowmem.artifact.manifest import Bundle
from lowmem.artifact.verdict import Floor
from lowmem.compute.plan import Plan
from lowmem.errors import InputError
from lowmem.fidelity import metrics, neighbours
from lowmem.fidelity.reference import Reference
from lowmem.measure import Record, measure

logger = logging.getLogger(__name__)

FORMAT = 1
_NEIGHBOURS = (1, 10)


@dataclass(frozen=True)
class Compared:
    """One plan's report, and what it was made from.

    Attributes:
        report: The object of ``report --json``.
        cosines: Of each text with its reference, float64 ``[texts]``.
        vectors: float32 ``[texts, hidden_size]``.
    """

    report: dict[str, Any]
    cosines: NDArray[np.float64]
    vectors: NDArray[np.float32]


def compare_plans(
    bundle: Bundle,
    plans: Sequence[Plan],
    reference: Reference,
    floor: Floor,
    on_plan: Callable[[Plan], None] = lambda plan: None,
) -> list[Compared]:
    """Runs plans over the reference's texts and compares their vectors with it.

    Args:
        bundle: The bundle.
        plans: One for each (variant, engine, device, compute); ``one_of_each`` picks them.
        reference: Texts and the vectors to compare with.
        floor: What sets each report's verdict.
        on_plan: Told each plan before it runs.

    Raises:
        LowmemError: A plan cannot be run.
    """
    compared = []
    for plan in plans:
        on_plan(plan)
        with tempfile.TemporaryDirectory(prefix="lowmem-") as folder:
            file = Path(folder) / "vectors.npy"
            record = measure(bundle.path, plan, reference.rows, vectors=file)
            vectors: NDArray[np.float32] = np.load(file, allow_pickle=False)
        compared.append(_compare(bundle, plan, record, vectors, reference, floor))
    return compared


def one_of_each(plans: Sequence[Plan]) -> list[Plan]:
    """The plans to report on: of those that differ in schedule alone the first that runs.

    Raises:
        InputError: None of the plans can run.
    """
    chosen: dict[str, Plan] = {}
    for plan in plans:
        if plan.dropped is None:
            chosen.setdefault(plan.report_id, plan)
    if not chosen:
        reasons = "; ".join(f"{plan.id}: {plan.dropped}" for plan in plans[:8])
        raise InputError(f"none of the plans asked for can run here: {reasons}")
    return list(chosen.values())


def store(bundle: Bundle, compared: Sequence[Compared], pages: Mapping[str, str]) -> None:
    """Puts reports into the bundle; a read-only bundle is left as it is.

    Args:
        bundle: The bundle.
        compared: Reports on its own reference texts: no others may lie there.
        pages: Plan to its HTML page, as far as pages were made.
    """
    folder = bundle.path / "reports"
    try:
        folder.mkdir(exist_ok=True)
        for one in compared:
            plan = one.report["plan"]
            files = {f"{plan}.json": strict_json.dumps(one.report)}
            if plan in pages:
                files[f"{plan}.html"] = pages[plan]
            for name, text in files.items():
                with cache.replacing(folder / name) as file:
                    file.write(text.encode())
    except OSError as error:
        logger.warning("reports are not stored: %s cannot be written (%s)", folder, error.strerror)


def dump(directory: Path, compared: Sequence[Compared], reference: Reference) -> None:
    """Writes the texts, the reference's vectors and each plan's, as ``report --dump`` does.

    Raises:
        InputError: The directory cannot be written.
    """
    lines = [
        strict_json.canonical(
            {"id": row.id, "text": row.text, "input_type": row.input_type, "task": row.task}
        )
        for row in reference.rows
    ]
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with cache.replacing(directory / "texts.jsonl") as file:
            file.write(b"\n".join(lines) + b"\n")
        arrays = {"reference": reference.vectors}
        arrays |= {str(one.report["plan"]): one.vectors for one in compared}
        for name, vectors in arrays.items():
            with cache.replacing(directory / f"{name}.npy") as file:
                np.save(file, vectors)
    except OSError as error:
        raise InputError(f"{directory} cannot be written: {error.strerror}") from error


def _compare(
    bundle: Bundle,
    plan: Plan,
    record: Record,
    vectors: NDArray[np.float32],
    reference: Reference,
    floor: Floor,
) -> Compared:
    cosines = metrics.cosines(reference.vectors, vectors)
    summary = metrics.summary(cosines)
    nonfinite = metrics.nonfinite(vectors)
    before, now = (neighbours.find(side, max(_NEIGHBOURS)) for side in (reference.vectors, vectors))
    variant = bundle.variant(plan.variant)
    rows = reference.rows
    report = {
        "format": FORMAT,
        "plan": plan.report_id,
        "licence": bundle.manifest.licence,
        "artifact_sha256": bundle.manifest.artifact_sha256(plan.variant),
        "reference_sha256": reference.sha256,
        "texts": {
            "name": reference.name,
            "sha256": reference.texts_sha256,
            "count": len(rows),
            "tokens": sum(reference.tokens),
            "truncated": reference.truncated,
        },
        "cosine": summary,
        "buckets": metrics.buckets(
            cosines,
            tokens=reference.tokens,
            languages=[row.lang for row in rows],
            input_types=[row.input_type for row in rows],
        ),
        "overlap": {str(k): neighbours.overlap(before, now, k) for k in _NEIGHBOURS},
        "spearman": metrics.spearman(reference.vectors, vectors),
        "worst": metrics.worst(cosines, [row.id for row in rows]),
        "nonfinite": nonfinite,
        "norm_error": metrics.norm_error(vectors),
        "bytes": variant.stored_bytes,
        "bits_per_weight": dict(variant.bits_per_weight),
        "tokens_per_second": record.tokens_per_second,
        "peak_host_bytes": record.peak_host_bytes,
        "peak_device_bytes": record.peak_device_bytes,
        "predicted": {"host_bytes": plan.host_bytes, "device_bytes": plan.device_bytes},
        "versions": record.versions,
        "retrieval": None,
        "sts": None,
        "floor": floor.to_json(),
        "verdict": "pass" if verdict.passes(summary, nonfinite, floor) else "fail",
    }
    return Compared(report, cosines, vectors)
