"""A process of its own that answers one job after another, and the reason where it does not.

A crash, a kill by the system or a hang of the process becomes an error of the caller, and nothing
that it allocated is left behind.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from multiprocessing.connection import Connection, Pipe
from typing import IO, Any

from lowmem import errors
from lowmem.errors import BackendError, LowmemError
from lowmem.hardware.peak import MemoryPeak

_PR_SET_PDEATHSIG = 1  # of linux/prctl.h
_SECONDS_TO_END = 30


class Child:
    """Runs code that calls :func:`serve`, from the first job until the context is left."""

    def __init__(self, code: str, name: str) -> None:
        """Nothing is started yet.

        Args:
            code: What the process runs, as after ``python -c``.
            name: What it is called in errors.
        """
        self._code = code
        self._name = name
        self._running: _Running | None = None

    def __enter__(self) -> Child:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._running is not None:
            self._running.end(at_once=kind is not None)

    @property
    def peak_bytes(self) -> int:
        """Most RssAnon + RssShmem of the process and its children so far; 0 before it runs."""
        return 0 if self._running is None else self._running.peak.bytes

    def ask(self, job: dict[str, Any], timeout_seconds: float | None = None) -> dict[str, Any]:
        """Sends a JSON value and waits for the one that answers it.

        Args:
            job: What to do.
            timeout_seconds: When to give up; the process is killed.

        Raises:
            LowmemError: What the answering function raised; a crash, a kill or a time-out is a
                BackendError.
        """
        if self._running is None:
            self._running = _Running(self._code)
        running = self._running
        try:
            running.connection.send_bytes(json.dumps(job).encode())
            if not running.connection.poll(timeout_seconds):
                running.process.kill()
                raise BackendError(f"{self._name} took more than {timeout_seconds} s")
            answer = json.loads(running.connection.recv_bytes())
        except (EOFError, OSError):
            raise self._failure() from None
        if "error" in answer:
            raise getattr(errors, answer["kind"])(answer["error"])
        result: dict[str, Any] = answer
        return result

    def _failure(self) -> LowmemError:
        assert self._running is not None
        status, problems = self._running.process.wait(), self._running.problems
        if status < 0:
            number = signal.Signals(-status).name
            hint = ", as the system does when memory runs out" if number == "SIGKILL" else ""
            return BackendError(f"{self._name} was ended by {number}{hint}")
        problems.seek(0)
        lines = problems.read().decode(errors="replace").strip().splitlines()
        return BackendError(f"{self._name} failed: {lines[-1] if lines else 'it said nothing'}")


class _Running:
    """The process, what it is asked through, what it complains of, and its memory."""

    def __init__(self, code: str) -> None:
        self.problems: IO[bytes] = tempfile.TemporaryFile()
        self.connection, theirs = Pipe()
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-c", code, str(os.getpid()), str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=self.problems,
                pass_fds=[theirs.fileno()],
                env={**os.environ, "PYTHONPATH": os.pathsep.join(map(os.path.abspath, sys.path))},
            )
        self.peak = MemoryPeak(self.process.pid)
        self.peak.__enter__()

    def end(self, *, at_once: bool) -> None:
        """Lets the process go, kills it where it must be at once or does not go, and waits."""
        self.connection.close()
        if at_once:
            self.process.kill()
        try:
            self.process.wait(_SECONDS_TO_END)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.peak.__exit__()
        self.problems.close()


def serve(answer: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Answers jobs until the parent wants no more; the process's arguments say who it is.

    Args:
        answer: Gives a JSON value for a JSON value; a LowmemError is the parent's to raise.
    """
    _end_with(int(sys.argv[1]))
    with Connection(int(sys.argv[2])) as connection:
        while True:
            try:
                job = json.loads(connection.recv_bytes())
            except EOFError:
                return
            try:
                result = answer(job)
            except LowmemError as error:
                result = {"kind": type(error).__name__, "error": str(error)}
            connection.send_bytes(json.dumps(result).encode())


def _end_with(parent: int) -> None:
    """Has the system end this process with its parent: an orphan would keep a model's memory."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        raise SystemExit("the process that wanted an answer is gone")
