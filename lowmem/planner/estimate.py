"""Estimated speed of a plan on a described card: arithmetic over rates, bytes over bandwidths.

Nothing here is measured. The efficiencies are what large products and plain kernels are commonly
seen to reach; an estimate orders plans and tells hundreds of tokens per second from thousands.
It is that of a long run in full windows, with weights that the host's page cache holds.
"""

from __future__ import annotations

from collections.abc import Mapping

from lowmem.artifact.config import ModelConfig
from lowmem.artifact.formats import BnbInt8, Format, Int8Channel, Plain, linear_bytes
from lowmem.artifact.weights import module_shapes
from lowmem.compute.plan import COMPUTES, DEVICE_CHUNK_TOKENS, TRITON_CAPABILITY, Plan
from lowmem.hardware import Gpu

TEXT_TOKENS = 512
PRODUCT_EFFICIENCY = 0.8
ATTENTION_EFFICIENCY = 0.3
MEMORY_EFFICIENCY = 0.8

# 8-bit products by Triton or CUTLASS, whose tiles are not made for one card each.
EIGHT_BIT_EFFICIENCY = 0.6
# On data-centre Blackwell 8-bit integers have kernels of older cards alone, "6-13x slower than
# tf32" (pytorch#187094), and tf32 is half of fp16.
_INT8_IS_SLOW, _SLOW_INT8_SHARE_OF_FP16 = ((10, 0), (10, 3)), 0.5 / 8

# What multiplies, by engine and compute.
# ONNX Runtime's CUDA kernels for its other graphs are not known well enough.
_ARITHMETIC = {("torch", compute): compute for compute in COMPUTES}
_ARITHMETIC["onnxruntime", "fp16"] = "fp16"
_NATIVE = {"bf16": "BF16", "fp16": "F16", "fp16-acc16": "F16", "fp32": "F32"}
_EIGHT_BIT = ("int8", "fp8")

# Passes over float32 activations in a layer: norms and residual; rotation; SiLU and product. Plain
# kernels make several of each; those of Triton read and write 16 bits or less, once.
_PLAIN_PASSES, _FUSED_PASSES = (16, 9, 8), (8, 3, 3)
_ROUNDING_PASSES = 5
# Bytes moved per weight to unpack codes by plain kernels: of 8 bits, or of fewer by a table.
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
        Tokens per second, or None for a CPU plan, a card without the rates that are needed, an
        engine whose kernels are not known, and weights that come from a disk of unknown speed.
    """
    arithmetic = _ARITHMETIC.get((plan.engine, plan.compute))
    rate = _rate(arithmetic or "", gpu)
    if plan.device != "cuda" or arithmetic is None or rate is None or gpu.memory_bandwidth is None:
        return None
    tokens = plan.window_tokens
    products = 2 * config.linear_weights * tokens
    # Scores and their product with the values, for half of all pairs of tokens.
    attention = 2 * config.num_hidden_layers * config.query_size * text_tokens * tokens
    # Attention is computed in 16 bits, unless all is in 32.
    mixing = rate if arithmetic == "fp32" else (gpu.rates or {}).get("fp16", rate)
    is_fused = gpu.compute_capability >= TRITON_CAPABILITY and arithmetic != "fp32"
    stored, dequantized = _weight_bytes(config, formats, arithmetic, is_fused)
    chunks = tokens / min(plan.batch_tokens, DEVICE_CHUNK_TOKENS)
    moved = tokens * _activation_bytes(plan, config, is_fused) + chunks * dequantized
    efficiency = EIGHT_BIT_EFFICIENCY if arithmetic in _EIGHT_BIT else PRODUCT_EFFICIENCY
    seconds = (
        products / (rate * efficiency)
        + attention / (mixing * ATTENTION_EFFICIENCY)
        + moved / (gpu.memory_bandwidth * MEMORY_EFFICIENCY)
    )
    if plan.schedule == "streamed":
        if gpu.copy_bandwidth is None or plan.drops_cache:
            return None
        streamed = 1 - plan.kept_layers / config.num_hidden_layers
        copying = streamed * stored / gpu.copy_bandwidth
        seconds = max(seconds, copying) + copying / config.num_hidden_layers
    return tokens / seconds


def _rate(arithmetic: str, gpu: Gpu) -> float | None:
    """Operations per second, by the card's description and what is known of its kernels."""
    rates = gpu.rates or {}
    rate = rates.get(arithmetic)
    if arithmetic == "int8" and gpu.compute_capability in _INT8_IS_SLOW and "fp16" in rates:
        return _SLOW_INT8_SHARE_OF_FP16 * rates["fp16"]
    return rate


def _activation_bytes(plan: Plan, config: ModelConfig, is_fused: bool) -> int:
    """Bytes that a token's activations move between products, in all layers."""
    hidden, heads, inner = _FUSED_PASSES if is_fused else _PLAIN_PASSES
    rounding = _ROUNDING_PASSES if plan.compute in _EIGHT_BIT and not is_fused else 0
    passes = (
        (hidden + 2 * rounding) * config.hidden_size
        + heads * (config.query_size + config.key_value_size)
        + rounding * config.query_size
        + (inner + rounding) * config.intermediate_size
    )
    return 4 * passes * config.num_hidden_layers


def _weight_bytes(
    config: ModelConfig, formats: Mapping[str, Format], arithmetic: str, is_fused: bool
) -> tuple[int, int]:
    """Bytes of all stored weights, and those moved to bring each once into the product's form."""
    width = 4 if arithmetic == "fp32" else 2
    stored = moved = 0
    for module, (rows, columns) in module_shapes(config).items():
        form = formats[module]
        nbytes = linear_bytes(form, rows, columns)
        stored += nbytes
        weights = rows * columns
        if arithmetic == "int8" and isinstance(form, Int8Channel | BnbInt8):
            continue
        if not isinstance(form, Plain):
            moved += nbytes + weights * width
            if not is_fused:
                # Scales are applied in float32, which is then rounded to a narrower dtype.
                unpacked = _BYTE_CODES_BYTES if form.bits == 8 else _TABLE_CODES_BYTES
                moved += weights * (unpacked + (0 if width == 4 else 4))
        elif arithmetic not in _EIGHT_BIT and form.dtype != _NATIVE[arithmetic]:
            moved += nbytes + weights * width
        if arithmetic in _EIGHT_BIT:
            moved += weights * (width + 1)
    return stored, moved
