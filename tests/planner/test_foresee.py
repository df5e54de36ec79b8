"""What would be chosen on cards that are not here, for a model of Mistral 7B's shape."""

from dataclasses import replace
from types import SimpleNamespace

import pytest

from lowmem.artifact.variants import VARIANTS, formats_for
from lowmem.artifact.verdict import FLOORS
from lowmem.hardware import Gpu, Hardware
from lowmem.planner import choice, window
from lowmem.planner.candidates import Subject, Wishes
from lowmem.planner.cards import DEVICE_RESERVE_BYTES, cards, describe
from lowmem.planner.choice import foresee
from tests.shapes import SEVEN_B

GIB = 2**30
FORMATS = {name: formats_for(name, SEVEN_B, "F16") for name in VARIANTS}
SUBJECT = Subject(SEVEN_B, 4096, "F16", FORMATS, {"fp16": {"model_fp16.onnx": "fp16"}})
HOST = Hardware("CPU", 8, ("avx2",), 32 * GIB, 28 * GIB)


def foreseen(machine, bundle=None, **wishes):
    if isinstance(machine, str):
        machine = describe(machine, HOST)
    return foresee(
        SUBJECT,
        machine=machine,
        wishes=Wishes(**wishes),
        floor=FLOORS["standard"],
        bundle=bundle,
    )


def running(found):
    return {plan.id for plan in found.plans if plan.dropped is None}


def judged(monkeypatch, **fidelities):
    """A bundle whose reports say this, by plan with underscores for hyphens."""

    def fidelity_of(plan, bundle, floor):
        return fidelities.get(plan.report_id.replace("-", "_"), "unverified")

    monkeypatch.setattr(choice, "fidelity_of", fidelity_of)
    return SimpleNamespace(path="bundle")


@pytest.mark.parametrize(
    ("card", "resident", "streamed", "chosen"),
    [
        ("GTX 1650 4GB", "", "int4 int8 fp16", "fp16-torch-cuda-fp32-streamed"),
        ("GTX 1660 6GB", "int4", "int8 fp16", "fp16-torch-cuda-fp32-streamed"),
        ("RTX 2060 6GB", "int4", "int8 fp16", "fp16-torch-cuda-fp32-streamed"),
        ("RTX 3050 8GB", "int4", "fp16", "fp16-torch-cuda-bf16-streamed"),
        ("RTX 4060 8GB", "int4", "fp16", "fp16-torch-cuda-bf16-streamed"),
        ("RTX 5060 8GB", "int4", "fp16", "fp16-torch-cuda-bf16-streamed"),
        ("RTX 2060 12GB", "int4 int8", "fp16", "fp16-torch-cuda-fp32-streamed"),
        ("RTX 3060 12GB", "int4 int8", "fp16", "fp16-torch-cuda-bf16-streamed"),
        ("RTX 5070 12GB", "int4 int8", "fp16", "fp16-torch-cuda-bf16-streamed"),
        ("RTX 3090 24GB", "int4 int8 fp16", "", "fp16-torch-cuda-bf16-resident"),
        ("RTX 4090 24GB", "int4 int8 fp16", "", "fp16-torch-cuda-bf16-resident"),
        ("RTX 5090 32GB", "int4 int8 fp16", "", "fp16-torch-cuda-bf16-resident"),
    ],
)
def test_what_fits_and_what_is_chosen(card, resident, streamed, chosen):
    found = foreseen(card)
    for schedule, variants in (("resident", resident), ("streamed", streamed)):
        other = {"resident": "streamed", "streamed": "resident"}[schedule]
        for variant in variants.split():
            assert f"{variant}-torch-cuda-fp16-{schedule}" in running(found)
            assert f"{variant}-torch-cuda-fp16-{other}" not in running(found)
    assert found.chosen is not None
    assert found.chosen.id == chosen


@pytest.mark.parametrize("card", ["RTX 4060 Ti 16GB", "RTX 5080 16GB"])
def test_16_gb_hold_the_8_bit_weights(card):
    found = foreseen(card)
    assert "int8-torch-cuda-bf16-resident" in running(found)
    assert found.chosen is not None
    assert found.chosen.report_id == "fp16-torch-cuda-bf16"


@pytest.mark.parametrize("card", cards(), ids=lambda card: card.name)
def test_every_card_of_the_table_runs_the_model(card):
    found = foreseen(card.name)
    assert found.chosen is not None
    assert found.chosen.device == "cuda"
    assert found.chosen.tokens_per_second is None
    assert found.chosen.estimated_tokens_per_second > 0
    has_bf16 = card.compute_capability >= (8, 0)
    assert any("-cuda-bf16-" in plan for plan in running(found)) is has_bf16


def test_more_memory_never_drops_a_plan_nor_slows_the_choice():
    # With fewer layers to stream a window may be a batch shorter, and waits for one layer still.
    first_layer = 1 / (window.MARGIN * SEVEN_B.num_hidden_layers)
    before, speed = set(), 0.0
    for gib in (3, 4, 5, 6, 8, 10, 12, 16, 20, 24, 32):
        machine = describe("RTX 4090", HOST)
        free_bytes = gib * GIB - DEVICE_RESERVE_BYTES
        gpu = replace(machine.gpus[0], total_bytes=gib * GIB, free_bytes=free_bytes)
        found = foreseen(replace(machine, gpus=(gpu,)))
        now = {plan.report_id for plan in found.plans if plan.dropped is None}
        assert now >= before
        assert found.chosen is not None
        assert found.chosen.speed >= (1 - first_layer) * speed
        before, speed = now, found.chosen.speed


def test_a_card_that_is_too_small_leaves_the_cpu():
    small = {"name": "small", "total_bytes": GIB, "compute_capability": [7, 5]}
    machine = replace(HOST, gpus=(Gpu.from_json({**small, "free_bytes": GIB // 2}),))
    found = foreseen(machine, compute="fp32", variant="fp16")
    assert found.chosen is not None
    assert found.chosen.id == "fp16-torch-cpu-fp32-resident"
    assert found.chosen.speed == 0


def test_without_rates_nothing_is_ranked():
    gpu = replace(describe("RTX 3060", HOST).gpus[0], rates=None)
    found = foreseen(replace(HOST, gpus=(gpu,)))
    assert found.chosen is None
    assert found.reason == (
        "nothing is exported yet; 3 trusted plans are to be timed there, and have no estimate"
    )
    alone = foreseen(replace(HOST, gpus=(gpu,)), variant="int4", device="cuda", compute="fp16")
    assert alone.chosen is not None
    assert alone.chosen.id == "int4-torch-cuda-fp16-resident"


def test_the_reason_names_the_plan_that_a_report_would_bring():
    found = foreseen("RTX 2060 6GB")
    assert found.reason.startswith("nothing is exported yet; no plan is verified; the only one")
    assert "such plans have no estimate" in found.reason
    fastest = max(
        (plan for plan in found.plans if plan.dropped is None), key=lambda plan: plan.speed
    )
    assert fastest.compute == "int8"
    assert f"{fastest.id}, an estimated {fastest.speed:.0f} tokens/s, would be" in found.reason


def test_a_verified_plan_is_chosen_and_a_failing_one_is_never_held_out(monkeypatch):
    bundle = judged(
        monkeypatch,
        int4_torch_cuda_fp16="verified",
        int4_torch_cuda_fp32="verified",
        int8_torch_cuda_fp16="failing",
        int8_torch_cuda_bf16="failing",
    )
    found = foreseen("RTX 3060", bundle)
    assert found.chosen is not None
    assert found.chosen.id == "int4-torch-cuda-fp16-resident"
    assert found.reason.startswith("nothing was timed: the machine is described; the fastest of 2")
    assert "int8-torch-cuda-fp16" not in found.reason
    assert "int8-torch-cuda-bf16" not in found.reason


def test_a_failing_plan_is_chosen_only_by_name(monkeypatch):
    bundle = judged(monkeypatch, int4_torch_cuda_fp16="failing")
    only = {"device": "cuda", "compute": "fp16", "variant": "int4"}
    found = foreseen("RTX 3060", bundle, **only)
    assert found.chosen is not None
    assert found.chosen.fidelity == "failing"
    assert found.warning is not None


def test_plans_are_ordered_by_estimate():
    speeds = [plan.speed for plan in foreseen("RTX 4060").plans if plan.dropped is None]
    assert speeds == sorted(speeds, reverse=True)
    assert speeds[0] > 0
