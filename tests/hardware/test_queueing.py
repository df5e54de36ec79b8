"""Waiting for a core, by what the system counts."""

import os
import subprocess
import sys
import time

from lowmem.hardware.queueing import queued_seconds


def test_threads_that_share_one_core_wait_for_each_other():
    code = (
        "import hashlib, os, threading; from lowmem.hardware.queueing import queued_seconds; "
        "os.sched_setaffinity(0, {min(os.sched_getaffinity(0))}); "
        "work = lambda: [hashlib.sha256(bytes(2**22)).digest() for _ in range(50)]; "
        "threads = [threading.Thread(target=work) for _ in range(2)]; "
        "[thread.start() for thread in threads]; work(); print(queued_seconds())"
    )
    output = subprocess.check_output([sys.executable, "-c", code], text=True)
    assert float(output) > 0.05


def test_a_thread_that_sleeps_does_not_wait_for_a_core():
    before = queued_seconds()
    time.sleep(0.3)
    assert queued_seconds() - before < 0.2


def test_where_the_system_does_not_count_nothing_was_waited(monkeypatch):
    monkeypatch.setattr("lowmem.hardware.queueing._TASKS", os.devnull)
    assert queued_seconds() == 0
