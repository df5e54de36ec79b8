"""What comes with lowmem: built-in texts, and tables of known models and their known answers.

Where the texts are from is in ``SOURCES.md``, how they were made in ``build_texts.py``.

``probe`` is what fidelity is measured on and ``quick`` 64 of its rows, for machines where ``probe``
takes too long; ``calibration`` steers the quantizers and ``workloads`` is timed. They are files
and not made when needed, so that two reports with the same hash speak of the same texts, and no
text that steered a quantizer or a tuning is ever measured: ``calibration`` and ``workloads`` share
no 13 tokens in a row with ``probe`` or with each other (tokens of SmolLM2, whose tokenizer anyone
can install).

``cards.json`` beside them is the planner's table of graphics cards.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import resources
from typing import Any

from lowmem.errors import InputError

NAMES = ("probe", "quick", "calibration", "workloads")


@dataclass(frozen=True, slots=True)
class Row:
    """One text.

    Attributes:
        id: Unique among all sets; names kind, source and place in it.
        text: The bare text, without instruction or special tokens.
        input_type: ``"document"`` or ``"query"``.
        task: The instruction of a query, None for a document.
        kind: ``prose``, ``question``, ``code``, ``short``, ``multilingual``, ``long``, or ``cut``
            for one without its last words; in ``workloads`` ``short``, ``mid``, ``long`` or
            ``instructed``.
        lang: ISO 639-1 code; code examples count as ``en``.
    """

    id: str
    text: str
    input_type: str = "document"
    task: str | None = None
    kind: str = ""
    lang: str = ""


def load(name: str) -> tuple[Row, ...]:
    """Returns the rows of one set, always in the same order.

    Args:
        name: One of ``NAMES``.

    Raises:
        InputError: There is no set of this name.
    """
    if name not in NAMES:
        raise InputError(f"the built-in texts are {', '.join(NAMES)}, got {name!r}")
    if name == "quick":
        ids = frozenset(_read("quick.txt").split())
        return tuple(row for row in load("probe") if row.id in ids)
    # JSON leaves U+2028 as it is, so splitlines would cut a text in two.
    lines = _read(f"{name}.jsonl").split("\n")
    return tuple(Row(**json.loads(line)) for line in lines if line)


def load_json(name: str) -> dict[str, Any]:
    """Returns the object that a JSON file of this package holds."""
    value: dict[str, Any] = json.loads(_read(name))
    return value


def sha256(rows: Iterable[Row]) -> str:
    """Returns the hex SHA-256 of what a model is given.

    Hashed are lines of compact JSON, UTF-8, each ended by a line feed, with the keys ``id``,
    ``text``, ``input_type`` and ``task`` in this order. The order of the rows counts.
    """
    digest = hashlib.sha256()
    for row in rows:
        line = {"id": row.id, "text": row.text, "input_type": row.input_type, "task": row.task}
        canonical = json.dumps(line, ensure_ascii=False, separators=(",", ":"))
        digest.update(canonical.encode() + b"\n")
    return digest.hexdigest()


def _read(name: str) -> str:
    """Returns a file of this package."""
    return resources.files(__name__).joinpath(name).read_text(encoding="utf-8")
