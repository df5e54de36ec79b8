"""Waiting for a core, by what the system counts."""

import os
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest

from lowmem.hardware import queueing
from lowmem.hardware.queueing import Queueing

ONE_CORE = "import hashlib, os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})\n"
WORK = "[hashlib.sha256(bytes(2**22)).digest() for _ in range(60)]\n"


def test_processes_that_share_one_core_wait_for_each_other():
    code = (
        f"{ONE_CORE}from lowmem.hardware.queueing import Queueing\n"
        f"queueing = Queueing()\n{WORK}print(queueing.seconds())"
    )
    with subprocess.Popen([sys.executable, "-c", f"{ONE_CORE}while True: {WORK}"]) as other:
        try:
            output = subprocess.check_output([sys.executable, "-c", code], text=True)
        finally:
            other.kill()
    assert float(output) > 0.05


def test_a_thread_that_sleeps_does_not_wait_for_a_core():
    waiting = Queueing()
    time.sleep(0.3)
    assert waiting.seconds() < 0.2


@pytest.fixture
def system(tmp_path, monkeypatch):
    """A system of two cores, of which this process may use the first; sets what it has counted."""
    monkeypatch.setattr(queueing, "_TASKS", str(tmp_path))
    monkeypatch.setattr(queueing, "_STAT", str(tmp_path / "stat"))
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0})
    monkeypatch.setattr(os, "sysconf", lambda _: 100)

    def counted(queued: float, first: float, second: float, own: float) -> None:
        for thread in range(2):
            (tmp_path / str(thread)).mkdir(exist_ok=True)
            waited = int(queued / 2 * 1e9)
            (tmp_path / str(thread) / "schedstat").write_text(f"1 {waited} 1\n")
        cores = [f"{int(100 * busy)} 0 0 7777 7777 0 0 7777 0 0" for busy in (first, second)]
        both = "9999999 0 0 7777 7777 0 0 7777 0 0"
        lines = [f"cpu  {both}", f"cpu0 {cores[0]}", f"cpu1 {cores[1]}", "intr 12 3"]
        (tmp_path / "stat").write_text("\n".join(lines))
        monkeypatch.setattr(os, "times", lambda: SimpleNamespace(user=own, system=0.0))

    return counted


@pytest.mark.parametrize(
    ("queued", "first", "second", "own", "seconds"),
    [
        (0.5, 2.0, 0.0, 2.0, 0.0),  # its threads waited for each other
        (0.5, 2.0, 0.0, 1.0, 0.5),
        (0.5, 2.0, 0.0, 1.8, 0.2),  # partly
        (0.5, 2.0, 2.0, 2.0, 0.0),  # others ran where it may not
        (0.0, 2.0, 0.0, 1.0, 0.0),
    ],
)
def test_others_kept_threads_waiting_for_no_longer_than_they_ran(
    system, queued, first, second, own, seconds
):
    system(1.0, 5.0, 5.0, 3.0)
    waiting = Queueing()
    system(1.0 + queued, 5.0 + first, 5.0 + second, 3.0 + own)
    assert waiting.seconds() == pytest.approx(seconds)


def test_where_the_system_does_not_count_nothing_was_waited(monkeypatch):
    monkeypatch.setattr(queueing, "_TASKS", os.devnull)
    monkeypatch.setattr(queueing, "_STAT", os.devnull)
    assert Queueing().seconds() == 0
