"""Machines that are not here: cards known by name, and descriptions in a file.

The table is ``lowmem/data/cards.json``, which names the source of each figure. What a description
leaves out is taken from this machine, so that a name alone stands for "this card in this machine".
"""

from __future__ import annotations

import difflib
import functools
import json
import os
import re
from importlib import resources
from pathlib import Path
from typing import Any

from lowmem.artifact import strict_json
from lowmem.errors import InputError
from lowmem.hardware import Gpu, Hardware

# What is not free of a described card and host: driver and a plain desktop, system and programs.
DEVICE_RESERVE_BYTES = 512 * 2**20
HOST_RESERVE_BYTES = 2 * 2**30

_CPU_KEYS = ("cpu_name", "cpu_threads", "cpu_features")
_MEMORY_KEYS = ("host_total_bytes", "host_free_bytes")
_NEAR = 4
_LONGEST_NAME = 60


@functools.cache
def cards() -> tuple[Gpu, ...]:
    """Returns the known cards, each named by model and memory, as in ``RTX 3060 12GB``."""
    path = resources.files("lowmem.data").joinpath("cards.json")
    table = json.loads(path.read_text(encoding="utf-8"))["cards"]
    return tuple(
        _described_gpu({key: value for key, value in card.items() if key != "source"}, card["name"])
        for card in table
    )


def find(name: str) -> Gpu:
    """Returns the card of a name.

    Case, spaces, hyphens, ``NVIDIA``, ``GeForce`` and ``Tesla`` do not count, and the memory may
    be left out where one card has the rest of the name.

    Args:
        name: As people write it.

    Raises:
        InputError: No card has this name, or several have.
    """
    wanted = _key(name)
    same = [card for card in cards() if _key(card.name) == wanted]
    model = [card for card in cards() if _key(card.name.rpartition(" ")[0]) == wanted]
    match same or model:
        case [card]:
            return card
        case []:
            near = difflib.get_close_matches(wanted, map(_key, _names()), n=_NEAR, cutoff=0)
            names = {_key(known): known for known in _names()}
            raise InputError(
                "a card must be a known name or a JSON file that describes one, got "
                f"{name[:_LONGEST_NAME]!r}: near are {', '.join(names[key] for key in near)}"
            )
        case several:
            raise InputError(
                f"a card must be named with its memory where there are several, got {name!r}: "
                f"{', '.join(card.name for card in several)}"
            )


def describe(card: str, host: Hardware) -> Hardware:
    """Returns the machine that ``--card`` stands for.

    A file holds what :meth:`Hardware.from_json` reads, with these differences: the CPU's three keys
    may be left out together, and so may both sizes of main memory (then they are those of
    ``host``); a card in ``gpus`` may be a name; where free bytes are left out, they are the total
    less what driver and system take.

    Args:
        card: A name, or the path of a JSON file.
        host: The machine whose CPU and memory count where none is described.

    Raises:
        InputError: No card has this name, or the description is not one.
        BundleError: The file cannot be read, or is not a JSON object.
    """
    here = host.to_json()
    if not os.path.isfile(card):  # a method of Path would raise where a name is too long
        return Hardware.from_json({**here, "gpus": [find(card).to_json()], "gpu_problem": None})
    value = strict_json.read_object(Path(card))
    for keys in (_CPU_KEYS, _MEMORY_KEYS):
        if value.keys().isdisjoint(keys):
            value |= {key: here[key] for key in keys}
    value = _with_free(value, "host_", HOST_RESERVE_BYTES)
    gpus = value.get("gpus", [])
    if isinstance(gpus, list):
        value["gpus"] = [
            _described_gpu(gpu, f"{card}.gpus[{index}]").to_json() for index, gpu in enumerate(gpus)
        ]
    return Hardware.from_json(value, card)


def _described_gpu(value: object, place: str) -> Gpu:
    if isinstance(value, str):
        return find(value)
    if isinstance(value, dict):
        value = _with_free(value, "", DEVICE_RESERVE_BYTES)
    return Gpu.from_json(value, place)


def _with_free(value: dict[str, Any], prefix: str, reserve_bytes: int) -> dict[str, Any]:
    """States what is free, unless that is stated or the total is no size to take it from."""
    total, free = value.get(f"{prefix}total_bytes"), f"{prefix}free_bytes"
    if free in value or type(total) is not int:
        return value
    return {**value, free: max(0, total - reserve_bytes)}


def _names() -> list[str]:
    return [card.name for card in cards()]


def _key(name: str) -> str:
    """What of a name counts: ``NVIDIA GeForce RTX 3060 12 GiB`` is ``rtx306012gb``."""
    bare = re.sub(r"nvidia|geforce|tesla|[\s_-]+", "", name[:_LONGEST_NAME].casefold())
    return re.sub(r"(?<=\d)gi?b?$", "gb", bare)
