"""Texts of which length attention is faster over in bfloat16, found by trying.

Where a processor multiplies bfloat16 in hardware, long texts take half the time in it. Over short
ones, whose products are small, it is slower.
"""

from __future__ import annotations

from functools import cache, partial

import torch
from torch import Tensor

from lowmem.compute.attention import Spans, attend
from lowmem.compute.operations import trials

_TOKENS = 1024
_LENGTHS = (16, 64, 256)
_HEADS, _KEY_VALUE_HEADS, _HEAD_DIM = 8, 2, 64


@cache
def narrow_from(threads: int) -> float:
    """The least number of tokens of a text from which bfloat16 is faster than float32.

    It is one of a few, and infinite where float32 is faster over all of them. Trying takes some
    tenths of a second, once on a machine.

    Args:
        threads: Those of torch, as they are set.
    """
    shortest = float("inf")
    for length in reversed(_LENGTHS):
        if not _narrow_is_faster(length):
            break
        shortest = length
    return shortest


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
