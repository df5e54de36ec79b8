"""A plan: which variant runs where, how, and what is known of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from lowmem.artifact.formats import BnbInt8, Format, Int8Channel

ENGINES = ("torch", "onnxruntime")
DEVICES = ("cpu", "cuda")
COMPUTES = ("fp32", "bf16", "fp16", "fp16-acc16", "int8", "fp8")
COMPUTES_OF_DEVICE = {"cpu": ("fp32", "bf16", "fp16", "int8"), "cuda": COMPUTES}
INT8_CAPABILITY = (7, 5)
"""Compute capability from which CUDA cards multiply 8-bit matrices in tensor cores."""
TRITON_CAPABILITY = (8, 0)
"""From which Triton compiles for them, and its row kernels save time and memory."""
SCHEDULES = ("resident", "streamed")
CHUNK_BYTES = 16 * 2**20
"""Size of a temporary in an operation on a CPU; more tokens than fit go through in chunks."""
DEVICE_CHUNK_TOKENS = 8192
"""The same on a CUDA device, in tokens: weights are dequantized again for each chunk."""
PLAIN_DEVICE_CHUNK_TOKENS = 2048
"""The same where plain kernels serve there, which hold float32 copies of what they work on."""
INT_MM_CHUNK_ROWS = 1024
"""Rows whose 32-bit sums torch's product of 8-bit matrices holds at a time."""

SHORTEST_BLOCKED = 256
"""Tokens of the shortest text over which attention may go in blocks of queries on a CPU."""
BLOCK_QUERIES = 128
"""Most tokens of a block: more, and scores leave the cache."""
BLOCK_SCORES = 512 * 1024
"""Most scores of a block with a key head, unless the fewest heads have more by themselves."""
FEWEST_BLOCK_HEADS = 128
"""Query heads of a block that meet a key head together: fewer, and products slow down."""
RECORDED_TOKENS = 64
"""Most tokens of a single text whose pass a CUDA device is given as one recorded launch."""
MOST_RECORDED = 16
"""Most passes that stay recorded."""


def int8_chunk_rows(threads: int) -> int:
    """Most tokens of a chunk of 8-bit products on a CPU with so many threads.

    Fewer, and products slow down, since each reorders its weight anew; more, and their sums leave
    the cache.
    """
    return max(768, 128 * threads)


def keys_multiplied(keys: int) -> int:
    """How many keys a block of queries meets that sees so many.

    oneDNN compiles code for each number: of all up to 4096 there are twelve.
    """
    step = 1 << max(8, (keys - 1).bit_length() - 3)
    return -(-keys // step) * step


def multiplies_codes(form: Format) -> bool:
    """Whether a linear's own codes are what activations rounded to 8 bits meet."""
    return isinstance(form, BnbInt8) or (isinstance(form, Int8Channel) and form.rounds_activations)


def rounds_every_mlp(formats: Mapping[str, Format]) -> bool:
    """Whether every layer's gate and up are codes that meet rounded activations.

    Then 8-bit products take all tokens through an MLP in chunks. ``formats`` are those of every
    linear.
    """
    return all(
        multiplies_codes(form)
        for module, form in formats.items()
        if module.endswith((".gate_proj", ".up_proj"))
    )


@dataclass(frozen=True)
class Plan:
    """One way to run a model on one machine.

    Attributes:
        variant: Stored form of the model.
        engine: ``torch`` or ``onnxruntime``.
        device: ``cpu`` or ``cuda``.
        compute: Arithmetic of the linears.
        schedule: ``resident`` or ``streamed``.
        threads: CPU threads of the engine.
        batch_tokens: Most tokens of a batch.
        window_tokens: Most tokens that go through a layer before the next is brought in.
        kept_layers: Layers of a streamed plan that stay on the device all the same.
        drops_cache: Whether what a streamed plan reads is let go from the page cache at once.
        host_bytes: Predicted peak of anonymous and shared memory of the process.
        device_bytes: Predicted peak of device memory, 0 on a CPU.
        tokens_per_second: Measured on this machine, or None.
        estimated_tokens_per_second: What a described card's rates let expect, or None.
        fidelity: ``verified``, ``failing`` or ``unverified``.
        dropped: Why the plan cannot or need not run here, or None for a candidate.
        reason: Why it was chosen, or was not, in words.
    """

    variant: str
    engine: str
    device: str
    compute: str
    schedule: str
    threads: int = 1
    batch_tokens: int = 4096
    window_tokens: int = 4096
    kept_layers: int = 0
    drops_cache: bool = False
    host_bytes: int = 0
    device_bytes: int = 0
    tokens_per_second: float | None = None
    estimated_tokens_per_second: float | None = None
    fidelity: str = "unverified"
    dropped: str | None = None
    reason: str = ""

    @property
    def id(self) -> str:
        """``<variant>-<engine>-<device>-<compute>-<schedule>``."""
        return f"{self.report_id}-{self.schedule}"

    @property
    def report_id(self) -> str:
        """The id without the schedule, which does not change a vector."""
        return f"{self.variant}-{self.engine}-{self.device}-{self.compute}"

    @property
    def speed(self) -> float:
        """Tokens per second, measured or else estimated; 0 where neither is known."""
        return self.tokens_per_second or self.estimated_tokens_per_second or 0.0

    def with_(self, **changes: Any) -> Plan:
        """The same plan with some of its fields changed."""
        return replace(self, **changes)

    def to_json(self) -> dict[str, Any]:
        """The form of ``lowmem plan --json``."""
        return {
            "id": self.id,
            "variant": self.variant,
            "engine": self.engine,
            "device": self.device,
            "compute": self.compute,
            "schedule": self.schedule,
            "threads": self.threads,
            "batch_tokens": self.batch_tokens,
            "window_tokens": self.window_tokens,
            "kept_layers": self.kept_layers,
            "drops_cache": self.drops_cache,
            "state": "candidate" if self.dropped is None else "dropped",
            "reason": self.dropped or self.reason,
            "predicted": {"host_bytes": self.host_bytes, "device_bytes": self.device_bytes},
            "tokens_per_second": self.tokens_per_second,
            "estimated_tokens_per_second": self.estimated_tokens_per_second,
            "fidelity": self.fidelity,
        }
