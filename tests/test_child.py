"""A process that answers jobs: what becomes of its errors, its crashes and its parent's end."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lowmem.child import Child
from lowmem.errors import BackendError, InputError

SERVING = """
import os
from lowmem.child import serve
from lowmem.errors import InputError

def answer(job):
    if "refused" in job:
        raise InputError(job["refused"])
    print("what a library says")
    held.append(bytearray(b"x" * job["bytes"]))
    return {"pid": os.getpid(), "held": len(held)}

held = []
serve(answer)
"""


def test_jobs_are_answered_one_after_another_by_one_process():
    with Child(SERVING, "it") as child:
        assert child.peak_bytes == 0
        first, second = child.ask({"bytes": 1}), child.ask({"bytes": 10**8})
        assert (first["held"], second["held"]) == (1, 2)
        assert first["pid"] == second["pid"] != os.getpid()
        time.sleep(0.1)
        assert 10**8 < child.peak_bytes < 3 * 10**8  # and a copy
    assert not _is_alive(first["pid"])


def test_an_error_keeps_its_class_and_text_and_the_process_goes_on():
    with Child(SERVING, "it") as child:
        before = child.ask({"bytes": 1})["pid"]
        with pytest.raises(InputError, match=r"^no such text$"):
            child.ask({"refused": "no such text"})
        assert child.ask({"bytes": 1})["pid"] == before


def test_a_process_that_is_not_asked_is_not_started():
    with Child("raise RuntimeError", "it"):
        pass


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        (
            "import os, signal; os.kill(os.getpid(), signal.SIGKILL)",
            "it was ended by SIGKILL, as the system does when memory runs out",
        ),
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "it was ended by SIGSEGV"),
        ("raise RuntimeError('on fire')", "it failed: RuntimeError: on fire"),
        ("", "it failed: it said nothing"),
    ],
    ids=["killed", "crashed", "raised", "silent"],
)
@pytest.mark.parametrize("size", [1, 10**7], ids=["small", "more than a pipe holds"])
def test_a_process_that_ends_becomes_a_reason(code, reason, size):
    with Child(code, "it") as child, pytest.raises(BackendError) as caught:
        child.ask({"text": "x" * size})
    assert str(caught.value) == reason


def test_a_process_that_ends_at_a_later_job_becomes_a_reason():
    code = SERVING.replace("held.append", "job['bytes'] > 5 and os.abort(); held.append")
    with Child(code, "it") as child:
        child.ask({"bytes": 1})
        with pytest.raises(BackendError, match="it was ended by SIGABRT"):
            child.ask({"bytes": 9})


def test_a_process_that_hangs_is_given_up():
    start = time.monotonic()
    with Child("import time; time.sleep(600)", "it") as child:
        with pytest.raises(BackendError, match=r"^it took more than 0\.5 s$"):
            child.ask({}, timeout_seconds=0.5)
    assert time.monotonic() - start < 60


def test_a_process_ends_when_its_parent_gives_up_on_it():
    child = Child(SERVING, "it")
    pid = child.ask({"bytes": 1})["pid"]
    child.__exit__(KeyboardInterrupt)
    assert not _is_alive(pid)


def test_a_child_ends_with_its_parent():
    script = (
        "import subprocess, sys, time; "
        "code = 'import os, sys, time; from lowmem.child import _end_with; "
        "_end_with(int(sys.argv[1])); print(os.getpid(), flush=True); time.sleep(600)'; "
        "import os; subprocess.Popen([sys.executable, '-c', code, str(os.getpid())]).wait()"
    )
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE) as parent:
        child = int(parent.stdout.readline())
        parent.terminate()
        parent.wait()
    deadline = time.monotonic() + 30
    while _is_alive(child):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_child_whose_parent_is_gone_already_does_nothing():
    code = "from lowmem.child import _end_with; _end_with(1 << 30)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr.strip().endswith("is gone")) == (1, True)


def _is_alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    except OSError:
        return False
