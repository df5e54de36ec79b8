"""The torch engine on a CUDA device: every compute, both schedules, and memory that runs out."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lowmem.artifact.manifest import Bundle
from lowmem.artifact.variants import VARIANTS
from lowmem.compute import torch_engine
from lowmem.compute.attention import Spans, attend
from lowmem.compute.engine import Runner
from lowmem.compute.kernels import packed_attention
from lowmem.compute.plan import COMPUTES, Plan
from lowmem.text.batching import EncodedText
from tests.tolerances import (
    BF16_VECTORS,
    FP16_VECTORS,
    PACKED_ATTENTION,
    PARITY_COSINE,
    ROUNDED_VECTORS,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

NEAR = {
    "fp32": (2 * PARITY_COSINE) ** 0.5,
    "fp16": 3**0.5 * FP16_VECTORS,
    "fp16-acc16": 3 * FP16_VECTORS,  # sums of at most 192 terms in fp16
    "bf16": BF16_VECTORS,
    "int8": ROUNDED_VECTORS,
    "fp8": ROUNDED_VECTORS * 2.0**-4 / (0.5 / 127 * 4),
}
CAPABILITIES = {"bf16": (8, 0), "fp8": (8, 9), "int8": (7, 5)}


def runner(path: Path, variant: str, device: str, compute: str, **plan: Any) -> Runner:
    settings = {"schedule": "resident", "threads": 1, **plan}
    return Runner(Bundle(path), Plan(variant, "torch", device, compute, **settings))


def texts(count: int = 40, longest: int = 100) -> list[EncodedText]:
    random = np.random.default_rng(0)
    lengths = random.integers(3, longest, count)
    return [
        EncodedText(np.concatenate([[1, 5, 6], random.integers(4, 300, length), [2]]), 3, 3)
        for length in lengths
    ]


@pytest.mark.parametrize("compute", COMPUTES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_vectors_are_near_those_of_the_cpu(tiny_bundle: Path, variant: str, compute: str) -> None:
    if torch.cuda.get_device_capability() < CAPABILITIES.get(compute, (0, 0)):
        pytest.skip(f"needs a card that multiplies {compute}")
    expected = runner(tiny_bundle, variant, "cpu", "fp32").embed(texts(), normalize=True)
    for schedule in ("resident", "streamed"):
        model = runner(tiny_bundle, variant, "cuda", compute, schedule=schedule)
        distances = np.linalg.norm(model.embed(texts(), normalize=True) - expected, axis=1)
        worst = distances.max() if compute == "fp32" else np.median(distances)
        assert worst <= NEAR[compute]


@pytest.mark.parametrize("compute", COMPUTES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_recorded_passes_give_what_the_passes_give(
    tiny_bundle: Path, variant: str, compute: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if torch.cuda.get_device_capability() < CAPABILITIES.get(compute, (0, 0)):
        pytest.skip(f"needs a card that multiplies {compute}")
    recorded = runner(tiny_bundle, variant, "cuda", compute)
    monkeypatch.setattr(torch_engine, "_records", lambda *_: None)
    plain = runner(tiny_bundle, variant, "cuda", compute)
    random = np.random.default_rng(0)
    prefix = [1, *range(5, 20)]
    for turn in range(4):
        for length in (1, 7, 8, 40):
            ids = np.concatenate([prefix, random.integers(30, 300, length), [2]])
            text = EncodedText(ids, len(prefix), len(prefix))
            found, expected = (model.embed([text], normalize=True) for model in (recorded, plain))
            assert np.linalg.norm(found - expected) <= NEAR[compute], turn
            # What a recording reads must not be memory that another tensor has now.
            taken = [
                torch.full((size,), torch.nan, device="cuda")
                for size in (128, 1024, 8192, 65536, 2**22)
                for _ in range(40)
            ]
            del taken
    passes = recorded._engine._recorded
    assert len(passes._recorded) == 4
    assert passes._works


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_packed_attention_is_the_plain_form(dtype: torch.dtype) -> None:
    if torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("needs a card that flash attention runs on")
    kernel = packed_attention.find_kernel(dtype, 128, "cuda")
    assert kernel is not None
    sections = [(17, [4096, 513, 1, 1]), (0, [5]), (3, [300])]
    tokens = 20 + 4096 + 513 + 1 + 1 + 5 + 300
    generator = torch.Generator().manual_seed(0)
    query, key, value = (
        (2 * torch.rand(tokens, heads, 128, generator=generator) - 1).to(dtype)
        for heads in (8, 2, 2)
    )
    spans = Spans.of(sections, True, "cpu")
    expected = attend(query.float(), key.float(), value.float(), spans)
    on_device = (states.cuda() for states in (query, key, value))
    got = packed_attention.attend(kernel, *on_device, Spans.of(sections, True, "cuda"))
    name = str(dtype).removeprefix("torch.")
    assert float((got.float().cpu() - expected).abs().max()) <= PACKED_ATTENTION[name]


@pytest.mark.parametrize("schedule", ["resident", "streamed"])
def test_batches_are_split_where_the_device_is_too_small(
    tiny_bundle: Path, schedule: str, caplog: pytest.LogCaptureFixture
) -> None:
    many = texts(3000)
    free = runner(tiny_bundle, "fp16", "cuda", "fp16", schedule=schedule)
    expected = free.embed(many, normalize=True)
    sizes = {"batch_tokens": 10**6, "window_tokens": 10**6}
    model = runner(tiny_bundle, "fp16", "cuda", "fp16", schedule=schedule, **sizes)
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 64e6) / total)
    try:
        got = model.embed(many, normalize=True)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert "memory of the cuda device ran out again" in caplog.text
    assert np.linalg.norm(got - expected, axis=1).max() <= NEAR["fp16"]
