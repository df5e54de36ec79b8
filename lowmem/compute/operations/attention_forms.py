"""From which length of a text on attention is faster in another form, found by trying.

Where a processor multiplies bfloat16 in hardware, long texts take half the time in it; where oneDNN
outdoes the library that torch's kernel multiplies by, in blocks through oneDNN. Over short texts,
whose products are small, both are slower.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, partial

import torch
from torch import Tensor

from lowmem.compute.attention import Spans, attend
from lowmem.compute.operations import trials
from lowmem.compute.operations.products import has_onednn
from lowmem.compute.plan import SHORTEST_BLOCKED

_TOKENS = 1024
_LENGTHS = (16, 64, 256)
_BLOCKED_LENGTHS = (SHORTEST_BLOCKED, 512, 1024)
_HEADS, _KEY_VALUE_HEADS, _HEAD_DIM = 8, 2, 64


@cache
def narrow_from(threads: int) -> float:
    """The least number of tokens of a text from which bfloat16 is faster than float32.

    It is one of a few, and infinite where float32 is faster over all of them. Trying takes some
    tenths of a second, once on a machine.

    Args:
        threads: Those of torch, as they are set.
    """
    return _shortest(_LENGTHS, _narrow_is_faster)


@cache
def blocks_from(threads: int, dtype: torch.dtype) -> float:
    """The least number of tokens of a text from which blocks are faster than torch's kernel.

    Args:
        threads: Those of torch, as they are set.
        dtype: What that kernel would multiply.
    """
    if not has_onednn():
        return float("inf")
    return _shortest(_BLOCKED_LENGTHS, lambda length: _blocks_are_faster(length, dtype))


def _shortest(lengths: Sequence[int], is_faster: Callable[[int], bool]) -> float:
    """The least of some lengths from which on another form is faster."""
    shortest = float("inf")
    for length in reversed(lengths):
        if not is_faster(length):
            break
        shortest = length
    return shortest


def _blocks_are_faster(length: int, dtype: torch.dtype) -> bool:
    spans = Spans.of([(0, [length] * (_TOKENS // length))], True, "cpu")
    query, key, value = (
        _ones(heads).to(dtype) for heads in (_HEADS, _KEY_VALUE_HEADS, _KEY_VALUE_HEADS)
    )
    forms = {
        "kernel": partial(attend, query, key, value, spans),
        "blocks": partial(attend, query, key, value, spans, blocks_from=0),
    }
    name = str(dtype).removeprefix("torch.")
    return trials.fastest(f"attention over {length} tokens in {name}", forms) == "blocks"


def _narrow_is_faster(length: int) -> bool:
    spans = Spans.of([(0, [length] * (_TOKENS // length))], True, "cpu")
    query, key, value = map(_ones, (_HEADS, _KEY_VALUE_HEADS, _KEY_VALUE_HEADS))
    forms = {
        "float32": partial(attend, query, key, value, spans),
        "bfloat16": partial(attend, query, key, value, spans, narrow_from=0),
    }
    return trials.fastest(f"attention over {length} tokens", forms) == "bfloat16"


def _ones(heads: int) -> Tensor:
    return torch.ones(_TOKENS, heads, _HEAD_DIM, dtype=torch.float32, device="cpu")
