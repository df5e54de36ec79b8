"""NV-Embed's latent attention as nodes, in float32 in every compute.

Keys and values of the latents are constants, which no optimizer folds where weights stay 16 bits
wide: they are computed at export and lie in a file of their own beside the graphs. The MLP's
weights are those of the variant.

Shape letters: P pooled tokens, H hidden_size, N latents.
"""

from __future__ import annotations

from dataclasses import replace

import onnx_ir as ir

from export.graph.builder import CONTRIB, Builder, Scope
from lowmem.artifact.latent_attention import ATTENTION, LAYER_NORM_EPS, MLP
from lowmem.artifact.tensors import StoredTensor, TensorSpec, header_bytes, read_header
from lowmem.artifact.weights import Checkpoint
from lowmem.compute.latent_attention import fold

FOLDED = "latent_attention.safetensors"


def write_folded(checkpoint: Checkpoint) -> None:
    """Writes the file that the nodes take keys and values from, float32 ``[heads * N, H]`` each."""
    shape = checkpoint.config.latent_attention
    assert shape is not None
    folded = fold(checkpoint.latent_attention(), shape, "cpu")
    specs = {
        name: TensorSpec("F32", tuple(tensor.shape))
        for name, tensor in zip(("keys", "values"), folded, strict=True)
    }
    with (checkpoint.directory / FOLDED).open("xb") as file:
        file.write(header_bytes(specs))
        for tensor in folded:
            file.write(tensor.numpy().data)


def add_latent_attention(builder: Builder, checkpoint: Checkpoint, hidden: ir.Value) -> ir.Value:
    """Adds the layer.

    Args:
        builder: The graph.
        checkpoint: The variant, with the file of ``write_folded``.
        hidden: Hidden states behind the final norm, float32 ``[P, H]``.

    Returns:
        float32 ``[P, H]``.
    """
    layer = _Layer(builder, checkpoint)
    return layer.add_mlp(layer.add_attention(hidden))


class _Layer:
    def __init__(self, builder: Builder, checkpoint: Checkpoint) -> None:
        assert checkpoint.config.latent_attention is not None
        self._builder = builder
        self._checkpoint = checkpoint
        self._config = checkpoint.config.latent_attention
        self._hidden_size = checkpoint.config.hidden_size

    def add_attention(self, hidden: ir.Value) -> ir.Value:
        """Each token's attention to the latents, added to it."""
        nodes = self._builder.at("/model/pooling/latent_attention/attn")
        folded = read_header(self._checkpoint.directory / FOLDED)
        keys, values = (
            self._builder.stored(f"latent_attention.{name}", tensor, "F32", tensor.shape)
            for name, tensor in folded.items()
        )
        scores = nodes("Gemm", self._norm(nodes, hidden, f"{ATTENTION}norm"), keys, transB=1)
        latents = self._config.num_latents_value
        by_head = nodes("Reshape", scores, nodes.int64(-1, self._config.num_cross_heads, latents))
        weights = nodes("Softmax", by_head, axis=-1)
        weights = nodes("Reshape", weights, nodes.int64(-1, self._config.num_cross_heads * latents))
        return nodes("Add", hidden, nodes("MatMul", weights, values))

    def add_mlp(self, hidden: ir.Value) -> ir.Value:
        """The gated MLP, added to its input."""
        nodes = self._builder.at("/model/pooling/latent_attention/mlp")
        normed = self._norm(nodes, hidden, f"{MLP}norm")
        inner = self._config.inner_size(self._hidden_size)
        raised, gate = (
            nodes(
                "Gemm",
                normed,
                self._rows(nodes, f"{MLP}fn.net.0.weight", first, inner),
                self._rows(nodes, f"{MLP}fn.net.0.bias", first, inner),
                transB=1,
            )
            for first in (0, inner)
        )
        gated = nodes("Mul", raised, nodes("Gelu", gate, domain=CONTRIB))
        down = (self._rows(nodes, f"{MLP}fn.net.2.{part}") for part in ("weight", "bias"))
        return nodes("Add", hidden, nodes("Gemm", gated, *down, transB=1))

    def _norm(self, nodes: Scope, hidden: ir.Value, name: str) -> ir.Value:
        weight, bias = (self._rows(nodes, f"{name}.{part}") for part in ("weight", "bias"))
        return nodes("LayerNormalization", hidden, weight, bias, axis=-1, epsilon=LAYER_NORM_EPS)

    def _rows(self, nodes: Scope, name: str, first: int = 0, count: int | None = None) -> ir.Value:
        """A stored tensor, or rows of it, as float32."""
        tensor = self._checkpoint.tensors[name]
        part = tensor if count is None else _slice(tensor, first, count)
        label = name if count is None else f"{name}.{first}"
        value = self._builder.stored(label, part, part.dtype, part.shape)
        return value if part.dtype == "F32" else nodes.cast(value, ir.DataType.FLOAT)


def _slice(tensor: StoredTensor, first: int, count: int) -> StoredTensor:
    """Some of a tensor's rows, which lie together."""
    row_bytes = tensor.nbytes // tensor.shape[0]
    return replace(
        tensor, shape=(count, *tensor.shape[1:]), offset=tensor.offset + first * row_bytes
    )
