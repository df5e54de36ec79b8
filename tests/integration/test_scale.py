"""Many texts cost what few do, each: a tiny model through the whole way from file to file."""

import random
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from lowmem.hardware.peak import MemoryPeak

# Few enough to be quick, and too many for the start of a process to blur.
FEW, MANY = 8_000, 40_000
# Of a text in memory: its row, and the ids of about 75 tokens. Vectors go to the disk.
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


@pytest.fixture(scope="module")
def costs(
    tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[int, tuple[float, int]]:
    """Number of texts to seconds and peak bytes."""
    folder = tmp_path_factory.mktemp("scale")
    found = {}
    for count in (1, FEW, MANY):
        output = folder / f"{count}.npy"
        found[count] = embed(tiny_bundle, write_texts(folder / f"{count}.txt", count), output)
        assert len(np.load(output)) == count
    return found


@pytest.mark.slow
def test_a_text_takes_as_long_among_many(costs: dict[int, tuple[float, int]]) -> None:
    (start, _), (few, _), (many, _) = costs.values()
    assert (many - start) / MANY < 1.3 * (few - start) / FEW


@pytest.mark.slow
def test_a_text_takes_little_memory_among_many(costs: dict[int, tuple[float, int]]) -> None:
    _, (_, few_bytes), (_, many_bytes) = costs.values()
    assert many_bytes - few_bytes < BYTES_OF_A_TEXT * (MANY - FEW)
