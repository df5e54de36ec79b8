"""What a plan on torch holds on a CUDA device besides weights: scratch, and one batch at work.

Sizes follow :mod:`lowmem.compute.operations.cuda`: when an operation there keeps one more buffer,
its line here changes with it.
"""

from __future__ import annotations

from collections.abc import Mapping

from lowmem.artifact.config import ModelConfig
from lowmem.artifact.formats import BnbInt8, Format, Int8Channel, Plain
from lowmem.compute.plan import (
    DEVICE_CHUNK_TOKENS,
    INT_MM_CHUNK_ROWS,
    MOST_RECORDED,
    PLAIN_DEVICE_CHUNK_TOKENS,
    RECORDED_TOKENS,
    TRITON_CAPABILITY,
    Plan,
)
from lowmem.hardware import Hardware

# What is multiplied, where that is what is stored.
_NATIVE = {"fp32": "F32", "bf16": "BF16", "fp16": "F16", "fp16-acc16": "F16"}
_EIGHT_BIT = ("int8", "fp8")
# Not measured: the launches of a recording, of which drivers before 550 hold more, and cuBLAS'
# workspace of the stream that is recorded. What runs short lets go of all recordings.
_RECORDING_BYTES, _RECORDING_WORKSPACE_BYTES = 2**20, 32 * 2**20


def has_triton(machine: Hardware) -> bool:
    """Whether Triton compiles for the card, where there is one."""
    return not machine.gpus or machine.gpus[0].compute_capability >= TRITON_CAPABILITY


def scratch_bytes(plan: Plan, config: ModelConfig, formats: Mapping[str, Format]) -> int:
    """Buffers that a matrix is dequantized into, and rounded into where products are 8-bit."""
    width = 4 if plan.compute == "fp32" else 2
    return _largest_changed(plan, config, formats) * (width + _rounded_width(plan))


def _rounded_width(plan: Plan) -> int:
    """Bytes of a weight that is rounded on its way into a product."""
    return 1 if plan.compute in _EIGHT_BIT else 0


def _largest_changed(plan: Plan, config: ModelConfig, formats: Mapping[str, Format]) -> int:
    """Weights of the largest matrix that is not multiplied as it is stored."""
    largest = 0
    for name, (rows, columns) in config.linears().items():
        for index in range(config.num_hidden_layers):
            form = formats[f"layers.{index}.{name}"]
            if isinstance(form, Plain) and form.dtype == _NATIVE.get(plan.compute):
                continue
            if isinstance(form, Int8Channel | BnbInt8) and plan.compute == "int8":
                continue
            largest = max(largest, rows * columns)
    return largest


def recorded_bytes(
    plan: Plan, config: ModelConfig, formats: Mapping[str, Format], has_triton: bool = True
) -> int:
    """What recorded passes hold, in memory of their own, at most; streamed plans record none.

    The scratch that matrices are dequantized into is that of all passes; what they are rounded into
    is not. Keys and values of prefixes are those that are kept anyway.
    """
    if plan.schedule == "streamed":
        return 0
    short = plan.with_(batch_tokens=min(plan.batch_tokens, RECORDED_TOKENS))
    rounded = _rounded_width(plan) * _largest_changed(plan, config, formats)
    at_work = activation_bytes(short, config, formats, has_triton)
    launches = MOST_RECORDED * _RECORDING_BYTES + _RECORDING_WORKSPACE_BYTES
    return rounded + at_work + launches


def activation_bytes(
    plan: Plan, config: ModelConfig, formats: Mapping[str, Format], has_triton: bool = True
) -> int:
    """What the widest moment of a layer holds for one batch: attention's or the MLP's."""
    if plan.compute == "fp32" or not has_triton:
        return _plain_bytes(plan, config)
    tokens, width = plan.batch_tokens, 2
    hidden, inner = config.hidden_size, config.intermediate_size
    query, key = config.query_size, config.key_value_size
    # Rows on their way into a product, rounded or as they are; twice where they are kept exact.
    rows = 1 if plan.compute in _EIGHT_BIT else width
    if rows == 1 and not all(
        not isinstance(form, Int8Channel) or form.rounds_activations for form in formats.values()
    ):
        rows = 2
    # The residual stream; inputs, q, k and v, or then q, k, v, keys and values gathered behind
    # their prefixes, and the mixed heads, twice.
    mixing = width * (2 * query + 2 * key)
    attention = 4 * hidden + max(rows * hidden, mixing) + width * (query + 2 * key)
    # The residual stream as it was and as it becomes; gate and up, and what they make together.
    chunk = min(tokens, DEVICE_CHUNK_TOKENS)
    return max(attention * tokens, 8 * hidden * tokens + (2 * width + rows) * inner * chunk)


def _plain_bytes(plan: Plan, config: ModelConfig) -> int:
    """The same where torch's own kernels serve, which work in float32."""
    tokens, hidden, inner = plan.batch_tokens, config.hidden_size, config.intermediate_size
    query, key = config.query_size, config.key_value_size
    chunk = min(tokens, PLAIN_DEVICE_CHUNK_TOKENS)
    if plan.compute == "fp32":
        # q, heads of k and v as they are and repeated, SDPA's result and where it is placed.
        attention = 4 * hidden + 4 * (5 * query + 2 * key)
        gated = 12 * chunk  # gate, up, and their product
    else:
        # q, k and v; while q is rotated its float32 form, the result, and that in 16 bits.
        attention = 4 * hidden + 2 * (query + 2 * key) + 10 * query
        gated = 10 * chunk  # gate, up, and their product in float32 and in 16 bits
        if plan.compute in _EIGHT_BIT:  # or sums of codes, and what they become
            gated = max(gated, 4 * chunk + 8 * min(chunk, INT_MM_CHUNK_ROWS))
    return max(attention * tokens, 8 * hidden * tokens + gated * inner)
