"""The whole model as a graph: embedding, layers, final norm, pooling.

The residual stream, norms and pooling are float32 in every compute. In the last layer everything
behind attention runs on the pooled tokens alone.

Shape letters: B texts, S columns of the inputs, T real tokens, P pooled tokens.
"""

from __future__ import annotations

import onnx_ir as ir

from export.graph.attention import Attention
from export.graph.builder import CONTRIB, Builder
from export.graph.latent_attention import add_latent_attention
from export.graph.linears import Linears, Rows, float32, stored
from export.graph.packing import Packing, pack
from lowmem.artifact.contract import Contract
from lowmem.artifact.weights import EMBEDDING, FINAL_NORM, Checkpoint

# What sentence-transformers puts in the place of a smaller length before it divides by it.
_SMALLEST_LENGTH = 1e-12


def build(checkpoint: Checkpoint, contract: Contract, compute: str) -> ir.Model:
    """One variant's graph.

    Args:
        checkpoint: The variant.
        contract: Attention, pooling, and whether vectors have unit length.
        compute: ``fp32``, ``fp16`` or ``int8``: the arithmetic of the linears. With ``fp16``
            attention is float16 too, for its operator has no float32 kernel on CUDA.
    """
    graph = _Decoder(checkpoint, contract, compute)
    hidden = graph.embed()  # [T, hidden]
    last = checkpoint.config.num_hidden_layers - 1
    for layer in range(last):
        hidden = graph.layer(layer, hidden)
    hidden = graph.layer(last, hidden, pooled_only=True)  # [P, hidden]
    return graph.builder.model(graph.pool(hidden))


class _Decoder:
    def __init__(self, checkpoint: Checkpoint, contract: Contract, compute: str) -> None:
        self.builder = Builder()
        self._checkpoint = checkpoint
        self._contract = contract
        self._is_half = compute == "fp16"
        self._packing: Packing = pack(self.builder, contract.pooling)
        self._linears = Linears(self.builder, checkpoint, compute)
        self._attention = Attention(
            self.builder,
            checkpoint.config,
            self._packing,
            contract.is_causal,
            ir.DataType.FLOAT16 if self._is_half else ir.DataType.FLOAT,
        )

    def embed(self) -> ir.Value:
        """Token embeddings, float32 ``[T, hidden]``."""
        nodes = self.builder.at("/model/embed_tokens")
        table = stored(self.builder, self._checkpoint, EMBEDDING)
        rows = nodes("Gather", table, self._packing.input_ids)
        return rows if self._checkpoint.dtype == "F32" else nodes.cast(rows, ir.DataType.FLOAT)

    def layer(self, layer: int, hidden: ir.Value, pooled_only: bool = False) -> ir.Value:
        """One layer, float32 ``[T, hidden]`` to the same, or to ``[P, hidden]`` if pooled only."""
        path, packing, linears = f"/model/layers.{layer}", self._packing, self._linears
        normed = self._norm(f"{path}/input_layernorm", f"layers.{layer}.input_layernorm", hidden)
        inputs = Rows(self.builder, f"{path}/attn/input", normed)
        query, key, value = (
            linears.add(f"{path}/attn/{name}", inputs, layer, f"self_attn.{name}")
            for name in ("q_proj", "k_proj", "v_proj")
        )
        mixed = self._attention.add(f"{path}/attn", query, key, value)  # [B, S, query size]

        places = packing.pooled_places if pooled_only else packing.places
        mixed = self.builder.at(f"{path}/attn")("GatherND", mixed, places)
        inputs = Rows(self.builder, f"{path}/attn/output", mixed, self._is_half)
        projected = linears.add(f"{path}/attn/o_proj", inputs, layer, "self_attn.o_proj")
        if pooled_only:
            hidden = self.builder.at(f"{path}/attn")("Gather", hidden, packing.pooled)
        hidden = self._add(f"{path}/attn", hidden, projected)

        norm = f"layers.{layer}.post_attention_layernorm"
        normed = self._norm(f"{path}/post_attention_layernorm", norm, hidden)
        inputs = Rows(self.builder, f"{path}/mlp/input", normed)
        nodes = self.builder.at(f"{path}/mlp")
        gate = linears.add(f"{path}/mlp/gate_proj", inputs, layer, "mlp.gate_proj")
        gate = nodes("QuickGelu", gate, domain=CONTRIB, alpha=1.0)  # SiLU
        up = linears.add(f"{path}/mlp/up_proj", inputs, layer, "mlp.up_proj")
        inputs = Rows(self.builder, f"{path}/mlp/output", nodes("Mul", gate, up), self._is_half)
        down = linears.add(f"{path}/mlp/down_proj", inputs, layer, "mlp.down_proj")
        return self._add(f"{path}/mlp", hidden, down)

    def pool(self, hidden: ir.Value) -> ir.Value:
        """Final norm and pooling, ``[P, hidden]`` to ``sentence_embedding`` ``[B, hidden]``."""
        normed = self._norm("/model/norm", FINAL_NORM.removesuffix(".weight"), hidden)
        if self._contract.pooling == "latent_attention":
            normed = add_latent_attention(self.builder, self._checkpoint, normed)
        nodes = self.builder.at("/model/pooling")
        operator = "Mul" if self._contract.pooling == "lasttoken" else "MatMul"
        pooled = nodes(operator, self._packing.shares, normed)
        if self._contract.normalize_embeddings:
            length = nodes("ReduceL2", pooled, nodes.int64(-1), keepdims=1)
            pooled = nodes("Div", pooled, nodes("Max", length, nodes.scalar(_SMALLEST_LENGTH)))
        pooled.name = "sentence_embedding"
        pooled.dtype = ir.DataType.FLOAT
        pooled.shape = ir.Shape(("batch", self._checkpoint.config.hidden_size))
        return pooled

    def _norm(self, path: str, module: str, hidden: ir.Value) -> ir.Value:
        """RMSNorm in float32 (https://arxiv.org/abs/1910.07467)."""
        weight = float32(self.builder, self._checkpoint, f"{module}.weight", path)
        return self.builder.at(path)(
            "SimplifiedLayerNormalization",
            hidden,
            weight,
            axis=-1,
            epsilon=self._checkpoint.config.rms_norm_eps,
            stash_type=1,
        )

    def _add(self, path: str, hidden: ir.Value, change: ir.Value) -> ir.Value:
        nodes = self.builder.at(path)
        if self._is_half:
            change = nodes.cast(change, ir.DataType.FLOAT)
        return nodes("Add", hidden, change)
