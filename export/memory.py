"""What an export may hold in memory, by the model's shape: an upper bound, not an estimate.

It is what the process itself holds (RssAnon + RssShmem). Hidden states of calibration texts lie in
scratch files, whose pages the system takes back. What calibrates may be a card, if it has the room.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from export import sensitivities
from export.hidden_states import LONGEST_TOKENS, STAGES
from export.sources import Source
from lowmem.artifact.config import ModelConfig
from lowmem.compute.out_of_memory import is_out_of_memory
from lowmem.errors import BackendError, CapacityError
from lowmem.hardware import Hardware

MIB = 2**20
# Interpreter and libraries, and what the heap keeps of blocks that are too small to be given back.
_LIBRARIES_BYTES = 400 * MIB
_FLOAT32, _HALF = 4, 2
# CUDA's own part of a card's memory, its libraries' workspaces, and what its heap keeps in pieces.
CUDA_BYTES = 900 * MIB


def check_memory(source: Source, most_bytes: int, *, is_calibrated: bool) -> None:
    """Refuses an export that might hold more than it may.

    Raises:
        CapacityError: It might.
    """
    config, dtype = source.config, source.dtype
    needed = peak_bytes(config, dtype, is_calibrated=is_calibrated)
    if needed <= most_bytes:
        return
    less = peak_bytes(config, dtype, is_calibrated=False)
    way_out = ""
    if is_calibrated and less <= most_bytes:
        way_out = f"; --calibration none needs {less // MIB} MiB"
    raise CapacityError(
        f"the export may need {needed // MIB} MiB of memory, {most_bytes // MIB} MiB are "
        f"allowed{way_out}"
    )


def peak_bytes(config: ModelConfig, source_dtype: str, *, is_calibrated: bool) -> int:
    """Most bytes that an export of any variants holds.

    Args:
        config: The model's shape.
        source_dtype: Of the source's tensors: F16, BF16 or F32.
        is_calibrated: Whether texts steer a quantizer.
    """
    # A tensor as it is read, and in 16 bits where it is not.
    read = _HALF if source_dtype != "F32" else _FLOAT32 + _HALF
    shapes = config.linears()
    largest = max(rows * columns for rows, columns in shapes.values())
    # One tensor at work, one read ahead and one that is written or let go; codes that are made, and
    # that are written.
    alone = 3 * read * max(largest, config.vocab_size * config.hidden_size // 2) + 4 * largest
    if not is_calibrated:
        return _LIBRARIES_BYTES + alone
    layer = read * sum(rows * columns for rows, columns in shapes.values())
    steered = max(_stage_bytes(config), sensitivities.peak_bytes(config))
    return _LIBRARIES_BYTES + max(alone, layer + steered)


def card_bytes(config: ModelConfig) -> int:
    """Most bytes of a card's memory that calibration holds."""
    columns = max(columns for _, columns in config.linears().values())
    # A card inverts by solving for the identity.
    stage = _stage_bytes(config) + _FLOAT32 * columns * columns
    return CUDA_BYTES + max(stage, sensitivities.peak_bytes(config))


def calibrating_device(wanted: str, config: ModelConfig, hardware: Hardware) -> tuple[str, str]:
    """What calibrates.

    Args:
        wanted: ``cpu``, ``cuda``, or ``auto``: a card that has the room, else the CPU.
        config: The model's shape.
        hardware: This machine.

    Returns:
        ``cpu`` or ``cuda``, and why.

    Raises:
        BackendError: The card is asked for, and there is none that torch can use.
        CapacityError: The card is asked for, and has not enough room.
    """
    if wanted == "cpu":
        return "cpu", "asked for"
    if not hardware.gpus:
        problem = hardware.why_no_gpu
    elif not torch.cuda.is_available():
        problem = "torch finds no CUDA device that it can use"
    else:
        card, needed = hardware.gpus[0], card_bytes(config)
        if needed <= card.free_bytes:
            return "cuda", card.name
        problem = (
            f"calibration may need {needed // MIB} MiB of the card's memory, "
            f"{card.free_bytes // MIB} MiB are free"
        )
        if wanted == "cuda":
            raise CapacityError(f"{problem}: --device cpu calibrates without it")
    if wanted == "cuda":
        raise BackendError(problem)
    return "cpu", problem


@contextmanager
def within_card(device: str) -> Iterator[None]:
    """Says what can be done where a card's memory is used up after all.

    Raises:
        CapacityError: It is.
    """
    try:
        yield
    except RuntimeError as error:
        if device != "cuda" or not is_out_of_memory(error):
            raise
        raise CapacityError(
            "the card's memory is used up, by this export and other programs: --device cpu "
            "calibrates without it"
        ) from error


def _stage_bytes(config: ModelConfig) -> int:
    """Most bytes that a stage at work holds, the layer's own weights not counted."""
    shapes = config.linears()
    inner = max(config.intermediate_size, config.query_size + 2 * config.key_value_size)
    batch = LONGEST_TOKENS * (3 * inner + 2 * config.hidden_size)
    stage = 0
    for linears in STAGES:
        rows = sum(shapes[name][0] for name in linears)
        columns = shapes[linears[0]][1]
        # The moments and what replaces them; the weights, what they miss, moved, and in an order.
        fitted = 2 * columns * columns + 5 * rows * columns
        # Before that the moments are summed up, and behind it the states go on.
        passed = columns * columns + 2 * rows * columns + batch
        stage = max(stage, fitted, passed)
    return _FLOAT32 * stage
