import numpy as np
import pytest

from lowmem.artifact.manifest import Bundle
from lowmem.compute.plan import Plan
from lowmem.data import Row
from lowmem.fidelity.invariance import choose, distances, invariance
from lowmem.measure import Measuring
from tests.models import TEXTS

ROWS = [Row(str(n), text) for n, text in enumerate(dict.fromkeys(TEXTS))]
TOKENS = [10] * len(ROWS)


def test_six_short_texts_are_compared_and_others_stand_beside_them() -> None:
    rows = [Row(str(n), f"text {n}") for n in range(40)]
    tokens = [300 if n % 2 else 20 for n in range(40)]
    chosen, others = choose(rows, tokens)
    assert len(chosen) == len(others) == 6
    assert not set(chosen) & set(others)
    assert all(tokens[place] == 20 for place in [*chosen, *others])
    assert choose(rows, [300] * 40) == ([], [])


def test_distances_of_nearly_equal_vectors_keep_their_digits() -> None:
    a = np.array([[1, 0], [1, 0], [2, 0]], np.float32)
    b = np.array([[1, 1e-5], [0, 3], [1, 0]], np.float32)
    assert distances(a, b) == pytest.approx([5e-11, 1, 0], rel=1e-5)


@pytest.mark.parametrize("plan", ["fp16-torch-cpu-fp32", "int4-onnxruntime-cpu-fp32"])
def test_a_text_is_the_same_in_any_company(tiny_bundle, tmp_path, plan: str) -> None:
    variant, engine, device, compute = plan.split("-")
    ran = Plan(variant, engine, device, compute, "resident")
    with Measuring(Bundle(tiny_bundle), ran) as measuring:
        measuring.run(ROWS, vectors=tmp_path / "vectors.npy")
        found = invariance(measuring, ROWS, TOKENS, np.load(tmp_path / "vectors.npy"))
    assert found is not None
    assert found["texts"] == 6
    # float32 sums in another order: squares of about 1e-6
    assert max(found[key] for key in ("alone", "shuffled", "neighbours")) < 1e-10


def test_vectors_that_are_another_texts_are_found(tiny_bundle, tmp_path) -> None:
    ran = Plan("fp16", "torch", "cpu", "fp32", "resident")
    with Measuring(Bundle(tiny_bundle), ran) as measuring:
        measuring.run(ROWS, vectors=tmp_path / "vectors.npy")
        turned = np.load(tmp_path / "vectors.npy")[::-1]
        found = invariance(measuring, ROWS, TOKENS, turned)
    assert found is not None
    assert min(found[key] for key in ("alone", "shuffled", "neighbours")) > 1e-3


def test_nothing_is_claimed_of_fewer_than_two_texts(tiny_bundle) -> None:
    plan = Plan("fp16", "torch", "cpu", "fp32", "resident")
    with Measuring(Bundle(tiny_bundle), plan) as measuring:
        assert invariance(measuring, ROWS[:1], [10], np.ones((1, 4), np.float32)) is None
