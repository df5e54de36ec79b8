"""Progress on stderr: a bar on a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

Progress = Callable[[str, int, int], None]
"""Called with (what is done, steps done, steps in all)."""

_LINE_SECONDS = 10.0


@contextmanager
def bar(what: str, total: int, *, shown: bool = True) -> Iterator[Callable[[int], None]]:
    """Shows how far work has come.

    Args:
        what: The work, as a noun or a gerund.
        total: Steps in all.
        shown: Whether to show anything.

    Yields:
        A function to call with the number of steps just done.
    """
    if not shown:
        yield lambda steps: None
    elif sys.stderr.isatty():
        with _terminal_bar(what, total) as advance:
            yield advance
    else:
        yield _plain_lines(what, total)


@contextmanager
def _terminal_bar(what: str, total: int) -> Iterator[Callable[[int], None]]:
    from rich import progress as rich_progress
    from rich.console import Console

    columns = (
        rich_progress.TextColumn("{task.description}"),
        rich_progress.BarColumn(),
        rich_progress.MofNCompleteColumn(),
        rich_progress.TimeRemainingColumn(),
    )
    console = Console(stderr=True)
    with rich_progress.Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(what, total=total)
        yield lambda steps: progress.advance(task, steps)


def _plain_lines(what: str, total: int) -> Callable[[int], None]:
    done, shown_at = 0, time.monotonic()

    def advance(steps: int) -> None:
        nonlocal done, shown_at
        done += steps
        if time.monotonic() - shown_at >= _LINE_SECONDS:
            shown_at = time.monotonic()
            sys.stderr.write(f"{what}: {done} of {total}\n")

    return advance


def duration_text(seconds: float) -> str:
    """A length of time for people, at least a second."""
    if seconds < 90:
        return f"{max(seconds, 1):.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"
