from lowmem.compute.plan import Plan
from lowmem.fidelity.pace import Pace

CPU = [Plan(variant, "torch", "cpu", "fp32", "resident") for variant in ("fp16", "int8", "int4")]
GPU = Plan("int8", "torch", "cuda", "fp16", "resident")


def test_plans_that_were_timed_before_and_others_on_the_cpu_are_foreseen() -> None:
    # 1000 s for the reference, 500 s for the plan that was timed, 1000 s for each other, and 15 s
    # for each to start
    pace = Pace(CPU, 10_000, 10_000, {CPU[0].id: 20.0}, 10.0)
    assert pace.left() == "about 59 min"


def test_what_is_left_follows_what_was_taken() -> None:
    pace = Pace(CPU, 1_000, 1_000, {}, 10.0)
    assert pace.left() == "about 7 min"
    pace.finished(CPU[0], 11.5)  # a tenth of the 115 s that were foreseen
    assert pace.left() == "about 23 s"
    pace.finished(CPU[1], 11.5)
    pace.finished(CPU[2], 11.5)
    assert pace.left() == "about 1 s"


def test_a_card_that_was_never_timed_is_said_to_be_unknown() -> None:
    pace = Pace([CPU[0], GPU], 720_000, 0, {}, 10.0)
    assert pace.left() == "about 20.0 h and 1 plan not timed yet"
    assert Pace([GPU, GPU.with_(compute="bf16")], 9, 0, {}, 10.0).left() == (
        "about 1 s and 2 plans not timed yet"
    )
    pace.finished(GPU, 5.0)
    assert pace.left() == "about 20.0 h"


def test_a_plan_that_failed_is_not_waited_for() -> None:
    pace = Pace(CPU, 1_000, 1_000, {}, 10.0)
    pace.ended(CPU[0])
    assert pace.left() == "about 4 min"  # 115 s for each of the two others
