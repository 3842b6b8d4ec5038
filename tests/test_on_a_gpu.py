"""`pytest -m cuda` in a process of its own, which alone sees the GPU."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.skipif(not shutil.which("nvidia-smi"), reason="there is no GPU here")
def test_what_needs_a_gpu_passes_on_the_one_of_this_machine() -> None:
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": os.environ["DDQ_TESTS_GPUS"]}
    if environment["CUDA_VISIBLE_DEVICES"] == "all":
        del environment["CUDA_VISIBLE_DEVICES"]
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-m", "cuda", "tests"]
    answer = subprocess.run(
        command,
        env=environment,
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        check=False,
    )
    assert answer.returncode == 0, answer.stdout[-10_000:]
    if "passed" not in answer.stdout:
        pytest.skip("PyTorch has no CUDA here")
