"""A short slice of `tests/benchmarks/siege.py`."""

from __future__ import annotations

import shutil
import sys
from collections import Counter
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import siege
from attacks import FILE, KINDS


@pytest.mark.parametrize("kind", [kind.__name__ for kind in KINDS])
def test_a_slice_of_the_siege_finds_no_fault(
    finished: Path, exported_file: Path, tmp_path: Path, kind: str
) -> None:
    import torch
    from safetensors.torch import save_file

    save_file(torch.load("model.pt", weights_only=True), "model.safetensors")
    shutil.copy(exported_file, FILE)
    target = shutil.copytree(finished, tmp_path / "target")
    trials = {"damaged": 12, "forged": 12, "odd": 6, "crash": 1, "together": 1, "startup": 1}.get(
        kind, 3
    )
    results = list(siege.siege(target, {kind: trials}, range(trials), 1, Counter()))
    assert len(results) == trials
    assert not [result for result in results if result[3]]
