"""lowmem.compute.threads."""

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier, Thread
from unittest.mock import patch

import pytest
import torch

from lowmem.artifact.manifest import Bundle
from lowmem.compute import threads as threads_module
from lowmem.compute.threads import helpers_let_go, lone_threads
from tests.runners import runner

pytestmark = pytest.mark.usefixtures("three_threads")


def counts(pool: ThreadPoolExecutor, count: int) -> list[int]:
    """In how many threads torch computes in each thread of a pool."""
    all_answer = Barrier(count)

    def answer() -> int:
        all_answer.wait()
        return torch.get_num_threads()

    return [future.result() for future in [pool.submit(answer) for _ in range(count)]]


def count_of_a_new_thread() -> int:
    found: list[int] = []
    later = Thread(target=lambda: found.append(torch.get_num_threads()))
    later.start()
    later.join()
    return found[0]


@pytest.mark.parametrize("count", [1, 5])
def test_torch_divides_no_work_in_them_whatever_is_set_elsewhere_before_they_compute(
    count: int,
) -> None:
    with lone_threads(count) as pool:
        torch.set_num_threads(4)
        assert counts(pool, count) == [1] * count


def test_other_threads_may_compute_with_as_many_as_before() -> None:
    with lone_threads(4):
        assert [torch.get_num_threads(), count_of_a_new_thread()] == [3, 3]
    assert [torch.get_num_threads(), count_of_a_new_thread()] == [3, 3]


def test_too_few_threads_are_an_error_and_none_is_left_waiting() -> None:
    started: list[Thread] = []
    start = Thread.start

    def refuse_the_third(thread: Thread) -> None:
        if len(started) == 2:
            raise RuntimeError("can't start new thread")
        started.append(thread)
        start(thread)

    with patch.object(Thread, "start", refuse_the_third), pytest.raises(RuntimeError):
        lone_threads(4)
    for thread in started:
        thread.join(timeout=10)
        assert not thread.is_alive()
    assert [torch.get_num_threads(), count_of_a_new_thread()] == [3, 3]


def tasks() -> set[str]:
    """The system's names of this process's threads."""
    return set(os.listdir("/proc/self/task"))


def divided_work() -> None:
    torch.ones(1_000_000, dtype=torch.float32, device="cpu").mul_(3)


@pytest.fixture
def others() -> set[str]:
    """This process's threads when the test's own has no helpers, of which it would get two."""
    with helpers_let_go():
        divided_work()
    return tasks()


def test_helpers_end_behind_what_is_done_and_come_back(others: set[str]) -> None:
    for _ in range(2):
        with helpers_let_go():
            divided_work()
            helpers = tasks() - others
            assert len(helpers) == 2
        assert not helpers & tasks()


def test_a_model_leaves_no_helpers_to_the_thread_that_opened_it_or_embedded(
    tiny_bundle: Path, others: set[str]
) -> None:
    model = runner(Bundle(tiny_bundle), threads=3)
    assert tasks() <= others
    words = [f"the fox number {number} of many" for number in range(500)]
    texts = model.tokenizer.encode(words, [""] * len(words))
    before = tasks()  # those of the tokenizer stay
    with patch.object(threads_module, "_openmp_pause", return_value=None):
        model.embed(texts, normalize=True)
    helpers = tasks() - before
    assert len(helpers) == 2
    model.embed(texts, normalize=True)
    assert tasks() <= before
