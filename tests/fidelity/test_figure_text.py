"""Figures as people read them."""

import math

from hypothesis import given
from hypothesis import strategies as st

from lowmem.fidelity.figure_text import cosine_text, signed_text, size_text, speed_text, tiny_text


@given(st.floats(-1, 1), st.floats(0.5, 1))
def test_a_cosine_below_the_bound_is_shown_below_it(value: float, bound: float) -> None:
    assert (float(cosine_text(value, bound)) < bound) >= (value < bound)


def test_cosines_have_four_decimals_or_as_many_as_tell_them_from_the_bound() -> None:
    assert cosine_text(0.98765) == "0.9877"
    assert cosine_text(0.98499, 0.985) == "0.98499"
    assert cosine_text(0.985, 0.985) == "0.9850"
    assert cosine_text(math.nextafter(0.985, 0), 0.985) == "0.9849999999999999"


def test_sizes_and_speeds_have_three_digits_and_a_unit() -> None:
    assert [size_text(n) for n in (None, 0, 1000, 1536, 5 * 2**20, 14 * 2**30, 700 * 2**30)] == [
        *("–", "0 B", "1000 B", "1.50 KiB", "5.00 MiB", "14.0 GiB", "700 GiB")
    ]
    assert [speed_text(n) for n in (None, 0.5, 12.34, 99.96, 123.4, 12345.6)] == [
        *("–", "0.500", "12.3", "100.0", "123", "12,346")
    ]


def test_changes_have_a_sign_and_what_is_no_change_has_none() -> None:
    assert [signed_text(value, 3) for value in (None, 0.0123, -0.0123, -0.0001, 0.0)] == [
        *("–", "+0.012", "-0.012", "0.000", "0.000")
    ]
    assert [tiny_text(value) for value in (None, 0.0, 2.34e-12)] == ["–", "0", "2e-12"]
