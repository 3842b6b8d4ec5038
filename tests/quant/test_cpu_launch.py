"""Compilers of the C kernels: missing, broken, or old. `test_operators.py` has the results."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import torch
from quant_cases import normal

from ddqcli.quant import cpu_launch
from ddqcli.quant.quantizer import DDQuantizer


@pytest.fixture
def compile_again(monkeypatch):
    """Return a function that compiles with the compiler `cc` of PATH, or of CC."""

    def library(cc: str | None, path: Path):
        monkeypatch.setenv("PATH", str(path))
        monkeypatch.delenv("CC", raising=False)
        if cc:
            monkeypatch.setenv("CC", cc)
        return cpu_launch.library.__wrapped__()

    return library


def script(path: Path, body: str) -> Path:
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return path


def test_without_a_compiler_pytorch_serves(compile_again, monkeypatch, tmp_path):
    assert compile_again(None, tmp_path) is None
    monkeypatch.setattr(cpu_launch, "library", lambda: None)
    x = normal(300)
    quantizer = DDQuantizer.from_tensor(x, 4, 3)
    expected = quantizer(x)
    quantizer.use_compiled = True
    assert torch.equal(quantizer(x), expected)


@pytest.mark.parametrize(
    "body", ["exit 1", 'while [ "$1" != -o ]; do shift; done; echo text > "$2"', "kill -9 $$"]
)
def test_a_broken_compiler_is_none(body, compile_again, tmp_path):
    assert compile_again(str(script(tmp_path / "cc", body)), tmp_path) is None


def test_a_compiler_that_knows_no_flags_compiles_without_them(compile_again, tmp_path):
    real = next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None)
    if real is None:
        pytest.skip("no C compiler here")
    refuse = 'for a; do case "$a" in -march=*|-fopenmp) exit 1;; esac; done'
    path = os.environ["PATH"]
    wrapper = script(tmp_path / "mycc", f'{refuse}\nPATH="{path}" exec {real} "$@"')
    kernels = compile_again(str(wrapper), tmp_path)
    assert kernels is not None
    assert kernels.level_gradients
