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


@pytest.fixture
def real() -> str:
    """The path of a compiler that works."""
    if cpu_launch.library() is None:
        pytest.skip("no C compiler here")
    return next(path for name in ("cc", "gcc", "clang") if (path := shutil.which(name)))


def test_a_compiler_that_knows_no_flags_compiles_without_them(real, compile_again, tmp_path):
    refuse = 'for a; do case "$a" in -march=*|-fopenmp) exit 1;; esac; done'
    path = os.environ["PATH"]
    wrapper = script(tmp_path / "mycc", f'{refuse}\nPATH="{path}" exec {real} "$@"')
    kernels = compile_again(str(wrapper), tmp_path)
    assert kernels is not None
    assert kernels.level_gradients


@pytest.mark.parametrize(
    "instead",
    ['echo text > "$target"', 'echo "void f(void) {}" | REAL -shared -fPIC -o "$target" -x c -'],
    ids=["no library", "another library"],
)
def test_what_does_not_load_or_lacks_kernels_gives_way_to_the_next_flags(
    instead, real, compile_again, tmp_path
):
    path, instead = os.environ["PATH"], instead.replace("REAL", real)
    body = f"""export PATH="{path}"
case "$*" in *-fopenmp*) ;; *) exec {real} "$@";; esac
while [ "$1" != -o ]; do shift; done
target="$2"
{instead}"""
    assert compile_again(str(script(tmp_path / "mycc", body)), tmp_path) is not None


@pytest.mark.parametrize("cc", ["false", "gone", "'open", "mycc", "mycc -c"])
def test_a_bad_cc_does_not_keep_the_compiler_of_path_from_being_tried(
    cc, real, compile_again, tmp_path
):
    path = os.environ["PATH"]
    script(tmp_path / "mycc", 'while [ "$1" != -o ]; do shift; done; echo text > "$2"')
    script(tmp_path / "cc", f'PATH="{path}" exec {real} "$@"')
    assert compile_again(cc, tmp_path) is not None


def test_cc_may_hold_arguments_or_a_wrapper(real, compile_again, tmp_path):
    body = f'shift; PATH="{os.environ["PATH"]}" exec "$@"'
    script(tmp_path / "wrapper", body)
    assert compile_again(f"wrapper cached {real} -O1", tmp_path) is not None


@pytest.mark.skipif(not shutil.which("g++"), reason="no g++ here")
def test_a_compiler_of_cpp_compiles_the_kernels_as_c(compile_again, tmp_path):
    body = f'PATH="{os.environ["PATH"]}" exec g++ "$@"'
    assert compile_again(str(script(tmp_path / "g++", body)), tmp_path) is not None
