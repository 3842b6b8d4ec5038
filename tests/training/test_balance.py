"""Balanced channels: the same function, one size, only where a normalization makes up for it."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from small_models import recipe
from torch import Tensor, nn

from ddqcli.qat.convert import convert
from ddqcli.training.balance import balance_channels


class Residual(nn.Module):
    """The first layer's output is read past its normalization; the second one's is not."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.first_norm = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6)
        self.second, self.second_norm = nn.Conv2d(6, 6, 1, bias=False), nn.BatchNorm2d(6)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        return self.second_norm(self.second(self.first_norm(y))) + y


class Detector(nn.Module):
    """Finds nothing in the samples, so that its output does not tell that `first` is read twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6)
        self.second, self.second_norm = nn.Conv2d(6, 8, 1), nn.BatchNorm2d(8)
        self.head = nn.Conv2d(6, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        scores = self.head(y + self.norm(y)).amax(1) + self.second_norm(self.second(y)).amax(1)
        return scores[scores > 1e9]


class CalledTwice(nn.Module):
    """One layer and one normalization, each called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.norm = nn.Conv2d(6, 6, 3, padding=1), nn.BatchNorm2d(6)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.layer(self.norm(self.layer(x)).relu()))


class OneOfTwo(nn.Module):
    """A normalization behind two layers, and a layer with a normalization for each call."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.shared = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 6, 1), nn.BatchNorm2d(6)
        self.c, self.c_norms = nn.Conv2d(6, 6, 1), nn.ModuleList(nn.BatchNorm2d(6) for _ in "12")

    def forward(self, x: Tensor) -> Tensor:
        y = self.shared(self.b(self.shared(self.a(x)).relu())).relu()
        return self.c_norms[1](self.c(self.c_norms[0](self.c(y)).relu()))


NETWORKS: dict[str, tuple[Any, tuple[int, ...], set[str]]] = {
    "images": (
        lambda: nn.Sequential(
            nn.Conv2d(3, 8, 3),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Conv2d(8, 8, 3, groups=8, bias=False),
            nn.PReLU(),
            nn.MaxPool2d(2),
            nn.BatchNorm2d(8),
            nn.ConvTranspose2d(8, 6, 3, groups=2),
            nn.BatchNorm2d(6),
            nn.Conv2d(6, 4, 1),
        ),
        (3, 9, 9),
        {"0", "3", "7"},
    ),
    "features": (
        lambda: nn.Sequential(
            nn.Linear(5, 8), nn.LeakyReLU(0.5), nn.BatchNorm1d(8), nn.Linear(8, 3)
        ),
        (5,),
        {"0"},
    ),
    "clipped": (
        lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU6(), nn.BatchNorm2d(8)),
        (3, 5, 5),
        set(),
    ),
    "curved": (
        lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.GELU(), nn.BatchNorm2d(8)),
        (3, 5, 5),
        set(),
    ),
    "mixed": (
        lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8)),
        (3, 6, 6),
        {"1"},
    ),
    "residual": (Residual, (3, 5, 5), {"second"}),
    "finds nothing": (Detector, (3, 5, 5), {"second"}),
    "called twice": (CalledTwice, (6, 5, 5), {"layer"}),
    "one of two": (OneOfTwo, (3, 5, 5), set()),
    "no norm": (lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU()), (3, 5, 5), set()),
}


def network(name: str) -> tuple[nn.Module, Tensor, set[str]]:
    """A network whose channels differ a hundredfold, some inputs, and what can be balanced."""
    torch.manual_seed(0)
    build, shape, balanced = NETWORKS[name]
    model: nn.Module = build()
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear, nn.ConvTranspose2d)):
            scale = torch.logspace(-1, 1, module.weight.shape[0])
            module.weight.data *= scale.view(-1, *[1] * (module.weight.ndim - 1))
        elif isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
            module.momentum = 1.0
    x = torch.randn(16, *shape)
    with torch.no_grad():
        model(x)  # in train mode: the statistics are those of x
    return model.eval(), x, balanced


def sizes(module: nn.Module) -> Tensor:
    weight = module.weight.detach().double()
    if isinstance(module, nn.ConvTranspose2d):
        groups = weight.view(module.groups, -1, *weight.shape[1:])
        return groups.square().mean(dim=(1, 3, 4)).sqrt().flatten()
    return weight.flatten(1).square().mean(1).sqrt()


@pytest.mark.parametrize("name", NETWORKS)
def test_only_layers_with_a_norm_of_their_own_are_balanced(name: str) -> None:
    model, x, expected = network(name)
    before, outputs = copy.deepcopy(model.state_dict()), model(x).detach()
    largest = max(map(abs, outputs.flatten().tolist()), default=0.0)
    quantized = convert(copy.deepcopy(model), recipe())
    balanced = balance_channels(quantized, model, x)
    changed = {
        layer.removesuffix(".weight")
        for layer, value in balanced.state_dict().items()
        if layer.endswith("weight") and not torch.equal(value, before[layer])
    }
    assert changed == expected
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    torch.testing.assert_close(balanced(x), outputs, rtol=1e-4, atol=1e-4 * largest)
    for layer in expected:
        of_channels = sizes(balanced.get_submodule(layer))
        torch.testing.assert_close(of_channels, of_channels[:1].expand_as(of_channels))


def test_the_quantized_model_holds_the_balanced_weights_and_loses_less() -> None:
    model, x, layers = network("images")
    plain = convert(copy.deepcopy(model), recipe(max_bits=3))
    quantized = convert(copy.deepcopy(model), recipe(max_bits=3))
    balanced = balance_channels(quantized, model, x)
    floats = balanced.state_dict()
    for tensor in quantized.tensors:
        assert torch.equal(tensor.parameter, floats[tensor.name])
    for name in layers:
        norm = {"0": "1", "3": "6", "7": "8"}[name]
        for statistic in ("running_mean", "running_var"):
            key = f"{norm}.{statistic}"
            assert torch.equal(quantized.model.state_dict()[key], floats[key])
    outputs = model(x).detach()
    errors = [
        float((q.model.eval()(x).detach() - outputs).square().mean()) for q in (plain, quantized)
    ]
    assert errors[1] < errors[0] / 2


def test_batch_statistics_make_up_for_the_scales_as_well() -> None:
    model, x, _ = network("images")
    balanced = balance_channels(convert(copy.deepcopy(model), recipe()), model, x)
    plain, scaled = model.train()(x).detach(), balanced.train()(x).detach()
    torch.testing.assert_close(scaled, plain, rtol=1e-2, atol=1e-2 * float(plain.abs().max()))


@pytest.mark.parametrize("eps", [0.0, 1e-3, 1e-1, 1e3])
@pytest.mark.parametrize("share", [1.0, 1e-2, 1e-4])
def test_batch_statistics_make_up_for_the_scales_whatever_eps_is(eps: float, share: float) -> None:
    """Also where eps is a large part of the variance, and for channels that hardly do anything."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8, eps=eps or 1e-30, momentum=1.0))
    model[0].weight.data *= torch.logspace(-1, 1, 8).view(-1, 1, 1, 1)
    model[0].weight.data[:4] *= share
    x = torch.randn(16, 3, 9, 9)
    model(x)
    model[1].eps = eps
    outputs = model.eval()(x).detach()
    balanced = balance_channels(convert(copy.deepcopy(model), recipe()), model, x)
    torch.testing.assert_close(balanced(x), outputs, rtol=1e-4, atol=1e-4)
    if eps:  # batch statistics need some
        plain, scaled = model.train()(x).detach(), balanced.train()(x).detach()
        torch.testing.assert_close(scaled, plain, rtol=2**0.5 - 1, atol=1e-3)


def test_channels_that_do_nothing_stay_finite() -> None:
    model, x, _ = network("images")
    model[0].weight.data[1:3] *= torch.tensor([0.0, 1e-38]).view(2, 1, 1, 1)
    model[1].running_var[2:4] = 0
    outputs = model(x).detach()
    quantized = convert(copy.deepcopy(model), recipe())
    balanced = balance_channels(quantized, model, x)
    assert all(value.isfinite().all() for value in quantized.model.state_dict().values())
    torch.testing.assert_close(
        balanced(x), outputs, rtol=1e-3, atol=1e-3 * float(outputs.abs().max())
    )


def test_levels_by_channel_need_no_balance() -> None:
    model, x, _ = network("images")
    quantized = convert(copy.deepcopy(model), recipe(granularity="channel"))
    before = copy.deepcopy(quantized.model.state_dict())
    balance_channels(quantized, model, x)
    assert all(torch.equal(v, before[k]) for k, v in quantized.model.state_dict().items())


def test_trained_weights_keep_the_scales_that_they_were_trained_with() -> None:
    """As in a sweep, whose next target starts from a trained model: it stays beside its float."""
    model, x, layers = network("images")
    balanced = balance_channels(convert(copy.deepcopy(model), recipe()), model, x)
    trained = copy.deepcopy(balanced)
    for layer in layers:  # training makes channels differ in size again
        weight = trained.get_submodule(layer).weight
        weight.data *= 1 + 0.3 * torch.rand(weight.shape)
    quantized = convert(copy.deepcopy(trained), recipe())
    again = balance_channels(quantized, model, x)
    for expected, found in ((trained, quantized.float_tensors()), (balanced, again.state_dict())):
        for name, value in expected.state_dict().items():
            assert torch.equal(value, found.get(name, value)), name
    floats = trained.state_dict()
    assert all(torch.equal(tensor.parameter, floats[tensor.name]) for tensor in quantized.tensors)


@pytest.mark.parametrize(("distilled", "others"), [("0", {"3", "7"}), ("4", {"0", "7"})])
def test_outputs_that_are_distilled_stay_those_of_the_float_model(
    distilled: str, others: set[str]
) -> None:
    """Of the layer itself, or of what is between it and the normalization."""
    model, x, layers = network("images")
    before = copy.deepcopy(model.state_dict())
    balanced = balance_channels(convert(copy.deepcopy(model), recipe()), model, x, [distilled])
    assert others < layers
    weights = {f"{layer}.weight" for layer in layers}
    after = balanced.state_dict()
    assert {n for n in weights if not torch.equal(after[n], before[n])} == {
        f"{layer}.weight" for layer in others
    }
    n = int(distilled) + 1
    torch.testing.assert_close(balanced[:n](x), model[:n](x), rtol=1e-4, atol=1e-4)
