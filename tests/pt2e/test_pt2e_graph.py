"""The int8 graph: trained integers and grids where there are some, ranges of samples elsewhere."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from quantized_net import quantize, shake
from torch import Tensor, fx, nn

import ddqcli
from ddqcli.errors import UsageError
from ddqcli.pt2e.graph import Int8Model, make_int8, one_by_one, plain_strides
from ddqcli.pt2e.grids import DEQUANTIZE, QUANTIZE, Grid, aten
from ddqcli.qat.input_hooks import input_quantizer


class Net(nn.Module):
    """A residual network with a shortcut, a concatenation, pooling and what stays float."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8))
        self.second = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8))
        self.depthwise = nn.Conv2d(8, 8, 3, stride=2, padding=1, groups=8)
        self.wide = nn.Conv2d(16, 12, 1)
        self.head = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.first(x))
        x = torch.relu(self.second(x) + x)
        x = torch.cat([self.depthwise(x), nn.functional.max_pool2d(x, 2)], 1)
        x = nn.functional.hardswish(self.wide(x))
        return self.head(x.mean((2, 3)))


def made(
    tmp_path: Path, bits: int = 4, samples: int = 16, net: type[nn.Module] = Net
) -> tuple[nn.Module, Int8Model, Tensor]:
    x = torch.randn(samples, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    file = quantize(shake(net()), x, tmp_path / "m.safetensors", bits=bits)
    model = ddqcli.load(file.path, net())
    return model, make_int8(model, file.weights, one_by_one(x, "LiteRT"), "LiteRT"), x


def answers(model: Int8Model, x: Tensor) -> Tensor:
    with torch.no_grad():
        return torch.cat([model.module(*sample)[0] for sample in one_by_one(x, "LiteRT")])


def test_the_graph_answers_as_the_trained_network(tmp_path: Path) -> None:
    model, graph, x = made(tmp_path)
    with torch.no_grad():
        expected = model(x)
    difference = (answers(graph, x) - expected).abs().max() / expected.abs().max()
    assert difference < 0.03  # some dozen roundings to 8 bits
    assert graph.floats == ()
    (step,) = graph.steps
    assert step is not None
    codes = answers(graph, x) / step
    assert (codes - codes.round()).abs().max() < 1e-3


def test_weights_are_the_trained_integers_with_batch_norm_in_the_scales(tmp_path: Path) -> None:
    model, graph, _ = made(tmp_path)
    assert graph.weights.keys() == {
        "first.0.weight",
        "second.0.weight",
        "depthwise.weight",
        "wide.weight",
        "head.weight",
    }
    state = {name: value.double().numpy() for name, value in model.state_dict().items()}
    for name, weight in graph.weights.items():
        factor = np.ones(len(weight.scale))
        if norm := {"first.0.weight": "first.1", "second.0.weight": "second.1"}.get(name):
            variance = state[f"{norm}.running_var"]
            factor = state[f"{norm}.weight"] / np.sqrt(variance + 1e-5)
        shape = [-1] + [1] * (weight.integers.ndim - 1)
        stored = weight.integers * weight.scale.astype(np.float64).reshape(shape)
        expected = state[name] * factor.reshape(shape)
        exact = weight.exact.reshape(shape)
        error = np.abs(stored - expected) / weight.scale.reshape(shape)
        assert np.all(error <= np.where(exact, 1e-4, 0.5001)), name


def test_what_runtimes_know_in_integers_has_one_grid_and_the_rest_is_float(tmp_path: Path) -> None:
    model, graph, _ = made(tmp_path)
    nodes = graph.module.graph.nodes

    def computed(node: fx.Node) -> list[fx.Node]:
        values = [source for source in node.all_input_nodes if source.op == "call_function"]
        return [value for value in values if "per_channel" not in str(value.target)]

    reads_float = {
        node.target
        for node in nodes
        if node.op == "call_function"
        and node.target is not QUANTIZE
        and not all(value.target in (DEQUANTIZE, QUANTIZE) for value in computed(node))
    }
    # Runtimes compute a clip together with what is before it; nothing integer is before the mean.
    assert reads_float == {aten.relu.default, aten.mean.dim}
    # No value is quantized twice in a row, which LiteRT's converter cannot do.
    assert not [n for n in nodes if n.target is QUANTIZE and n.args[0].target is DEQUANTIZE]
    trained = {
        Grid(float(quantizer.scale), quantizer.zero_point - 128)
        for module in model.modules()
        if (quantizer := input_quantizer(module)) is not None
    }
    used = {Grid(*node.args[1:3]) for node in nodes if node.target is QUANTIZE}
    assert len(trained & used) >= 4
    pools = [n for n in nodes if n.target in (aten.max_pool2d.default, aten.cat.default)]
    for pool in pools:
        (after,) = pool.users
        sources = {s.args[1:3] for s in pool.all_input_nodes}
        assert sources == {after.args[1:3]}


def test_each_dequantizer_has_one_reader(tmp_path: Path) -> None:
    nodes = made(tmp_path)[1].module.graph.nodes
    readers = Counter(len(node.users) for node in nodes if node.target is DEQUANTIZE)
    assert set(readers) == {1}


def test_grids_cover_the_values_of_the_samples() -> None:
    for low, high in ((-1.5, 3.0), (0.2, 5.0), (-4.0, -1.0), (0.0, 0.0)):
        grid = Grid.over(low, high)
        assert grid.scale > 0
        assert -128 <= grid.zero_point <= 127
        reach = (-128 - grid.zero_point) * grid.scale, (127 - grid.zero_point) * grid.scale
        assert reach[0] <= min(low, 0) + grid.scale / 2 + 1e-6
        assert reach[1] >= max(high, 0) - grid.scale / 2 - 1e-6


class SamePool(nn.Module):
    """Max-pooling over a pad of -inf, as timm's "same" pooling; no layer reads its output."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.pad(self.first(x), (0, 1, 0, 1), value=float("-inf"))
        return self.second(nn.functional.max_pool2d(x, 3, 2).mean((2, 3)))


class Scaled(nn.Conv2d):
    """A layer whose bias the graph computes."""

    def forward(self, x: Tensor) -> Tensor:
        assert self.bias is not None
        return nn.functional.conv2d(x, self.weight, 20 * self.bias)


class ComputedBias(nn.Module):
    """Such a layer between two others."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 3)
        self.scaled = Scaled(8, 8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.scaled(torch.relu(self.first(x))))


@pytest.mark.parametrize(("net", "floats"), [(SamePool, ()), (ComputedBias, ("scaled.weight",))])
def test_what_has_no_integers_stays_float(
    net: type[nn.Module], floats: tuple[str, ...], tmp_path: Path
) -> None:
    model, graph, x = made(tmp_path, net=net)
    assert graph.floats == floats
    with torch.no_grad():
        expected = model(x)
    difference = (answers(graph, x) - expected).abs().max() / expected.abs().max()
    assert difference < 0.03


def test_outputs_that_are_no_tensors_are_left_out(tmp_path: Path) -> None:
    class Several(Net):
        def forward(self, x: Tensor) -> tuple[object, ...]:
            return None, super().forward(x), 3, "text"

    model, graph, x = made(tmp_path, net=Several)
    with torch.no_grad():
        expected = model(x)[1]
    (step,) = graph.steps
    assert step is not None
    difference = (answers(graph, x) - expected).abs().max() / expected.abs().max()
    assert difference < 0.03


@pytest.mark.parametrize(("act_bits", "found"), [(None, "are float"), (4, "and 1 has 4")])
def test_inputs_of_other_than_8_bits_are_refused(
    act_bits: int | None, found: str, tmp_path: Path
) -> None:
    x = torch.randn(4, 6)
    net = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 4), nn.Linear(4, 2))
    file = quantize(net, x, tmp_path / "m", act_bits=act_bits)
    model = ddqcli.load(file.path, net)
    with pytest.raises(UsageError, match=rf"{found}; finetune with --act-bits 8\."):
        make_int8(model, file.weights, one_by_one(x, "ExecuTorch"), "ExecuTorch")


def test_networks_that_cannot_be_traced_are_one_sentence(tmp_path: Path) -> None:
    class Deciding(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = self.layer(x)
            return x if x.sum() > 0 else -x

    x = torch.randn(4, 3)
    file = quantize(Deciding(), x, tmp_path / "m")
    model = ddqcli.load(file.path, Deciding())
    with pytest.raises(UsageError, match="cannot be exported to LiteRT: its forward decides"):
        make_int8(model, file.weights, one_by_one(x, "LiteRT"), "LiteRT")
    with pytest.raises(UsageError, match="LiteRT takes a network of tensors alone"):
        one_by_one({"x": x}, "LiteRT")


def test_gray_images_get_the_strides_that_runtimes_read() -> None:
    x = torch.rand(4, 1, 8, 8).to(memory_format=torch.channels_last)
    assert plain_strides(x[:1]).stride() == (64, 64, 8, 1)
    assert torch.equal(plain_strides(x), x)
