"""Progress on stderr: a bar on a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

Progress = Callable[[str, int, int], None]
"""Called with (what is done, steps done, steps in all)."""


def silent(what: str, done: int, total: int) -> None:
    """A ``Progress`` that shows nothing."""


_LINE_SECONDS = 30.0


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


class Steps:
    """Steps of several works, one after another: a ``Progress`` that writes them to stderr.

    As a context manager it takes its line off the terminal again.
    """

    def __init__(self) -> None:
        self._what = ""
        self._told: set[str] = set()
        self._first, self._start, self._shown_at = 0, 0.0, 0.0

    def __enter__(self) -> Steps:
        return self

    def __exit__(self, *_: object) -> None:
        if self._what and sys.stderr.isatty():
            sys.stderr.write("\r\033[K")
            sys.stderr.flush()

    def __call__(self, what: str, done: int, total: int) -> None:
        """Shows a step that begins, and how long the rest will take by the steps before it."""
        now = time.monotonic()
        if what != self._what:
            self._what, self._first, self._start = what, done, now
        finished = done - self._first
        left = (now - self._start) / finished * (total - done) if finished else None
        about = "" if left is None else f", about {duration_text(left)} left"
        if sys.stderr.isatty():
            sys.stderr.write(f"\r\033[K{what}: {done} of {total}{about}")
        elif what not in self._told:
            self._told.add(what)
            sys.stderr.write(f"{what}: {total} step{'s' if total > 1 else ''}\n")
            self._shown_at = now
        elif now - self._shown_at >= _LINE_SECONDS:
            sys.stderr.write(f"{what}: {done} of {total}{about}\n")
            self._shown_at = now
        sys.stderr.flush()


def duration_text(seconds: float) -> str:
    """A length of time for people, at least a second."""
    if seconds < 90:
        return f"{max(seconds, 1):.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"
