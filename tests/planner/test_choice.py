from dataclasses import replace

import pytest

from lowmem.artifact.manifest import Bundle
from lowmem.artifact.verdict import FLOORS
from lowmem.compute.plan import Plan
from lowmem.errors import CapacityError
from lowmem.hardware import Hardware
from lowmem.measure import Record
from lowmem.planner import choice, timing
from lowmem.planner.candidates import Wishes
from lowmem.planner.choice import _best_of, _best_tier, _explain, choose, repeated_share
from tests.models import CONTRACT

FLOOR = FLOORS["standard"]


def plan(variant="fp16", compute="fp32", fidelity="unverified", speed=None, dropped=None):
    return Plan(
        variant,
        "torch",
        "cpu",
        compute,
        "resident",
        fidelity=fidelity,
        tokens_per_second=speed,
        dropped=dropped,
    )


def test_verified_plans_come_before_all_others():
    verified = plan("int8", "int8", "verified")
    tier, kind = _best_tier([plan(), verified, plan("int4", fidelity="failing")], Wishes())
    assert (tier, kind) == ([verified], "verified")


def test_without_a_report_the_16_bit_weights_in_fp32_or_bf16_are_trusted():
    both = [plan(), plan(compute="bf16")]
    tier, kind = _best_tier([*both, plan(compute="fp16"), plan("int8")], Wishes())
    assert (tier, kind) == (both, "trusted")


def test_a_failing_plan_is_never_chosen_by_itself():
    assert _best_tier([plan("int4", fidelity="failing")], Wishes()) == ([], "none")


def test_a_failing_plan_runs_when_its_variant_is_asked_for():
    failing = plan("int4", fidelity="failing")
    assert _best_tier([failing], Wishes(variant="int4")) == ([failing], "failing")


def test_a_dropped_plan_is_never_chosen():
    assert _best_tier([plan(dropped="does not fit")], Wishes()) == ([], "none")


def test_of_plans_that_timing_cannot_tell_apart_one_that_keeps_prefixes_is_chosen():
    keeps, other = plan("int8", "int8", speed=950), plan("int8", "int8", speed=1000)
    other = other.with_(engine="onnxruntime")
    assert _best_of([keeps, other], CONTRACT, {}) == keeps
    slower = keeps.with_(tokens_per_second=850)
    assert _best_of([slower, other], CONTRACT, {}) == other
    bidirectional = replace(CONTRACT, is_causal=False)
    assert _best_of([keeps, other], bidirectional, {}) == other


def test_of_plans_that_timing_cannot_tell_apart_the_most_faithful_is_chosen():
    fast, good = plan("bnb-int8", "int8", speed=1000), plan("int8", "int8", speed=950)
    means = {fast.report_id: 0.9944, good.report_id: 0.9989}
    assert _best_of([fast, good], CONTRACT, means) == good
    assert (
        _best_of([fast, good], CONTRACT, {**means, fast.report_id: 0.9988}) == fast
    )  # hardly less
    assert _best_of([fast, good.with_(tokens_per_second=850)], CONTRACT, means) == fast
    assert _best_of([fast, good], CONTRACT, means, repeated=0.5) == good
    keeps_none = good.with_(engine="onnxruntime")
    assert _best_of([fast, keeps_none], CONTRACT, means | {keeps_none.report_id: 0.9989}) == fast


def test_the_reason_says_why_a_faster_plan_was_not_chosen(tiny_bundle, monkeypatch):
    means = {"fp32": 0.999}

    def report(plan, bundle):
        figures = {"mean": means.get(plan.compute, 0.99), "p5": 0.98, "min": 0.97}
        return {"cosine": figures, "nonfinite": 0}

    seconds = {"fp32": 2.1, "int8": 2.0}
    monkeypatch.setattr(choice, "stored_report", report)
    monkeypatch.setattr(
        timing,
        "measure",
        lambda bundle, plan, rows, **_: Record(1, 100, 0.0, [seconds[plan.compute]]),
    )
    wishes = Wishes("int8", "torch", "cpu", schedule="resident")
    machine = Hardware("cpu", 2, (), 2**34, 2**34)
    found = choose(Bundle(tiny_bundle), wishes=wishes, floor=FLOOR, machine=machine)
    assert found.get().id == "int8-torch-cpu-fp32-resident"
    assert found.reason.endswith(
        "; 48 tokens/s; int8-torch-cpu-int8-resident (50 tokens/s) is faster by less than timings "
        "differ, and less faithful"
    )


def test_what_is_repeated_counts_for_plans_that_compute_it_once():
    keeps, other = plan("int8", "int8", speed=500), plan("int8", "int8", speed=1000)
    other = other.with_(engine="onnxruntime")
    assert _best_of([keeps, other], CONTRACT, {}, 0.4) == other
    assert _best_of([keeps, other], CONTRACT, {}, 0.5) == keeps
    assert _best_of([keeps, other], replace(CONTRACT, is_causal=False), {}, 0.9) == other
    # Documents, which repeat nothing, get the other plan: their queries keep its variant.
    assert _best_of([plan("int4", speed=850), keeps, other], CONTRACT, {}, 0.5) == keeps
    assert _best_of([plan("int4", speed=800), other], CONTRACT, {}, 0.5) == other


def test_only_instructions_that_came_before_are_repeated():
    instruction = "Instruct: find the passages that answer\nQuery: "
    size = len(instruction)
    assert repeated_share(["a"] * 4, [instruction] * 4) == 3 * size / (4 * size + 4)
    assert repeated_share(["a"] * 2, [instruction, instruction + "x"]) == 0
    assert repeated_share(["a"] * 4, ["query: "] * 4) == 0
    assert repeated_share([], []) == 0


def test_a_streamed_plan_stands_in_for_a_resident_one_that_fails(tiny_bundle, monkeypatch):
    """Memory that the prediction found may be gone by the time that a plan is run."""

    def measure(path, plan, rows, **_):
        if plan.schedule == "resident":
            raise CapacityError("the weights do not fit")
        return Record(1, 100, 0.0, [2.0])

    monkeypatch.setattr(timing, "measure", measure)
    bundle, wishes = Bundle(tiny_bundle), Wishes("int8", "torch", "cpu")  # fp32 and int8
    for time_all in (False, True):
        found = choose(bundle, wishes=wishes, floor=FLOOR, time_all=time_all)
        assert found.get().schedule == "streamed"
        assert found.get().tokens_per_second


@pytest.mark.parametrize(
    ("compute", "warned"), [("fp32", False), ("bf16", True)], ids=["fp32", "bf16"]
)
def test_an_unjudged_fp32_plan_needs_no_warning(compute, warned):
    _, warning = _explain(plan(compute=compute), "trusted", 1, FLOOR)
    assert (warning is not None) is warned


def test_the_reason_names_the_floor_and_its_numbers():
    reason, _ = _explain(plan("int8", fidelity="verified", speed=123.4), "verified", 3, FLOOR)
    assert "the fastest of 3" in reason
    assert "standard: mean 0.985, p5 0.965, min 0.9" in reason
    assert "123 tokens/s" in reason
