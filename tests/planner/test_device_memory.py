"""What a card without Triton is predicted to hold, beside what the operations then do."""

import pytest
import torch

from lowmem.artifact.config import ModelConfig
from lowmem.artifact.tensors import RawTensor
from lowmem.artifact.variants import formats_for
from lowmem.compute.attention import Spans
from lowmem.compute.decoder import DecoderLayer, Rotation, decode_layer
from lowmem.compute.kernels import plain_rows
from lowmem.compute.operations import dequantize
from lowmem.compute.operations.linear import Linear, to_torch
from lowmem.compute.plan import Plan
from lowmem.planner import device_memory
from tests.plain_cuda import TURING, operations
from tests.pretend_device import DEVICE, PretendDevice
from tests.stored_weights import random_weights

CONFIG = ModelConfig("mistral", 320, 256, 896, 1, 8, 2, 32, 1e-5, 1e4, 4096, 4096)
# Blocks and scales, which are next to nothing at the size of real models.
OVER, UNDER = 0.05, 0.03


@pytest.mark.parametrize("tokens", [1024, 4096])
@pytest.mark.parametrize(
    ("variant", "compute"),
    [("fp16", "fp32"), ("int4", "fp32"), ("fp16", "fp16"), ("int4", "fp16"), ("int8", "int8")],
)
def test_a_layer_on_a_card_without_triton_holds_what_is_predicted(
    monkeypatch: pytest.MonkeyPatch, variant: str, compute: str, tokens: int
) -> None:
    monkeypatch.setattr(plain_rows, "_BLOCK_ELEMENTS", 2**16)
    monkeypatch.setattr(dequantize, "_DEVICE_BLOCK_ELEMENTS", 2**14)
    formats = formats_for(variant, CONFIG, "F16")

    def place(raw: RawTensor) -> torch.Tensor:
        return to_torch(raw, DEVICE)

    with PretendDevice() as device, torch.inference_mode():
        linears = [
            Linear.load(random_weights(formats[f"layers.0.{name}"], *shape, 0), place)
            for name, shape in CONFIG.linears().items()
        ]
        norm = torch.ones(CONFIG.hidden_size, device=DEVICE)
        layer = DecoderLayer(0, norm, *linears[:4], norm, *linears[4:])
        positions = torch.arange(tokens).to(DEVICE)
        rotation = Rotation.at(positions, CONFIG.rope_theta, CONFIG.head_dim)
        spans = Spans.of([(0, [tokens // 8] * 8)], True, DEVICE)
        ops = operations(compute, TURING)
        resident = device.held_bytes
        hidden = [torch.ones(tokens, CONFIG.hidden_size, device=DEVICE)]
        device.reset_peak()
        decode_layer(ops, layer, hidden.pop(), rotation, spans)
        held = device.peak_bytes - resident
    plan = Plan(variant, "torch", "cuda", compute, "resident", batch_tokens=tokens)
    predicted = device_memory.scratch_bytes(plan, CONFIG, formats)
    predicted += device_memory.activation_bytes(plan, CONFIG, formats, has_triton=False)
    assert -UNDER <= predicted / held - 1 <= OVER
