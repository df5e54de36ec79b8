from dataclasses import replace

import pytest

from lowmem.artifact.variants import VARIANTS, formats_for
from lowmem.compute.plan import COMPUTES, Plan
from lowmem.planner import estimate
from lowmem.planner.cards import find
from lowmem.planner.estimate import tokens_per_second
from tests.shapes import SEVEN_B

WINDOWS = {"resident": 4096, "streamed": 16384}
CARDS = ["GTX 1650", "RTX 2060 6GB", "RTX 3060", "RTX 4090", "RTX 5060 Ti 16GB", "T4"]


def speed(
    card="RTX 3060",
    variant="fp16",
    compute="fp16",
    schedule="resident",
    engine="torch",
    device="cuda",
    config=SEVEN_B,
    text_tokens=512,
    **changes,
):
    plan = Plan(variant, engine, device, compute, schedule, window_tokens=WINDOWS[schedule])
    gpu = replace(find(card), **changes)
    formats = formats_for(variant, config, "F16")
    return tokens_per_second(plan, config, formats, gpu, text_tokens)


def combinations(card):
    for variant in VARIANTS:
        for compute in COMPUTES:
            if compute in find(card).rates:
                for schedule in WINDOWS:
                    yield {"variant": variant, "compute": compute, "schedule": schedule}


def test_a_plan_of_the_16_bit_weights_takes_the_time_of_its_sums():
    small = replace(SEVEN_B, num_hidden_layers=1, hidden_size=64, intermediate_size=128)
    small = replace(small, num_attention_heads=4, num_key_value_heads=2, head_dim=16)
    rates = {"fp16": 1e12}
    weights = 64 * (64 + 32 + 32) + 64 * 64 + 3 * 64 * 128
    passes = 8 * 64 + 3 * (64 + 32) + 3 * 128
    seconds = 2 * weights / (0.8 * 1e12) + 2 * 64 * 100 / (0.3 * 1e12)
    seconds += 4 * passes / (0.8 * 1e11)
    found = speed(config=small, text_tokens=100, rates=rates, memory_bandwidth=1e11)
    assert found == pytest.approx(1 / seconds)


def test_an_estimate_is_near_a_published_speed():
    # llama.cpp, Mistral 7B in fp16 on an RTX 4090, prefill of 512 tokens: 7265 tokens/s.
    assert 7265 / 1.5 < speed("RTX 4090") < 7265 * 1.5


def test_no_estimate_is_above_the_rate_of_the_products():
    for card in CARDS:
        for combination in combinations(card):
            rate = max(find(card).rates[combination["compute"]], find(card).rates["fp16"])
            peak = rate / (2 * SEVEN_B.linear_weights)
            assert 0 < speed(card, **combination) < peak


@pytest.mark.parametrize("card", CARDS)
def test_a_faster_card_is_never_estimated_slower(card):
    gpu = find(card)
    faster = [{"rates": {**gpu.rates, name: 1.5 * rate}} for name, rate in gpu.rates.items()]
    faster += [{key: 1.5 * getattr(gpu, key)} for key in ("memory_bandwidth", "copy_bandwidth")]
    for combination in combinations(card):
        base = speed(card, **combination)
        assert all(speed(card, **combination, **changes) >= base for changes in faster)


@pytest.mark.parametrize("card", CARDS)
def test_streaming_is_never_faster_than_holding_the_weights(card):
    for combination in combinations(card):
        resident = speed(card, **{**combination, "schedule": "resident"})
        assert speed(card, **combination) <= resident


def test_a_fast_link_hides_streaming_and_a_slow_one_bounds_it():
    resident = speed()
    assert speed(schedule="streamed") > 0.95 * resident
    seconds = 2 * SEVEN_B.linear_weights / 1e9
    slow = speed(schedule="streamed", copy_bandwidth=1e9)
    assert slow == pytest.approx(16384 / seconds, rel=0.05)
    assert slow < resident / 1.04


def test_dequantization_and_longer_texts_cost_time():
    assert speed(variant="int8") < speed(variant="int4") < speed()  # fewer bytes are read
    assert speed(compute="bf16") < speed()  # the stored weights are fp16
    assert speed(text_tokens=4096) < speed(text_tokens=64)


def test_every_compute_of_torch_is_estimated_by_a_rate_of_its_own():
    assert all(estimate._ARITHMETIC["torch", compute] == compute for compute in COMPUTES)


def test_8_bit_products_of_8_bit_weights_are_estimated_fastest():
    for card in ("RTX 3060", "RTX 4090"):
        best = max(("fp16", "fp16-acc16", "int8"), key=lambda one: speed(card, "int8", one))
        assert best == "int8"
    assert speed("RTX 2060 6GB", "int8", "int8") > speed("RTX 2060 6GB", "int8", "fp16")


def test_weights_that_are_not_8_bit_cost_8_bit_products_their_rounding():
    assert speed(variant="int4", compute="int8") < speed(variant="int8", compute="int8")
    assert speed(variant="bnb-int8", compute="int8") == speed(variant="int8", compute="int8")


def test_8_bit_integers_are_slow_on_data_centre_blackwell_and_fp8_is_preferred():
    rates = {"fp16": 2.2e15, "bf16": 2.2e15, "int8": 4.5e15, "fp8": 4.5e15, "fp32": 7e13}
    card = {"compute_capability": (10, 0), "rates": rates, "memory_bandwidth": 8e12}
    assert speed(variant="int8", compute="int8", **card) < speed(variant="int8", **card)
    assert speed(variant="int8", compute="fp8", **card) > speed(variant="int8", **card)


@pytest.mark.parametrize(
    "changes",
    [
        {"device": "cpu"},
        {"rates": None},
        {"rates": {"fp32": 1e13}},
        {"memory_bandwidth": None},
        {"schedule": "streamed", "copy_bandwidth": None},
        {"engine": "onnxruntime", "variant": "int8", "compute": "int8"},
    ],
    ids=str,
)
def test_what_is_not_known_has_no_estimate(changes):
    assert speed(**changes) is None


def test_onnxruntime_multiplies_fp16_as_torch_does():
    assert speed(engine="onnxruntime") == speed()
