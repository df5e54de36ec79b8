import pytest

from lowmem.cli.options import parse_size, size_text, wrapped
from lowmem.errors import InputError


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("4096", 4096),
        ("3G", 3 * 2**30),
        ("1.5 GiB", 3 * 2**29),
        ("800mb", 800 * 2**20),
        (" 2K ", 2048),
        ("0.5T", 2**39),
    ],
)
def test_a_size_is_a_number_and_a_unit(text: str, size: int) -> None:
    assert parse_size(text, "--max-memory") == size


@pytest.mark.parametrize("text", ["", "G", "-1G", "0", "1e9", "3 GG", "3X", "1.5.2G", "9" * 40])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="--max-memory must be a size such as 3G or 800M, got"):
        parse_size(text, "--max-memory")


def test_sizes_are_shown_in_units_of_1024() -> None:
    assert [size_text(n) for n in (0, 1023, 2048, 5 * 2**20, 3 * 2**29)] == [
        *("0 B", "1023 B", "2 KiB", "5 MiB", "1.50 GiB"),
    ]


def test_lines_have_at_most_80_columns_and_words_stay_whole() -> None:
    text = "tasks " + ", ".join(f"Task-{number}" for number in range(30))
    lines = wrapped(text, "  ", "    ").splitlines()
    assert max(map(len, lines)) <= 80
    assert [line[:5] for line in lines[:2]] == ["  tas", "    T"]
    assert " ".join("\n".join(lines).split()) == text
