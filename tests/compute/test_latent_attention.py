"""Latent attention by itself: folded matrices, chunks and blocks change nothing."""

import numpy as np
import pytest
import torch
from torch import Tensor

from lowmem.artifact.latent_attention import LatentAttentionConfig
from lowmem.artifact.tensors import RawTensor
from lowmem.compute import latent_attention
from lowmem.compute.latent_attention import LatentAttention, fold
from lowmem.compute.pooling import latent_attention_pool, mean_pool
from tests.bidirectional import (
    LATENT_HEAD_DIM,
    LATENT_HEADS,
    LATENTS,
    plain_latent_attention,
    random_latents,
)
from tests.models import HIDDEN_SIZE
from tests.tolerances import PARITY_HIDDEN_STATES

CONFIG = LatentAttentionConfig(LATENTS, LATENT_HEADS, LATENT_HEAD_DIM)


@pytest.fixture
def tensors() -> dict[str, RawTensor]:
    return {
        f"latent_attention_model.{name}": RawTensor("F32", tensor.numpy())
        for name, tensor in random_latents(seed=2).items()
    }


@pytest.fixture
def layer(tensors: dict[str, RawTensor]) -> LatentAttention:
    return LatentAttention.load(tensors, CONFIG, "cpu")


def hidden_states(tokens: int) -> Tensor:
    return torch.randn(tokens, HIDDEN_SIZE, generator=torch.Generator().manual_seed(3))


def relative_error(got: Tensor, expected: Tensor) -> float:
    return float((got - expected).norm() / expected.norm())


@pytest.mark.parametrize("tokens", [0, 1, 2, 17, 40])
@pytest.mark.parametrize(("chunk", "block"), [(512, 1024), (1, 512), (7, 100), (17, 1)])
def test_chunks_of_tokens_and_blocks_of_features_change_nothing(
    layer: LatentAttention, monkeypatch: pytest.MonkeyPatch, tokens: int, chunk: int, block: int
) -> None:
    monkeypatch.setattr(latent_attention, "_CHUNK_TOKENS", chunk)
    monkeypatch.setattr(latent_attention, "_BLOCK_FEATURES", block)
    expected = plain_latent_attention(random_latents(seed=2), hidden_states(tokens))
    got = layer(hidden_states(tokens))
    assert got.shape == (tokens, HIDDEN_SIZE)
    if tokens:
        assert relative_error(got, expected) < PARITY_HIDDEN_STATES


def test_folded_matrices_have_a_row_for_each_latent_of_each_head(
    tensors: dict[str, RawTensor],
) -> None:
    keys, values = fold(tensors, CONFIG, "cpu")
    assert keys.shape == values.shape == (LATENT_HEADS * LATENTS, HIDDEN_SIZE)
    assert keys.nbytes + values.nbytes == CONFIG.folded_bytes(HIDDEN_SIZE)


def test_each_text_is_the_mean_of_its_own_masked_tokens(layer: LatentAttention) -> None:
    lengths = [3, 1, 5]
    mask = torch.tensor([False, True, True, True, False, False, False, False, True])
    hidden = hidden_states(9)
    before = hidden.clone()
    got = latent_attention_pool(hidden, mask, lengths, layer)
    after = plain_latent_attention(random_latents(seed=2), hidden)
    expected = torch.stack([after[1:3].mean(0), after[3], after[8]])
    assert relative_error(got, expected) < PARITY_HIDDEN_STATES
    assert torch.equal(hidden, before)
    plain = mean_pool(hidden, mask, lengths)
    assert torch.allclose(plain, torch.stack([hidden[1:3].mean(0), hidden[3], hidden[8]]))


def test_tokens_that_are_left_out_have_no_say(layer: LatentAttention) -> None:
    mask = torch.tensor([False, True, True])
    hidden = hidden_states(3)
    other = hidden.clone()
    other[0] = np.nan
    for states in (hidden, other):
        assert torch.equal(
            latent_attention_pool(states, mask, [3], layer),
            latent_attention_pool(hidden, mask, [3], layer),
        )
