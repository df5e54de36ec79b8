"""The command line in this process, which has torch loaded already."""

from __future__ import annotations

import io
import logging
import sys
from dataclasses import dataclass

import pytest

from lowmem.cli import main

PROGRAM_SETS = {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_VERBOSITY": "error"}
"""What the program puts into its environment for good."""


@dataclass(frozen=True)
class Ended:
    """What a command printed."""

    stdout: str
    stderr: str


def lowmem(*arguments: object, status: int = 0) -> Ended:
    """Runs a command as the program does, and leaves this process as it was.

    Args:
        arguments: What follows ``lowmem``.
        status: The exit status that it must end with.
    """
    stdout, stderr = (io.TextIOWrapper(io.BytesIO(), encoding="utf-8") for _ in range(2))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["lowmem", *map(str, arguments)])
        patch.setattr(sys, "stdout", stdout)
        patch.setattr(sys, "stderr", stderr)
        patch.setattr(sys, "stdin", io.StringIO())
        patch.setattr(logging.getLogger(), "handlers", [])  # logging is set up only where it is not
        for name, value in PROGRAM_SETS.items():
            patch.setenv(name, value)
        with pytest.raises(SystemExit) as ended:
            main()
    shown = []
    for stream in (stdout, stderr):
        stream.seek(0)
        shown.append(stream.read())
    assert (ended.value.code or 0) == status, shown[1]
    return Ended(*shown)
