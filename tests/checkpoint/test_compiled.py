"""A network is quantized and loaded without torch.compile around it or its parts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

import ddqcli
from ddqcli.checkpoint.architecture import build_model
from ddqcli.checkpoint.compiled import uncompiled
from ddqcli.checkpoint.read import Checkpoint


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Sequential(nn.ReLU(), nn.Linear(8, 3)))


def whole() -> nn.Module:
    return torch.compile(net(), backend="eager")  # type: ignore[return-value]


def part() -> nn.Module:
    model = net()
    model[0].compile(backend="eager")
    model[1] = torch.compile(model[1], backend="eager")  # type: ignore[assignment]
    return model


@pytest.mark.parametrize("build", [whole, part])
def test_the_original_modules_are_left_and_compute_the_same(
    build: Callable[[], nn.Module],
) -> None:
    model, was_compiled = uncompiled(build())
    assert was_compiled
    assert list(model.state_dict()) == list(net().state_dict())
    assert all(module._compiled_call_impl is None for module in model.modules())
    x = torch.randn(5, 4)
    assert torch.equal(model(x), net()(x))


def test_a_network_of_torch_jit_is_left_as_it_is() -> None:
    for model in (torch.jit.script(net()), nn.Sequential(torch.jit.script(net()))):
        assert uncompiled(model) == (model, False)


def test_one_compiled_part_in_two_places_is_replaced_in_both() -> None:
    part = torch.compile(nn.Linear(4, 4), backend="eager")
    model, was_compiled = uncompiled(nn.Sequential(part, part))  # type: ignore[arg-type]
    assert was_compiled
    assert list(model.state_dict()) == ["0.weight", "0.bias", "1.weight", "1.bias"]
    assert model[0] is model[1]  # type: ignore[index]
    assert type(model[0]) is nn.Linear  # type: ignore[index]


def test_a_network_that_was_never_compiled_is_left_as_it_is() -> None:
    model = net()
    assert uncompiled(model) == (model, False)


@pytest.mark.parametrize("build", ["whole", "part"])
def test_an_architecture_is_built_without_torch_compile_and_the_note_says_so(build: str) -> None:
    checkpoint = Checkpoint(Path("m.pt"), "", net().state_dict(), "")
    built = build_model(checkpoint, f"{Path(__file__)}:{build}", {})
    assert built.note.endswith(", without torch.compile")
    assert list(built.model.state_dict()) == list(net().state_dict())


@pytest.mark.parametrize("build", [whole, part])
def test_a_file_is_loaded_into_a_compiled_network(
    build: Callable[[], nn.Module], tmp_path: Path
) -> None:
    file = tmp_path / "m.safetensors"
    ddqcli.save(ddqcli.quantize(net(), bits=6), file)
    expected, x = ddqcli.load(file, net()), torch.randn(5, 4)
    assert torch.equal(ddqcli.load(file, build())(x), expected(x))
