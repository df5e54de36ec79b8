"""Errors that say what is missing, and what is broken."""

import pytest

from lowmem.errors import import_failure


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (
            ModuleNotFoundError("No module named 'onnxruntime'", name="onnxruntime"),
            "which is not installed: pip install 'lowmem[cpu]'",
        ),
        (
            ModuleNotFoundError("No module named 'flatbuffers'", name="flatbuffers"),
            "which cannot be imported: No module named 'flatbuffers'",
        ),
        (
            ImportError("libcudart.so.12: cannot open shared object file\n", name="onnxruntime"),
            "which cannot be imported: libcudart.so.12: cannot open shared object file",
        ),
    ],
)
def test_a_package_that_is_broken_is_not_called_missing(error: ImportError, said: str) -> None:
    found = import_failure(error, "onnxruntime", "onnxruntime", "cpu", "an onnxruntime plan")
    assert str(found) == f"an onnxruntime plan needs the package onnxruntime, {said}"
