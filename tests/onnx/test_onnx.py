"""The ONNX file: the integers of the ddq file, and onnxruntime answers as torch does."""

from __future__ import annotations

import copy
import importlib.util
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import numpy_helper
from quantized_net import Quantized, quantize, shake
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock

import ddqcli
from ddqcli.errors import UsageError, VerificationError
from ddqcli.onnx import kernel, packed
from ddqcli.onnx.export import make_onnx, require_onnx
from ddqcli.onnx.runtime import compare, onnxruntime_answers, session

EXACT = 2e-6  # float32 sums in another order


def written(
    model: nn.Module, x: Any, folder: Path, **options: object
) -> tuple[Path, nn.Module, Quantized]:
    """Write the ONNX file of the model, quantized and loaded again; return it with both."""
    made = quantize(model, x, folder / "model.safetensors", **options)  # type: ignore[arg-type]
    loaded = ddqcli.load(made.path, model)
    raw = make_onnx(loaded, made.weights, x, {"source": "0123"}).raw
    (folder / "model.onnx").write_bytes(raw)
    return folder / "model.onnx", loaded, made


def outputs(path: Path, x: Tensor) -> list[list[Tensor]]:
    """Return all outputs of onnxruntime, with its optimizations and without."""
    runs = [session(path, optimized=on).run(None, {"input": x.numpy()}) for on in (True, False)]
    return [[torch.from_numpy(output) for output in run] for run in runs]


def both(path: Path, x: Tensor) -> list[Tensor]:
    """Return the answers of onnxruntime with its optimizations and without."""
    return [first for first, *_ in outputs(path, x)]


def torch_answer(model: nn.Module, *x: Tensor) -> Tensor:
    with torch.no_grad():
        return model(*x)


def distance(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


def kernels(path: Path) -> Counter[str]:
    """Count the nodes that onnxruntime runs of a file, after its optimizations."""
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(path.with_suffix(".run.onnx"))
    options.log_severity_level = 3
    onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return Counter(node.op_type for node in onnx.load(options.optimized_model_filepath).graph.node)


def uneven(model: nn.Module, seed: int = 0) -> nn.Module:
    """Give the model weights of an asymmetric range, which need a zero point."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape) * 0.3 + 0.1)
    return shake(model, seed)


class Branches(nn.Module):
    """Layers side by side, each with an output: one export shows them all."""

    def __init__(self, layers: Iterable[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> list[Tensor]:
        return [layer(x) for layer in self.layers]


# ---- one layer: exact


GEOMETRIES = {
    "3x3": dict(kernel_size=3, padding=1),
    "3x3, stride 2": dict(kernel_size=3, stride=2, padding=1),
    "uneven everything": dict(kernel_size=(3, 5), stride=(2, 1), padding=(0, 3), dilation=(1, 2)),
    "1x1": dict(kernel_size=1),
    "1x1, stride 2": dict(kernel_size=1, stride=2),
    "same": dict(kernel_size=4, padding="same"),
    "grouped": dict(kernel_size=3, groups=2),
    "depthwise": dict(kernel_size=3, padding=1, groups=16, out_channels=16),
    "reflected": dict(kernel_size=3, padding=1, padding_mode="reflect"),
}


def convolution(geometry: str, dead: bool) -> nn.Module:
    layer = nn.Conv2d(**{"in_channels": 16, "out_channels": 24, **GEOMETRIES[geometry]})  # type: ignore[arg-type]
    model = uneven(nn.Sequential(layer, nn.BatchNorm2d(layer.out_channels)))
    with torch.no_grad():
        model[1].weight[:2] = torch.tensor([-1.5, 0.0 if dead else 1.0])  # type: ignore[index]
    return model


@pytest.mark.parametrize("granularity", ["layer", "channel"])
def test_a_convolution_with_a_float_result_is_exact_but_for_its_rounded_shift(
    granularity: str, tmp_path: Path
) -> None:
    cases = [*((geometry, False) for geometry in GEOMETRIES), ("3x3", True), ("depthwise", True)]
    model = Branches(convolution(geometry, dead) for geometry, dead in cases)
    x = torch.randn(3, 16, 9, 11)
    path, loaded, made = written(model, x, tmp_path, granularity=granularity)
    expected = torch_answer(loaded, x)
    found = outputs(path, x)
    in_integers: Counter[str] = Counter()
    for number, (geometry, dead) in enumerate(cases):
        layer, norm = model.layers[number], loaded.layers[number]  # type: ignore[index,union-attr]
        gathered = geometry not in ("grouped", "depthwise", "reflected", "same")
        # A channel whose products count for nothing has no unit to round its shift to.
        rounded = gathered and not dead
        in_integers += {"QGemm": rounded, "MatMulIntegerToFloat": gathered and dead}  # type: ignore[arg-type]
        factor = layer[1].weight / torch.sqrt(layer[1].running_var + layer[1].eps)  # type: ignore[index]
        scale = torch.from_numpy(made.weights[f"layers.{number}.0.weight"].scale)
        unit = scale * factor * norm[0].input_quantizer.scale
        wanted = expected[number]
        slack = EXACT * wanted.abs().max() + (rounded * 0.5001 * unit.detach().abs())[:, None, None]
        for answers in found:
            away = (answers[number] - wanted).abs()
            assert bool((away <= slack).all()), (geometry, dead)
    runs = kernels(path)
    assert in_integers == {name: runs[name] for name in in_integers}


@pytest.mark.parametrize(("widths", "signed"), [(range(9), True), ((1, 4, 5, 8), False)])
def test_inputs_of_every_width_are_exact(
    widths: Sequence[int], signed: bool, tmp_path: Path
) -> None:
    """A width of 0 keeps the input in float."""
    model = uneven(Branches(nn.Linear(20, 30) for _ in widths))
    x = torch.randn(7, 20)
    x = x if signed else x.relu()
    overrides = [{"match": f"layers.{k}", "act_bits": bits} for k, bits in enumerate(widths)]
    path, loaded, made = written(model, x, tmp_path, overrides=overrides)
    ties = torch.arange(-280, 280).reshape(28, 20) / 2
    layers = zip(loaded.layers, widths, strict=True)  # type: ignore[arg-type]
    scales = [layer.input_quantizer.scale for layer, bits in layers if bits]
    # Beyond the range, and all ties.
    x = torch.cat([x, 50 * x, 0.1 * ties, *(ties * scale for scale in scales)])
    expected = torch_answer(loaded, x)
    for bits, one, other in zip(widths, expected, torch_answer(made.model, x), strict=True):
        assert torch.equal(one, other), bits
    for answers in outputs(path, x):
        for bits, found, wanted in zip(widths, answers, expected, strict=True):
            assert distance(found, wanted) < EXACT, bits


@pytest.mark.parametrize("shape", [(6, 20), (2, 5, 20), (2, 3, 4, 20)])
def test_linear_layers_run_in_integers(shape: tuple[int, ...], tmp_path: Path) -> None:
    model = uneven(Branches(nn.Linear(20, 30, bias=bias) for bias in (True, False)))
    x = torch.randn(shape)
    path, loaded, _ = written(model, x, tmp_path)
    assert kernels(path)["MatMulIntegerToFloat"] == 2
    for answers in outputs(path, x):
        for found, expected in zip(answers, torch_answer(loaded, x), strict=True):
            assert distance(found, expected) < EXACT


# ---- from integers to integers


@pytest.mark.parametrize(
    ("between", "most"),
    [
        ([nn.ReLU(), nn.ReLU6(), nn.Hardtanh(-0.3, 0.4), nn.Identity()], 1e9),
        ([nn.ReLU6()], 3.0),
    ],
    ids=["within the range", "relu6 above the range"],
)
def test_activations_become_part_of_the_quantizer(
    between: list[nn.Module], most: float, tmp_path: Path
) -> None:
    model = uneven(
        Branches(
            nn.Sequential(
                nn.Conv2d(16, 16, 3, bias=False),
                nn.BatchNorm2d(16),
                activation,
                nn.Conv2d(16, 20, 1),
                nn.Flatten(),
            )
            for activation in between
        )
    )
    x = 4 * torch.randn(2, 16, 8, 8)
    calibration = x if most > 100 else x / 8  # then the second layer's range ends below 6
    path, loaded, _ = written(model, calibration, tmp_path)
    runs = kernels(path)
    assert runs["QLinearConv"] == len(between)
    assert not runs.keys() & {"Conv", "Relu", "BatchNormalization", "FusedConv"}
    branches: Any = loaded.layers
    for answers in outputs(path, x):
        for branch, found, expected in zip(branches, answers, torch_answer(loaded, x), strict=True):
            step = float(branch[3].input_quantizer.scale * branch[3].weight.detach().abs().max())
            assert float((found - expected).abs().max()) <= 3.1 * step, (
                "a rounded shift may move a value to the next level"
            )
            assert float(((found - expected).abs() < 0.02 * step).float().mean()) > 0.9


def test_three_channels_and_depthwise_run_in_integers(tmp_path: Path) -> None:
    model = uneven(
        nn.Sequential(
            nn.Conv2d(3, 16, 3, 2),
            nn.ReLU(),
            nn.Conv2d(16, 16, 3, groups=16),
            nn.ReLU(),
            nn.Conv2d(16, 16, 1),
            nn.ReLU(),
        )
    )
    x = torch.randn(2, 3, 11, 11)
    path, loaded, _ = written(model, x, tmp_path)
    assert kernels(path)["QLinearConv"] == 2
    expected = torch_answer(loaded, x)
    for found in both(path, x):
        assert (
            float((found - expected).square().mean().sqrt() / expected.square().mean().sqrt())
            < 0.01
        )


def test_a_shift_that_no_int32_holds_stays_float(tmp_path: Path) -> None:
    model = uneven(
        nn.Sequential(nn.Conv2d(16, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 1))
    )
    with torch.no_grad():
        model[1].weight.mul_(1e-9)  # type: ignore[union-attr]
        model[1].bias.fill_(1.0)  # type: ignore[union-attr]
    x = torch.randn(2, 16, 6, 6)
    path, loaded, _ = written(model, x, tmp_path)
    assert "QLinearConv" not in kernels(path)
    for found in both(path, x):
        assert distance(found, torch_answer(loaded, x)) < 1e-5


# ---- whole networks


class Shared(nn.Module):
    """A layer called twice, a tied embedding, attention, a norm whose input has another user."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(9, 16)
        self.twice = nn.Linear(16, 16)
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.conv = nn.Conv2d(16, 16, 1)
        self.norm = nn.BatchNorm2d(16)
        self.head = nn.Linear(16, 9)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens.long())
        x = self.twice(self.twice(x).relu())
        x = x + self.attention(x, x, x, need_weights=False)[0]
        y = self.conv(x.transpose(1, 2)[..., None])
        y = (self.norm(y) + y).squeeze(-1).transpose(1, 2)
        return self.head(y)


def test_shared_tensors_attention_and_embeddings(tmp_path: Path) -> None:
    model = uneven(Shared())
    tokens = (torch.arange(21.0) % 9).view(3, 7)
    path, loaded, _ = written(model, tokens, tmp_path, act_bits=2)
    for found in both(path, tokens):
        assert distance(found, torch_answer(loaded, tokens)) < 0.01, (
            "the convolution's shift is rounded"
        )
    names = {tensor.name for tensor in onnx.load(path).graph.initializer}
    assert not names & {"head.weight", "embed.weight"}, (
        "the embedding is quantized, by whichever name"
    )
    assert {"norm.weight", "norm.bias"} <= names
    assert not names & {"norm.running_mean", "norm.running_var"}, "constants after folding"


def residual_net() -> nn.Module:
    downsample = nn.Sequential(nn.Conv2d(16, 32, 1, 2, bias=False), nn.BatchNorm2d(32))
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        BasicBlock(16, 16),
        BasicBlock(16, 32, 2, downsample),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(32, 9),
    )


def test_a_residual_network_answers_alike_at_any_batch_size(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = shake(residual_net()), torch.randn(5, 3, 16, 16)
    path, loaded, _ = written(model, x, tmp_path, act_bits=2)
    for count in (1, 5):
        for found in both(path, x[:count]):
            away = (found - torch_answer(loaded, x[:count])).abs().amax(1) / 5
            assert float(away.median()) < 1e-4, (
                "a typical sample is the same; one on an edge may go its own way"
            )
    runs = kernels(path)
    assert runs["QGemm"] == 5  # all convolutions but the first
    assert runs["MatMulIntegerToFloat"] == 1  # the last layer
    assert runs["Conv"] + runs["FusedConv"] == 1


def test_for_openvino_convolutions_stay_and_the_answers_too(tmp_path: Path) -> None:
    model, x = shake(residual_net()), torch.randn(8, 3, 16, 16)
    path, loaded, made = written(model, x, tmp_path)
    size = path.stat().st_size
    raw = make_onnx(loaded, made.weights, x, {"source": "0123"}, "openvino").raw
    path.write_bytes(raw)
    operators = Counter(node.op_type for node in onnx.load(path).graph.node)
    assert operators["Conv"] == sum(isinstance(layer, nn.Conv2d) for layer in model.modules())
    assert operators["Transpose"] == operators["Gemm"] + operators["MatMul"] == 1
    assert len(raw) < size
    for found in both(path, x):
        away = (found - torch_answer(loaded, x)).abs().amax(1) / 5
        assert float(away.median()) < 1e-4


def test_sizes_are_computed_when_the_file_is_written(tmp_path: Path) -> None:
    """Of a convolution's missing bias, and of pads and slices."""

    class Shortcut(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(16, 32, 3, padding=1, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            wide = nn.functional.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 8, 8))
            return wide + self.conv(x)[:, :, ::2, ::2]

    path, loaded, _ = written(shake(Shortcut()), x := torch.randn(2, 16, 8, 8), tmp_path)
    proto = onnx.load(path)
    assert not {node.op_type for node in proto.graph.node} & {"Constant", "Shape", "Expand"}
    values = [(t.data_type, tuple(t.dims), t.raw_data) for t in proto.graph.initializer]
    assert len(values) == len(set(values)), "equal constants are stored once"
    for found in both(path, x):
        assert distance(found, torch_answer(loaded, x)) < 1e-4


def test_the_integers_are_those_of_the_file(tmp_path: Path) -> None:
    model = uneven(
        nn.Sequential(nn.Conv2d(16, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 17, 1))
    )
    path, _, made = written(model, torch.randn(2, 16, 6, 6), tmp_path)
    for name, layout in (("0.weight", (0, 1, 2, 3)), ("3.weight", (1, 0))):
        tensor = made.weights[name]
        level = tensor.integers().astype(int) - int(tensor.zero_point[0])
        integers, zero_point = dequantized_inputs(path, name)
        assert integers.dtype == np.int8
        centered = integers.astype(int) - zero_point.astype(int).reshape(
            (-1, 1, 1, 1) if len(layout) == 4 else (1, -1)
        )
        assert np.array_equal(centered, level.reshape(level.shape[: len(layout)]).transpose(layout))
    stored = [numpy_helper.to_array(t) for t in onnx.load(path).graph.initializer]
    assert not [array for array in stored if array.dtype == np.float32 and array.ndim > 1]


def dequantized_inputs(path: Path, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Return integers and zero points of a weight as onnxruntime unpacks them."""
    proto = onnx.load(path)
    (node,) = [
        node
        for node in proto.graph.node
        if node.op_type == "DequantizeLinear" and node.input[1] == f"{name}.scale"
    ]
    wanted = [node.input[0], node.input[2]]
    proto.graph.output.extend(
        onnx.helper.make_tensor_value_info(value, onnx.TensorProto.INT8, None) for value in wanted
    )
    runtime = onnxruntime.InferenceSession(proto.SerializeToString())
    (given,) = runtime.get_inputs()
    x = np.zeros([1, *given.shape[1:]], np.float32)
    integers, zero_point = runtime.run(wanted, {given.name: x})
    return integers, zero_point


@pytest.mark.parametrize(("bits", "act_bits"), [(3, 8), (4, None)])
def test_packed_weights_answer_bit_for_bit_as_plain_ones(
    bits: int, act_bits: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, x = shake(residual_net()), torch.randn(3, 3, 16, 16)
    answers, sizes = [], []
    for node_bytes in (packed._NODE_BYTES, 1 << 30):
        monkeypatch.setattr(packed, "_NODE_BYTES", node_bytes)
        path, _, _ = written(copy.deepcopy(model), x, tmp_path, bits=bits, act_bits=act_bits)
        answers.append(both(path, x))
        sizes.append(path.stat().st_size)
    for ours, plain in zip(*answers, strict=True):
        assert torch.equal(ours, plain)
    values = sum(p.numel() for p in model.parameters() if p.ndim == 4 and p.shape[1] > 3)
    assert sizes[1] - sizes[0] > 0.7 * values * (1 - bits / 8)


def test_a_tensor_with_two_names_is_stored_once(tmp_path: Path) -> None:
    tied = nn.ModuleDict({"embed": nn.Embedding(64, 32), "head": nn.Linear(32, 64)})
    tied["head"].weight = tied["embed"].weight  # type: ignore[assignment]

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = tied

        def forward(self, tokens: Tensor) -> Tensor:
            return self.layers["head"](self.layers["embed"](tokens.long()))

    tokens = torch.arange(21.0).view(3, 7)
    path, loaded, _ = written(uneven(Tied()), tokens, tmp_path, act_bits=None)
    large = [t.name for t in onnx.load(path).graph.initializer if len(t.raw_data) >= 64 * 32 // 2]
    assert len(large) == 1
    for found in both(path, tokens):
        assert distance(found, torch_answer(loaded, tokens)) < EXACT


def test_bounds_of_activations_are_constants_that_onnxruntime_fuses(tmp_path: Path) -> None:
    model = uneven(nn.Sequential(nn.Conv2d(16, 16, 3), nn.BatchNorm2d(16), nn.ReLU6()))
    path, _, _ = written(model, torch.randn(2, 16, 8, 8), tmp_path, act_bits=None)
    assert not kernels(path).keys() & {"Clip", "Cast", "CastLike", "DequantizeLinear", "Mul"}


def test_the_file_is_the_same_each_time_and_tells_nothing_of_the_machine(tmp_path: Path) -> None:
    model, x = (
        uneven(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 1))),
        torch.randn(2, 3, 6, 6),
    )
    first, second = tmp_path / "first", tmp_path / "second"
    for folder in (first, second):
        folder.mkdir()
        written(uneven(model), x, folder)
    raw = (first / "model.onnx").read_bytes()
    assert raw == (second / "model.onnx").read_bytes()
    assert not [word for word in (b"/tmp", b".py", b"nn.modules", b"quantized_net") if word in raw]
    proto = onnx.load(first / "model.onnx")
    assert [
        i.type.tensor_type.shape.dim[0].dim_param
        for i in (proto.graph.input[0], proto.graph.output[0])
    ] == ["batch"] * 2
    about = {prop.key: prop.value for prop in proto.metadata_props}
    assert about.keys() == {"source", "runtime", "exporter", "sha256"}
    assert about["source"] == "0123"


# ---- what is refused, and what is noticed


class Deciding(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else -x


class Unknown(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.special.bessel_j0(x)


class Foreign(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.from_numpy(x.numpy()) + 0


def test_a_recurrent_layer_with_a_projection_is_refused(tmp_path: Path) -> None:
    model = uneven(nn.Sequential(nn.Linear(4, 4), nn.LSTM(4, 6, proj_size=2)))
    with pytest.raises(UsageError, match=r"the layer 1 cannot .* ONNX's LSTM has no proj_size"):
        written(model, torch.randn(2, 4), tmp_path)


class Packed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.GRU(4, 4, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        lengths = torch.full((len(x),), 3)
        packed = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True)
        return self.rnn(packed)[1]


def test_packed_sequences_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"the layer rnn cannot .* has no packed sequences; give"):
        written(uneven(Packed()), torch.randn(2, 3, 4), tmp_path)


class Bags(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bag, self.head = nn.EmbeddingBag(20, 16), nn.Linear(16, 3)

    def forward(self, words: Tensor, offsets: Tensor) -> Tensor:
        return self.head(self.bag(words, offsets))


def test_inputs_may_differ_in_their_first_dimension(tmp_path: Path) -> None:
    """Texts one after the other and where each begins, as EmbeddingBag takes them."""
    words, offsets = torch.arange(20) * 7 % 20, torch.tensor([0, 3, 9, 12])
    path, loaded, _ = written(uneven(Bags()), (words, offsets), tmp_path)
    for count, starts in ((20, [0, 3, 9, 12]), (7, [0, 5])):
        feed = {"input_0": words[:count], "input_1": torch.tensor(starts)}
        expected = torch_answer(loaded, feed["input_0"], feed["input_1"])
        given = session(path, optimized=True).run(None, {k: v.numpy() for k, v in feed.items()})
        assert distance(torch.from_numpy(given[0]), expected) < EXACT


class Counting(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + x.new_ones(len(x), 4)


class Complex(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.fft.fft(x)


class OneSize(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.view(2, 4)


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (Deciding, r"of the layer 1\.1 .*decides by the values of a tensor \(.*test_onnx\.py:\d+"),
        (Unknown, r"of the layer 1\.1 .*ONNX has no operator prims\.bessel_j0; compute it with"),
        (Foreign, r"of the layer 1\.1 .*numpy.*; torch\.export must be able to trace"),
        (Counting, r".*works for one batch size alone"),
        (OneSize, r".*works for one batch size alone; take it from x\.shape\[0\], .* -1 in a view"),
        (Complex, r".*its output is torch\.complex64, .* use torch\.view_as_real\(x\)"),
    ],
)
def test_what_onnx_cannot_express_is_refused_with_layer_cause_and_remedy(
    layer: Callable[[], nn.Module],
    reason: str,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    model = uneven(nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.ReLU(), layer())))
    with pytest.raises(UsageError, match=f"^The model {reason}") as error:
        written(model, torch.randn(2, 4), tmp_path)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "model.onnx").exists()
    assert capfd.readouterr().err == ""


def test_without_the_extra_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name.startswith("onnx") else find(name)
    )
    with pytest.raises(UsageError, match=r"pip install 'ddqcli\[onnx\]'"):
        require_onnx()


def test_a_comparison_sees_a_wrong_layer_and_a_damaged_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, x = (
        uneven(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))),
        torch.randn(40, 8),
    )
    path, loaded, _ = written(model, x, tmp_path)
    batches = [(x[:20], torch.zeros(20)), (x[20:], torch.zeros(20))]
    optimized = onnxruntime_answers(path, optimized=True)
    right = compare(optimized, loaded, batches, lambda out, y: (out.argmax(1) == y).float())
    assert right.samples == 40
    assert right.outputs < EXACT
    hits = float((torch_answer(loaded, x).argmax(1) == 0).float().mean())
    assert right.accuracy == right.torch_accuracy == pytest.approx(100 * hits)
    plain = onnxruntime_answers(path, optimized=False)
    assert compare(plain, loaded, batches, None, max_samples=20).samples == 20
    to_int8 = kernel.to_int8
    monkeypatch.setattr(
        kernel, "to_int8", lambda tensor: (to_int8(tensor)[0] // 2, to_int8(tensor)[1])
    )
    path, loaded, _ = written(model, x, tmp_path)
    wrong = onnxruntime_answers(path, optimized=True)
    assert compare(wrong, loaded, batches, None).outputs > 0.1
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(VerificationError, match="onnxruntime cannot load"):
        session(path, optimized=True)
