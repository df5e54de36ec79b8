"""Nodes and initializers of one graph, made one by one with ``onnx_ir``.

Weights are never read here. An initializer that stands for a stored tensor holds the file's name,
the offset and the length of its bytes in the variant's safetensors, so a graph is small whatever
the model's size.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from lowmem.artifact.manifest import FORMAT
from lowmem.artifact.tensors import StoredTensor

CONTRIB = "com.microsoft"
"""Domain of the operators that ONNX Runtime adds to the standard."""

# The oldest operator set with all that is used here. Every node of it has a CUDA kernel, which is
# not so with 21 (https://github.com/microsoft/onnxruntime/issues/26065).
_OPSET = 18
_IR_VERSION = 8

_DTYPES = {
    "F32": ir.DataType.FLOAT,
    "F16": ir.DataType.FLOAT16,
    "BF16": ir.DataType.BFLOAT16,
    "I8": ir.DataType.INT8,
    "U8": ir.DataType.UINT8,
}


class Builder:
    """One graph while it grows; nodes stand in the order in which they are added."""

    def __init__(self) -> None:
        self._inputs: list[ir.Value] = []
        self._nodes: list[ir.Node] = []
        self._initializers: dict[str, ir.Value] = {}
        self._paths: Counter[str] = Counter()

    def input(self, name: str, dtype: ir.DataType, shape: Sequence[str | int]) -> ir.Value:
        """Adds an input of the graph; a dimension given by name may have any size."""
        value = ir.val(name, dtype, shape)
        self._inputs.append(value)
        return value

    def at(self, path: str) -> Scope:
        """Adds nodes under a path, ``/model/layers.0/attn/q_proj``."""
        return Scope(self, path)

    def node(
        self,
        path: str,
        operator: str,
        inputs: Sequence[ir.Value | None],
        attributes: dict[str, Any],
        domain: str,
        outputs: int,
    ) -> ir.Value:
        """Adds a node and returns its first output.

        Its name is the path and the operator's type, and a number from the second such node on.
        """
        name = f"{path}/{operator}"
        self._paths[name] += 1
        if self._paths[name] > 1:
            name += f"_{self._paths[name] - 1}"
        values = [ir.Value(name=f"{name}/output_{number}") for number in range(outputs)]
        self._nodes.append(
            ir.node(operator, inputs, attributes, domain=domain, outputs=values, name=name)
        )
        return values[0]

    def constant(self, array: NDArray[Any], name: str = "") -> ir.Value:
        """An initializer inside the graph file; without a name, equal ones are one."""
        if not name:
            values = "_".join(map(str, array.ravel().tolist()))
            name = f"/constants/{array.dtype}/{array.ndim}d/{values}"
        return self._initializer(ir.tensor(array, name=name))

    def stored(self, name: str, tensor: StoredTensor, dtype: str, shape: Sequence[int]) -> ir.Value:
        """An initializer whose bytes are those of a stored tensor, made once for each name.

        Args:
            name: The initializer's name.
            tensor: Where the bytes lie, in a file beside the graph.
            dtype: What the graph takes them for: F32, F16, BF16, I8 or U8.
            shape: The shape that the graph gives them.
        """
        return self._initializer(
            ir.ExternalTensor(
                tensor.path.name,
                tensor.offset,
                tensor.spec.nbytes,
                _DTYPES[dtype],
                shape=ir.Shape(shape),
                name=name,
            )
        )

    def model(self, output: ir.Value) -> ir.Model:
        """The finished model."""
        graph = ir.Graph(
            self._inputs,
            [output],
            nodes=self._nodes,
            initializers=list(self._initializers.values()),
            opset_imports={"": _OPSET, CONTRIB: 1},
            name="model",
        )
        return ir.Model(
            graph,
            ir_version=_IR_VERSION,
            producer_name="lowmem",
            producer_version=str(FORMAT),
        )

    def _initializer(self, tensor: ir.TensorProtocol) -> ir.Value:
        assert tensor.name is not None
        value = self._initializers.get(tensor.name)
        if value is None:
            value = ir.val(tensor.name, const_value=tensor)
            self._initializers[tensor.name] = value
        return value


@dataclass(frozen=True)
class Scope:
    """Adds nodes to one place of a graph; calling it adds one and returns its first output."""

    builder: Builder
    path: str

    def __call__(
        self,
        operator: str,
        *inputs: ir.Value | None,
        domain: str = "",
        outputs: int = 1,
        **attributes: Any,
    ) -> ir.Value:
        """Adds a node.

        Args:
            operator: The operator's type.
            *inputs: Its inputs in order, None for one that is left out.
            domain: The operator set, ``CONTRIB`` or the standard one.
            outputs: How many outputs the node has.
            **attributes: Attributes by name.
        """
        return self.builder.node(self.path, operator, inputs, attributes, domain, outputs)

    def cast(self, value: ir.Value, dtype: ir.DataType) -> ir.Value:
        """The value in another dtype."""
        return self("Cast", value, to=dtype)

    def int64(self, *values: int) -> ir.Value:
        """A constant list of sizes, axes or indices."""
        return self.builder.constant(np.array(values, np.int64))

    def scalar(self, value: int | float) -> ir.Value:
        """A constant without dimensions: int64 for an int, float32 for a float."""
        dtype = np.int64 if isinstance(value, int) else np.float32
        return self.builder.constant(np.array(value, dtype))


def save(model: ir.Model, path: Path) -> None:
    """Writes a model; the same model gives the same bytes. External data is not touched."""
    path.write_bytes(ir.to_proto(model).SerializeToString(deterministic=True))
