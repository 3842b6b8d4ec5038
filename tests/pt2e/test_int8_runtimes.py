"""Files of LiteRT and ExecuTorch: trained integers inside, answers of the graph. Needs extras."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from quantized_net import quantize
from test_pt2e_graph import ComputedBias, Net, SamePool, answers, made
from torch import Tensor, nn

import ddqcli
from ddqcli.errors import UsageError, VerificationError
from ddqcli.pt2e.executorch import EXECUTORCH
from ddqcli.pt2e.graph import Int8Model, make_int8, one_by_one
from ddqcli.pt2e.litert import LITERT
from ddqcli.pt2e.runtime import Int8Runtime, sample_by_sample

RUNTIMES = pytest.mark.parametrize("runtime", [LITERT, EXECUTORCH], ids=lambda each: each.name)


def require(runtime: Int8Runtime) -> None:
    try:
        runtime.require()
    except UsageError as error:
        pytest.skip(str(error))


def converted(runtime: Int8Runtime, graph: Int8Model, path: Path) -> bytes:
    raw = runtime.convert(graph)
    path.write_bytes(raw)
    return raw


@RUNTIMES
def test_a_file_holds_the_integers_and_answers_as_the_graph(
    runtime: Int8Runtime, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    require(runtime)
    _, graph, x = made(tmp_path)
    path = tmp_path / "model"
    raw = converted(runtime, graph, path)
    (step,) = graph.steps
    assert step is not None
    (found,) = sample_by_sample(runtime.open(path))({"input": x.numpy()})
    assert np.abs(found - answers(graph, x).numpy()).max() <= 1.001 * step
    captured = capfd.readouterr()
    assert (captured.out, captured.err) == ("", "")

    assert runtime.missing(raw, graph.weights) == []
    weight = graph.weights["wide.weight"]
    changed = weight.integers.copy()
    changed[3, 5] ^= 1
    other = graph.weights | {"wide.weight": replace(weight, integers=changed)}
    assert runtime.missing(raw, other) == ["wide.weight"]


@RUNTIMES
@pytest.mark.parametrize("net", [SamePool, ComputedBias])
def test_what_stays_float_runs_between_integers(
    net: type[nn.Module], runtime: Int8Runtime, tmp_path: Path
) -> None:
    require(runtime)
    _, graph, x = made(tmp_path, net=net)
    path = tmp_path / "model"
    raw = converted(runtime, graph, path)
    (step,) = graph.steps
    assert step is not None
    (found,) = sample_by_sample(runtime.open(path))({"input": x.numpy()})
    assert np.abs(found - answers(graph, x).numpy()).max() <= 1.001 * step
    assert runtime.missing(raw, graph.weights) == []


@RUNTIMES
def test_several_inputs_and_outputs_keep_their_order(runtime: Int8Runtime, tmp_path: Path) -> None:
    require(runtime)

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.left, self.right = nn.Linear(6, 4), nn.Linear(3, 4)

        def forward(self, a: Tensor, b: Tensor) -> dict[str, Tensor]:
            return {"z": self.left(a), "a": self.right(b), "sum": self.left(a) + self.right(b)}

    class Joined(Two):  # one tensor is what the helper quantizes with
        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return super().forward(x[:, :6], x[:, 6:])

    x = torch.randn(16, 9)
    file = quantize(Joined(), x, tmp_path / "m")
    model = ddqcli.load(file.path, Two())
    inputs = (x[:, :6], x[:, 6:])
    graph = make_int8(model, file.weights, one_by_one(inputs, runtime.name), runtime.name)
    path = tmp_path / "model"
    converted(runtime, graph, path)
    feed = {"input_0": inputs[0].numpy().copy(), "input_1": inputs[1].numpy().copy()}
    found = sample_by_sample(runtime.open(path))(feed)
    with torch.no_grad():
        expected = list(model(*inputs).values())
    for theirs, ours in zip(found, expected, strict=True):
        assert np.abs(theirs - ours.numpy()).max() < 0.03 * ours.abs().max()


@RUNTIMES
def test_damaged_files_are_refused(runtime: Int8Runtime, tmp_path: Path) -> None:
    require(runtime)
    path = tmp_path / "model"
    path.write_bytes(b"no model, but some bytes of text" * 4)
    with pytest.raises(VerificationError, match=f"{runtime.name} cannot load {path}"):
        runtime.open(path)


@RUNTIMES
def test_what_a_converter_lacks_is_one_sentence(runtime: Int8Runtime, tmp_path: Path) -> None:
    require(runtime)

    class Odd(Net):
        def forward(self, x: Tensor) -> Tensor:
            return torch.linalg.eigvals(super().forward(x)[:, :4].reshape(-1, 2, 2)).real

    x = torch.randn(4, 3, 8, 8)
    file = quantize(Odd(), x, tmp_path / "m")
    model = ddqcli.load(file.path, Odd())
    graph = make_int8(model, file.weights, one_by_one(x, runtime.name), runtime.name)
    with pytest.raises(UsageError, match="cannot convert the model: ") as error:
        runtime.convert(graph)
    assert "\n" not in str(error.value)
