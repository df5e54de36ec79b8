"""Estimated speed of a plan on a described card: arithmetic over rates, bytes over bandwidths.

Nothing here is measured. The efficiencies are what large products and plain kernels are commonly
seen to reach; an estimate orders plans and tells hundreds of tokens per second from thousands.
It is that of a long run in full windows, with weights that the host's page cache holds.
"""

from __future__ import annotations

from collections.abc import Mapping

from lowmem.artifact.config import ModelConfig
from lowmem.artifact.formats import Format, Plain
from lowmem.artifact.weights import module_shapes
from lowmem.compute.plan import Plan
from lowmem.hardware import Gpu
from lowmem.planner.memory import PRODUCT_BYTES

TEXT_TOKENS = 512
PRODUCT_EFFICIENCY = 0.8
ATTENTION_EFFICIENCY = 0.3
MEMORY_EFFICIENCY = 0.8

# What multiplies, by engine and compute. torch's 8-bit compute multiplies whole numbers as float32.
# ONNX Runtime's CUDA kernels for its other graphs are not known well enough.
_ARITHMETIC = {
    ("torch", "fp32"): "fp32",
    ("torch", "bf16"): "bf16",
    ("torch", "fp16"): "fp16",
    ("torch", "int8"): "fp32",
    ("onnxruntime", "fp16"): "fp16",
}
_NATIVE = {"bf16": "BF16", "fp16": "F16", "fp32": "F32"}

# Passes over float32 activations in a layer: norms and residual, rotation, SiLU and product.
_HIDDEN_PASSES, _HEAD_PASSES, _INNER_PASSES, _ROUNDING_PASSES = 16, 9, 8, 5
# Bytes moved per weight to unpack codes into float32: of 8 bits in one pass, of fewer by a table.
_BYTE_CODES_BYTES, _TABLE_CODES_BYTES = 4, 16


def tokens_per_second(
    plan: Plan,
    config: ModelConfig,
    formats: Mapping[str, Format],
    gpu: Gpu,
    text_tokens: int = TEXT_TOKENS,
) -> float | None:
    """Estimates the speed of a plan on CUDA.

    time = products / rate + attention / rate + (activations + dequantization) / memory bandwidth
    for one window of tokens. A streamed plan copies a layer while the one before computes: it takes
    the longer of that time and the copy of what is streamed, and always waits for one layer.

    Args:
        plan: Engine, compute, schedule and token budgets.
        config: The model's shape.
        formats: Format of every linear.
        gpu: The card, with its rates.
        text_tokens: Length of one text, of which attention's share follows; causal.

    Returns:
        Tokens per second, or None for a CPU plan, a card without the rates that are needed, and an
        engine whose kernels are not known.
    """
    arithmetic = _ARITHMETIC.get((plan.engine, plan.compute))
    rate = (gpu.rates or {}).get(arithmetic or "")
    if plan.device != "cuda" or arithmetic is None or rate is None or gpu.memory_bandwidth is None:
        return None
    tokens = plan.window_tokens
    products = 2 * config.linear_weights * tokens
    # Scores and their product with the values, for half of all pairs of tokens.
    attention = 2 * config.num_hidden_layers * config.query_size * text_tokens * tokens
    stored, dequantized = _weight_bytes(config, formats, arithmetic)
    moved = tokens * _activation_bytes(plan, config) + tokens / plan.batch_tokens * dequantized
    seconds = (
        products / (rate * PRODUCT_EFFICIENCY)
        + attention / (rate * ATTENTION_EFFICIENCY)
        + moved / (gpu.memory_bandwidth * MEMORY_EFFICIENCY)
    )
    if plan.schedule == "streamed":
        if gpu.copy_bandwidth is None:
            return None
        streamed = 1 - plan.kept_layers / config.num_hidden_layers
        copying = streamed * stored / gpu.copy_bandwidth
        seconds = max(seconds, copying) + copying / config.num_hidden_layers
    return tokens / seconds


def _activation_bytes(plan: Plan, config: ModelConfig) -> int:
    """Bytes that a token's activations move between products, in all layers."""
    rounding = _ROUNDING_PASSES if plan.compute == "int8" else 0
    heads = config.query_size + config.key_value_size
    passes = (
        (_HIDDEN_PASSES + 2 * rounding) * config.hidden_size
        + _HEAD_PASSES * heads
        + rounding * config.query_size
        + (_INNER_PASSES + rounding) * config.intermediate_size
    )
    return 4 * passes * config.num_hidden_layers


def _weight_bytes(
    config: ModelConfig, formats: Mapping[str, Format], arithmetic: str
) -> tuple[int, int]:
    """Bytes of all stored weights, and those moved to bring each once into the product's dtype."""
    width = PRODUCT_BYTES[arithmetic]
    stored = moved = 0
    for module, (rows, columns) in module_shapes(config).items():
        form = formats[module]
        nbytes = sum(spec.nbytes for spec in form.specs(rows, columns).values())
        stored += nbytes
        if isinstance(form, Plain):
            if form.dtype != _NATIVE[arithmetic]:
                moved += nbytes + rows * columns * width
            continue
        unpacked = _BYTE_CODES_BYTES if form.bits == 8 else _TABLE_CODES_BYTES
        # Scales are applied in float32, which is then rounded to the dtype of narrower products.
        rounded = 0 if width == 4 else 4 + width
        moved += nbytes + rows * columns * (unpacked + rounded)
    return stored, moved
