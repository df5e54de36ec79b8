"""JSON Schemas, draft 2020-12, of what lowmem writes for other programs.

``plan``, ``report`` and ``bench`` leave room for keys that are yet to come; in ``manifest``, the
input contract in it included, every key decides something, and an unknown one is an error.
"""

from __future__ import annotations

import json
from importlib import resources
from typing import Any

from lowmem.errors import InputError

NAMES = ("manifest", "plan", "report", "bench")


def load(name: str) -> dict[str, Any]:
    """Returns a schema.

    Args:
        name: ``manifest`` for ``lowmem.json``, ``plan`` for ``lowmem plan --json``, ``report`` for
            ``lowmem report --json``, whose ``#/$defs/report`` is one file of a bundle's
            ``reports/``; ``bench`` for ``lowmem bench --json``.

    Raises:
        InputError: There is no schema of this name.
    """
    if name not in NAMES:
        raise InputError(f"the schemas are {', '.join(NAMES)}, got {name!r}")
    path = resources.files(__name__).joinpath(f"{name}.schema.json")
    schema: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return schema
