"""Predicted memory of a plan: a pure function of shapes, formats and token budget.

Host memory is what the process itself holds (RssAnon + RssShmem); weights that are mapped from
their files are page cache, and a CPU plan on torch holds none of them. Sizes follow the code that
allocates: when an operation keeps one more buffer, its line here changes with it.
"""

from __future__ import annotations

from collections.abc import Mapping

from lowmem.artifact.config import ModelConfig
from lowmem.artifact.formats import Format, Int8Channel, IntGrouped, Plain, linear_bytes
from lowmem.artifact.weights import module_shapes
from lowmem.compute.plan import (
    BLOCK_QUERIES,
    BLOCK_SCORES,
    CHUNK_BYTES,
    FEWEST_BLOCK_HEADS,
    SHORTEST_BLOCKED,
    Plan,
    int8_chunk_rows,
    keys_multiplied,
    rounds_every_mlp,
)
from lowmem.hardware import Hardware
from lowmem.planner import device_memory
from lowmem.text.batching import PREFIX_TOKENS

MIB = 2**20
# Interpreter, libraries and thread pools with no model loaded, measured as RssAnon.
TORCH_BASE_BYTES = 172 * MIB
ONNX_BASE_BYTES = 60 * MIB
# A token in a loaded tokenizer with its merges: 584 measured with SmolLM2's, 970 with Mistral's.
_VOCABULARY_BYTES = 800
# CUDA's context, kernels and cuBLAS workspaces on the device, and their mirror on the host.
CUDA_CONTEXT_BYTES = 600 * MIB
CUDA_HOST_BYTES = 900 * MIB

# Code that oneDNN compiles for 16-bit products and keeps, with what it reorders matrices into. With
# AMX these are blocks in another order, of a small matrix all: measured at two sizes.
_COMPILED_BYTES, _COMPILED_AMX_BYTES = 24 * MIB, 40 * MIB
_REORDERED_BYTES = 40 * MIB
# The same for each number of keys that attention meets over long texts, where it goes in blocks,
# whose scores leave gaps between.
_BLOCKS_COMPILED_BYTES = 2 * MIB

# The MLP of latent attention works in blocks of weights and chunks of tokens.
_LATENT_BLOCK_BYTES = 64 * MIB

PRODUCT_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2, "fp16-acc16": 2, "int8": 4, "fp8": 2}


def predict(
    plan: Plan,
    config: ModelConfig,
    formats: Mapping[str, Format],
    machine: Hardware,
) -> tuple[int, int]:
    """Peak memory of a plan.

    Args:
        plan: Engine, device, compute, schedule and token budget; its memory fields are not read.
        config: The model's shape.
        formats: Format of every linear.
        machine: Where it runs; how much memory there is does not count.

    Returns:
        Bytes on the host and on the device, the latter 0 for a CPU plan.
    """
    if plan.engine == "onnxruntime":
        host, device = _onnx(plan, config, formats)
    else:
        host, device = _torch(plan, config, formats, machine)
    return host + _VOCABULARY_BYTES * config.vocab_size, device


def _torch(
    plan: Plan,
    config: ModelConfig,
    formats: Mapping[str, Format],
    machine: Hardware,
) -> tuple[int, int]:
    """Torch maps weights on a CPU and copies them to a card; beside them lies what is at work."""
    weights = stored_bytes(config, formats)
    layer = largest_layer_bytes(config, formats)
    if plan.device == "cuda":
        has_triton = device_memory.has_triton(machine)
        scratch = device_memory.scratch_bytes(plan, config, formats)
        scratch += device_memory.recorded_bytes(plan, config, formats, has_triton)
        activations = device_memory.activation_bytes(plan, config, formats, has_triton)
    else:
        scratch = _scratch_bytes(plan, config, formats)
        activations = _activation_bytes(plan, config, formats, machine)
    activations = max(activations, _pooling_bytes(plan, config))
    work = scratch + activations + _hidden_bytes(plan, config) + _prefix_bytes(plan, config)
    folded, kept = _latent_bytes(config)
    read = min(2, config.num_hidden_layers - plan.kept_layers)
    streamed = read * layer if plan.schedule == "streamed" else 0
    if plan.device == "cpu":
        compiled = _compiled_bytes(plan, config, machine)
        return TORCH_BASE_BYTES + folded + streamed + work + compiled, 0
    resident = weights if plan.schedule == "resident" else plan.kept_layers * layer
    # torch rounds pinned memory up to powers of two.
    pinned = read * (1 << (layer - 1).bit_length()) if plan.schedule == "streamed" else 0
    host = TORCH_BASE_BYTES + CUDA_HOST_BYTES + pinned
    return host, CUDA_CONTEXT_BYTES + folded + kept + resident + streamed + work


def mapped_bytes(plan: Plan, config: ModelConfig, formats: Mapping[str, Format]) -> int:
    """Weights that a resident plan reads from the page cache in every pass."""
    if plan.device == "cuda" or plan.schedule == "streamed":
        return 0
    if plan.engine == "onnxruntime" and not any(isinstance(f, Plain) for f in formats.values()):
        return 0  # packed into memory of the process
    return stored_bytes(config, formats)


def stored_bytes(config: ModelConfig, formats: Mapping[str, Format]) -> int:
    """What the linears take on disk."""
    return sum(_layer_bytes(config, formats))


def packed_bytes(plan: Plan, config: ModelConfig, formats: Mapping[str, Format]) -> int:
    """ONNX Runtime's own copy of the linears."""
    packed = 0
    for module, (rows, columns) in module_shapes(config).items():
        form = formats[module]
        if isinstance(form, Plain):
            packed += rows * columns * 2 if plan.device == "cuda" else 0
        elif isinstance(form, IntGrouped | Int8Channel):
            packed += linear_bytes(form, rows, columns)
        if isinstance(form, IntGrouped):
            # 16-bit scales are widened to float32 while the session opens; for 8-bit products they
            # are packed once more, with a sum of each group's codes beside them.
            bytes_per_group = 2 + (8 if plan.compute == "int8" else 0)
            packed += bytes_per_group * rows * columns // form.group_size
    return packed


def largest_layer_bytes(config: ModelConfig, formats: Mapping[str, Format]) -> int:
    """What the linears of the largest layer take: in a mixture of formats layers differ."""
    return max(_layer_bytes(config, formats))


def _layer_bytes(config: ModelConfig, formats: Mapping[str, Format]) -> list[int]:
    """What the linears of each layer take on disk."""
    sizes = [0] * config.num_hidden_layers
    for module, shape in module_shapes(config).items():
        sizes[int(module.split(".")[1])] += linear_bytes(formats[module], *shape)
    return sizes


def _scratch_bytes(plan: Plan, config: ModelConfig, formats: Mapping[str, Format]) -> int:
    """The one buffer that matrices are dequantized into on a CPU, where any has another form."""
    native = {"bf16": "BF16", "fp16": "F16"}.get(plan.compute)
    if all(isinstance(form, Plain) and form.dtype == native for form in formats.values()):
        return 0
    return config.largest_linear * PRODUCT_BYTES[plan.compute]


def _compiled_bytes(plan: Plan, config: ModelConfig, machine: Hardware) -> int:
    """What oneDNN holds of its own on a CPU, for 16-bit products and for attention in blocks."""
    width = PRODUCT_BYTES[plan.compute]
    blocks = 0
    if _may_go_in_blocks(plan, config):
        ends = range(BLOCK_QUERIES, plan.batch_tokens + BLOCK_QUERIES, BLOCK_QUERIES)
        blocks = len(set(map(keys_multiplied, ends))) * _BLOCKS_COMPILED_BYTES
    if width != 2:
        return blocks
    if not machine.has_amx:
        return blocks + _COMPILED_BYTES
    return blocks + _COMPILED_AMX_BYTES + min(width * config.largest_linear, _REORDERED_BYTES)


def _may_go_in_blocks(plan: Plan, config: ModelConfig) -> bool:
    """Whether attention over a text may, if that is faster here, which is tried when it runs."""
    return config.is_stock and plan.batch_tokens >= SHORTEST_BLOCKED


def _hidden_bytes(plan: Plan, config: ModelConfig) -> int:
    """Hidden states of the batches of a window, float32, but for the one at work."""
    return 4 * config.hidden_size * max(0, plan.window_tokens - plan.batch_tokens)


def _prefix_bytes(plan: Plan, config: ModelConfig) -> int:
    """Keys and values of the prefixes that are kept, in all layers."""
    return (
        2
        * PREFIX_TOKENS
        * config.num_hidden_layers
        * config.key_value_size
        * PRODUCT_BYTES[plan.compute]
    )


def _activation_bytes(
    plan: Plan, config: ModelConfig, formats: Mapping[str, Format], machine: Hardware
) -> int:
    """What the widest moment of a layer holds for one batch: attention's or the MLP's."""
    width = PRODUCT_BYTES[plan.compute]
    hidden, query, key = config.hidden_size, config.query_size, config.key_value_size
    # The residual stream; q, k and v; q and k rotated; the mixed heads, and before them SDPA's.
    attention = plan.batch_tokens * (4 * hidden + width * (4 * query + 3 * key))
    if _may_go_in_blocks(plan, config):
        # Scores of a block and their weights; keys and values of a head, twice.
        keys = keys_multiplied(plan.batch_tokens)
        most = max(BLOCK_SCORES, FEWEST_BLOCK_HEADS * keys)
        scores = min(BLOCK_QUERIES * keys * query // key, most)
        attention += 4 * (2 * scores + 4 * keys * config.head_dim)
    if plan.compute == "int8" and machine.has_vnni and rounds_every_mlp(formats):
        # A chunk goes through all three linears: sums, the gate, what meets it, and codes of both.
        rows = min(plan.batch_tokens, int8_chunk_rows(plan.threads))
        chunk = min(CHUNK_BYTES, 4 * rows * config.intermediate_size)
        return max(attention, 2 * 4 * hidden * plan.batch_tokens + 4 * chunk)
    # The residual stream, its norm as inputs, and the gate; what meets it goes in two chunks.
    mlp = 4 * hidden + width * (hidden + config.intermediate_size)
    whole = 4 * config.intermediate_size * plan.batch_tokens
    chunk = whole // -(-whole // CHUNK_BYTES)  # equal ones
    chunks = 3 if plan.compute == "int8" else 2  # rounded, what goes into the last product is new
    return max(attention, plan.batch_tokens * mlp + chunks * chunk)


def _pooling_bytes(plan: Plan, config: ModelConfig) -> int:
    """What latent attention holds for one batch, float32.

    Hidden states of all tokens before and behind the final norm, of those that are pooled as they
    change, and their norm.
    """
    if config.latent_attention is None:
        return 0
    return 4 * 4 * config.hidden_size * plan.batch_tokens + _LATENT_BLOCK_BYTES


def _latent_bytes(config: ModelConfig) -> tuple[int, int]:
    """Of latent attention: its folded matrices, and its MLP as it is stored, in 16 bits."""
    latents, hidden = config.latent_attention, config.hidden_size
    if latents is None:
        return 0, 0
    return latents.folded_bytes(hidden), 2 * 3 * latents.inner_size(hidden) * hidden


def _onnx(plan: Plan, config: ModelConfig, formats: Mapping[str, Format]) -> tuple[int, int]:
    """ONNX Runtime packs codes into a copy of its own, and widens one 16-bit matrix at a time."""
    packed, widened = packed_bytes(plan, config, formats), 0
    largest_copied = 0
    for module, (rows, columns) in module_shapes(config).items():
        form = formats[module]
        if isinstance(form, Plain):
            widened = max(widened, rows * columns * 4)
        elif isinstance(form, Int8Channel) and form.rounds_activations:
            largest_copied = max(largest_copied, rows * columns)
    layer = 4 * config.hidden_size + 3 * config.intermediate_size
    folded, pooling = 0, 0
    if config.latent_attention is not None:
        inner = config.latent_attention.inner_size(config.hidden_size)
        folded, pooling = _latent_bytes(config)[0], 4 * config.hidden_size + 3 * inner
        widened = max(widened, 4 * inner * config.hidden_size)
        if plan.device == "cuda" or any(isinstance(form, IntGrouped) for form in formats.values()):
            # Cast to float32 while the session opens, and kept.
            folded += 2 * _latent_bytes(config)[1]
    widest = plan.batch_tokens * 4 * max(layer, pooling)
    if not config.is_stock:
        # The operator for attention to all tokens holds every score of a text that fills a batch.
        widest = max(widest, 4 * config.num_attention_heads * plan.batch_tokens**2)
    # Measured: a little more than the widest moment, for chunks of the arena that fit nothing.
    activations = int(1.1 * widest)
    if plan.device == "cpu":
        # While the session opens codes are copied before they are packed, one matrix at a time:
        # transposed, and without VNNI made unsigned.
        return ONNX_BASE_BYTES + packed + folded + widened + max(activations, largest_copied), 0
    host = ONNX_BASE_BYTES + CUDA_HOST_BYTES
    table = 2 * config.vocab_size * config.hidden_size  # looked up in on the card
    return host, CUDA_CONTEXT_BYTES + packed + table + folded + widened + activations
