from collections.abc import Sequence

from lowmem import data
from lowmem.data.overlap import Shared, shared


def words(texts: Sequence[str]) -> list[list[int]]:
    return [[hash(word) for word in text.split()] for text in texts]


LONG = " ".join(f"w{n}" for n in range(20))


def test_thirteen_tokens_in_a_row_are_shared_and_twelve_are_not() -> None:
    thirteen = " ".join(LONG.split()[3:16]) + " other"
    twelve = " ".join(LONG.split()[3:15]) + " other"
    found = shared([("a", thirteen), ("b", twelve)], [LONG], words)
    # of the two runs of a and the one of b, one stands in the other text
    assert found == Shared(1, 2, 1 / 3, ("a",))


def test_a_short_text_is_compared_whole() -> None:
    found = shared([("a", "yeast ferments"), ("b", "yeast")], ["yeast ferments", LONG], words)
    assert found == Shared(1, 2, 0.0, ("a",))


def test_at_most_ten_are_named() -> None:
    found = shared([(str(n), LONG) for n in range(12)], [LONG], words)
    assert found.texts == 12
    assert found.runs == 1.0
    assert found.to_json()["ids"] == [str(n) for n in range(10)]


def test_the_probe_shares_nothing_with_calibration() -> None:
    texts = [(row.id, row.text) for row in data.load("probe")]
    found = shared(texts, [row.text for row in data.load("calibration")], words)
    assert found == Shared(0, len(texts), 0.0, ())
