"""From padded ids to packed tokens, inside the graph.

The mask alone says where texts lie, so padding on either side, or anywhere, gives the same vector:
positions count real tokens, and the last token is the last real one. Everything but attention runs
on the real tokens end to end; attention takes each text right-padded, as its operators want it.

No node asks for a shape: ``Shape`` answers on the CPU and would draw the nodes behind it there, in
a session that must not leave the GPU.

Shape letters: B texts, S columns of the inputs, T real tokens, P pooled tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from export.graph.builder import Builder, Scope

_SHAPE = ("batch", "sequence")


@dataclass(frozen=True)
class Packing:
    """Where tokens are before, during and after attention; int64 unless it says otherwise.

    Attributes:
        input_ids: ``[T]``.
        slots: ``[B, S]``, which real token stands in each right-padded slot. Slots behind a
            text's end repeat its last token: finite, and never read.
        places: ``[T, 2]``, text and position of each real token.
        columns: ``[B, S]``, 0 to S - 1 in each row.
        lengths: int32 ``[B]``, real tokens of each text, 1 for a text that has none.
        width: int32 scalar, S.
        pooled: ``[P]``, which real tokens are pooled.
        pooled_places: ``[P, 2]``, text and position of each pooled token.
        shares: float32, what each pooled token counts. For a mean ``[B, P]``: one over the number
            of pooled tokens of the text where the token is the text's own, else 0. For the last
            token ``[B, 1]``: 1, or 0 for a text without tokens.
    """

    input_ids: ir.Value
    slots: ir.Value
    places: ir.Value
    columns: ir.Value
    lengths: ir.Value
    width: ir.Value
    pooled: ir.Value
    pooled_places: ir.Value
    shares: ir.Value


def pack(builder: Builder, pooling: str) -> Packing:
    """Adds the inputs of the graph and the nodes that pack them.

    Args:
        builder: The graph.
        pooling: ``lasttoken``, or another, whose mean adds the input ``pooling_mask``.
    """
    input_ids = builder.input("input_ids", ir.DataType.INT64, _SHAPE)
    attention_mask = builder.input("attention_mask", ir.DataType.INT64, _SHAPE)
    nodes = builder.at("/model/packing")
    zero, one = nodes.scalar(0), nodes.scalar(1)

    mask = nodes.cast(attention_mask, ir.DataType.BOOL)
    counted = nodes.cast(mask, ir.DataType.INT64)
    lengths = nodes("ReduceSum", counted, nodes.int64(1), keepdims=1)  # [B, 1]
    ends = nodes("CumSum", lengths, zero)  # [B, 1], the index behind each text's last token
    last = nodes("Max", nodes("Sub", ends, one), zero)

    ones = nodes.cast(nodes("Equal", attention_mask, attention_mask), ir.DataType.INT64)
    columns = nodes("CumSum", ones, one, exclusive=1)
    still_to_come = nodes("Max", nodes("Sub", nodes("Sub", lengths, one), columns), zero)
    slots = nodes("Max", nodes("Sub", last, still_to_come), zero)

    real = nodes("Transpose", nodes("NonZero", mask), perm=[1, 0])  # [T, 2], text and column
    counted_so_far = nodes("GatherND", nodes("CumSum", counted, one), real)  # [T]
    positions = nodes("Unsqueeze", nodes("Sub", counted_so_far, one), nodes.int64(1))
    texts = nodes("Gather", real, nodes.int64(0), axis=1)  # [T, 1]
    places = nodes("Concat", texts, positions, axis=1)

    if pooling != "lasttoken":
        pooling_mask = builder.input("pooling_mask", ir.DataType.INT64, _SHAPE)
        wanted = nodes("GatherND", nodes.cast(pooling_mask, ir.DataType.BOOL), real)
        pooled = nodes("Reshape", nodes("NonZero", wanted), nodes.int64(-1))
        shares = _mean_shares(nodes, pooled, nodes("Sub", ends, lengths), ends)
    else:
        pooled = nodes("Reshape", last, nodes.int64(-1))
        shares = nodes.cast(nodes("Min", lengths, one), ir.DataType.FLOAT)

    at_least_one = nodes("Reshape", nodes("Max", lengths, one), nodes.int64(-1))
    width = nodes("ReduceMax", nodes("Add", columns, one), keepdims=0)
    return Packing(
        input_ids=nodes("GatherND", input_ids, real),
        slots=slots,
        places=places,
        columns=columns,
        lengths=nodes.cast(at_least_one, ir.DataType.INT32),
        width=nodes.cast(width, ir.DataType.INT32),
        pooled=pooled,
        pooled_places=nodes("Gather", places, pooled),
        shares=shares,
    )


def _mean_shares(nodes: Scope, pooled: ir.Value, begins: ir.Value, ends: ir.Value) -> ir.Value:
    """Weights of a mean, ``[B, P]``; begins and ends are ``[B, 1]``."""
    own = nodes("And", nodes("GreaterOrEqual", pooled, begins), nodes("Less", pooled, ends))
    own = nodes.cast(own, ir.DataType.FLOAT)
    counts = nodes("ReduceSum", own, nodes.int64(1), keepdims=1)
    return nodes("Div", own, nodes("Max", counts, nodes.scalar(1.0)))
