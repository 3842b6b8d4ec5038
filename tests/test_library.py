"""The library: quantize a model, train it in a plain loop, save it, load it."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torchvision import models as zoo

import ddqcli
from ddqcli.artifact.encode import encode_artifact
from ddqcli.artifact.read import read_artifact
from ddqcli.errors import BudgetError, UsageError, VerificationError
from ddqcli.qat.frozen import FrozenModel, freeze
from ddqcli.qat.model import QuantizedModel


class Net(nn.Module):
    """Convolutions, BatchNorm, and two layers that share a weight."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.features = nn.Sequential(
            nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 8, 3), nn.Flatten()
        )
        self.first, self.second = nn.Linear(32, 32), nn.Linear(32, 32)
        self.second.weight = self.first.weight
        self.head = nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(self.first(self.features(x)).relu()).relu())


X, Y = torch.randn(16, 3, 6, 6, generator=torch.Generator().manual_seed(1)), torch.arange(16) % 4


def train(model: nn.Module, steps: int = 30) -> float:
    """A plain loop of a user's own; returns the last loss."""
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(steps):
        loss = nn.functional.cross_entropy(model(X), Y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return float(loss.detach())


def bits_of(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {t.name: t.quantizer.bits for t in QuantizedModel.of(model).tensors}


VARIANTS: dict[str, dict[str, Any]] = {
    "bits": {"bits": 4},
    "bytes": {"budget": ddqcli.Budget(target_size="3kB")},
    "inputs": {"bits": 3, "act_bits": 4, "calibration": [X]},
    "channels": {"bits": 4, "granularity": "channel", "max_bits": 6},
    "no limit": {"budget": ddqcli.Budget(), "max_bits": 4},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_plain_loop_trains_and_the_file_keeps_the_budget(variant: str, tmp_path: Path) -> None:
    model = Net()
    assert ddqcli.quantize(model, **VARIANTS[variant]) is model
    assert train(model) < 1.0
    sizes = ddqcli.save(model, tmp_path / "model.safetensors")

    artifact = read_artifact(tmp_path / "model.safetensors")
    assert artifact.sizes == sizes
    assert artifact.aliases == {"second.weight": "first.weight"}
    values = sum(tensor.indices.size for tensor in artifact.quantized.values())
    stored = sum(tensor.nbytes for tensor in artifact.quantized.values())
    limit = VARIANTS[variant].get("bits", 32) * values / 8
    assert stored <= limit
    assert limit == 4 * values or stored > 0.97 * limit
    assert variant != "bytes" or 0.97 * 3000 < sizes.file <= 3000

    loaded = ddqcli.load(tmp_path / "model.safetensors", Net())
    model.eval()
    with torch.no_grad():
        # Roundings of BatchNorm's scale and shift; with 4-bit inputs, one may take another level.
        difference = (loaded(X) - model(X)).abs().max() / model(X).abs().max()
        assert difference < (0.05 if variant == "inputs" else 1e-5)
        with QuantizedModel.of(model).folded():
            assert torch.equal(loaded(X), model(X))
        for name, parameter in loaded.named_parameters():
            layer, _, local = name.rpartition(".")
            if isinstance(model.get_submodule(layer), nn.BatchNorm2d):
                continue
            assert torch.equal(parameter, getattr(model.get_submodule(layer), local)), name


def save_from(model: nn.Module, path: Path) -> bytes:
    ddqcli.save(model, path)
    return path.read_bytes()


def test_copies_and_wrappers_save_the_same(tmp_path: Path) -> None:
    model = ddqcli.quantize(Net(), bits=3, act_bits=4, calibration=[X])
    train(model, 3)
    raw = save_from(model, tmp_path / "model")
    assert save_from(copy.deepcopy(model), tmp_path / "copy") == raw
    wrapper = nn.Sequential(nn.Identity(), model)
    ddqcli.save(wrapper, tmp_path / "wrapped")
    wrapped = read_artifact(tmp_path / "wrapped")
    assert wrapped.aliases == {"1.second.weight": "1.first.weight"}
    assert sorted(wrapped.activations) == [
        f"1.{name} (input)" for name in ("features.0", "features.3", "first", "head", "second")
    ]


def test_a_state_dict_goes_into_a_freshly_quantized_model(tmp_path: Path) -> None:
    """The bits follow from the gates that it holds, whatever budget the fresh model was given."""
    model = ddqcli.quantize(Net(), bits=3, act_bits=4, calibration=[X])
    train(model, 3)
    torch.save(model.state_dict(), tmp_path / "state.pt")
    fresh = ddqcli.quantize(Net(), bits=5, act_bits=4, calibration=[2 * X])
    assert bits_of(fresh) != bits_of(model)
    fresh.load_state_dict(torch.load(tmp_path / "state.pt"))
    assert bits_of(fresh) == bits_of(model)
    assert torch.equal(fresh.eval()(X), model.eval()(X))
    assert save_from(fresh, tmp_path / "fresh") == save_from(model, tmp_path / "model")


def test_gradients_before_the_call_say_where_bits_are_needed() -> None:
    """Of two layers alike, the one that the loss feels more gets more bits."""
    bits = []
    for strong in (0, 1):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(64, 64, bias=False), nn.Linear(64, 64, bias=False))
        for number, layer in enumerate(model):
            layer.weight.grad = torch.full((64, 64), 1.0 if number == strong else 1e-3)
        ddqcli.quantize(model, bits=4)
        bits.append([bits for (bits,) in bits_of(model).values()])
    assert bits[0][0] > bits[0][1]
    assert bits[1][0] < bits[1][1]


def test_overrides_keep_layers_float_or_at_their_bits() -> None:
    overrides = [{"match": "features.0", "skip": True}, {"match": "head", "bits": 8}]
    model = ddqcli.quantize(Net(), bits=3, overrides=overrides)
    bits = bits_of(model)
    assert "features.0.weight" not in bits
    assert bits["head.weight"] == (8,)


@pytest.mark.parametrize(
    "batch", [X, (X,), [X], {"x": X}], ids=["tensor", "tuple", "list", "keywords"]
)
def test_calibration_batches_are_passed_as_they_are_meant(batch: Any) -> None:
    model = Net()
    model.features[1].eval()
    ddqcli.quantize(model, bits=4, act_bits=8, calibration=[batch])
    assert len(QuantizedModel.of(model).activations) == 5
    assert model.training
    assert not model.features[1].training
    assert model.features[1].num_batches_tracked == 0


# ---- refusals


def refused(call: Callable[[nn.Module], Any], error: type[Exception], message: str) -> None:
    """The call is refused, and the model computes as before."""
    model = Net()
    names, before = list(model.state_dict()), model.eval()(X)
    with pytest.raises(error, match=message):
        call(model)
    assert list(model.state_dict()) == names
    assert torch.equal(model(X), before)
    assert not any("Parametrized" in type(m).__name__ for m in model.modules())
    assert ddqcli.quantize(model, bits=4) is model


def two_batches_of_which_the_second_fails() -> Any:
    yield X
    raise OSError("the disk is gone")


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({}, UsageError, "either bits or a budget"),
        ({"bits": 4, "budget": ddqcli.Budget()}, UsageError, "either bits or a budget"),
        ({"bits": 4, "act_bits": 8}, UsageError, "Give quantize.. calibration batches"),
        ({"bits": 4, "act_bits": 8, "calibration": []}, UsageError, "reached no layer"),
        ({"bits": 4, "max_bits": 9}, UsageError, "max_bits: Input should be less than or equal"),
        ({"bits": 4, "min_bits": 3, "max_bits": 2}, UsageError, "min_bits 3 is above max_bits 2"),
        ({"bits": 4, "overrides": [{"match": "conv"}]}, UsageError, "No layer .* override conv"),
        (
            {"bits": 0.5},
            BudgetError,
            "The budget of 0.5 bits a weight .* cannot be met: the smallest",
        ),
        ({"budget": ddqcli.Budget(target_size="1%")}, BudgetError, "smallest reachable size"),
        (
            {"bits": 4, "act_bits": 8, "calibration": two_batches_of_which_the_second_fails()},
            OSError,
            "the disk is gone",
        ),
    ],
)
def test_what_cannot_be_quantized_as_asked_is_left_as_it_was(
    arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    refused(lambda model: ddqcli.quantize(model, **arguments), error, message)


def test_models_that_are_quantized_or_have_no_weights_are_refused() -> None:
    model = ddqcli.quantize(Net(), bits=4)
    with pytest.raises(UsageError, match="already quantized; pass the float model"):
        ddqcli.quantize(model, bits=4)
    with pytest.raises(UsageError, match="Nothing in this ReLU can be quantized"):
        ddqcli.quantize(nn.ReLU(), bits=4)


def test_a_float_model_cannot_be_saved(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"This Net has no quantizers; ddqcli.quantize attaches"):
        ddqcli.save(Net(), tmp_path / "model")
    assert not list(tmp_path.iterdir())


def test_a_file_that_would_read_differently_is_not_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = ddqcli.quantize(Net(), bits=4)
    decode = ddqcli.library.decode_model

    def changed(path: Path) -> Any:
        tensors, tables, meta = decode(path)
        weight = np.nextafter(tensors["head.weight"], np.inf)
        return tensors | {"head.weight": weight}, tables, meta

    monkeypatch.setattr("ddqcli.library.decode_model", changed)
    with pytest.raises(VerificationError, match=r"model would differ .* in head.weight; it was"):
        ddqcli.save(model, tmp_path / "model")
    assert not list(tmp_path.iterdir())


def test_a_file_that_names_its_network_needs_no_other(tmp_path: Path) -> None:
    net = zoo.squeezenet1_1(num_classes=3)
    ddqcli.quantize(net, bits=3, act_bits=8, calibration=[torch.rand(2, 3, 32, 32)])
    frozen = FrozenModel.from_state(freeze(QuantizedModel.of(net)))
    parts = frozen.quantized, frozen.activations, frozen.floats, frozen.aliases
    meta = {"report": {"source": {"arch": "squeezenet1_1"}}, "recipe": {}}
    path = tmp_path / "m.safetensors"
    path.write_bytes(encode_artifact(*parts, meta, frozen.constants)[0])
    x = torch.rand(2, 3, 32, 32)
    assert torch.equal(ddqcli.load(path)(x), net.eval()(x))
    ddqcli.save(net, path)
    with pytest.raises(UsageError, match="does not say how its network is built; pass the float"):
        ddqcli.load(path)


# ---- the import


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ddqcli.load("gone.safetensors", Net), r"load\(\) .*, not Net; pass Net\(\)\."),
        (lambda: ddqcli.quantize(Net, bits=4), r"quantize\(\) .*, not Net; pass Net\(\)\."),
        (lambda: ddqcli.save(Net, "a.safetensors"), r"save\(\) .*, not Net; pass Net\(\)\."),
        (lambda: ddqcli.parameter_groups({}, 0.1), r"takes a network, .*, not a dict\."),
    ],
)
def test_a_function_in_place_of_a_network_is_named(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        call()


def test_importing_ddqcli_does_not_import_torch() -> None:
    program = (
        "import sys, ddqcli; assert 'torch' not in sys.modules; "
        "assert set(ddqcli.__all__) <= set(dir(ddqcli)); "
        "[getattr(ddqcli, name) for name in ddqcli.__all__]; assert 'torch' in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
    with pytest.raises(AttributeError, match="no attribute 'lod'"):
        _ = ddqcli.lod


def test_parameter_groups_hold_every_parameter_once_and_only_weights_decay() -> None:
    model = ddqcli.quantize(Net(), bits=4)
    groups = ddqcli.parameter_groups(model, lr=1e-3, weight_decay=0.5)
    grouped = [id(p) for group in groups for p in group["params"]]
    wanted = {id(p) for p in model.parameters() if p.requires_grad}
    assert len(grouped) == len(set(grouped))
    assert set(grouped) == wanted
    levels = {id(t.quantizer.levels) for t in QuantizedModel.of(model).tensors}
    for group in groups:
        weights = all(p.ndim > 1 and id(p) not in levels for p in group["params"])
        assert group["weight_decay"] == (0.5 if weights else 0.0)


def test_levels_move_with_parameter_groups() -> None:
    """With a learning rate for weights they would stay within 1e-3 grid steps."""
    model = ddqcli.quantize(Net(), bits=3)
    tensors = [t for t in QuantizedModel.of(model).tensors if t.kind != "bias"]
    before = [t.quantizer.levels.detach().clone() for t in tensors]
    optimizer = torch.optim.AdamW(ddqcli.parameter_groups(model, lr=1e-4))
    for _ in range(20):
        nn.functional.cross_entropy(model(X), Y).backward()
        optimizer.step()
        optimizer.zero_grad()
    moved = [
        float((t.quantizer.levels - old).detach().abs().max())
        for t, old in zip(tensors, before, strict=True)
    ]
    assert max(moved) > 0.5
    with pytest.raises(UsageError, match="no quantizers"):
        ddqcli.parameter_groups(Net(), lr=1e-3)
