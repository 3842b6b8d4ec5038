"""Compensation: outputs near the float network's, equal means, and nothing else changed."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from small_models import Nested, fit_inputs, recipe
from torch import Tensor, nn

from ddqcli.qat.convert import convert
from ddqcli.qat.layer_matrix import as_matrix
from ddqcli.qat.model import QuantizedModel
from ddqcli.training import compensate
from ddqcli.training.compensate import Compensation


class Attention(nn.Module):
    """Self-attention, then a head."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(12, 2, batch_first=True)
        self.head = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x + self.attention(x, x, x, need_weights=False)[0])


def network(name: str) -> nn.Module:
    torch.manual_seed(0)
    networks = {
        "convolutions": lambda: nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Conv2d(8, 8, 3, groups=8),
            nn.BatchNorm2d(8),
            nn.Conv2d(8, 12, 3, groups=2, stride=2),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(12, 10),
            nn.BatchNorm1d(10),
            nn.Linear(10, 4),
        ),
        "transposed": lambda: nn.Sequential(
            nn.ConvTranspose2d(3, 8, 3, stride=2, groups=1),
            nn.ReLU(),
            nn.ConvTranspose2d(8, 6, 2, groups=2),
            nn.InstanceNorm2d(6, track_running_stats=True),
        ),
        "sequences": lambda: nn.Sequential(
            nn.Conv1d(3, 8, 3, padding="same", padding_mode="circular"),
            nn.BatchNorm1d(8),
            nn.ReLU(),
            nn.Linear(12, 6),
        ),
        "attention": Attention,
    }
    return with_statistics(networks[name]())


def with_statistics(model: nn.Module) -> nn.Module:
    """The model with statistics that its norms could have after training."""
    random = torch.Generator().manual_seed(5)
    for module in model.modules():
        if isinstance(getattr(module, "running_mean", None), Tensor):
            module.running_mean.normal_(0, 0.1, generator=random)  # type: ignore[union-attr]
            module.running_var.uniform_(0.5, 2, generator=random)  # type: ignore[union-attr]
    return model


SHAPES = {
    "convolutions": (3, 6, 6),
    "transposed": (3, 4, 4),
    "sequences": (3, 12),
    "attention": (7, 12),
}
SETTINGS: dict[str, dict[str, Any]] = {
    "learned levels": {"max_bits": 3},
    "8 bits": {"max_bits": 8},
    "levels by channel": {"max_bits": 3, "granularity": "channel", "levels": "uniform"},
    "float biases": {"max_bits": 3, "bias_bits": None},
    "inputs with learned levels": {"max_bits": 3, "act_bits": 4},
    "inputs at 8 bits": {"max_bits": 3, "act_bits": 8},
}


def inputs(*shape: int, samples: int = 64) -> Tensor:
    """Inputs with shared causes, so that errors can make up for each other."""
    random = torch.Generator().manual_seed(1)
    shared = torch.randn(samples, *[1] * len(shape), generator=random)
    return shared + 0.5 * torch.randn(samples, *shape, generator=random)


def quantized_pair(
    model: nn.Module, x: Tensor, **settings: Any
) -> tuple[QuantizedModel, nn.Module]:
    """The quantized model in eval mode, calibrated, and the float model."""
    teacher = copy.deepcopy(model).eval().requires_grad_(False)
    quantized = convert(model, recipe(**{"max_bits": 3, **settings}))
    for name in fit_inputs(quantized, x.clone()):
        quantized.keep_input_float(name)
    return quantized, teacher


def state_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def changed(model: nn.Module, before: dict[str, Tensor]) -> set[str]:
    return {n for n, value in model.state_dict().items() if not torch.equal(value, before[n])}


@torch.no_grad()
def error(quantized: QuantizedModel, teacher: nn.Module, x: Tensor) -> float:
    """Mean squared error of the network's outputs."""
    return float((quantized.model(x.clone()) - teacher(x.clone())).double().square().mean())


@torch.no_grad()
def seen(model: nn.Module, x: Tensor) -> dict[str, tuple[Tensor, Any]]:
    """What each module reads and returns at its first call, in float64."""
    calls: dict[str, tuple[Tensor, Any]] = {}

    def keep(name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            if args and isinstance(args[0], Tensor) and isinstance(output, Tensor):
                calls.setdefault(name, (args[0].double(), output.double()))

        return hook

    handles = [m.register_forward_hook(keep(name)) for name, m in model.named_modules()]
    model(x.clone())
    for handle in handles:
        handle.remove()
    return calls


def channel_means(module: nn.Module, x: Tensor) -> Tensor:
    """Means over all axes but the channels': the last for Linear layers, else the second."""
    axis = -1 if isinstance(module, nn.Linear) else 1
    return x.movedim(axis, -1).flatten(0, -2).mean(0)


# ---- weights


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("name", SHAPES)
def test_outputs_come_nearer_to_the_float_networks(name: str, settings: str) -> None:
    x = inputs(*SHAPES[name])
    quantized, teacher = quantized_pair(network(name), x, **SETTINGS[settings])
    before, state = error(quantized, teacher, x), state_of(quantized.model)
    compensation = Compensation(quantized, teacher, x)
    compensation.apply(means=False, variances=False)
    assert error(quantized, teacher, x) < 0.8 * before
    quantized.model.load_state_dict(state)
    compensation.apply(means=True, variances=False)
    assert error(quantized, teacher, x) < before


def test_progress_counts_the_layers_of_both_networks_and_begins_again() -> None:
    x, told = inputs(*SHAPES["convolutions"]), []
    quantized, teacher = quantized_pair(network("convolutions"), x)
    layers = sum(t.kind != "bias" for t in quantized.tensors)
    compensation = Compensation(quantized, teacher, x, lambda *args: told.append(args))
    compensation.apply(means=True, variances=True)
    compensation.apply(means=False, variances=False)
    steps = [*range(1, 2 * layers + 1), *range(layers + 1, 2 * layers + 1)]
    assert told == [("compensate", step, 2 * layers) for step in steps]


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("name", SHAPES)
def test_every_weight_quantizes_to_its_assigned_levels(
    name: str, settings: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assigned: list[Tensor] = []

    def recorded(*args: Any) -> Tensor:
        assigned.append(rounding(*args))
        return assigned[-1]

    rounding = compensate.compensated_rounding
    monkeypatch.setattr(compensate, "compensated_rounding", recorded)
    x = inputs(*SHAPES[name])
    quantized, teacher = quantized_pair(network(name), x, **SETTINGS[settings])
    Compensation(quantized, teacher, x).apply(means=True, variances=True)
    weights = [t for t in quantized.tensors if t.kind != "bias"]
    reached = [t for t in weights if t.name != "attention.out_proj.weight"]
    for tensor, matrix in zip(reached, assigned, strict=True):
        values = tensor.quantizer(tensor.parameter).detach()
        assert torch.equal(as_matrix(tensor.places[0].module, values), matrix)


# ---- means and variances


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("name", ["convolutions", "transposed", "sequences"])
def test_norms_subtract_the_mean_that_their_input_has_moved_by(name: str, settings: str) -> None:
    x = inputs(*SHAPES[name])
    quantized, teacher = quantized_pair(network(name), x, **SETTINGS[settings])
    Compensation(quantized, teacher, x).apply(means=True, variances=False)
    float_calls, calls = seen(teacher, x), seen(quantized.model, x)
    norms = [n for n, m in teacher.named_modules() if hasattr(m, "running_mean")]
    assert norms
    for norm in norms:
        one, two = teacher.get_submodule(norm), quantized.model.get_submodule(norm)
        float_mean = channel_means(one, float_calls[norm][0]) - one.running_mean
        mean = channel_means(two, calls[norm][0]) - two.running_mean
        assert torch.allclose(mean, float_mean, atol=1e-5)
        assert torch.equal(one.running_var, two.running_var)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["convolutions", "transposed", "sequences"])
def test_variances_follow_within_a_factor_of_4(name: str) -> None:
    x = inputs(*SHAPES[name])
    quantized, teacher = quantized_pair(network(name), x, max_bits=1)
    Compensation(quantized, teacher, x).apply(means=True, variances=True)
    float_calls, calls = seen(teacher, x), seen(quantized.model, x)
    for norm in [n for n, m in teacher.named_modules() if hasattr(m, "running_var")]:
        one, two = teacher.get_submodule(norm), quantized.model.get_submodule(norm)
        variances = [c[norm][0].transpose(0, 1).flatten(1).var(1) for c in (calls, float_calls)]
        ratio = (variances[0] / variances[1]).clamp(0.25, 4)
        assert torch.allclose(two.running_var / one.running_var, ratio.float(), rtol=1e-4)


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("name", SHAPES)
def test_biases_give_outputs_the_float_mean(name: str, settings: str) -> None:
    """Exactly for float biases, and but for the rounding of the bias for quantized ones."""
    x = inputs(*SHAPES[name])
    quantized, teacher = quantized_pair(network(name), x, **SETTINGS[settings])
    Compensation(quantized, teacher, x).apply(means=True, variances=False)
    float_calls, calls = seen(teacher, x), seen(quantized.model, x)
    biases = {t.places[0].layer: t for t in quantized.tensors if t.kind == "bias"}
    layers = [n for n, m in teacher.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
    for layer in set(layers) & calls.keys():
        module = teacher.get_submodule(layer)
        lack = channel_means(module, float_calls[layer][1] - calls[layer][1])
        if layer in biases:
            tensor = biases[layer]
            lack -= (tensor.parameter - tensor.quantizer(tensor.parameter)).detach()
        assert torch.allclose(lack, torch.zeros_like(lack), atol=1e-5)


def test_the_bias_of_a_model_that_is_one_layer_is_corrected() -> None:
    x = inputs(20)
    quantized, teacher = quantized_pair(nn.Linear(20, 5), x, max_bits=1)
    Compensation(quantized, teacher, x).apply(means=True, variances=False)
    with torch.no_grad():
        lack = (teacher(x) - quantized.model(x)).mean(0)
    assert lack.abs().max() < 0.01


# ---- what stays


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize(
    ("parts", "moves"),
    [
        ({"means": False, "variances": False}, ("weight.original",)),
        (
            {"means": True, "variances": False},
            ("weight.original", "bias.original", "bias.0.log2_clip", "running_mean"),
        ),
        (
            {"means": True, "variances": True},
            (
                *("weight.original", "bias.original", "bias.0.log2_clip"),
                *("running_mean", "running_var"),
            ),
        ),
    ],
)
def test_nothing_else_changes(name: str, parts: dict[str, bool], moves: tuple[str, ...]) -> None:
    x = inputs(*SHAPES[name])
    quantized, teacher = quantized_pair(network(name), x, act_bits=4)
    before, float_before, x_before = state_of(quantized.model), state_of(teacher), x.clone()
    bits = [t.quantizer.bits for t in quantized.tensors]
    hooks = count_hooks(quantized.model), count_hooks(teacher)
    Compensation(quantized, teacher, x).apply(**parts)
    names = changed(quantized.model, before)
    assert names
    assert all(name.endswith(moves) for name in names), names
    assert not changed(teacher, float_before)
    assert torch.equal(x, x_before)
    assert [t.quantizer.bits for t in quantized.tensors] == bits
    assert (count_hooks(quantized.model), count_hooks(teacher)) == hooks


def count_hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def test_a_second_pass_from_the_same_state_ends_in_the_same_one() -> None:
    x = inputs(*SHAPES["convolutions"])
    quantized, teacher = quantized_pair(network("convolutions"), x)
    compensation, before = Compensation(quantized, teacher, x), state_of(quantized.model)
    compensation.apply(means=True, variances=True)
    first = state_of(quantized.model)
    quantized.model.load_state_dict(before)
    compensation.apply(means=True, variances=True)
    assert not changed(quantized.model, first)


# ---- unusual networks


class ChangesItsInput(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.mul_(2).add_(1))


class UsesAutocast(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(12, 12), nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            x = self.second(self.first(x))
            assert x.dtype == torch.bfloat16
        return x.float()


class CallsByKeyword(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.norm = nn.Linear(12, 4), nn.BatchNorm1d(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(input=self.layer(input=x))


class SharesAWeight(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(12, 12), nn.Linear(12, 12)
        self.two.weight, self.two.bias = self.one.weight, self.one.bias

    def forward(self, x: Tensor) -> Tensor:
        return self.two(self.one(x).relu())


@pytest.mark.parametrize(
    "model_class", [ChangesItsInput, UsesAutocast, CallsByKeyword, SharesAWeight]
)
def test_unusual_networks_improve_too(model_class: type[nn.Module]) -> None:
    torch.manual_seed(0)
    x = inputs(12)
    quantized, teacher = quantized_pair(model_class(), x, max_bits=2)
    before, x_before = error(quantized, teacher, x), x.clone()
    Compensation(quantized, teacher, x).apply(means=True, variances=False)
    assert error(quantized, teacher, x) < before
    assert torch.equal(x, x_before)


def test_autocast_in_a_network_does_not_reach_the_statistics() -> None:
    """Statistics of bfloat16 products would have errors of some 1e-3."""
    torch.manual_seed(0)
    x = inputs(12)
    quantized, teacher = quantized_pair(UsesAutocast(), x)
    statistics = Compensation(quantized, teacher, x).float
    first = teacher.get_submodule("first")
    expected = first.weight.double() @ x.double().T  # type: ignore[union-attr, operator]
    assert torch.allclose(statistics.outputs["first"][0].double(), expected, atol=1e-5)


def test_layers_in_lists_called_twice_never_or_past_their_forward() -> None:
    torch.manual_seed(0)
    x = inputs(3, 5, 5)
    quantized, teacher = quantized_pair(Nested(), x, max_bits=1, act_bits=8)
    before, state = error(quantized, teacher, x), state_of(quantized.model)
    Compensation(quantized, teacher, x).apply(means=True, variances=True)
    names = changed(quantized.model, state)
    assert not {n for n in names if n.startswith(("unused", "direct"))}
    assert "stem.0.parametrizations.weight.original" in names
    assert "twice.parametrizations.bias.original" in names
    assert error(quantized, teacher, x) < before


def test_the_first_of_several_calls_decides() -> None:
    torch.manual_seed(0)
    x = inputs(12)
    once, teacher_once = quantized_pair(nn.Sequential(nn.Linear(12, 12)), x, max_bits=2)
    layer = copy.deepcopy(teacher_once[0]).requires_grad_()  # type: ignore[index]
    twice, teacher_twice = quantized_pair(nn.Sequential(layer, nn.ReLU(), layer), x, max_bits=2)
    before = state_of(once.model)
    for quantized, teacher in ((once, teacher_once), (twice, teacher_twice)):
        Compensation(quantized, teacher, x).apply(means=True, variances=True)
    assert "0.parametrizations.weight.original" in changed(once.model, before)
    assert not changed(once.model, state_of(twice.model))


class CrossAttention(Attention):
    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.attention(x, x + 1, x, need_weights=False)[0])


class TiedEmbedding(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head, self.embedding = nn.Linear(12, 7, bias=False), nn.Embedding(7, 12)
        self.embedding.weight = self.head.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x + self.embedding(torch.zeros(len(x), dtype=torch.int64)))


class Odd(nn.Linear):
    """Takes a mapping and returns one."""

    def forward(self, x: Any) -> Any:
        return {"y": super().forward(x["x"])}


class OddLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.odd = Odd(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.odd({"x": x})["y"]


class RefusesHooks(nn.Module):
    """Stands for networks whose fast paths hooks rule out."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        if self.layer._forward_pre_hooks:
            raise RuntimeError("no hooks, please")
        return self.layer(x)


@pytest.mark.parametrize(
    ("model_class", "shape", "name"),
    [
        (CrossAttention, (7, 12), "attention.parametrizations.in_proj_weight.original"),
        (TiedEmbedding, (12,), "head.parametrizations.weight.original"),
        (OddLayer, (12,), "odd.parametrizations.weight.original"),
        (RefusesHooks, (12,), "layer.parametrizations.weight.original"),
    ],
)
def test_a_layer_that_cannot_be_compensated_stays_as_it_is(
    model_class: type[nn.Module], shape: tuple[int, ...], name: str
) -> None:
    x = inputs(*shape)
    quantized, teacher = quantized_pair(model_class(), x)
    before = state_of(quantized.model)
    Compensation(quantized, teacher, x).apply(means=True, variances=True)
    assert name in before
    assert name not in changed(quantized.model, before)


def test_a_failing_layer_leaves_the_others_compensated(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail_for_convolutions(layer: nn.Module, *args: Any) -> Tensor:
        if isinstance(layer, nn.Conv2d):
            raise RuntimeError("unexpected")
        return patches(layer, *args)

    patches = compensate.patches
    monkeypatch.setattr(compensate, "patches", fail_for_convolutions)
    x = inputs(*SHAPES["convolutions"])
    quantized, teacher = quantized_pair(network("convolutions"), x)
    before = state_of(quantized.model)
    Compensation(quantized, teacher, x).apply(means=False, variances=False)
    weights = {f"{n}.parametrizations.weight.original" for n in ("8", "10")}
    assert changed(quantized.model, before) == weights


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_constant_inputs_leave_finite_values(value: float) -> None:
    model = network("convolutions")
    model[1].running_var.zero_()  # type: ignore[index, union-attr, operator]
    x = torch.full((8, 3, 6, 6), value)
    quantized, teacher = quantized_pair(model, x)
    Compensation(quantized, teacher, x).apply(means=True, variances=True)
    assert all(tensor.isfinite().all() for tensor in quantized.model.state_dict().values())
    assert not quantized.model[1].running_var.any()  # type: ignore[index, union-attr, operator]


def test_one_sample_with_one_patch_suffices() -> None:
    x = inputs(*SHAPES["convolutions"], samples=1)
    quantized, teacher = quantized_pair(network("convolutions"), x)
    before = error(quantized, teacher, x)
    Compensation(quantized, teacher, x).apply(means=False, variances=False)
    assert error(quantized, teacher, x) < before


def test_a_sample_that_overflows_is_not_spread() -> None:
    x = inputs(12)
    x[3] = torch.inf
    quantized, teacher = quantized_pair(nn.Sequential(nn.Linear(12, 4), nn.BatchNorm1d(4)), x)
    before = state_of(quantized.model)
    Compensation(quantized, teacher, x).apply(means=True, variances=True)
    assert all(tensor.isfinite().all() for tensor in quantized.model.state_dict().values())
    assert not {name for name in changed(quantized.model, before) if "weight" in name}


# ---- limits


def test_a_layer_with_too_many_inputs_keeps_its_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compensate, "_MOST_INPUTS", 11)
    x = inputs(*SHAPES["convolutions"])
    quantized, teacher = quantized_pair(network("convolutions"), x)
    before = state_of(quantized.model)
    Compensation(quantized, teacher, x).apply(means=False, variances=False)
    names = {name.split(".")[0] for name in changed(quantized.model, before)}
    assert names == {"3", "10"}  # those with 9 and 10 inputs


def test_kept_outputs_have_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compensate, "_MOST_OUTPUTS", 2000)
    x = inputs(*SHAPES["convolutions"])
    quantized, teacher = quantized_pair(network("convolutions"), x)
    before = error(quantized, teacher, x)
    compensation = Compensation(quantized, teacher, x)
    assert sum(out.numel() for out in compensation.float.outputs.values()) < 2 * 2000
    compensation.apply(means=True, variances=False)
    assert error(quantized, teacher, x) < before
