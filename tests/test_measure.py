"""One plan in a child process: what it reports of the workloads it is given."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from lowmem.artifact.manifest import Bundle
from lowmem.compute.plan import Plan
from lowmem.data import Row
from lowmem.errors import BundleError, InputError
from lowmem.measure import Measuring, Pass, measure
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
    with Measuring(Bundle(tiny_bundle), PLAN) as measuring:
        record = measuring.run(ROWS, passes=passes, vectors=tmp_path / "passes.npy")
        measuring.run(ROWS, vectors=tmp_path / "vectors.npy")
    assert len(record.seconds) == 2
    found, expected = np.load(tmp_path / "passes.npy"), np.load(tmp_path / "vectors.npy")
    distances = np.linalg.norm(found - expected[[2, 0, 1, 2]], axis=1)
    assert distances.max() < INVARIANCE_DISTANCE


def test_passes_are_repeated_until_they_have_taken_long_enough(tiny_bundle):
    with Measuring(Bundle(tiny_bundle), PLAN) as measuring:
        once = measuring.run(ROWS)
        often = measuring.run(ROWS, least_seconds=0.2)
    assert len(once.seconds) == 1
    assert sum(often.seconds[:-1]) < 0.2 <= sum(often.seconds)
    assert 0 <= often.queued_seconds < sum(often.seconds) * (os.cpu_count() or 1)


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


def test_workloads_run_one_after_another_in_one_process(tiny_bundle, tmp_path):
    with Measuring(Bundle(tiny_bundle), PLAN) as measuring:
        first = measuring.run(ROWS, vectors=tmp_path / "first.npy")
        again = measuring.run(ROWS[:2], repeats=3, vectors=tmp_path / "again.npy")
    assert (first.texts, again.texts, len(again.seconds)) == (len(ROWS), 2, 3)
    assert again.load_seconds == first.load_seconds
    assert again.peak_host_bytes >= first.peak_host_bytes
    found, expected = np.load(tmp_path / "again.npy"), np.load(tmp_path / "first.npy")[:2]
    assert np.linalg.norm(found - expected, axis=1).max() < INVARIANCE_DISTANCE


def test_a_child_imports_nothing_from_the_working_directory(tiny_bundle, tmp_path, monkeypatch):
    (tmp_path / "numpy.py").write_text("raise RuntimeError('a stranger')")
    monkeypatch.chdir(tmp_path)
    assert measure(Bundle(tiny_bundle), PLAN, ROWS).texts == len(ROWS)
