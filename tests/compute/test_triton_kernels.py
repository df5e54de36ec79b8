"""Triton's kernels on a CPU: its interpreter must be asked for before Triton is imported."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent


def test_the_kernels_agree_with_plain_torch_under_the_interpreter(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pytest", "--noconftest", "-m", "gpu", "-p"]
    done = subprocess.run(
        [*command, "no:cacheprovider", "tests/gpu/test_kernels.py"],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-1000:]
    assert " passed" in done.stdout
    assert "skipped" not in done.stdout
