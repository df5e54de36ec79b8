"""Folds change what is rounded, and not the model."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from export.folds import _fold_norm, balance, fold
from export.hidden_states import ATTENTION, DOWN, MLP, OUTPUT
from lowmem.artifact.config_file import parse_config
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

    widths = {ATTENTION: HIDDEN, OUTPUT: HEADS * HEAD_DIM, MLP: HIDDEN, DOWN: INTERMEDIATE}
    folded_norms, folds = fold(
        norms,
        lambda stage: outliers(widths[stage]),
        lambda stage: torch.cat([weights[name] for name in stage]),
        CONFIG,
    )
    folded = {name: folds.apply(name, weight) for name, weight in weights.items()}
    assert folded_norms["input_layernorm"].dtype == "F16"
    assert not np.array_equal(folded_norms["input_layernorm"].array, norms["input_layernorm"].array)
    expected = outputs(norms, weights)
    for before, after in zip(expected, outputs(folded_norms, folded), strict=True):
        torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4 * float(before.abs().max()))


def outliers(features: int, tokens: int = 200) -> Tensor:
    """Inputs of which a few have a hundred times the range of others."""
    states = torch.randn(tokens, features, generator=torch.Generator().manual_seed(4))
    states[:, ::9] *= 100
    return states


def disturbance(inputs: Tensor, weight: Tensor, scales: Tensor) -> float:
    """Squared change of the outputs when both are rounded, measured."""
    inputs, weight = inputs / scales, weight * scales

    def rounded(rows: Tensor) -> Tensor:
        step = rows.abs().amax(-1, keepdim=True) / 127
        return (rows / step).round() * step

    return float((rounded(inputs) @ rounded(weight).T - inputs @ weight.T).square().sum())


def test_balanced_scales_disturb_outputs_less_than_none_and_than_smoothquants() -> None:
    inputs = outliers(64)
    weight = torch.randn(48, 64, generator=torch.Generator().manual_seed(5)) / 8
    weight[:, 5] *= 20
    scales = balance(inputs, weight)
    formula = (inputs.abs().amax(0) / weight.abs().amax(0)).sqrt()
    lost = disturbance(inputs, weight, scales)
    assert lost < 0.2 * disturbance(inputs, weight, torch.ones(64))
    assert lost < disturbance(inputs, weight, formula)
    assert float(scales.log().mean()) == pytest.approx(0, abs=1e-5)


def test_inputs_that_share_a_scale_get_one() -> None:
    shared = torch.arange(8).repeat(3)
    scales = balance(outliers(24), torch.ones(4, 24), shared)
    assert torch.equal(scales[:8], scales[8:16])
    assert torch.equal(scales[:8], scales[16:])


def test_inputs_that_are_always_zero_have_finite_scales() -> None:
    inputs = outliers(16)
    inputs[:, 3] = 0
    assert bool(torch.isfinite(balance(inputs, torch.ones(4, 16)).log()).all())
    assert bool(torch.isfinite(balance(torch.zeros(4, 16), torch.zeros(4, 16)).log()).all())


def test_an_input_that_was_silent_does_not_drown_the_token_in_which_it_speaks() -> None:
    generator = torch.Generator().manual_seed(6)
    inputs, weight = torch.randn(200, 64, generator=generator), torch.ones(4, 64)
    inputs[:, 3] = 0
    scales = balance(inputs, weight)
    later = torch.randn(50, 64, generator=generator)
    later[:, 3] = 3
    outputs = later @ weight.T
    assert disturbance(later, weight, scales) < 0.01 * float(outputs.square().sum())


def test_a_norm_whose_quotient_is_too_large_for_its_dtype_is_divided_by_less() -> None:
    norm = RawTensor("F16", np.array([3.0, 2.0], np.float16))
    stored, exact = _fold_norm(norm, torch.tensor([1e-6, 0.5]))
    assert np.isfinite(stored.array).all()
    torch.testing.assert_close(
        torch.from_numpy(stored.array).float() * exact, torch.tensor([3.0, 2.0])
    )
