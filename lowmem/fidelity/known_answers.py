"""The scores that a model's card prints, beside those of a plan.

Fidelity compares a plan with this project's own reference, which would follow a wrong input
contract just as well. The card's scores come from the model's authors: a wrong template, a lost
EOS, another pooling or attention shows here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lowmem import data
from lowmem.artifact import strict_json
from lowmem.artifact.verdict import Floor
from lowmem.compute.plan import Plan
from lowmem.embedder import Embedder
from lowmem.errors import BundleError

# Hundredfold scores, by how the card made its own: for a plan in fp32 and for one in 16 bits.
# Scores in fp32 repeat to 1e-4, so 0.05 leaves room for other orders of sums; 16 bits should move
# them by 0.1 at most. A card that computed in 16 bits itself brings that error, and in GritLM's
# case the rounding to three decimals, 0.05, to every comparison.
_TOLERANCES: Mapping[str, tuple[float, float]] = {
    "fp32": (0.05, 0.2),
    "bf16": (0.2, 0.3),
    "autocast": (0.2, 0.3),
}


@dataclass(frozen=True)
class KnownAnswers:
    """Texts, and the scores that their authors found.

    Attributes:
        source: Address of the page that prints them.
        task: Instruction of the queries.
        queries: Bare texts.
        documents: Bare texts.
        scores: 100 x cosine, ``[queries][documents]``, or None where the page prints none.
        arithmetic: What they were computed in, ``fp32``, ``bf16`` or ``autocast``; None without
            scores.
    """

    source: str
    task: str
    queries: tuple[str, ...]
    documents: tuple[str, ...]
    scores: tuple[tuple[float, ...], ...] | None
    arithmetic: str | None


@dataclass(frozen=True)
class Tolerance:
    """How far a hundredfold score may be off, and why so far."""

    value: float
    reason: str


@dataclass(frozen=True)
class Comparison:
    """Printed scores and a plan's.

    Attributes:
        printed: 100 x cosine, float64 ``[queries, documents]``.
        found: The plan's, likewise.
        tolerance: How far apart they may be.
    """

    printed: NDArray[np.float64]
    found: NDArray[np.float64]
    tolerance: Tolerance

    @property
    def worst(self) -> tuple[int, int]:
        """Query and document whose scores are furthest apart, counted from 0."""
        query, document = divmod(
            int(np.argmax(np.abs(self.found - self.printed))), self.printed.shape[1]
        )
        return query, document

    @property
    def agrees(self) -> bool:
        """Whether every score is within the tolerance."""
        return bool((np.abs(self.found - self.printed) <= self.tolerance.value).all())


def built_in() -> dict[str, KnownAnswers]:
    """Known answers by the short name of their model."""
    table = data.load_json("known_answers.json")
    return {
        name: parse_answers(value, f"known_answers.json, {name}") for name, value in table.items()
    }


def read_answers(path: Path) -> KnownAnswers:
    """Reads answers from a JSON file, an object with the fields of ``KnownAnswers``.

    Raises:
        BundleError: The file is missing, is not JSON, or breaks a rule.
    """
    return parse_answers(strict_json.read_object(path), str(path))


def parse_answers(value: Mapping[str, Any], place: str) -> KnownAnswers:
    """Reads answers from their JSON object.

    Raises:
        BundleError: A key is missing, unknown, or holds a value outside its rule; all problems
            are listed at once.
    """
    known = {item.name for item in fields(KnownAnswers)}
    problems = [f"unknown key {key!r}" for key in sorted(set(value) - known)]
    problems += [f"missing key {key!r}" for key in sorted(known - set(value))]
    if not problems:
        problems = _problems(value)
    if problems:
        raise BundleError(f"the known answers in {place} are not valid: " + "; ".join(problems))
    scores = value["scores"]
    return KnownAnswers(
        value["source"],
        value["task"],
        tuple(value["queries"]),
        tuple(value["documents"]),
        None if scores is None else tuple(tuple(row) for row in scores),
        value["arithmetic"],
    )


def tolerance(arithmetic: str, plan: Plan, floor: Floor, hidden_size: int) -> Tolerance:
    """How far a plan's hundredfold scores may be from printed ones.

    Where weights or activations are quantized, a vector as near to its reference as the floor's
    mean cosine c is q' = c q + sqrt(1 - c^2) u with u orthogonal to q. A score q'd' then differs
    from qd by at most 1 - c^2 through the factors c^2 and through errors that q and d have in
    common, and by sqrt(1 - c^2) (ud + qv) through their own; of directions without preference in
    n dimensions these have a standard deviation of at most 1 / sqrt(n) each, and three of
    sqrt(2 / n) are allowed.
    """
    exact, sixteen_bits = _TOLERANCES[arithmetic]
    if plan.variant == "fp16" and plan.compute == "fp32":
        return Tolerance(exact, f"fp32 over 16-bit weights, printed from {arithmetic}")
    if plan.variant == "fp16" and plan.compute in ("bf16", "fp16"):
        return Tolerance(sixteen_bits, f"{plan.compute}, printed from {arithmetic}")
    moved = 1 - floor.mean**2
    allowed = 100 * (moved + 3 * math.sqrt(2 * moved / hidden_size))
    return Tolerance(
        sixteen_bits + allowed,
        f"quantized: {sixteen_bits}, and what a mean cosine of {floor.mean}, the floor "
        f"{floor.name}, moves a score by",
    )


def compare(model: Embedder, answers: KnownAnswers, floor: Floor) -> Comparison:
    """Embeds the texts through a loaded plan and compares the scores.

    Args:
        model: The loaded plan; its contract makes prompts and ids.
        answers: With scores.
        floor: Sets the tolerance of quantized plans.

    Raises:
        InputError: A text is longer than the contract allows.
        BackendError: A vector is not finite.
    """
    assert answers.scores is not None
    assert answers.arithmetic is not None
    queries = model.encode_query(list(answers.queries), task=answers.task)
    documents = model.encode_document(list(answers.documents))
    found = 100 * model.similarity(queries, documents).astype(np.float64)
    allowed = tolerance(answers.arithmetic, model.plan, floor, queries.shape[1])
    return Comparison(np.array(answers.scores, np.float64), found, allowed)


def _problems(value: Mapping[str, Any]) -> list[str]:
    problems = [
        f"{key} must be a string, got {strict_json.type_name(value[key])}"
        for key in ("source", "task")
        if not isinstance(value[key], str)
    ]
    for key in ("queries", "documents"):
        texts = value[key]
        if not isinstance(texts, list) or not texts or not all(isinstance(t, str) for t in texts):
            problems.append(f"{key} must be a list of texts")
    scores, arithmetic = value["scores"], value["arithmetic"]
    if scores is None:
        if arithmetic is not None:
            problems.append("arithmetic must be null without scores")
        return problems
    if arithmetic not in list(_TOLERANCES):
        problems.append(f"arithmetic must be one of {', '.join(_TOLERANCES)}, got {arithmetic!r}")
    if not problems and not _is_matrix(scores, len(value["queries"]), len(value["documents"])):
        problems.append("scores must hold a number from -100 to 100 for each query and document")
    return problems


def _is_matrix(value: Any, rows: int, columns: int) -> bool:
    return (
        isinstance(value, list)
        and len(value) == rows
        and all(isinstance(row, list) and len(row) == columns for row in value)
        and all(
            strict_json.is_number(score) and abs(score) <= 100 for row in value for score in row
        )
    )
