"""The report: what a plan's vectors are, beside those of the reference.

Each plan runs in a process of its own over the same texts as the reference. Reports on the
built-in texts lie in the bundle, bound to the artifact by hash, and they alone decide which plans
are faithful enough.
"""

from __future__ import annotations

import functools
import itertools
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lowmem import hardware
from lowmem.artifact import verdict
from lowmem.artifact.manifest import Bundle
from lowmem.artifact.verdict import REPORT_FORMAT, Floor
from lowmem.compute.plan import Plan
from lowmem.data import Row
from lowmem.errors import InputError, LowmemError, reason_of
from lowmem.fidelity import calibration, metrics, neighbours, retrieval, smaller_vectors, sts
from lowmem.fidelity.inputs import Inputs, Progress
from lowmem.fidelity.invariance import invariance
from lowmem.fidelity.neighbours import Neighbours
from lowmem.fidelity.parts import Parts
from lowmem.fidelity.readiness import readiness
from lowmem.fidelity.reference import Reference
from lowmem.fidelity.worst import worst
from lowmem.hardware import Hardware
from lowmem.measure import Measuring, Record

NEIGHBOURS = 10


@dataclass(frozen=True)
class Compared:
    """One plan's report, and what it was made from.

    Attributes:
        report: The object of ``report --json``.
        cosines: Of each text with its reference, float64 ``[texts]``.
        vectors: float32 ``[texts, hidden_size]``.
        nearest: The ten nearest others of each text, by this plan.
    """

    report: dict[str, Any]
    cosines: NDArray[np.float64]
    vectors: NDArray[np.float32]
    nearest: Neighbours


def compare_plans(
    bundle: Bundle,
    plans: Sequence[Plan],
    inputs: Inputs,
    floor: Floor,
    machine: Hardware,
    parts: Parts,
    progress: Progress,
    on_plan: Callable[[Plan, float], None] = lambda plan, seconds: None,
) -> tuple[list[Compared], list[Plan]]:
    """Runs plans over texts and compares their vectors with the reference.

    One that fails does not keep the others from being compared.

    Args:
        bundle: The bundle.
        plans: One for each (variant, engine, device, compute); ``one_of_each`` picks them.
        inputs: What to embed, and the vectors to compare with.
        floor: What sets each report's verdict.
        machine: Where this is.
        parts: Keeps finished parts.
        progress: Opens a progress bar for a plan and its number of texts.
        on_plan: Told each plan that is done, a failed one as it is returned, and the seconds it
            took.

    Returns:
        The plans that were compared, and those that failed, with the error in ``dropped``.

    Raises:
        LowmemError: No plan could be compared; this is the error of the first.
    """
    first_rows = _first_rows(inputs.texts.rows)
    before = neighbours.find(inputs.texts.vectors, NEIGHBOURS, first_rows)
    shared: dict[str, dict[str, Any]] = {}

    def compare(plan: Plan) -> Compared:
        count = sum(len(one.rows) for one in inputs.references)
        texts = inputs.texts
        identities = [_identity(bundle, plan, one, machine) for one in inputs.references]
        with Measuring(bundle, plan) as measuring:
            with progress(plan.report_id, count) as advance:
                ran = [
                    _embed(measuring, one, identity, plan.window_tokens, parts, advance)
                    for one, identity in zip(inputs.references, identities, strict=True)
                ]
            vectors = ran[0][0]
            moved = functools.partial(invariance, measuring, texts.rows, texts.tokens, vectors)
            by_company = parts.value(identities[0], "invariance", moved)
        steered = calibration.steered_by(bundle.variant(plan.variant).recipe)
        if steered not in shared:
            shared[steered] = calibration.statement(bundle, steered, inputs.texts.rows)
        about = {
            "invariance": by_company,
            "machine": machine.words(plan.device),
            "calibration": shared[steered],
        }
        return _compare(bundle, plan, ran, inputs, before, floor, about)

    compared: list[Compared] = []
    failed: list[Plan] = []
    errors: list[LowmemError] = []
    for plan in plans:
        start = time.monotonic()
        try:
            compared.append(compare(plan))
        except LowmemError as error:
            errors.append(error)
            plan = plan.with_(dropped=reason_of(error))
            failed.append(plan)
        on_plan(plan, time.monotonic() - start)
    if errors and not compared:
        raise errors[0]
    return compared, failed


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


def of_texts_alone(one: Compared, floor: Floor) -> Compared:
    """The same without judged collections and pairs: those are the user's, and no bundle's."""
    nonfinite = metrics.nonfinite(one.vectors)
    report = {
        **one.report,
        "retrieval": None,
        "sts": None,
        "nonfinite": nonfinite,
        "verdict": _verdict(one.report["cosine"], nonfinite, floor),
    }
    return replace(one, report={**report, "readiness": readiness(report, floor)})


def agreement(compared: Sequence[Compared]) -> list[dict[str, Any]]:
    """How far each two plans agree: whether one may search what the other has indexed.

    Returns:
        For each pair ``a``, ``b``, ``mean`` and ``p5`` of the cosines of their vectors, and the
        ``overlap`` of their ten nearest texts.
    """
    pairs = []
    for a, b in itertools.combinations(compared, 2):
        figures = metrics.summary(metrics.cosines(a.vectors, b.vectors))
        pairs.append(
            {
                "a": a.report["plan"],
                "b": b.report["plan"],
                "mean": figures["mean"],
                "p5": figures["p5"],
                "overlap": neighbours.overlap(a.nearest, b.nearest, NEIGHBOURS),
            }
        )
    return pairs


def _embed(
    measuring: Measuring,
    reference: Reference,
    identity: Mapping[str, Any],
    first_tokens: int,
    parts: Parts,
    advance: Callable[[int], None],
) -> tuple[NDArray[np.float32], Record]:
    def run(rows: Sequence[Row]) -> tuple[NDArray[np.float32], Record]:
        with tempfile.TemporaryDirectory(prefix="lowmem-") as folder:
            file = Path(folder) / "vectors.npy"
            record = measuring.run(rows, vectors=file)
            return np.load(file, allow_pickle=False), record

    return parts.embed(identity, reference.rows, reference.tokens, first_tokens, run, advance)


def _identity(
    bundle: Bundle, plan: Plan, reference: Reference, machine: Hardware
) -> dict[str, Any]:
    """What decides a plan's vectors and its speed, besides versions and code."""
    return {
        "artifact": bundle.artifact_sha256(plan.variant),
        "plan": plan.id,
        "threads": plan.threads,
        "batch_tokens": plan.batch_tokens,
        "window_tokens": plan.window_tokens,
        "texts": reference.texts_sha256,
        "machine": hardware.fingerprint(machine),
    }


def _compare(
    bundle: Bundle,
    plan: Plan,
    ran: Sequence[tuple[NDArray[np.float32], Record]],
    inputs: Inputs,
    before: Neighbours,
    floor: Floor,
    about: Mapping[str, Any],
) -> Compared:
    (vectors, record), *others = ran
    reference, rest = inputs.texts, iter(others)
    cosines = metrics.cosines(reference.vectors, vectors)
    summary = metrics.summary(cosines)
    nonfinite = sum(metrics.nonfinite(found) for found, _ in ran)
    now = neighbours.find(vectors, NEIGHBOURS, before.first_rows)
    variant = bundle.variant(plan.variant)
    rows = reference.rows
    report = {
        "format": REPORT_FORMAT,
        "plan": plan.report_id,
        "licence": bundle.manifest.licence,
        "artifact_sha256": bundle.artifact_sha256(plan.variant),
        "reference_sha256": reference.sha256,
        "reference_given": reference.given,
        "reference_checked": reference.checked,
        "texts": {
            "name": reference.name,
            "sha256": reference.texts_sha256,
            "count": len(rows),
            "all": reference.all_texts or len(rows),
            "tokens": sum(reference.tokens),
            "truncated": reference.truncated,
        },
        "cosine": summary,
        "buckets": metrics.buckets(
            cosines,
            tokens=reference.tokens,
            languages=[row.lang for row in rows],
            input_types=[row.input_type for row in rows],
            kept=neighbours.kept_shares(before, now, NEIGHBOURS)
            if before.leave_out_some(NEIGHBOURS)
            else None,
        ),
        "overlap": {str(k): neighbours.overlap(before, now, k) for k in (1, NEIGHBOURS)},
        "search": _search(rows, reference.vectors, vectors),
        "spearman": metrics.spearman(reference.vectors, vectors),
        "worst": worst(cosines, rows, reference.tokens, before, now),
        "nonfinite": nonfinite,
        "norm_error": metrics.norm_error(vectors),
        "outputs": smaller_vectors.costs(reference.vectors, before, vectors, NEIGHBOURS),
        "bytes": variant.stored_bytes,
        "bits_per_weight": dict(variant.bits_per_weight),
        "tokens_per_second": record.tokens_per_second,
        "peak_host_bytes": record.peak_host_bytes,
        "peak_device_bytes": record.peak_device_bytes,
        "predicted": {"host_bytes": plan.host_bytes, "device_bytes": plan.device_bytes},
        "versions": record.versions,
        **about,
        "retrieval": _judged(retrieval.judge, inputs.collection, rest),
        "sts": _judged(sts.judge, inputs.pairs, rest),
        "floor": floor.to_json(),
        "verdict": _verdict(summary, nonfinite, floor),
    }
    report["readiness"] = readiness(report, floor)
    return Compared(report, cosines, vectors, now)


def _verdict(cosine: Mapping[str, float], nonfinite: int, floor: Floor) -> str:
    return "pass" if verdict.passes(cosine, nonfinite, floor) else "fail"


def _first_rows(rows: Sequence[Row]) -> NDArray[np.int64]:
    """Where each text stands first, int64 [n]."""
    places: dict[tuple[str, str, str | None], int] = {}
    return np.array(
        [
            places.setdefault((row.text, row.input_type, row.task), place)
            for place, row in enumerate(rows)
        ]
    )


def _judged(
    judge: Callable[[Any, NDArray[np.float32], NDArray[np.float32]], dict[str, Any]],
    judged: tuple[Any, Reference] | None,
    ran: Iterator[tuple[NDArray[np.float32], Record]],
) -> dict[str, Any] | None:
    if judged is None:
        return None
    subject, reference = judged
    vectors, _ = next(ran)
    return judge(subject, reference.vectors, vectors)


def _search(
    rows: Sequence[Row], reference: NDArray[np.float32], vectors: NDArray[np.float32]
) -> dict[str, Any] | None:
    """How many of the documents that each query finds first are still found first."""
    is_query = np.array([row.input_type == "query" for row in rows])
    if not is_query.any() or is_query.all():
        return None
    before, now = (
        neighbours.search(side[is_query], side[~is_query], NEIGHBOURS)
        for side in (reference, vectors)
    )
    return {
        "queries": int(is_query.sum()),
        "documents": int((~is_query).sum()),
        "overlap": neighbours.overlap_of_searches(before, now, int((~is_query).sum())),
    }
