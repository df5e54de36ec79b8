"""Whether ONNX Runtime's integer kernels are exact on this machine.

On x86 without VNNI a product of uint8 and int8 is summed in pairs of 16 bits, which saturates:
results are wrong by thousands, with no error. Sessions ask for other kernels there. But before an
``int8`` plan is believed, its operators multiply extreme values here, through a session like any
other, and every result must be exact.

The models are a few fields of protobuf, written out by hand (``onnx.proto`` of
https://github.com/onnx/onnx), so that the runtime needs neither ``onnx`` nor ``onnx_ir``.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lowmem.artifact.formats import Format, Int8Channel, IntGrouped
from lowmem.artifact.formats.int_grouped import pack
from lowmem.compute.onnx_engine import import_onnxruntime, session_options

_IR_VERSION = 8
_OPSET = 18
_CONTRIB = "com.microsoft"
_DATA_TYPES = {"float32": 1, "uint8": 2, "int8": 3}  # TensorProto.DataType
_INT_ATTRIBUTE = 2  # AttributeProto.AttributeType

# One row is a matrix times a vector, which has kernels of its own.
_ROWS = (1, 3, 64)

_Field = tuple[int, int | str | bytes]
"""Number and value of one field of a protobuf message."""


def is_exact(formats: Iterable[Format], threads: int) -> bool:
    """Whether the operators that multiply codes of these formats by rounded inputs are exact.

    Args:
        formats: Formats of a variant's linears.
        threads: CPU threads of the session.

    Raises:
        BackendError: onnxruntime is not installed.
    """
    different = set(formats)
    channels = any(isinstance(form, Int8Channel) for form in different)
    groups = [form for form in different if isinstance(form, IntGrouped)]
    return (not channels or matmul_integer_is_exact(threads)) and all(
        matmul_nbits_is_exact(form.bits, form.group_size, threads) for form in groups
    )


def matmul_integer_is_exact(threads: int) -> bool:
    """Whether 8-bit activations times 8-bit weights are exact, as ``int8`` variants need it.

    Args:
        threads: CPU threads of the session.

    Raises:
        BackendError: onnxruntime is not installed.
    """
    out_features, in_features = 37, 259  # no multiple of any kernel's tile
    weights = _extremes((-127, 127, -128, 0), (out_features, in_features), np.int8)
    model = _model(
        "QGemm",
        ["input", "one", "middle", "weight", "scales", "zeros"],
        {"transB": 1},
        {
            "one": np.float32(1),
            "middle": np.uint8(128),
            "weight": weights,
            "scales": np.ones(out_features, np.float32),
            "zeros": np.zeros(out_features, np.int8),
        },
        "uint8",
        in_features,
    )
    inputs = [_extremes((255, 0, 1, 128), (rows, in_features), np.uint8) for rows in _ROWS]
    return _is_exact(model, inputs, 128, weights, threads)


def matmul_nbits_is_exact(bits: int, group_size: int, threads: int) -> bool:
    """Whether ``MatMulNBits`` with rounded activations is exact, as grouped codes need it.

    Every group of the inputs holds 127 or -127, so that its scale is 1 and rounding changes
    nothing.

    Args:
        bits: Width of a code, 4 or 8.
        group_size: Features per scale; the operator calls it ``block_size``.
        threads: CPU threads of the session.

    Raises:
        BackendError: onnxruntime is not installed.
    """
    # At most 512 features: the kernels sum unsigned codes, 512 * 127 * 255 < 2^24.
    out_features, groups = 37, min(3, 512 // group_size)
    in_features = groups * group_size
    middle = 1 << (bits - 1)
    weights = _extremes((-middle, middle - 1, 0, 1 - middle), (out_features, in_features), np.int8)
    packed = pack(weights, bits).view(np.uint8)
    model = _model(
        "MatMulNBits",
        ["input", "weight", "scales"],
        {
            "K": in_features,
            "N": out_features,
            "bits": bits,
            "block_size": group_size,
            "accuracy_level": 4,
        },
        {
            "weight": packed.reshape(out_features, groups, -1),
            "scales": np.ones(out_features * groups, np.float32),
        },
        "float32",
        in_features,
    )
    inputs = [_extremes((127, -127, -126, 0), (rows, in_features), np.float32) for rows in _ROWS]
    for values in inputs:
        values[:, ::group_size] = 127
    return _is_exact(model, inputs, 0, weights, threads)


def _extremes(
    values: Sequence[int], shape: tuple[int, int], dtype: type[np.generic]
) -> NDArray[Any]:
    """Rows of one value, of two in turn, and of all in a random order."""
    random = np.random.default_rng(0)
    array = random.choice(np.array(values, dtype), shape)
    for row in range(0, shape[0], 3):
        array[row] = values[(row // 3) % len(values)]
        if row + 1 < shape[0]:
            array[row + 1, ::2], array[row + 1, 1::2] = values[0], values[1]
    return array


def _is_exact(
    model: bytes,
    inputs: Sequence[NDArray[Any]],
    middle: int,
    weights: NDArray[np.int8],
    threads: int,
) -> bool:
    """Whether the model gives (input - middle) times the weights transposed, to the last bit."""
    onnxruntime = import_onnxruntime("cpu")
    options = session_options(onnxruntime, threads)
    session = onnxruntime.InferenceSession(
        model, options, providers=["CPUExecutionProvider"], enable_fallback=0
    )
    for values in inputs:
        exact = (values.astype(np.int64) - middle) @ weights.T.astype(np.int64)
        # Sums stay below 2^24, so float32 holds every one of them.
        if not np.array_equal(session.run(None, {"input": values})[0], exact):
            return False
    return True


def _model(
    operator: str,
    inputs: Sequence[str],
    attributes: dict[str, int],
    initializers: dict[str, Any],
    input_dtype: str,
    in_features: int,
) -> bytes:
    """A ``ModelProto`` of one contributed operator from ``input`` to a float32 ``output``."""
    node: list[_Field] = [(1, name) for name in inputs]
    node += [(2, "output"), (4, operator), (7, _CONTRIB)]
    node += [
        (5, _message((1, name), (3, value), (20, _INT_ATTRIBUTE)))
        for name, value in attributes.items()
    ]
    graph: list[_Field] = [(1, _message(*node)), (2, operator)]
    graph += [(5, _tensor(name, np.asarray(value))) for name, value in initializers.items()]
    graph += [
        (11, _value("input", input_dtype, _message((2, "rows")), in_features)),
        (12, _value("output", "float32", _message((2, "rows")), None)),
    ]
    return _message(
        (1, _IR_VERSION),
        (2, "lowmem"),
        (7, _message(*graph)),
        (8, _message((1, ""), (2, _OPSET))),
        (8, _message((1, _CONTRIB), (2, 1))),
    )


def _tensor(name: str, array: NDArray[Any]) -> bytes:
    """A ``TensorProto``: dims, data_type, name, raw_data."""
    dims: list[_Field] = [(1, size) for size in array.shape]
    data = array.astype(array.dtype.newbyteorder("<")).tobytes()
    return _message(*dims, (2, _DATA_TYPES[array.dtype.name]), (8, name), (9, data))


def _value(name: str, dtype: str, rows: bytes, columns: int | None) -> bytes:
    """A ``ValueInfoProto`` of a matrix: name, type (tensor_type: elem_type, shape)."""
    second = _message((2, "columns")) if columns is None else _message((1, columns))
    shape = _message((1, rows), (1, second))
    return _message((1, name), (2, _message((1, _message((1, _DATA_TYPES[dtype]), (2, shape))))))


def _message(*fields: _Field) -> bytes:
    """Fields of a protobuf message: varints, and strings or messages with their length.

    Source: https://protobuf.dev/programming-guides/encoding.
    """
    encoded = b""
    for number, value in fields:
        if isinstance(value, int):
            encoded += _varint(number << 3) + _varint(value)
        else:
            data = value.encode() if isinstance(value, str) else value
            encoded += _varint(number << 3 | 2) + _varint(len(data)) + data
    return encoded


def _varint(value: int) -> bytes:
    """A number that is not negative, seven bits a byte, the lowest first."""
    encoded = bytearray()
    while value > 127:
        encoded.append(value & 127 | 128)
        value >>= 7
    return bytes([*encoded, value])
