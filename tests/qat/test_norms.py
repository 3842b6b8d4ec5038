"""BatchNorm as scale and shift: which layers are folded, and what they then compute."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from small_models import recipe
from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d

from ddqcli.qat.convert import convert
from ddqcli.qat.frozen import FrozenModel, freeze
from ddqcli.qat.norms import fold_norms


class Subclass(nn.BatchNorm2d):
    """One with an activation in it, as timm has."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).relu()


class Other(nn.BatchNorm2d):
    """One that computes something else."""

    def forward(self, x: Tensor) -> Tensor:
        mean = self.running_mean
        assert mean is not None
        return super().forward(x) + mean[:, None, None]


def uneven(norm: Any) -> Any:
    """Give the layer the statistics of a trained one."""
    random = torch.Generator().manual_seed(0)
    for local in ("weight", "bias", "running_mean"):
        if isinstance(tensor := getattr(norm, local, None), Tensor):
            tensor.data.normal_(0, 1, generator=random)
    if isinstance(getattr(norm, "running_var", None), Tensor):
        norm.running_var.uniform_(0.1, 3, generator=random)
    if isinstance(getattr(norm, "num_batches_tracked", None), Tensor):
        norm.num_batches_tracked.fill_(9)
    return norm.eval()


FOLDED: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "BatchNorm1d": (lambda: nn.BatchNorm1d(5), 2),
    "BatchNorm2d": (lambda: nn.BatchNorm2d(5, eps=1e-3), 4),
    "BatchNorm3d": (lambda: nn.BatchNorm3d(5), 5),
    "SyncBatchNorm": (lambda: nn.SyncBatchNorm(5), 4),
    "FrozenBatchNorm2d": (lambda: FrozenBatchNorm2d(5), 4),
    "InstanceNorm2d": (lambda: nn.InstanceNorm2d(5, affine=True, track_running_stats=True), 4),
    "subclass": (lambda: Subclass(5), 4),
    "double": (lambda: nn.BatchNorm2d(5).double(), 4),
}


@pytest.mark.parametrize("kind", FOLDED)
def test_a_folded_layer_computes_the_same_from_two_vectors(kind: str) -> None:
    build, rank = FOLDED[kind]
    norm: Any = uneven(build())
    state, before = norm.state_dict(), copy.deepcopy(norm.state_dict())
    folded = fold_norms(norm, state)
    assert all(torch.equal(value, before[name]) for name, value in norm.state_dict().items())
    assert folded.vectors.keys() == {"weight", "bias"}
    assert folded.constants.keys() == state.keys() - {"weight", "bias"}
    assert {name: value.unique().numel() for name, value in folded.constants.items()} == (
        dict.fromkeys(folded.constants, 1)
    )

    x = torch.randn(4, 5, *[3] * (rank - 2), dtype=norm.weight.dtype)
    wide = {name: value.double() for name, value in before.items()}
    scale = wide["weight"] / (wide["running_var"] + norm.eps).sqrt()
    shift = wide["bias"] - wide["running_mean"] * scale
    along = [5, *[1] * (rank - 2)]
    expected = x.double() * scale.view(along) + shift.view(along)
    if kind == "subclass":
        expected = expected.relu()
    torch.testing.assert_close(folded.vectors["weight"].double(), scale, rtol=3e-7, atol=0)
    for name, value in (folded.vectors | folded.constants).items():
        assert value.dtype == before[name].dtype
        state[name].copy_(value)
    torch.testing.assert_close(norm(x).double(), expected, rtol=1e-5, atol=1e-6)

    again = fold_norms(norm, norm.state_dict())
    for name, value in (again.vectors | again.constants).items():
        assert torch.equal(value, norm.state_dict()[name]), name


class Shared(nn.Module):
    """Two layers with one weight and statistics of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.BatchNorm2d(5), nn.BatchNorm2d(5)
        self.b.weight = self.a.weight


LEFT: dict[str, Callable[[], nn.Module]] = {
    "no affine": lambda: nn.BatchNorm2d(5, affine=False),
    "no statistics": lambda: nn.BatchNorm2d(5, track_running_stats=False),
    "half": lambda: nn.BatchNorm2d(5).bfloat16(),
    "other forward": lambda: Other(5),
    "layer norm": lambda: nn.LayerNorm(5),
    "shared": Shared,
}


@pytest.mark.parametrize("kind", LEFT)
def test_any_other_layer_keeps_its_vectors(kind: str) -> None:
    model = uneven(LEFT[kind]())
    folded = fold_norms(model, model.state_dict())
    assert folded.vectors == {}
    # The number of training steps is nothing that inference reads.
    counters = {name for name in model.state_dict() if name.endswith("num_batches_tracked")}
    assert folded.constants.keys() == counters
    assert not any(folded.constants.values())


def test_a_finished_model_keeps_what_another_run_starts_from() -> None:
    norm = uneven(nn.BatchNorm2d(4))
    model = nn.Sequential(nn.Conv2d(3, 4, 3), norm, norm, nn.BatchNorm2d(4, affine=False))
    before = copy.deepcopy(norm.state_dict())
    quantized = convert(model.eval(), recipe(max_bits=3))
    state = freeze(quantized)
    assert all(torch.equal(value, before[name]) for name, value in norm.state_dict().items())
    assert {name: value for name, value in state["unfolded"].items() if name[0] == "1"}.keys() == (
        {f"1.{name}" for name in before}
    )
    assert all(torch.equal(state["unfolded"][f"1.{name}"], before[name]) for name in before)
    assert state["constants"].keys() == {
        *("1.running_mean", "1.running_var", "1.num_batches_tracked", "3.num_batches_tracked")
    }

    expected = FrozenModel.from_state(state).expected()
    with quantized.folded():
        assert not torch.equal(norm.weight, before["weight"])
        for name, value in model.state_dict().items():
            if name in expected:
                assert value.numpy().tobytes() == expected[name].tobytes(), name
    assert all(torch.equal(value, before[name]) for name, value in norm.state_dict().items())
    assert expected["2.weight"] is expected["1.weight"]
