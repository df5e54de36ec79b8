"""Folds change what is rounded, and not the model."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from export.folds import fold
from export.hidden_states import ATTENTION, DOWN, MLP, OUTPUT
from lowmem.artifact.config import parse_config
from lowmem.artifact.tensors import RawTensor
from lowmem.compute.decoder import rms_norm

HIDDEN, INTERMEDIATE, HEADS, KEY_VALUE_HEADS, HEAD_DIM = 32, 48, 6, 2, 8
CONFIG = parse_config(
    {
        "architectures": ["LlamaModel"],
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "num_hidden_layers": 1,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KEY_VALUE_HEADS,
        "head_dim": HEAD_DIM,
        "vocab_size": 64,
        "max_position_embeddings": 64,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
    },
    "config.json",
)


@pytest.fixture
def weights() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.randn(shape, generator=generator) / shape[1] ** 0.5
        for name, shape in CONFIG.linears().items()
    }


@pytest.fixture
def norms() -> dict[str, RawTensor]:
    generator = torch.Generator().manual_seed(1)
    names = ("input_layernorm", "post_attention_layernorm")
    made = {name: 1 + 0.3 * torch.randn(HIDDEN, generator=generator) for name in names}
    made["input_layernorm"][3] = 0
    return {name: RawTensor("F16", norm.half().numpy()) for name, norm in made.items()}


def test_a_folded_layer_computes_what_the_layer_did(
    weights: dict[str, Tensor], norms: dict[str, RawTensor]
) -> None:
    states = torch.randn(20, HIDDEN, generator=torch.Generator().manual_seed(2))
    states *= torch.logspace(-1, 2, HIDDEN)
    mixing = torch.softmax(torch.randn(20, 20, generator=torch.Generator().manual_seed(3)), -1)

    def outputs(norms: dict[str, RawTensor], weights: dict[str, Tensor]) -> list[Tensor]:
        """Both halves of a layer; heads mix values alike, which is all that folds rely on."""
        normed = rms_norm(states, torch.from_numpy(norms["input_layernorm"].float32()), 1e-5)
        query, key, value = (normed @ weights[name].T for name in ATTENTION)
        heads = value.view(20, KEY_VALUE_HEADS, 1, HEAD_DIM)
        heads = heads.expand(-1, -1, HEADS // KEY_VALUE_HEADS, -1).reshape(20, -1)
        mixed = mixing @ heads @ weights[OUTPUT[0]].T
        normed = rms_norm(
            states, torch.from_numpy(norms["post_attention_layernorm"].float32()), 1e-5
        )
        gate, up = (normed @ weights[name].T for name in MLP)
        return [query, key, mixed, (F.silu(gate) * up) @ weights[DOWN[0]].T]

    inputs = {
        ATTENTION: torch.logspace(0, 2, HIDDEN),
        OUTPUT: torch.logspace(-1, 1, HEADS * HEAD_DIM),
        MLP: torch.logspace(2, 0, HIDDEN),
        DOWN: torch.logspace(0, 3, INTERMEDIATE),
    }
    columns = {
        stage: torch.stack([weights[name].abs().amax(0) for name in stage]).amax(0)
        for stage in inputs
    }
    folded_norms, folds = fold(norms, inputs, columns, CONFIG)
    folded = {name: folds.apply(name, weight) for name, weight in weights.items()}
    assert folded_norms["input_layernorm"].dtype == "F16"
    assert not np.array_equal(folded_norms["input_layernorm"].array, norms["input_layernorm"].array)
    expected = outputs(norms, weights)
    for before, after in zip(expected, outputs(folded_norms, folded), strict=True):
        torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4 * float(before.abs().max()))


def test_large_inputs_become_smaller_beside_small_ones(
    weights: dict[str, Tensor], norms: dict[str, RawTensor]
) -> None:
    inputs = {
        ATTENTION: torch.ones(HIDDEN),
        OUTPUT: torch.ones(HEADS * HEAD_DIM),
        MLP: torch.ones(HIDDEN),
        DOWN: torch.ones(INTERMEDIATE),
    }
    inputs[DOWN][7] = 1000
    columns = {stage: torch.ones_like(largest) for stage, largest in inputs.items()}
    _, folds = fold(norms, inputs, columns, CONFIG)
    scales = folds.inputs["mlp.down_proj"]
    assert float(scales[7] / scales[0]) == pytest.approx(1000**0.65, rel=1e-4)
    assert torch.equal(folds.outputs["mlp.up_proj"], scales)
