"""A model's shape: what memory, layouts and arithmetic follow from."""

from __future__ import annotations

from dataclasses import dataclass

from lowmem.artifact.latent_attention import LatentAttentionConfig

MAX_SIZE = 2**31
NORMS = ("input_layernorm", "post_attention_layernorm")
"""Norms of one layer, in execution order."""


@dataclass(frozen=True)
class ModelConfig:
    """The shape of one decoder of the Llama and Mistral family; names are Hugging Face's.

    ``sliding_window`` is kept only to bound the sequence length: no text is ever longer, so the
    window never acts. ``bias`` does not exist in this family as supported here.

    Attributes:
        model_type: ``llama`` or ``mistral``: whose layers these are.
        is_stock: Whether the directory's ``model_type`` is one that stock loaders take, and so
            compute causal attention; not where ``is_causal`` is false, which newer ones follow.
        latent_attention: The shape of a pooling that has weights, or None.
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    max_position_embeddings: int
    sliding_window: int | None
    is_stock: bool = True
    latent_attention: LatentAttentionConfig | None = None

    @property
    def query_size(self) -> int:
        """Features of all query heads together."""
        return self.num_attention_heads * self.head_dim

    @property
    def key_value_size(self) -> int:
        """Features of all key (or value) heads together."""
        return self.num_key_value_heads * self.head_dim

    @property
    def longest_sequence(self) -> int:
        """Tokens up to which neither the positions nor the sliding window act as a limit."""
        return min(self.max_position_embeddings, self.sliding_window or MAX_SIZE)

    def linears(self) -> dict[str, tuple[int, int]]:
        """The linears of one layer, in execution order.

        Returns:
            Module name within the layer, such as ``self_attn.q_proj``, to
            ``(out_features, in_features)``.
        """
        hidden, inner = self.hidden_size, self.intermediate_size
        return {
            "self_attn.q_proj": (self.query_size, hidden),
            "self_attn.k_proj": (self.key_value_size, hidden),
            "self_attn.v_proj": (self.key_value_size, hidden),
            "self_attn.o_proj": (hidden, self.query_size),
            "mlp.gate_proj": (inner, hidden),
            "mlp.up_proj": (inner, hidden),
            "mlp.down_proj": (hidden, inner),
        }

    @property
    def largest_linear(self) -> int:
        """Weights of the largest linear."""
        return max(rows * columns for rows, columns in self.linears().values())

    @property
    def linear_weights(self) -> int:
        """Weights of all linears of all layers, in numbers (not bytes)."""
        layer = sum(rows * columns for rows, columns in self.linears().values())
        return layer * self.num_hidden_layers

    def operations(self, tokens: int, token_pairs: int) -> int:
        """Multiplications and additions of a pass that computes every token in every layer.

        Args:
            tokens: Tokens of all texts.
            token_pairs: Pairs of a token and one that it sees, over all texts.
        """
        attention = 4 * self.num_hidden_layers * self.query_size * token_pairs
        return 2 * self.linear_weights * tokens + attention
