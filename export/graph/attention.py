"""Attention between packed tokens, by the operators of ONNX Runtime.

Both take right-padded texts, so queries, keys and values are gathered to ``[B, S, features]``
before them. Causal attention is ``GroupQueryAttention``, which rotates by itself. It cannot look
forward, so bidirectional attention is ``MultiHeadAttention`` behind ``RotaryEmbedding``, with keys
and values repeated for the query heads that share them
(https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md).

Shape letters: B texts, S columns of the inputs, D head_dim.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from export.graph.builder import CONTRIB, Builder, Scope
from export.graph.packing import Packing
from lowmem.artifact.config import ModelConfig

# Added to the scores of slots behind a text's end: float16 holds it, and its exponential is 0.
_MASKED = -60000.0


class Attention:
    """Adds attention to a graph; what all layers share is made once.

    Args:
        builder: The graph.
        config: The model's shape.
        packing: Where tokens are.
        is_causal: Whether a token sees only itself and earlier ones.
        dtype: Of queries, keys and values: float32 or float16.
    """

    def __init__(
        self,
        builder: Builder,
        config: ModelConfig,
        packing: Packing,
        is_causal: bool,
        dtype: ir.DataType,
    ) -> None:
        self._builder = builder
        self._config = config
        self._packing = packing
        self._is_causal = is_causal
        nodes = builder.at("/model/rotary")
        self._last = nodes("Sub", packing.lengths, builder.constant(np.array(1, np.int32)))
        self._cos, self._sin = _rotation(nodes, config, packing, dtype)

    def add(self, path: str, query: ir.Value, key: ir.Value, value: ir.Value) -> ir.Value:
        """Adds attention of packed ``[T, features]`` states; returns ``[B, S, query size]``."""
        nodes = self._builder.at(path)
        query, key, value = (
            nodes("Gather", states, self._packing.slots) for states in (query, key, value)
        )
        return (self._causal if self._is_causal else self._bidirectional)(nodes, query, key, value)

    def _causal(self, nodes: Scope, query: ir.Value, key: ir.Value, value: ir.Value) -> ir.Value:
        # Versions of ONNX Runtime write to the second and third output whether they are there
        # or not.
        mixed = nodes(
            "GroupQueryAttention",
            query,
            key,
            value,
            None,
            None,
            self._last,
            self._packing.width,
            self._cos,
            self._sin,
            domain=CONTRIB,
            outputs=3,
            num_heads=self._config.num_attention_heads,
            kv_num_heads=self._config.num_key_value_heads,
            do_rotary=1,
            rotary_interleaved=0,
        )
        # A value is freed behind its last reader, and one without a reader when the pass ends:
        # unread, the keys and values of all layers would be held at once. So one slot is read.
        producer = mixed.producer()
        assert producer is not None
        for present in producer.outputs[1:]:
            nodes("Gather", present, nodes.scalar(0), axis=2)
        return mixed

    def _bidirectional(
        self, nodes: Scope, query: ir.Value, key: ir.Value, value: ir.Value
    ) -> ir.Value:
        heads, key_value_heads = (
            self._config.num_attention_heads,
            self._config.num_key_value_heads,
        )
        query = self._rotate(nodes, query, heads)
        key = self._rotate(nodes, key, key_value_heads)
        if heads != key_value_heads:
            key, value = (self._repeat(nodes, states) for states in (key, value))
        return nodes(
            "MultiHeadAttention",
            query,
            key,
            value,
            None,
            self._packing.lengths,
            domain=CONTRIB,
            num_heads=heads,
            unidirectional=0,
            mask_filter_value=_MASKED,
        )

    def _rotate(self, nodes: Scope, states: ir.Value, heads: int) -> ir.Value:
        return nodes(
            "RotaryEmbedding",
            states,
            self._packing.columns,
            self._cos,
            self._sin,
            domain=CONTRIB,
            num_heads=heads,
            rotary_embedding_dim=0,
            interleaved=0,
        )

    def _repeat(self, nodes: Scope, states: ir.Value) -> ir.Value:
        """``[B, S, key-value heads * D]`` to ``[B, S, heads * D]``, each head repeated in place."""
        config = self._config
        sharing = config.num_attention_heads // config.num_key_value_heads
        order = np.repeat(np.arange(config.num_key_value_heads), sharing)
        heads = nodes(
            "Reshape", states, nodes.int64(0, 0, config.num_key_value_heads, config.head_dim)
        )
        repeated = nodes("Gather", heads, nodes.int64(*order.tolist()), axis=2)
        return nodes("Reshape", repeated, nodes.int64(0, 0, config.query_size))


def _rotation(
    nodes: Scope, config: ModelConfig, packing: Packing, dtype: ir.DataType
) -> tuple[ir.Value, ir.Value]:
    """Cosines and sines of positions 0 to S - 1, ``[S, D / 2]``.

    Angles are float32 in every compute (https://arxiv.org/abs/2104.09864).
    """
    exponents = np.arange(0, config.head_dim, 2, dtype=np.float32) / np.float32(config.head_dim)
    frequencies = np.float32(1) / np.float32(config.rope_theta) ** exponents
    positions = nodes("Gather", packing.columns, nodes.scalar(0))  # [S]
    positions = nodes("Unsqueeze", nodes.cast(positions, ir.DataType.FLOAT), nodes.int64(1))
    angles = nodes(
        "Mul", positions, nodes.builder.constant(frequencies, "/model/rotary/frequencies")
    )
    cos, sin = nodes("Cos", angles), nodes("Sin", angles)
    if dtype == ir.DataType.FLOAT:
        return cos, sin
    return nodes.cast(cos, dtype), nodes.cast(sin, dtype)
