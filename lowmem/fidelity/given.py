"""Reference vectors that someone else computed: a 16-bit run on a machine that holds the model.

That they belong to these texts cannot be proven, so what can be seen is checked: shape, NaN,
length, and a few texts beside the reference of this project, where the bundle can compute it.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from lowmem.data import Row
from lowmem.disk import shown_name
from lowmem.errors import InputError
from lowmem.fidelity import metrics, neighbours
from lowmem.fidelity.directions import Vectors, is_finite
from lowmem.fidelity.npy_files import npy_bytes, npy_header
from lowmem.fidelity.reference import Reference

logger = logging.getLogger(__name__)

CHECKED_TEXTS = 8
LEAST_COSINE = 0.9
"""Of texts, model and contract that are the same; 16-bit runs stay above 0.999."""
EXPECTED_COSINE = 0.99
BETTER_COSINE = 0.01
"""By which no other text's vector may be nearer: that of a text said twice is as near."""
NORM_ERROR = 0.01
"""float16 components move the length of a vector by less than this."""
_MOST_NAMED = 10


def read_vectors(path: Path, rows: int, hidden_size: int, is_normalized: bool) -> Vectors:
    """Reads vectors and refuses what cannot be a reference of these texts.

    Args:
        path: A ``.npy`` file of floating-point numbers.
        rows: How many texts there are.
        hidden_size: Length of a vector.
        is_normalized: Whether the contract demands unit length.

    Returns:
        float32 [rows, hidden_size].

    Raises:
        InputError: The file cannot be read, its shape is another, a vector is not finite, is zero
            or has not the length that it should have; of those the first ten are named.
    """
    read: Callable[..., Any] = np.lib.format.read_array  # has no types of its own
    try:
        with path.open("rb") as file:
            shape, dtype = npy_header(file)
            file.seek(0)
            is_fit = np.issubdtype(dtype, np.floating) and shape == (rows, hidden_size)
            stored = read(file, allow_pickle=False) if is_fit else None
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read as .npy: {error}") from error
    if stored is None:
        raise InputError(
            f"reference vectors must be floats [{rows}, {hidden_size}], one for each text in its "
            f"order, got {dtype} {list(shape)} ({path})"
        )
    vectors: Vectors = stored.astype(np.float32)
    norms = np.linalg.norm(vectors.astype(np.float64), axis=1)
    _refuse(path, ~is_finite(vectors), "hold NaN or infinity")
    _refuse(path, norms == 0, "are zero")
    if is_normalized:
        _refuse(path, np.abs(norms - 1) > NORM_ERROR, "have not the length 1 that the contract has")
    return vectors


def replaced(reference: Reference, vectors: Vectors, path: Path, own: Vectors | None) -> Reference:
    """The same texts with other vectors.

    Args:
        reference: The texts, with any vectors.
        vectors: float32 [texts, d].
        path: Where they came from.
        own: This project's vectors of the texts at ``checked``, float32 [checked, d], or None
            where it has none to compare with.

    Raises:
        InputError: They are of other texts, of another order, or of another model or contract.
    """
    if own is None:
        logger.warning(
            "%s is taken as it is: without fp16 in the bundle nothing shows that its vectors are "
            "of these texts, in this order",
            path,
        )
    else:
        _compare(path, vectors, own, reference.rows)
    digest = hashlib.sha256(npy_bytes(vectors)).hexdigest()
    return replace(
        reference,
        vectors=vectors,
        sha256=digest,
        given=shown_name(path),
        checked=0 if own is None else len(own),
    )


def checked(count: int) -> list[int]:
    """Positions of the texts that are compared: eight, spread from the first to the last."""
    return sorted({int(place) for place in np.linspace(0, count - 1, min(count, CHECKED_TEXTS))})


def _compare(path: Path, vectors: Vectors, own: Vectors, rows: tuple[Row, ...]) -> None:
    places = checked(len(rows))
    cosines = metrics.cosines(own, vectors[places])
    least = int(np.argmin(cosines))
    nearest = neighbours.search(own, vectors, 1)[:, 0]
    moved = metrics.cosines(own, vectors[nearest])
    fits = moved >= np.where(cosines < LEAST_COSINE, LEAST_COSINE, EXPECTED_COSINE)
    better = np.where(fits, moved - cosines, 0)
    wrong = int(np.argmax(better))
    problem = f"{path} does not hold the reference of these texts: text"
    if better[wrong] > BETTER_COSINE:
        raise InputError(
            f"{problem} {places[wrong]} ({rows[places[wrong]].id}) has a cosine of "
            f"{cosines[wrong]:.4f} to the reference computed here, and vector {nearest[wrong]} "
            f"fits that text, so they are in another order"
        )
    if cosines[least] < LEAST_COSINE:
        raise InputError(
            f"{problem} {places[least]} ({rows[places[least]].id}) has a cosine of "
            f"{cosines[least]:.4f} to the reference computed here, and must have {LEAST_COSINE}; "
            "they are of other texts, another model, or another input contract"
        )
    if cosines[least] < EXPECTED_COSINE:
        logger.warning(
            "%s differs from the reference computed here, by a cosine of %.4f for text %d: a "
            "16-bit run of the same model stays above %s",
            path,
            cosines[least],
            places[least],
            EXPECTED_COSINE,
        )


def _refuse(path: Path, is_bad: Any, what: str) -> None:
    if is_bad.any():
        bad = np.flatnonzero(is_bad)
        more = f" and {len(bad) - _MOST_NAMED} more" if len(bad) > _MOST_NAMED else ""
        named = ", ".join(map(str, bad[:_MOST_NAMED]))
        raise InputError(f"{path} holds vectors that {what}: {named}{more}")
