from collections import Counter

import pytest

from lowmem import data
from lowmem.data import Row
from lowmem.errors import InputError
from lowmem.fidelity.sample import stratified

ROWS = [
    *(Row(f"en-{n}", f"text {n}", lang="en") for n in range(60)),
    *(Row(f"de-{n}", f"Text {n}", lang="de") for n in range(30)),
    *(Row(f"q-{n}", f"question {n}", input_type="query", lang="en") for n in range(9)),
    Row("long", "long", lang="en"),
]
TOKENS = [20] * 99 + [3000]


def groups(places: list[int]) -> Counter[str]:
    return Counter(ROWS[place].id.split("-")[0] for place in places)


def test_a_part_has_every_group_and_as_much_of_each_as_the_whole() -> None:
    assert groups(stratified(ROWS, TOKENS, 8)).keys() == {"en", "de", "q", "long"}
    assert groups(stratified(ROWS, TOKENS, 50)) == {"en": 30, "de": 15, "q": 4, "long": 1}


@pytest.mark.parametrize("count", [10, 100, 400])
def test_many_small_groups_take_half_of_a_part_at_most(count: int) -> None:
    rows = [Row(f"en-{n}", f"text {n}", lang="en") for n in range(1900)]
    rows += [Row(f"x-{n}", f"text {n}", lang=f"x{n}") for n in range(100)]
    part = stratified(rows, [20] * len(rows), count)
    english = sum(rows[place].lang == "en" for place in part)
    assert count / 2 <= english < count


def test_a_smaller_part_is_in_a_larger_one_and_in_the_order_of_the_texts() -> None:
    before: set[int] = set()
    for count in range(1, 101):
        part = stratified(ROWS, TOKENS, count)
        assert part == sorted(part)
        assert len(part) == count
        assert before < set(part)
        before = set(part)


def test_the_order_of_the_texts_does_not_choose_them() -> None:
    turned = stratified(ROWS[::-1], TOKENS[::-1], 20)
    part = {ROWS[place].id for place in stratified(ROWS, TOKENS, 20)}
    assert {ROWS[::-1][place].id for place in turned} == part


def test_where_there_are_no_more_all_are_taken() -> None:
    rows = data.load("quick")
    assert stratified(rows, [10] * len(rows), 1000) == list(range(len(rows)))


def test_a_part_of_nothing_is_refused() -> None:
    with pytest.raises(InputError, match="must hold at least 1, got 0"):
        stratified(ROWS, TOKENS, 0)
