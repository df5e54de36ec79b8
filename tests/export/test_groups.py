"""Writing behind the work: order, and errors that come late."""

import threading

import numpy as np
import pytest
import torch

from export.groups import _Behind, _read_ahead, _write, _write_tensor
from export.job import Job
from lowmem.artifact.formats import Int8Channel
from lowmem.artifact.tensors import RawTensor
from lowmem.errors import CapacityError

RAW = RawTensor("U8", np.zeros(1, np.uint8))


class Writer:
    """Writes nothing, and notes the names."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.may_go_on = threading.Event()

    def write(self, name: str, raw: RawTensor) -> None:
        assert self.may_go_on.wait(10)
        if name == "too much":
            raise CapacityError("the disk is full")
        self.names.append(name)


def test_a_tensor_is_written_while_the_next_one_is_made_and_all_are_there_in_the_end() -> None:
    writer = Writer()
    with _Behind() as behind:
        behind.do(_write, writer, {"a": RAW, "a_scale": RAW})
        assert writer.names == []
        writer.may_go_on.set()
        behind.do(_write, writer, {"b": RAW})
        assert writer.names[:2] == ["a", "a_scale"]
        behind.wait()
        assert writer.names == ["a", "a_scale", "b"]


def test_what_could_not_be_written_is_raised_by_the_next_call() -> None:
    writer = Writer()
    writer.may_go_on.set()
    with _Behind() as behind:
        behind.do(_write, writer, {"too much": RAW})
        with pytest.raises(CapacityError, match="the disk is full"):
            behind.do(_write, writer, {"b": RAW})
        behind.do(_write, writer, {"too much": RAW})
        with pytest.raises(CapacityError, match="the disk is full"):
            behind.wait()
        behind.wait()
        assert writer.names == []


def test_a_linear_is_quantized_while_the_one_before_it_is_written() -> None:
    """Its codes and its scales alike: only the next linear's wait for both."""
    writer = Writer()
    job = Job("int8", {}, {"a": Int8Channel(), "b": Int8Channel()}, None)
    weight = RawTensor("F16", np.ones((4, 8), np.float16))
    with _Behind() as behind:
        _write_tensor("a.weight", weight, job, writer, behind)  # type: ignore[arg-type]
        assert writer.names == []  # and yet it is back
        writer.may_go_on.set()
        _write_tensor("b.weight", weight, job, writer, behind)  # type: ignore[arg-type]
        behind.wait()
    assert writer.names == ["a.weight", "a.weight_scale", "b.weight", "b.weight_scale"]


@pytest.mark.usefixtures("three_threads")
def test_what_is_done_beside_the_arithmetic_has_no_helpers_that_would_slow_it() -> None:
    counts = []

    class Source:
        def tensor(self, name: str) -> RawTensor:
            counts.append(torch.get_num_threads())
            return RawTensor("F16", np.ones((4, 8), np.float16))

    list(_read_ahead(Source(), ["a", "b"], "F16"))  # type: ignore[arg-type]
    with _Behind() as behind:
        behind.do(lambda: counts.append(torch.get_num_threads()))
    assert counts == [1, 1, 1]
    assert torch.get_num_threads() == 3
