"""The nodes of one linear: one function per format.

Each reads the stored bytes as they lie. What an input has to be rounded or cast to is made once
for all linears that share it. ONNX Runtime calls our ``group_size`` ``block_size``.

Shape letters: T rows, K in_features, N out_features.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from export.graph.builder import CONTRIB, Builder
from lowmem.artifact.formats import Int8Channel, IntGrouped, Plain
from lowmem.artifact.weights import Checkpoint

# A 127th of it is still a normal float32, so a row of zeros has a scale, and codes of zero.
_SMALLEST_ABSMAX = 1e-30


class Rows:
    """The input of linears, ``[T, K]``, and the forms of it that they ask for.

    Args:
        builder: The graph.
        path: Where nodes that make another form stand.
        value: The rows.
        is_half: Whether they are float16 already, and not float32.
    """

    def __init__(self, builder: Builder, path: str, value: ir.Value, is_half: bool = False) -> None:
        self.value = value
        self._nodes = builder.at(path)
        self._half = value if is_half else None
        self._rounded: tuple[ir.Value, ir.Value] | None = None

    def half(self) -> ir.Value:
        """The rows as float16."""
        if self._half is None:
            self._half = self._nodes.cast(self.value, ir.DataType.FLOAT16)
        return self._half

    def rounded(self) -> tuple[ir.Value, ir.Value]:
        """Codes uint8 ``[T, K]`` with zero point 128, and scales float32 ``[T, 1]``.

        scale = absmax of the row / 127, code = value / scale rounded half to even, so codes less
        128 run from -127 to 127. No other row has a say in them.
        """
        if self._rounded is None:
            nodes, last = self._nodes, self._nodes.int64(-1)
            largest = nodes("ReduceMax", self.value, last, keepdims=1)
            smallest = nodes("ReduceMin", self.value, last, keepdims=1)
            floor = nodes.scalar(_SMALLEST_ABSMAX)
            absmax = nodes("Max", largest, nodes("Neg", smallest), floor)
            scales = nodes("Div", absmax, nodes.scalar(127.0))
            by_row = nodes("Reshape", scales, last)  # [T]
            middle = nodes("Add", nodes("Mul", by_row, nodes.scalar(0.0)), nodes.scalar(128.0))
            middle = nodes.cast(middle, ir.DataType.UINT8)
            self._rounded = nodes("QuantizeLinear", self.value, by_row, middle, axis=0), scales
        return self._rounded


class Linears:
    """Adds linears to a graph, each in its stored format.

    Args:
        builder: The graph.
        checkpoint: The variant.
        compute: ``fp32``, ``fp16``, or ``int8``: activations are rounded, by row where the
            format's codes have one scale per channel and it allows that, by block where they
            have one per group.
    """

    def __init__(self, builder: Builder, checkpoint: Checkpoint, compute: str) -> None:
        self._builder = builder
        self._checkpoint = checkpoint
        self._compute = compute
        self._shapes = checkpoint.config.linears()

    def add(self, path: str, rows: Rows, layer: int, name: str) -> ir.Value:
        """Adds one linear.

        Args:
            path: Where its nodes stand.
            rows: Its input.
            layer: Position of its layer.
            name: Its name within the layer, ``self_attn.q_proj``.

        Returns:
            ``[T, N]``, float16 where compute is ``fp16``, else float32.
        """
        module = f"layers.{layer}.{name}"
        form = self._checkpoint.formats[module]
        if isinstance(form, Plain):
            return self._plain(path, rows, module)
        if isinstance(form, IntGrouped):
            return self._int_grouped(path, rows, module, form, *self._shapes[name])
        assert isinstance(form, Int8Channel), form
        return self._int8_channel(path, rows, module, form, *self._shapes[name])

    def _plain(self, path: str, rows: Rows, module: str) -> ir.Value:
        nodes = self._builder.at(path)
        if self._compute == "fp16":
            weight = stored(self._builder, self._checkpoint, f"{module}.weight")
            return nodes("Gemm", rows.half(), weight, transB=1)
        weight = float32(self._builder, self._checkpoint, f"{module}.weight", path)
        return nodes("Gemm", rows.value, weight, transB=1)

    def _int_grouped(
        self,
        path: str,
        rows: Rows,
        module: str,
        form: IntGrouped,
        out_features: int,
        in_features: int,
    ) -> ir.Value:
        """``MatMulNBits`` over the packed bytes, whose layout is that operator's own.

        Accuracy level 0 multiplies in float32; 4 rounds activations to 8 bits per block.
        """
        groups = in_features // form.group_size
        name = f"{module}.weight_packed"
        packed = self._builder.stored(
            name,
            self._checkpoint.tensors[name],
            "U8",
            (out_features, groups, form.group_size * form.bits // 8),
        )
        scales = float32(
            self._builder,
            self._checkpoint,
            f"{module}.weight_scale",
            path,
            (out_features * groups,),
        )
        return self._builder.at(path)(
            "MatMulNBits",
            rows.value,
            packed,
            scales,
            domain=CONTRIB,
            K=in_features,
            N=out_features,
            bits=form.bits,
            block_size=form.group_size,
            accuracy_level=4 if self._compute == "int8" else 0,
        )

    def _int8_channel(
        self,
        path: str,
        rows: Rows,
        module: str,
        form: Int8Channel,
        out_features: int,
        in_features: int,
    ) -> ir.Value:
        """Integer products of rounded rows, or float32 products of the codes.

        ``QGemm`` takes ``[N, K]`` weights as they are stored, where ``MatMulInteger`` needs them
        transposed, and brings int32 to float32 with the channel's scale in the same pass.
        """
        nodes = self._builder.at(path)
        name = f"{module}.weight"
        codes = self._builder.stored(
            name, self._checkpoint.tensors[name], "I8", (out_features, in_features)
        )
        channel_scales = float32(
            self._builder, self._checkpoint, f"{module}.weight_scale", path, (out_features,)
        )
        if self._compute != "int8" or not form.rounds_activations:
            weight = nodes.cast(codes, ir.DataType.FLOAT)
            return nodes("Mul", nodes("Gemm", rows.value, weight, transB=1), channel_scales)
        # Of its own for every linear: with `session.x64quantprecision` ONNX Runtime puts a uint8
        # copy of a derived name in its place, and such a name may exist only once.
        zero_point = self._builder.constant(
            np.zeros(out_features, np.int8), f"{module}.weight_zero_point"
        )
        row_codes, row_scales = rows.rounded()
        product = nodes(
            "QGemm",
            row_codes,
            nodes.scalar(1.0),
            self._builder.constant(np.array(128, np.uint8)),
            codes,
            channel_scales,
            zero_point,
            domain=CONTRIB,
            transB=1,
        )
        return nodes("Mul", product, row_scales)


def stored(
    builder: Builder, checkpoint: Checkpoint, name: str, shape: tuple[int, ...] | None = None
) -> ir.Value:
    """A stored tensor in its own dtype, and its own shape unless another is given."""
    tensor = checkpoint.tensors[name]
    return builder.stored(name, tensor, tensor.dtype, shape or tensor.shape)


def float32(
    builder: Builder,
    checkpoint: Checkpoint,
    name: str,
    path: str,
    shape: tuple[int, ...] | None = None,
) -> ir.Value:
    """A stored float tensor as float32, through a ``Cast`` under the path if it needs one."""
    value = stored(builder, checkpoint, name, shape)
    if checkpoint.tensors[name].dtype == "F32":
        return value
    return builder.at(path).cast(value, ir.DataType.FLOAT)
