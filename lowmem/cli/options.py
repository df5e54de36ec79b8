"""Options that several verbs share."""

from __future__ import annotations

import re
import textwrap
from pathlib import Path
from typing import Annotated

import typer

from lowmem.errors import InputError

Bundle = Annotated[Path, typer.Argument(help="The bundle's directory.", show_default=False)]
Variant = Annotated[
    str, typer.Option(help="fp16, int8, int4, int4-BITS, bnb-int8, bnb-nf4, or auto.")
]
Engine = Annotated[str, typer.Option(help="torch, onnxruntime, or auto.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, or auto.")]
Compute = Annotated[
    str, typer.Option(help="fp32, bf16, fp16, int8; on a GPU also fp16-acc16, fp8; or auto.")
]
Schedule = Annotated[str, typer.Option(help="resident, streamed, or auto.")]
Floor = Annotated[str, typer.Option(help="strict, standard, loose, or mean=…,p5=…,min=….")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]


_WIDTH = 80


def wrapped(text: str, first: str = "", rest: str = "  ") -> str:
    """Text in lines of at most 80 columns where its words are no longer, broken at blanks alone.

    Args:
        text: Words.
        first: What the first line begins with.
        rest: What the others do.
    """
    return textwrap.fill(
        text,
        _WIDTH,
        initial_indent=first,
        subsequent_indent=rest,
        break_long_words=False,
        break_on_hyphens=False,
    )


def size_text(count: float) -> str:
    """Bytes for people: ``1.5 GiB``."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}"
        count /= 1024
    return f"{count:.2f} GiB"


_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def parse_size(text: str, option: str) -> int:
    """Bytes of ``3G``, ``1.5 GiB``, ``800MB`` or ``4096``; all units are powers of 1024.

    Args:
        text: What was given.
        option: Its name, for the error.

    Raises:
        InputError: It is no size.
    """
    match = re.fullmatch(r"([0-9]{1,15}(?:\.[0-9]{1,6})?) ?([KMGT]?)(?:I?B)?", text.strip().upper())
    if match is None or not float(match[1]):
        raise InputError(f"{option} must be a size such as 3G or 800M, got {text!r}")
    return int(float(match[1]) * _UNITS[match[2]])
