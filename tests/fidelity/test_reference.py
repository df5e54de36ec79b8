import numpy as np

from lowmem import data
from lowmem.fidelity.reference import Reference

ROWS = tuple(data.Row(str(n), f"text {n}") for n in range(5))
WHOLE = Reference(
    "mine.txt",
    ROWS,
    (9, 20, 20, 3, 20),
    3,
    np.arange(20, dtype=np.float32).reshape(5, 4),
    "a" * 64,
)


def test_a_part_has_the_vectors_and_an_identity_of_its_own() -> None:
    part = WHOLE.part([1, 3])
    assert part.rows == (ROWS[1], ROWS[3])
    assert part.tokens == (20, 3)
    assert part.vectors.tolist() == WHOLE.vectors[[1, 3]].tolist()
    assert part.texts_sha256 == data.sha256(part.rows) != WHOLE.texts_sha256
    assert part.sha256 != WHOLE.sha256
    assert (part.name, part.all_texts) == ("mine.txt", 5)


def test_a_part_counts_its_own_texts_that_were_cut() -> None:
    assert WHOLE.part([0, 1, 3]).truncated == 1
    assert Reference("x", ROWS, WHOLE.tokens, 0, WHOLE.vectors, "").part([1]).truncated == 0


def test_a_part_of_everything_is_the_whole() -> None:
    assert WHOLE.part(range(5)) is WHOLE
