import numpy as np
import pytest

from lowmem.errors import InputError
from lowmem.fidelity import neighbours
from lowmem.fidelity.directions import Vectors


def rows(*values: list[float]) -> Vectors:
    return np.array(values, np.float32)


def test_the_nearest_stand_first_and_no_text_is_its_own_neighbour() -> None:
    found = neighbours.find(rows([1, 0], [3, 1], [1, 1], [0, 1]), 2)
    assert found.nearest.tolist() == [[1, 2], [0, 2], [1, 0], [2, 1]]


def test_of_equally_near_texts_the_first_stands_first() -> None:
    found = neighbours.find(rows([1, 0], [1, 1], [1, -1], [2, 2], [1, 1]), 4)
    assert found.nearest[0].tolist() == [1, 2, 3, 4]


def test_a_text_without_direction_comes_last_and_keeps_nothing() -> None:
    before = neighbours.find(rows([1, 0], [1, 1], [0, 1]), 1)
    now = neighbours.find(rows([1, 0], [np.nan, 1], [0, 1]), 1)
    assert before.nearest[:, 0].tolist() == [1, 0, 1]
    assert now.nearest[:, 0].tolist() == [2, 0, 0]
    assert neighbours.kept_shares(before, now, 1).tolist() == [0, 0, 0]


def test_shares_of_fewer_neighbours_come_from_the_same_search() -> None:
    generator = np.random.default_rng(3)
    reference = generator.standard_normal((60, 8)).astype(np.float32)
    vectors = reference + generator.standard_normal((60, 8)).astype(np.float32)
    ten = neighbours.find(reference, 10), neighbours.find(vectors, 10)
    one = neighbours.find(reference, 1), neighbours.find(vectors, 1)
    assert neighbours.overlap(*ten, 1) == neighbours.overlap(*one, 1)


def test_equal_texts_are_one_and_no_neighbours_of_one_another() -> None:
    """Vectors that have nothing in common keep no neighbours, however often a text stands."""
    generator = np.random.default_rng(4)
    first_rows = np.arange(330) // 11 * 11
    before, now = (
        neighbours.find(vectors[first_rows], 10, first_rows)
        for vectors in generator.standard_normal((2, 330, 8)).astype(np.float32)
    )
    assert not (before.nearest // 11 == np.arange(330)[:, None] // 11).any()
    assert (before.nearest % 11 == 0).all()
    kept = neighbours.overlap(before, now, 10)
    assert kept is not None
    assert kept < 0.5  # by chance a third
    assert neighbours.overlap(before, now, 29) is None
    alone = neighbours.find(np.ones((5, 2), np.float32), 3, np.zeros(5, np.int64))
    assert alone.nearest.shape == (5, 0)


def test_a_query_without_direction_finds_nothing() -> None:
    found = neighbours.search(rows([0, 0], [np.nan, 1], [0, 1]), rows([1, 1], [0, 1]), 2)
    assert found.tolist() == [[-1, -1], [-1, -1], [1, 0]]
    assert neighbours.shares_in_common(found, found).tolist() == [0, 0, 1]


def test_a_search_shows_the_nearest_documents_of_each_query() -> None:
    queries = rows([1, 0], [0, 1])
    documents = rows([0, 0], [1, 1], [2, 0], [0, 3])
    assert neighbours.search(queries, documents, 2).tolist() == [[2, 1], [3, 1]]
    assert neighbours.search(queries, documents, 10).tolist() == [[2, 1, 3, 0], [3, 1, 2, 0]]


def test_shares_in_common_do_not_ask_for_the_order() -> None:
    before, now = np.array([[1, 2, 3], [4, 5, 6]]), np.array([[3, 1, 2], [6, 7, 8]])
    assert neighbours.shares_in_common(before, now) == pytest.approx([1, 1 / 3])


def test_no_neighbour_is_refused() -> None:
    with pytest.raises(InputError, match="k must be at least 1, got 0"):
        neighbours.find(rows([1, 2], [3, 4]), 0)
