"""The window of a streamed plan, from the speed of copies and of arithmetic."""

from dataclasses import replace
from pathlib import Path

import pytest

from lowmem import cache
from lowmem.artifact.manifest import Bundle
from lowmem.artifact.variants import formats_for
from lowmem.artifact.verdict import FLOORS
from lowmem.compute.plan import Plan
from lowmem.hardware import Gpu, Hardware
from lowmem.measure import Record
from lowmem.planner import memory, timing, window
from lowmem.planner.candidates import HOST_MARGIN_BYTES, Subject, Wishes
from lowmem.planner.cards import describe
from lowmem.planner.choice import foresee
from lowmem.planner.timing import Stopwatch
from tests.disk import cached_file, read_bytes
from tests.shapes import SEVEN_B

GIB = 2**30
FORMATS = {"fp16": formats_for("fp16", SEVEN_B, "F16")}
SUBJECT = Subject(SEVEN_B, 4096, "F16", FORMATS, {"fp16": {}})
HOST = Hardware("CPU", 8, ("avx2",), 32 * GIB, 28 * GIB)
STORED_BYTES = 2 * SEVEN_B.linear_weights
PLAN = Plan("fp16", "torch", "cpu", "fp32", "streamed", batch_tokens=1000)


def sized(plan=PLAN, machine=HOST, *, seconds_of_copy=1.0, speed):
    """The plan on a machine that copies the whole stack in so many seconds."""
    bandwidth = STORED_BYTES / seconds_of_copy
    return window.sized(plan, SUBJECT, machine, copy_bandwidth=bandwidth, tokens_per_second=speed)


@pytest.mark.parametrize("speed", [1, 700, 2100, 50_000])
@pytest.mark.parametrize("kept", [0, 8, 31])
def test_copies_hide_behind_a_window_with_a_margin_and_no_more_than_a_batch_to_spare(speed, kept):
    plan = sized(PLAN.with_(kept_layers=kept), seconds_of_copy=3.0, speed=speed)
    copying = 3.0 * (1 - kept / 32)
    assert plan.window_tokens % plan.batch_tokens == 0
    assert plan.window_tokens / speed >= window.MARGIN * copying
    assert (plan.window_tokens - plan.batch_tokens) / speed < window.MARGIN * copying


def test_a_faster_copy_needs_a_smaller_window_and_faster_arithmetic_a_larger_one():
    usual = sized(speed=9000).window_tokens
    assert sized(speed=9000, seconds_of_copy=0.5).window_tokens < usual
    assert sized(speed=18000).window_tokens > usual


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_memory_bounds_the_window_and_the_reason_says_so(device):
    plan = PLAN.with_(device=device)
    host, on_device = memory.predict(plan.with_(window_tokens=1000), SEVEN_B, FORMATS["fp16"], HOST)
    hidden = 4 * 4096 * 1000
    free = (host if device == "cpu" else on_device) + 3 * hidden
    machine = replace(HOST, host_free_bytes=max(host, free) + HOST_MARGIN_BYTES)
    machine = replace(machine, gpus=(Gpu("small", free, free, (8, 6)),))
    bounded = sized(plan, machine, speed=50_000)
    assert bounded.window_tokens == 4000
    assert (bounded.host_bytes if device == "cpu" else bounded.device_bytes) == free
    assert bounded.reason.endswith(
        "hide behind 50000 tokens at 50000 tokens/s, and memory holds 4000"
    )


def test_the_memory_of_the_window_is_in_the_prediction():
    small, large = sized(speed=1), sized(speed=10_000)
    more = large.window_tokens - small.window_tokens
    assert large.host_bytes - small.host_bytes == 4 * 4096 * more


def test_a_described_card_gets_a_window_for_its_link():
    def window_at(copy_bandwidth):
        machine = describe("RTX 4060 8GB", HOST)
        gpu = replace(machine.gpus[0], copy_bandwidth=copy_bandwidth)
        machine = replace(machine, gpus=(gpu,))
        wishes = Wishes("fp16", device="cuda", compute="bf16", schedule="streamed")
        floor = FLOORS["standard"]
        found = foresee(SUBJECT, machine=machine, wishes=wishes, floor=floor, bundle=None)
        return found.plans[0]

    slow, fast = window_at(4e9), window_at(32e9)
    assert slow.window_tokens > fast.window_tokens >= fast.batch_tokens
    assert "GB/s hide behind" in slow.reason


def test_the_disk_is_read_and_not_the_page_cache(tmp_path: Path):
    file = cached_file(tmp_path, 2**23)
    before = read_bytes()
    assert window.read_bandwidth(file) > 0
    assert read_bytes() - before >= 2**23


def test_timing_sizes_a_streamed_plan_without_what_it_waited_and_remembers_both(
    tiny_bundle, monkeypatch
):
    bundle = Bundle(tiny_bundle)
    subject = Subject.of_bundle(bundle)
    runs = []

    def measure(path, plan, rows, **_):
        runs.append(plan)
        return Record(texts=1, tokens=4000, load_seconds=0.1, seconds=[10.0], waited_seconds=8.0)

    layers = memory.stored_bytes(subject.config, subject.formats["fp16"])
    monkeypatch.setattr(timing, "measure", measure)
    monkeypatch.setattr(window, "read_bandwidth", lambda path: layers / 3)
    for _ in range(2):
        (plan,) = Stopwatch(bundle, subject, HOST).time([PLAN])
        assert plan.tokens_per_second == 2000  # in a full window, which hides what it waits for
        assert plan.window_tokens == window.MARGIN * 3 * 2000
        assert plan.reason.endswith("hide behind 6000 tokens at 2000 tokens/s")
    assert len(runs) == 1
    assert list(cache.directory().iterdir())
    dropping = PLAN.with_(drops_cache=True)
    Stopwatch(bundle, subject, HOST).time([dropping])
    assert runs[1:] == [dropping], "reading from the page cache says nothing of a disk"


def test_a_streamed_plan_is_as_fast_as_the_slower_of_copy_and_arithmetic():
    plan = PLAN.with_(window_tokens=4000)
    for seconds, speed, expected in ((1.0, 1000, 1000), (8.0, 1000, 500)):
        bandwidth = STORED_BYTES / seconds
        found = window.tokens_per_second(plan, SUBJECT, copy_bandwidth=bandwidth, computing=speed)
        assert found == pytest.approx(expected)
