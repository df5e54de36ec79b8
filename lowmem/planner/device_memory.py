"""What a plan on torch holds on a CUDA device besides weights: scratch, and one batch at work.

Sizes follow :mod:`lowmem.compute.operations.cuda`: when an operation there keeps one more buffer,
its line here changes with it.
"""

from __future__ import annotations

from collections.abc import Mapping

from lowmem.artifact.config import ModelConfig
from lowmem.artifact.formats import BnbInt8, Format, Int8Channel, Plain
from lowmem.compute.plan import DEVICE_CHUNK_TOKENS, PLAIN_DEVICE_CHUNK_TOKENS, Plan

# What is multiplied, where that is what is stored.
_NATIVE = {"fp32": "F32", "bf16": "BF16", "fp16": "F16", "fp16-acc16": "F16"}
_EIGHT_BIT = ("int8", "fp8")


def scratch_bytes(plan: Plan, config: ModelConfig, formats: Mapping[str, Format]) -> int:
    """Buffers that a matrix is dequantized into, and rounded into where products are 8-bit."""
    width = 4 if plan.compute == "fp32" else 2
    largest = 0
    for name, (rows, columns) in config.linears().items():
        for index in range(config.num_hidden_layers):
            form = formats[f"layers.{index}.{name}"]
            if isinstance(form, Plain) and form.dtype == _NATIVE.get(plan.compute):
                continue
            if isinstance(form, Int8Channel | BnbInt8) and plan.compute == "int8":
                continue
            largest = max(largest, rows * columns)
    return largest * (width + (1 if plan.compute in _EIGHT_BIT else 0))


def activation_bytes(plan: Plan, config: ModelConfig, formats: Mapping[str, Format]) -> int:
    """What the widest moment of a layer holds for one batch: attention's or the MLP's."""
    tokens = plan.batch_tokens
    width = 4 if plan.compute == "fp32" else 2
    hidden, inner = config.hidden_size, config.intermediate_size
    query, key = config.query_size, config.key_value_size
    # Rows on their way into a product, rounded or as they are; twice where they are kept exact.
    rows = 1 if plan.compute in _EIGHT_BIT else width
    if rows == 1 and not all(
        not isinstance(form, Int8Channel) or form.rounds_activations for form in formats.values()
    ):
        rows = 2
    # The residual stream; inputs, q, k and v, or then q, k, v and the mixed heads.
    attention = 4 * hidden + max(rows * hidden, width * query) + width * (query + 2 * key)
    if plan.compute == "fp32":  # by length: heads repeated, and SDPA's result before it is placed
        attention += width * 3 * query
    # The residual stream as it was and as it becomes; gate and up, and what they make together.
    chunk = PLAIN_DEVICE_CHUNK_TOKENS if plan.compute == "fp32" else DEVICE_CHUNK_TOKENS
    mlp = 8 * hidden * tokens + (2 * width + rows) * inner * min(tokens, chunk)
    return max(attention * tokens, mlp)
