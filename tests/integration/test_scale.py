"""Many texts cost what few do, each: a tiny model through the whole way from file to file."""

import random
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from lowmem.measure import MemoryPeak

FEW, MANY = 2_000, 22_000
# Of a text in memory: its row, its ids and its vector.
BYTES_OF_A_TEXT = 4_000


def write_texts(path: Path, count: int) -> Path:
    words = "the of and to in is that for it was on are as with his they at be this from".split()
    draw = random.Random(count)
    lines = (" ".join(draw.choices(words, k=draw.randint(3, 24))) for _ in range(count))
    path.write_text("".join(f"{number} {line}\n" for number, line in enumerate(lines)))
    return path


def embed(bundle: Path, texts: Path, output: Path) -> tuple[float, int]:
    """Seconds and peak bytes of a process that embeds a file."""
    wishes = ("--variant", "fp16", "--engine", "torch", "--compute", "fp32")
    words = ["-m", "lowmem", "embed", bundle, texts, output, *wishes]
    start = time.monotonic()
    with (
        subprocess.Popen([sys.executable, *map(str, words)]) as process,
        MemoryPeak(process.pid) as peak,
    ):
        assert process.wait() == 0
    return time.monotonic() - start, peak.bytes


@pytest.mark.slow
def test_time_and_memory_of_a_text_are_the_same_for_ten_times_as_many(
    tiny_bundle: Path, tmp_path: Path
) -> None:
    outputs = {count: tmp_path / f"{count}.npy" for count in (1, FEW, MANY)}
    costs = {
        count: embed(tiny_bundle, write_texts(tmp_path / f"{count}.txt", count), output)
        for count, output in outputs.items()
    }
    assert [len(np.load(output)) for output in outputs.values()] == [1, FEW, MANY]
    (start, _), (few, few_bytes), (many, many_bytes) = costs.values()
    assert (many - start) / MANY < 1.3 * (few - start) / FEW
    assert many_bytes - few_bytes < BYTES_OF_A_TEXT * (MANY - FEW)
