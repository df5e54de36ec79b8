"""One plan in a child process: what it reports, and what a crash becomes."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from lowmem import measure as measure_module
from lowmem.artifact.manifest import Bundle
from lowmem.compute.plan import Plan
from lowmem.data import Row
from lowmem.errors import BackendError, BundleError, InputError
from lowmem.measure import Pass, measure
from tests.bundles import edit
from tests.models import TEXTS
from tests.tolerances import INVARIANCE_DISTANCE

PLAN = Plan("fp16", "torch", "cpu", "fp32", "resident")
ROWS = [Row(str(number), text) for number, text in enumerate(TEXTS)]


def test_a_record_counts_texts_and_tokens_and_shows_speed_and_memory(tiny_bundle, tmp_path):
    record = measure(Bundle(tiny_bundle), PLAN, ROWS, repeats=2, vectors=tmp_path / "vectors.npy")
    assert record.texts == len(ROWS)
    assert record.tokens > 2 * len(ROWS)
    assert len(record.seconds) == 2
    assert record.tokens_per_second > 0
    assert 20 * 2**20 < record.peak_host_bytes < 2**30
    assert "torch" in record.versions
    vectors = np.load(tmp_path / "vectors.npy")
    assert vectors.shape == (len(ROWS), 128)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, rtol=1e-6)


def test_passes_give_their_vectors_one_behind_the_other(tiny_bundle, tmp_path):
    passes = [Pass((2, 0)), Pass((1, 2), batch_size=1)]
    record = measure(
        Bundle(tiny_bundle), PLAN, ROWS, passes=passes, vectors=tmp_path / "passes.npy"
    )
    measure(Bundle(tiny_bundle), PLAN, ROWS, vectors=tmp_path / "vectors.npy")
    assert len(record.seconds) == 2
    found, expected = np.load(tmp_path / "passes.npy"), np.load(tmp_path / "vectors.npy")
    distances = np.linalg.norm(found - expected[[2, 0, 1, 2]], axis=1)
    assert distances.max() < INVARIANCE_DISTANCE


def test_an_error_of_the_child_keeps_its_class_and_text(tiny_bundle):
    with pytest.raises(InputError, match="no variant 'int3'"):
        measure(Bundle(tiny_bundle), PLAN.with_(variant="int3"), ROWS)


def test_a_variant_that_was_exported_anew_is_not_measured(tiny_bundle, tmp_path):
    copy = Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))
    opened = Bundle(copy)
    contract = json.loads((copy / "lowmem.json").read_text())["contract"]
    edit(copy, contract={**contract, "normalize_embeddings": False})
    with pytest.raises(BundleError, match="fp16 was exported anew meanwhile"):
        measure(opened, PLAN, ROWS)


def test_a_killed_child_becomes_a_reason(tiny_bundle, monkeypatch):
    code = "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"
    _replace_child(monkeypatch, code)
    with pytest.raises(BackendError, match="was ended by SIGKILL, as the system does"):
        measure(Bundle(tiny_bundle), PLAN, ROWS)


def test_a_crashed_child_becomes_its_last_line(tiny_bundle, monkeypatch):
    _replace_child(monkeypatch, "raise RuntimeError('the device is on fire')")
    with pytest.raises(BackendError, match="failed: RuntimeError: the device is on fire"):
        measure(Bundle(tiny_bundle), PLAN, ROWS)


def test_a_child_that_hangs_is_given_up(tiny_bundle, monkeypatch):
    _replace_child(monkeypatch, "import time; time.sleep(60)")
    with pytest.raises(BackendError, match="took more than"):
        measure(Bundle(tiny_bundle), PLAN, ROWS, timeout_seconds=0.5)


def _replace_child(monkeypatch, code):
    real = subprocess.Popen

    def start(command, **options):
        return real([sys.executable, "-c", code], **{**options, "env": dict(os.environ)})

    monkeypatch.setattr(measure_module.subprocess, "Popen", start)


def test_a_child_ends_with_its_parent():
    script = (
        "import subprocess, sys, time; from lowmem import measure; "
        "code = 'import os, sys, time; from lowmem.measure import _end_with; "
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
    code = "from lowmem.measure import _end_with; _end_with(1 << 30)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr.strip().endswith("is gone")) == (1, True)


def _is_alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    except OSError:
        return False


def test_a_child_imports_nothing_from_the_working_directory(tiny_bundle, tmp_path, monkeypatch):
    (tmp_path / "numpy.py").write_text("raise RuntimeError('a stranger')")
    monkeypatch.chdir(tmp_path)
    assert measure(Bundle(tiny_bundle), PLAN, ROWS).texts == len(ROWS)
