import hashlib
import logging
import re
from pathlib import Path

import numpy as np
import pytest

from lowmem.data import Row
from lowmem.errors import InputError
from lowmem.fidelity import given
from lowmem.fidelity.directions import Vectors
from lowmem.fidelity.npy_files import npy_bytes
from lowmem.fidelity.reference import Reference

FILE = Path("theirs.npy")
ROWS = tuple(Row(f"text-{n}", f"text {n}") for n in range(20))


def unit(count: int = 20, seed: int = 1) -> Vectors:
    vectors = np.random.default_rng(seed).standard_normal((count, 32))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def taken(vectors: Vectors, own: Vectors | None) -> Reference:
    blank = Reference("mine.txt", ROWS, tuple(range(1, 21)), 0, vectors, "")
    return given.replaced(blank, vectors, FILE, own)


def saved(path: Path, vectors: np.ndarray) -> Path:
    np.save(path / "theirs.npy", vectors)
    return path / "theirs.npy"


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_vectors_of_any_float_are_read_as_float32(tmp_path: Path, dtype: type) -> None:
    file = saved(tmp_path, unit().astype(dtype))
    found = given.read_vectors(file, 20, 32, True)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, unit(), atol=1e-3)


@pytest.mark.parametrize(
    ("vectors", "message"),
    [
        (unit(19), r"must be floats \[20, 32\], one for each text .* got float32 \[19, 32\]"),
        (unit()[:, :16], r"got float32 \[20, 16\]"),
        (np.zeros((20, 32), np.int8), r"got int8 \[20, 32\]"),
        (2 * unit(), r"have not the length 1 .*: 0, 1, 2, 3, 4, 5, 6, 7, 8, 9 and 10 more"),
        (np.where(np.arange(20)[:, None] == 7, np.nan, unit()), r"hold NaN or infinity: 7$"),
        (np.where(np.arange(20)[:, None] == 7, 0, unit()), r"are zero: 7$"),
    ],
)
def test_what_cannot_be_a_reference_of_the_texts_is_refused(
    tmp_path: Path, vectors: np.ndarray, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        given.read_vectors(saved(tmp_path, vectors), 20, 32, True)


def test_lengths_are_free_where_the_contract_does_not_normalise(tmp_path: Path) -> None:
    assert given.read_vectors(saved(tmp_path, 2 * unit()), 20, 32, False).shape == (20, 32)


def test_files_that_are_no_array_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.npy").write_text("no")
    np.savez(tmp_path / "b.npz", a=unit())
    for name in ("a.npy", "b.npz", "c.npy"):
        with pytest.raises(InputError, match=f"{name} cannot be read as"):
            given.read_vectors(tmp_path / name, 20, 32, True)


def test_vectors_of_the_same_run_are_taken_in_silence(caplog: pytest.LogCaptureFixture) -> None:
    vectors = unit().astype(np.float16).astype(np.float32)
    found = taken(vectors, unit()[given.checked(20)])
    assert found.given == "theirs.npy"
    assert found.sha256 == hashlib.sha256(npy_bytes(vectors)).hexdigest()
    assert caplog.records == []


def test_vectors_in_another_order_are_refused_with_the_one_that_fits() -> None:
    with pytest.raises(InputError) as caught:
        taken(unit()[::-1], unit()[given.checked(20)])
    found = re.search(r"text (\d+) .* vector (\d+) fits that text, so they are", str(caught.value))
    assert found is not None
    assert int(found[1]) + int(found[2]) == 19


def test_another_order_is_seen_where_all_texts_are_alike() -> None:
    alike = unit() + np.float32(1)
    alike /= np.linalg.norm(alike, axis=1, keepdims=True)
    own = alike[given.checked(20)]
    assert float((alike @ alike.T).min()) > given.LEAST_COSINE
    with pytest.raises(InputError, match="so they are in another order"):
        taken(alike[::-1], own)
    taken(alike, own)


def test_vectors_of_another_model_are_refused() -> None:
    with pytest.raises(
        InputError, match="of other texts, another model, or another input contract"
    ):
        taken(unit(seed=2), unit()[given.checked(20)])


def test_vectors_further_off_than_16_bits_are_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    noisy = unit() + 0.25 * unit(seed=3)
    noisy /= np.linalg.norm(noisy, axis=1, keepdims=True)
    taken(noisy.astype(np.float32), unit()[given.checked(20)])
    assert "theirs.npy differs from the reference computed here, by a cosine of 0.9" in caplog.text


def test_what_nothing_can_be_compared_with_is_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        taken(unit(), None)
    assert "nothing shows that its vectors are of these texts, in this order" in caplog.text


def test_the_texts_that_are_compared_are_spread() -> None:
    assert given.checked(20) == [0, 2, 5, 8, 10, 13, 16, 19]
    assert given.checked(3) == [0, 1, 2]
    assert given.checked(1) == [0]


def test_a_shape_is_refused_before_room_is_taken_for_it(tmp_path: Path) -> None:
    with (tmp_path / "theirs.npy").open("wb") as file:
        header = {"descr": "<f4", "fortran_order": False, "shape": (20, 10**13)}
        np.lib.format.write_array_header_1_0(file, header)
    with pytest.raises(InputError, match=r"got float32 \[20, 10000000000000\]"):
        given.read_vectors(tmp_path / "theirs.npy", 20, 32, True)
