"""Freed memory is kept, in a process of its own."""

import subprocess
import sys

BEGIN = """
import re, torch
from lowmem.compute.heap import keep_freed_memory
def held():
    status = open("/proc/self/status").read()
    return 1024 * int(re.search(r"RssAnon:\\s+(\\d+)", status)[1])
torch.set_num_threads(1)
keep_freed_memory()
"""

CODE = """
import resource
def layer():
    return [torch.ones(2**20) for _ in range(20)]  # 80 MiB in blocks of 4
layer(); layer()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    layer()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


GAP = """
large = torch.ones(2**22)  # 16 MiB
behind = torch.ones(2**18)
before = held()
del large
print(before - held())
"""

TRIAL = """
from lowmem.compute.operations import trials
def form():
    blocks = [torch.ones(2**19) for _ in range(40)]  # 80 MiB in blocks of 2
    behind.append(torch.ones(2**18))
behind = []
before = held()
trials.fastest("what costs nothing", {"one": form, "other": form})
print(held() - before)
"""

PASSING = """
from lowmem.compute.heap import passing_blocks_given_back
torch.ones(2**19)
behind = []
before = held()
with passing_blocks_given_back():
    for _ in range(40):  # each passing block of 8 MiB leaves one of 64 KiB behind
        passing = [torch.ones(2**18) for _ in range(8)]
        behind.append(torch.ones(2**14))
        most = held()
        del passing
print(most - before)
"""


def printed(code: str) -> int:
    command = [sys.executable, "-c", BEGIN + code]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return int(done.stdout)


def test_what_one_layer_frees_serves_the_next_without_page_faults() -> None:
    pages = 10 * 80 * 2**20 // 4096  # all that ten layers touch
    assert printed(CODE) < pages / 10


def test_a_large_block_leaves_no_gap_before_what_came_after_it() -> None:
    assert printed(GAP) > 15 * 2**20


def test_a_trial_leaves_none_of_its_memory_behind() -> None:
    kept = 12 * 2**20  # of each call one block that is still in use
    assert printed(TRIAL) < kept + 20 * 2**20


def test_passing_blocks_leave_no_gaps_that_add_up() -> None:
    assert printed(PASSING) < (8 + 40 / 16) * 2**20 + 4 * 2**20
