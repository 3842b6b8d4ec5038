"""`ddqcli.load`: the float network with a file in it computes bit for bit as it was trained."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from quantized_net import quantize, shake
from torch import Tensor, nn
from torchvision import models as zoo

import ddqcli
from ddqcli.artifact.encode import encode_artifact
from ddqcli.artifact.tensors import BFLOAT16
from ddqcli.errors import CheckpointError, UsageError, VerificationError


def conv_net() -> nn.Module:
    torch.manual_seed(3)
    return shake(
        nn.Sequential(
            nn.Conv2d(3, 16, 3, padding=1, bias=False),
            nn.BatchNorm2d(16),
            nn.ReLU(),
            nn.Conv2d(16, 16, 3, padding=1, groups=16),
            nn.BatchNorm2d(16),
            nn.Hardswish(),
            nn.ConvTranspose2d(16, 8, 2, stride=2),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(8, 5),
        )
    )


class Attentive(nn.Module):
    """Attention, a tied embedding, and a layer that takes its input by name."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.embed = nn.Embedding(11, 12)
        layer = nn.TransformerEncoderLayer(12, 3, 24, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(12, 11, bias=False)
        self.head.weight = self.embed.weight
        self.input_quantizer = nn.Linear(12, 12)  # a name that ddq uses too

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(input=self.input_quantizer(self.encoder(self.embed(tokens))))


NETS = {
    "convolutions": (conv_net, torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))),
    "attention": (lambda: Attentive().eval(), torch.arange(14).view(2, 7) % 11),
}


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("act_bits", [None, 2, 4, 6, 8])
@pytest.mark.parametrize("granularity", ["layer", "channel"])
def test_the_loaded_network_answers_as_the_trained_one(
    net: str, act_bits: int | None, granularity: str, tmp_path: Path
) -> None:
    build, x = NETS[net]
    exported = quantize(
        build(), x, tmp_path / "m", bits=3, act_bits=act_bits, granularity=granularity
    )
    model = build().train()
    names = list(model.state_dict())
    assert ddqcli.load(exported.path, model) is model
    assert not model.training
    assert list(model.state_dict()) == names
    with torch.no_grad():
        if net == "attention" and not act_bits:  # torch then takes its fused kernels
            torch.testing.assert_close(model(x), exported.model(x), rtol=0, atol=1e-5)
        else:
            assert torch.equal(model(x), exported.model(x))
        assert act_bits or torch.equal(copy.deepcopy(model)(x), model(x))
    for name, tensor in exported.weights.items():
        assert np.array_equal(model.get_parameter(name).detach().numpy(), tensor.dequantize()), name


def test_copies_and_pickles_of_it_answer_alike(tmp_path: Path) -> None:
    build, x = NETS["convolutions"]
    model = ddqcli.load(quantize(build(), x, tmp_path / "m").path, build())
    assert torch.equal(copy.deepcopy(model)(x), model(x))
    assert torch.equal(pickle.loads(pickle.dumps(model))(x), model(x))


def test_a_second_file_takes_the_place_of_the_first(tmp_path: Path) -> None:
    build, x = NETS["convolutions"]
    first = quantize(build(), x, tmp_path / "first", act_bits=2)
    for act_bits in (8, None):
        second = quantize(build(), x, tmp_path / "second", act_bits=act_bits)
        model = ddqcli.load(second.path, ddqcli.load(first.path, build()))
        assert torch.equal(model(x), second.model(x))


def test_floats_of_every_type_are_kept_bit_for_bit(tmp_path: Path) -> None:
    class Buffers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("b", torch.zeros(2, dtype=torch.bfloat16))
            self.register_buffer("d", torch.zeros(2, dtype=torch.float64))
            self.register_buffer("f", torch.zeros(3))
            self.register_buffer("n", torch.zeros((), dtype=torch.int64))

    bits = torch.tensor([1.5, -3e-39], dtype=torch.bfloat16)
    floats = {
        "b": bits.view(torch.uint16).numpy().view(BFLOAT16),
        "d": np.array([1 / 3, -0.0]),
        "f": np.array([1e-45, -0.0, 7], np.float32),
        "n": np.array(2**53 + 1),
    }
    (tmp_path / "m").write_bytes(encode_artifact([], [], floats, {}, {})[0])
    state = ddqcli.load(tmp_path / "m", Buffers()).state_dict()
    assert torch.equal(state["b"].view(torch.int16), bits.view(torch.int16))
    for name in "dfn":
        assert state[name].numpy().tobytes() == floats[name].tobytes()


# ---- files that do not fit


def other(**changes: nn.Module) -> nn.Module:
    model = conv_net()
    for name, module in changes.items():
        model[int(name[1:])] = module
    return model


def integers(layer: nn.Linear) -> nn.Linear:
    del layer.bias
    layer.register_buffer("bias", torch.zeros(5, dtype=torch.long))
    return layer


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (
            lambda: other(_9=nn.Linear(8, 6)),
            "it has in another shape 9.weight [5, 8] instead of [6, 8], 9.bias [5] inst",
        ),
        (
            lambda: other(_3=nn.Identity(), _4=nn.Identity()),
            "it has unknown 3.bias, 3.weight, 4.bias, ...",
        ),
        (
            lambda: nn.Sequential(*conv_net(), nn.Linear(5, 5)),
            "it lacks 10.weight, 10.bias; build the",
        ),
        (
            lambda: other(_9=integers(nn.Linear(8, 5))),
            "a type that this one would round 9.bias torch.float32, not torch.int64",
        ),
    ],
    ids=["shape", "unknown", "lacks", "type"],
)
def test_another_network_is_refused_by_name_and_left_alone(
    model: object, message: str, tmp_path: Path
) -> None:
    build, x = NETS["convolutions"]
    exported = quantize(build(), x, tmp_path / "m.safetensors")
    unfit = model()  # type: ignore[operator]
    before = copy.deepcopy(unfit.state_dict())
    with pytest.raises(CheckpointError) as error:
        ddqcli.load(exported.path, unfit)
    assert str(error.value).startswith(f"{exported.path} is not of this Sequential: ")
    assert message in str(error.value)
    assert all(torch.equal(value, before[name]) for name, value in unfit.state_dict().items())


@pytest.mark.parametrize("half", ["all", "1"], ids=["all", "BatchNorm"])
def test_a_network_in_half_precision_is_made_float32_and_answers_as_trained(
    half: str, tmp_path: Path
) -> None:
    build, x = NETS["convolutions"]
    exported = quantize(build(), x, tmp_path / "m.safetensors")
    expected = ddqcli.load(exported.path, build())
    model = build()
    (model if half == "all" else model.get_submodule(half)).half()
    loaded = ddqcli.load(exported.path, model)
    assert loaded is model
    for name, value in expected.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name
        assert loaded.state_dict()[name].dtype == value.dtype
    assert torch.equal(loaded(x), expected(x))


def test_a_file_that_quantizes_the_input_of_a_layer_unknown_here_is_refused(tmp_path: Path) -> None:
    build, x = NETS["convolutions"]
    exported = quantize(build(), x, tmp_path / "m.safetensors")

    class Flat(nn.Module):  # the same tensors without the layers
        def __init__(self) -> None:
            super().__init__()
            for name, value in build().state_dict().items():
                self.register_buffer(name.replace(".", "_"), value)

        def state_dict(self, *args: object, **kwargs: object) -> dict[str, Tensor]:
            return build().state_dict()

    with pytest.raises(CheckpointError, match=r"it has unknown 0 \(input\), 3 \(input\)"):
        ddqcli.load(exported.path, Flat())


def test_a_damaged_file_and_no_file_are_told_apart(tmp_path: Path) -> None:
    build, x = NETS["convolutions"]
    path = quantize(build(), x, tmp_path / "m").path
    raw = bytearray(path.read_bytes())
    raw[-20] ^= 4
    path.write_bytes(raw)
    with pytest.raises(VerificationError, match="damaged"):
        ddqcli.load(path, build())
    with pytest.raises(UsageError, match="No such file"):
        ddqcli.load(tmp_path / "gone", build())
    with pytest.raises(UsageError, match="not a ddq file"):
        ddqcli.load(__file__, build())


# ---- torch.export


def test_it_exports_with_torch_and_any_batch_size(tmp_path: Path) -> None:
    build, x = NETS["convolutions"]
    for act_bits in (2, 8):
        model = ddqcli.load(quantize(build(), x, tmp_path / "m", act_bits=act_bits).path, build())
        program = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("batch")},))
        more = torch.randn(5, 3, 8, 8)
        torch.export.save(program, tmp_path / "m.pt2")
        again = torch.export.load(tmp_path / "m.pt2").module()
        with torch.no_grad():
            assert torch.equal(again(more), model(more))


def test_resnet18_exports_with_torch(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = shake(zoo.resnet18(num_classes=7)), torch.randn(2, 3, 32, 32)
    ddqcli.load(quantize(model, x, tmp_path / "m").path, model)
    program = torch.export.export(model, (x,))
    with torch.no_grad():
        assert torch.equal(program.module()(x), model(x))
