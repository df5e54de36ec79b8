"""Prefixes that are kept from pass to pass."""

from pathlib import Path

import numpy as np
import pytest
import torch

from lowmem.artifact.manifest import Bundle
from lowmem.compute import layers
from lowmem.compute.decoder import PrefixStates
from lowmem.compute.engine import Runner
from lowmem.compute.plan import Plan
from lowmem.compute.prefixes import PrefixCache
from tests.models import LAYERS
from tests.tolerances import INVARIANCE_DISTANCE


def states(tokens: int) -> list[PrefixStates]:
    return [PrefixStates(torch.zeros(tokens, 1, 2), torch.zeros(tokens, 1, 2))] * 2


def test_the_prefix_that_was_not_used_for_longest_goes_first() -> None:
    cache = PrefixCache(10)
    for ids in (b"a", b"b"):
        cache.keep(ids, states(4))
    assert cache.get(b"a") is not None
    cache.keep(b"c", states(5))
    assert cache.get(b"b") is None
    assert cache.get(b"a") is not None
    assert cache.get(b"c") is not None


def test_a_prefix_that_is_too_long_is_not_kept_and_drives_none_out() -> None:
    cache = PrefixCache(10)
    cache.keep(b"a", states(4))
    cache.keep(b"b", states(11))
    assert cache.get(b"b") is None
    assert cache.get(b"a") is not None


def test_keeping_a_prefix_again_does_not_count_it_twice() -> None:
    cache = PrefixCache(10)
    cache.keep(b"a", states(5))
    for _ in range(3):
        cache.keep(b"b", states(5))
    assert cache.get(b"a") is not None


def test_of_many_prefixes_the_first_are_kept() -> None:
    ids = [bytes(8 * tokens) for tokens in (4, 5, 2, 1)]
    assert PrefixCache(10).fitting(ids) == ids[:2]
    assert PrefixCache(0).fitting(ids) == []


@pytest.mark.parametrize(("variant", "compute"), [("fp16", "fp32"), ("int8", "int8")])
@pytest.mark.parametrize("schedule", ["resident", "streamed"])
def test_a_prefix_is_computed_once_and_changes_no_vector(
    tiny_bundle: Path,
    monkeypatch: pytest.MonkeyPatch,
    variant: str,
    compute: str,
    schedule: str,
) -> None:
    passes: list[int] = []
    plain = layers.decode_prefix

    def counted(*arguments: object, is_exact: bool) -> object:
        passes.append(len(arguments[2]))  # type: ignore[arg-type]  # the hidden states
        return plain(*arguments, is_exact=is_exact)  # type: ignore[arg-type]

    monkeypatch.setattr(layers, "decode_prefix", counted)
    plan = Plan(variant, "torch", "cpu", compute, schedule, batch_tokens=30, window_tokens=60)
    model = Runner(Bundle(tiny_bundle), plan)
    prompt = model.contract.prompt("query", "same")
    texts = model.tokenizer.encode(["one", "two or three", "a fox", "moon"], [prompt] * 4)
    first = model.embed(texts, normalize=True)
    assert len(passes) == LAYERS
    again = model.embed(texts[:2], normalize=True)
    assert len(passes) == LAYERS
    np.testing.assert_array_less(np.linalg.norm(first[:2] - again, axis=1), INVARIANCE_DISTANCE)
