import numpy as np

from lowmem.data import Row
from lowmem.fidelity import neighbours
from lowmem.fidelity.worst import excerpt, worst

ROWS = [Row("a", "first"), Row("b", "second", "query"), Row("c", "third"), Row("d", "fourth")]


def test_the_worst_texts_stand_first_with_what_became_of_their_neighbours() -> None:
    reference = np.array([[1, 0], [10, 1], [0, 1], [1, 10]], np.float32)
    vectors = np.array([[1, 0], [1, 10], [0, 1], [10, 1]], np.float32)
    before, now = neighbours.find(reference, 2), neighbours.find(vectors, 2)
    found = worst(np.array([1.0, 0.2, 1.0, 0.2]), ROWS, [3, 4, 5, 6], before, now, count=2)
    assert found == [
        {
            "id": "b",
            "cosine": 0.2,
            "tokens": 4,
            "input_type": "query",
            "text": "second",
            "kept": 1,
            "of": 2,
            "nearest_before": {"id": "a", "text": "first"},
            "nearest_now": {"id": "c", "text": "third"},
        },
        {
            "id": "d",
            "cosine": 0.2,
            "tokens": 6,
            "input_type": "document",
            "text": "fourth",
            "kept": 1,
            "of": 2,
            "nearest_before": {"id": "c", "text": "third"},
            "nearest_now": {"id": "a", "text": "first"},
        },
    ]


def test_a_single_text_has_no_neighbour() -> None:
    alone = neighbours.find(np.ones((1, 3), np.float32), 10)
    [found] = worst(np.array([0.5]), ROWS[:1], [3], alone, alone)
    assert (found["kept"], found["of"], found["nearest_now"]) == (None, 0, None)


def test_an_excerpt_is_one_line_of_160_characters() -> None:
    assert excerpt("a\n\n  b") == "a b"
    assert excerpt("x" * 160) == "x" * 160
    assert excerpt("x" * 161) == "x" * 159 + "…"
