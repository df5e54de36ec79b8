"""What ``report`` prints, of invented figures."""

from collections.abc import Mapping

from lowmem.cli.report_tables import table
from lowmem.fidelity.readiness import readiness
from tests.report_pages import BAD, GOOD, STANDARD, report


def printed(distances: Mapping[str, float]) -> str:
    """The table of plans whose vectors are so far from the reference."""
    reports = [report(plan, distance) for plan, distance in distances.items()]
    return table([one | {"readiness": readiness(one, STANDARD)} for one in reports], STANDARD)


def test_plans_that_all_say_the_same_are_not_listed_again() -> None:
    plans = [f"fp16-torch-cpu-{compute}" for compute in ("fp32", "bf16", "int8")]
    text = printed(dict.fromkeys(plans, GOOD))
    assert "all 3 plans: ready" in text
    assert [text.count(plan) for plan in plans] == [1, 1, 1]


def test_plans_are_named_where_others_say_otherwise() -> None:
    good = ("int8-torch-cpu-fp32", "fp16-torch-cpu-fp32")
    text = printed({**dict.fromkeys(good, GOOD), "int4-torch-cpu-fp32": BAD})
    assert f"{', '.join(good)}: ready" in text
    assert "int4-torch-cpu-fp32: not ready" in text
    assert max(map(len, text.splitlines())) <= 80
