import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from lowmem.fidelity import directions, metrics, neighbours
from lowmem.fidelity.directions import Floats, Vectors

# Float64 products of up to 64 float32 numbers: 64 roundings of 1.1e-16 each, and some room.
EXACT = 1e-13

WHOLE = st.integers(-3, 3).map(float)  # small whole numbers, so that ties and zero rows are common


@st.composite
def pairs_of_vectors(
    draw: st.DrawFn, least: int = 1, elements: st.SearchStrategy[float] = WHOLE
) -> tuple[Vectors, Vectors]:
    shape = (draw(st.integers(least, 9)), draw(st.integers(1, 4)))
    arrays = hnp.arrays(np.float32, shape, elements=elements)
    return draw(arrays), draw(arrays)


FINITE = st.floats(width=32, allow_nan=False, allow_infinity=False)
ANY = st.floats(width=32)


def rows(*values: list[float]) -> Vectors:
    return np.array(values, np.float32)


def random_pair(count: int, size: int, noise: float = 0.3) -> tuple[Vectors, Vectors]:
    generator = np.random.default_rng(count)
    reference = generator.standard_normal((count, size)).astype(np.float32)
    return reference, reference + noise * generator.standard_normal((count, size), np.float32)


def slow_cosine(r: NDArray[np.float32], v: NDArray[np.float32]) -> float:
    left, right = [float(x) for x in r], [float(x) for x in v]
    if not all(map(math.isfinite, left + right)):
        return -1.0
    norms = math.sqrt(math.fsum(x * x for x in left)) * math.sqrt(math.fsum(x * x for x in right))
    return math.fsum(x * y for x, y in zip(left, right, strict=True)) / norms if norms else 0.0


def slow_nearest(vectors: Vectors, index: int, k: int) -> set[int]:
    others = [j for j in range(len(vectors)) if j != index]
    has_direction = [np.isfinite(row).all() and row.any() for row in vectors]
    near = [
        round(slow_cosine(vectors[index], row), 9) if has else -2.0
        for row, has in zip(vectors, has_direction, strict=True)
    ]
    return set(sorted(others, key=lambda j: (-near[j], j))[:k])


def slow_overlap(reference: Vectors, vectors: Vectors, k: int) -> float | None:
    if k >= len(reference) - 1:
        return None
    common = 0
    for i in range(len(reference)):
        if all(np.isfinite(side[i]).all() and side[i].any() for side in (reference, vectors)):
            common += len(slow_nearest(reference, i, k) & slow_nearest(vectors, i, k))
    return common / (k * len(reference))


def overlap(reference: Vectors, vectors: Vectors, k: int) -> float | None:
    before, now = neighbours.find(reference, k), neighbours.find(vectors, k)
    return neighbours.overlap(before, now, k)


def slow_ranks(values: list[float]) -> list[float]:
    return [
        sum(other < value for other in values) + (sum(other == value for other in values) + 1) / 2
        for value in values
    ]


def slow_spearman(reference: Vectors, vectors: Vectors) -> float | None:
    sides = []
    for side in (reference, vectors):
        pairs = [(i, j) for j in range(len(side)) for i in range(j)]
        sides.append(slow_ranks([round(slow_cosine(side[i], side[j]), 9) for i, j in pairs]))
    a, b = sides
    if len(set(a)) < 2 or len(set(b)) < 2:
        return None
    mean = math.fsum(a) / len(a)
    spread = [math.fsum((x - mean) ** 2 for x in side) for side in (a, b)]
    both = math.fsum((x - mean) * (y - mean) for x, y in zip(a, b, strict=True))
    return both / math.sqrt(spread[0] * spread[1])


def test_cosines_of_a_worked_example() -> None:
    reference = rows([3, 4], [1, 0], [1, 0], [2, 0], [0, 0])
    vectors = rows([4, 3], [0, 5], [-7, 0], [1, 0], [1, 1])
    assert metrics.cosines(reference, vectors).tolist() == pytest.approx([0.96, 0, -1, 1, 0])


@given(pairs_of_vectors(elements=FINITE))
def test_cosines_are_those_of_the_formula(pair: tuple[Vectors, Vectors]) -> None:
    got = metrics.cosines(*pair)
    expected = [slow_cosine(r, v) for r, v in zip(*pair, strict=True)]
    assert got.dtype == np.float64
    np.testing.assert_allclose(got, expected, rtol=0, atol=EXACT)


@given(pairs_of_vectors(elements=ANY))
def test_cosines_are_within_one_whatever_the_rows_hold(pair: tuple[Vectors, Vectors]) -> None:
    got = metrics.cosines(*pair)
    assert (np.abs(got) <= 1).all()


def test_cosines_do_not_depend_on_the_length_of_the_vectors() -> None:
    reference, vectors = random_pair(20, 16)
    scaled = vectors * np.float32(2) ** np.arange(-10, 10, dtype=np.float32)[:, None]
    assert np.array_equal(metrics.cosines(reference, vectors), metrics.cosines(reference, scaled))


def test_cosines_of_many_texts_are_those_of_each_alone() -> None:
    reference, vectors = random_pair(1100, 8)
    parts = [metrics.cosines(reference[i : i + 1], vectors[i : i + 1]) for i in range(1100)]
    np.testing.assert_allclose(
        metrics.cosines(reference, vectors), np.concatenate(parts), rtol=0, atol=EXACT
    )


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_row_that_is_not_finite_is_counted_and_has_the_cosine_of_the_opposite(
    bad: float,
) -> None:
    reference, vectors = rows([1, 0], [1, 0]), rows([1, bad], [1, 0])
    assert metrics.cosines(reference, vectors).tolist() == [-1, 1]
    assert metrics.cosines(vectors, reference).tolist() == [-1, 1]
    assert metrics.nonfinite(vectors) == 1
    assert metrics.nonfinite(reference) == 0


def test_overlap_of_a_worked_example() -> None:
    reference = rows([1, 0], [10, 1], [0, 1], [1, 10])  # 0 and 1 are near, and so are 2 and 3
    vectors = rows([1, 0], [1, 10], [0, 1], [10, 1])  # 1 and 3 have changed places
    assert overlap(reference, reference, 1) == 1.0
    assert overlap(reference, vectors, 1) == 0.0
    # 0 and 2 keep both 1 and 3; 1 keeps 3 of 0 and 3, and 3 keeps 1 of 2 and 1
    assert overlap(reference, vectors, 2) == 6 / 8
    # All others are among the three nearest, whatever the vectors are.
    assert overlap(reference, vectors, 3) is None


def test_of_equally_near_texts_the_first_is_the_neighbour() -> None:
    reference = rows([1, 0], [1, 1], [1, 1], [1, -1])  # 1, 2 and 3 are equally near to 0
    vectors = rows([1, 0], [-1, 0], [1, 1], [1, 1])  # now 2 and 3 are
    # the nearest of 0 to 3 are 1, 2, 1, 0 and then 2, 2, 3, 2
    assert overlap(reference, vectors, 1) == 1 / 4


def test_equal_texts_are_ties_wherever_they_stand() -> None:
    reference = random_pair(700, 40)[0]
    reference[350:] = reference[:350]
    assert overlap(reference, 3 * reference, 5) == 1.0


@given(pairs_of_vectors(least=2), st.integers(1, 12))
def test_overlap_is_that_of_the_slow_way(pair: tuple[Vectors, Vectors], k: int) -> None:
    assert overlap(*pair, k) == pytest.approx(slow_overlap(*pair, k), abs=EXACT)


@given(pairs_of_vectors(least=2, elements=st.sampled_from([math.nan, math.inf, 0.0, 1.0, -2.0])))
def test_rows_without_direction_share_no_neighbour(pair: tuple[Vectors, Vectors]) -> None:
    for k in (1, 3):
        assert overlap(*pair, k) == pytest.approx(slow_overlap(*pair, k), abs=EXACT)


def test_figures_do_not_depend_on_the_block_size(monkeypatch: pytest.MonkeyPatch) -> None:
    reference, vectors = random_pair(100, 6)
    whole = overlap(reference, vectors, 7), metrics.spearman(reference, vectors)
    monkeypatch.setattr(directions, "_BLOCK_ROWS", 7)
    parts = overlap(reference, vectors, 7), metrics.spearman(reference, vectors)
    assert whole == pytest.approx(parts, abs=EXACT)
    assert whole[0] == pytest.approx(slow_overlap(reference, vectors, 7), abs=EXACT)


def test_a_single_text_has_no_overlap_and_no_rank() -> None:
    assert overlap(rows([1, 2]), rows([1, 2]), 10) is None
    assert metrics.spearman(rows([1, 2]), rows([1, 2])) is None


def test_spearman_of_a_worked_example() -> None:
    reference = rows([1, 0], [3, 1], [0, 1])  # cosines 01 > 12 > 02
    assert metrics.spearman(reference, reference) == 1.0
    swapped = rows([0, 1], [3, 1], [1, 0])  # cosines 12 > 01 > 02: ranks 3 2 1 and 2 3 1
    assert metrics.spearman(reference, swapped) == pytest.approx(0.5)


@given(pairs_of_vectors(least=2))
def test_spearman_is_that_of_the_slow_way(pair: tuple[Vectors, Vectors]) -> None:
    expected = slow_spearman(*pair)
    assert metrics.spearman(*pair) == (expected if expected is None else pytest.approx(expected))


def test_equal_cosines_near_half_a_unit_of_the_twelfth_decimal_are_ties() -> None:
    # -13 / sqrt(276) = -0.78250804505749980..., twice, from products in another order
    vectors = rows([-1, -1, -3, -1], [-1, 1, 3, -1], [2, -1, 3, 3], [2, -3, -3, -1])
    reference = rows([0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 1, 1], [1, 1, 0, 0])
    assert metrics.spearman(reference, vectors) == pytest.approx(slow_spearman(reference, vectors))


def test_spearman_is_not_defined_where_all_pairs_are_equally_close() -> None:
    reference, vectors = random_pair(5, 4)
    assert metrics.spearman(reference, np.ones_like(vectors)) is None
    assert metrics.spearman(np.eye(5, 4, dtype=np.float32)[:4], vectors[:4]) is None
    assert metrics.spearman(reference[:2], vectors[:2]) is None


def test_spearman_of_many_texts_is_sampled_alike_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    reference, vectors = random_pair(1200, 6)
    whole = metrics.spearman(reference, vectors)
    monkeypatch.setattr(metrics, "SPEARMAN_TEXTS", 600)
    sampled = metrics.spearman(reference, vectors)
    assert sampled == metrics.spearman(reference, vectors)
    assert whole is not None
    # about 1 / sqrt(600), the spread of a mean over 600 texts
    assert sampled == pytest.approx(whole, abs=0.04)
    assert sampled != whole


@given(pairs_of_vectors(elements=ANY))
def test_no_figure_is_nan(pair: tuple[Vectors, Vectors]) -> None:
    reference, vectors = pair
    cosine = metrics.cosines(reference, vectors)
    count = len(reference)
    everything = [
        metrics.summary(cosine),
        metrics.buckets(
            cosine, tokens=[5] * count, languages=["en"] * count, input_types=["query"] * count
        ),
        overlap(reference, vectors, 10),
        metrics.spearman(reference, vectors),
        metrics.norm_error(vectors),
        metrics.nonfinite(vectors),
    ]
    json.dumps(everything, allow_nan=False)


def test_summary_of_a_worked_example() -> None:
    cosine = np.array([0.9, 1.0, 0.5, 0.8, 0.7])
    got = metrics.summary(cosine)
    # p5 stands at 0.05 * 4 = 0.2 of the way from 0.5 to 0.7, p1 at 0.04 of it
    expected = {"mean": 0.78, "median": 0.8, "p5": 0.54, "p1": 0.508, "min": 0.5}
    assert list(got) == list(expected)
    assert got == pytest.approx(expected)


@given(hnp.arrays(np.float64, st.integers(1, 50), elements=st.floats(-1, 1)))
def test_a_summary_is_ordered(cosine: Floats) -> None:
    got = metrics.summary(cosine)
    assert got["min"] <= got["p1"] <= got["p5"] <= got["median"] <= cosine.max()
    assert got["min"] - EXACT <= got["mean"] <= cosine.max() + EXACT


def test_buckets_stand_in_a_fixed_order_and_none_is_empty() -> None:
    got = metrics.buckets(
        np.array([0.9, 0.8, 0.7, 0.6, 0.5]),
        tokens=[5000, 16, 17, 1, 4096],
        languages=["fr", "", "de", "de", "fr"],
        input_types=["query", "document", "document", "document", "document"],
    )
    assert [(one["kind"], one["name"], one["count"]) for one in got] == [
        ("length", "1-16", 2),
        ("length", "17-64", 1),
        ("length", "1025-4096", 1),
        ("length", "4097+", 1),
        ("language", "de", 2),
        ("language", "fr", 2),
        ("input_type", "document", 4),
        ("input_type", "query", 1),
    ]
    assert got[0] == pytest.approx(
        {"kind": "length", "name": "1-16", "count": 2, "mean": 0.7, "p5": 0.61, "min": 0.6}
    )


def test_a_bucket_says_how_many_neighbours_its_texts_keep() -> None:
    got = metrics.buckets(
        np.ones(3),
        tokens=[5, 5, 5],
        languages=["de", "de", "fr"],
        input_types=["document"] * 3,
        kept=np.array([1.0, 0.5, 0.0]),
    )
    overlaps = {one["name"]: one["overlap"] for one in got}
    assert overlaps == {"1-16": 0.5, "de": 0.75, "fr": 0.0, "document": 0.5}


@given(st.lists(st.integers(1, 9000), min_size=1, max_size=30))
def test_every_text_is_in_the_length_bucket_that_its_name_states(tokens: list[int]) -> None:
    count = len(tokens)
    got = metrics.buckets(
        np.arange(count) / count, tokens=tokens, languages=[""] * count, input_types=[""] * count
    )
    for one in got:
        low, _, high = one["name"].rstrip("+").partition("-")
        inside = [n for n in tokens if int(low) <= n and (not high or n <= int(high))]
        assert one["count"] == len(inside)
    assert sum(one["count"] for one in got) == count
