"""From which length on attention goes through bfloat16."""

import math

import pytest
import torch

from lowmem.compute.attention import Spans, attend
from lowmem.compute.operations import attention_forms, int8, trials
from lowmem.compute.operations.plain import PlainOperations


@pytest.fixture(autouse=True)
def _forgotten() -> None:
    attention_forms.narrow_from.cache_clear()


@pytest.mark.parametrize(
    ("wins", "expected"),
    [
        ((), math.inf),
        ((256,), 256),
        ((64, 256), 64),
        ((16, 64, 256), 16),
        ((16, 256), 256),
        ((16, 64), math.inf),
    ],
    ids=str,
)
def test_bfloat16_must_win_over_all_longer_texts(
    wins: tuple[int, ...], expected: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    questions = {f"attention over {length} tokens" for length in wins}

    def winner(question: str, forms: object) -> str:
        return "bfloat16" if question in questions else "float32"

    monkeypatch.setattr(trials, "fastest", winner)
    assert attention_forms.narrow_from(1) == expected


def test_both_forms_that_are_tried_are_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    tried = {}
    monkeypatch.setattr(trials, "fastest", lambda question, forms: tried.update(forms) or "float32")
    attention_forms.narrow_from(1)
    results = [form() for form in tried.values()]
    assert [result.dtype for result in results] == [torch.float32] * 2
    torch.testing.assert_close(results[0], torch.ones_like(results[0]))
    torch.testing.assert_close(results[1], torch.ones_like(results[1]), rtol=0, atol=2**-7)


def test_8_bit_products_go_with_attention_in_bfloat16_and_no_others_do(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(int8, "narrow_from", lambda threads: 40)
    spans = Spans.of([(0, [40, 30])], True, "cpu")
    query, key, value = (torch.rand(70, heads, 8) for heads in (4, 2, 2))
    exact = attend(query, key, value, spans)
    assert torch.equal(PlainOperations("int8", 1e-5).attend(query, key, value, spans), exact)
    got = int8.Int8Operations(1e-5).attend(query, key, value, spans)
    assert got.dtype == torch.float32
    assert torch.equal(got[40:], exact[40:])
    assert not torch.equal(got[:40], exact[:40])
    torch.testing.assert_close(got, exact, rtol=0, atol=2**-6)
