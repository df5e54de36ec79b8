import numpy as np
import pytest

from lowmem.fidelity import neighbours, smaller_vectors


def test_forms_hold_what_a_store_would_hold() -> None:
    vectors = np.array([[0.6, -0.8, 0, 0], [0, 0, 0, 0]], np.float32)
    forms = {name: form for name, *form in smaller_vectors.forms(vectors)}
    assert forms["int8"][0].tolist() == [[95, -127, 0, 0], [0, 0, 0, 0]]
    assert forms["binary"][0].tolist() == [[1, -1, -1, -1], [0, 0, 0, 0]]
    assert forms["first 2"][0].tolist() == [pytest.approx([0.6, -0.8, 0, 0]), [0, 0, 0, 0]]
    assert {name: form[1:] for name, form in forms.items()} == {
        "float32": [4, 16],
        "int8": [4, 4],
        "binary": [4, 1],
        "first 2": [2, 8],
        "first 1": [1, 4],
    }
    assert vectors[0].tolist() == pytest.approx([0.6, -0.8, 0, 0])


def test_eight_bits_cost_little_and_one_bit_more() -> None:
    generator = np.random.default_rng(6)
    reference = generator.standard_normal((200, 64)).astype(np.float32)
    before = neighbours.find(reference, 10)
    rows = {row["name"]: row for row in smaller_vectors.costs(reference, before, reference, 10)}
    assert rows["float32"]["overlap"] == {"1": 1.0, "10": 1.0}
    assert rows["float32"]["spearman"] == pytest.approx(1)
    assert rows["int8"]["overlap"]["10"] > 0.95 > rows["first 32"]["overlap"]["10"]
    assert rows["first 32"]["overlap"]["10"] > rows["first 16"]["overlap"]["10"]
    assert 0.999 < rows["int8"]["spearman"] < 1
    assert rows["binary"]["spearman"] < rows["int8"]["spearman"]
