"""Triton's kernels compiled for cards that need not be here, and what their code may not hold."""

from __future__ import annotations

import re
from typing import Any

import pytest

from ddqcli.quant import operators

pytestmark = pytest.mark.skipif(
    operators.INTERPRETED or not operators.installed(), reason="Triton compiles nothing here"
)

LEVELS = {"ALONE": True, "N": 16}
ONE_GROUP = {**LEVELS, "SUMS": 17, "CORRECTED": False, "GATED": False}
CHANNELS = {"ALONE": False, "N": 256, "SUMS": 769, "CORRECTED": True, "GATED": True}
KERNELS = {
    "quantize": {"ALONE": True, "BLOCK": 1024},
    "straight_through": {**LEVELS, "BLOCK": 1024},
    "level_sums": {**ONE_GROUP, "LANES": 512},
    "level_sums of channels": {**CHANNELS, "LANES": 32},
    "level_gradients": {**{k: v for k, v in ONE_GROUP.items() if k != "ALONE"}, "ROWS": 64},
    "uniform_quantize": {"BLOCK": 1024},
    "uniform_gradients": {"BLOCK": 1024},
}
TYPES = {"x_ptr": "*bf16", "grad_ptr": "*bf16", "grad_x_ptr": "*bf16", "starts_ptr": "*i64"}


def ptx(name: str, capability: int) -> str:
    """The kernel's code for a card, as for pointers and sizes that are multiples of 16."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from ddqcli.quant import triton_kernels

    kernel, constants = getattr(triton_kernels, f"{name.split()[0]}_kernel"), KERNELS[name]
    signature: dict[str, str] = {}
    for argument in kernel.arg_names:
        pointer = TYPES.get(argument, "*fp32") if argument.endswith("_ptr") else "i32"
        signature[argument] = "constexpr" if argument in constants else pointer
    places = {argument: (i,) for i, argument in enumerate(kernel.arg_names)}
    if "out_ptr" in signature:
        signature["out_ptr"] = "*bf16"
    source = ASTSource(
        kernel,
        signature,
        {places[argument]: value for argument, value in constants.items()},
        {place: [["tt.divisibility", 16]] for a, place in places.items() if a not in constants},
    )
    compiled: Any = triton.compile(source, target=GPUTarget("cuda", capability, 32))
    return str(compiled.asm["ptx"])


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


@pytest.mark.parametrize("name", KERNELS)
def test_a_kernel_compiles_without_atomics_or_inexact_division(name):
    """Atomics would add in any order; Triton's plain division is off by up to two units."""
    code = ptx(name, 80)
    assert not re.search(r"\b(atom|red)\.", code)
    divisions = set(re.findall(r"\bdiv\.\S*f32", code))
    assert divisions == (set() if name == "straight_through" else {"div.rn.f32"})


@pytest.mark.parametrize("name", ["quantize", "uniform_quantize"])
def test_values_of_one_group_are_loaded_several_at_a_time(name):
    assert re.search(r"ld\.global\S*\.v4\.b32", ptx(name, 80))  # 8 values in bfloat16
