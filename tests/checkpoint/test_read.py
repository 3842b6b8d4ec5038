"""The weights in a checkpoint are found, unwrapped and checked."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from weight_files import assert_same, fault, saved, state

from ddqcli.checkpoint.read import load_checkpoint


@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors"])
def test_reads_each_format_by_its_contents(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "model.anything"
    if kind == "safetensors":
        save_file(state(), path)
    else:
        torch.save(state(), path, _use_new_zipfile_serialization=kind == "zip")
    checkpoint = load_checkpoint(path)
    assert_same({name: checkpoint.tensors[name] for name in state()}, state())
    assert checkpoint.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert checkpoint.path == path
    assert checkpoint.note == "state dict at the top level"
    assert checkpoint.module is None


@pytest.mark.parametrize(
    ("content", "where"),
    [
        ({"state_dict": state(1), "state_dict_ema": state(), "epoch": 3}, "under 'state_dict_ema'"),
        (
            {
                "model": state(1),
                "model_ema": state(),
                "optimizer": {"state": {0: {"exp_avg": torch.ones(3)}}},
            },
            "'model_ema'",
        ),
        ({"net": state(), "acc": 93.1}, "under 'net'"),
        ({"model_state_dict": state(), "loss": torch.tensor(0.1)}, "under 'model_state_dict'"),
        ({"model": {"state_dict": state(), "epoch": 1}}, "under 'model' > 'state_dict'"),
        ({"model": {"depth": 18}, "weights": state()}, "under 'weights'"),
        ({"state_dict_ema": None, "model_ema": {}, "state_dict": state()}, "under 'state_dict'"),
        ({**state(), "epoch": 3}, "at the top level, 1 entries that are no tensors left out"),
    ],
    ids=[
        "timm",
        "torchvision",
        "net",
        "tutorial",
        "nested",
        "model is a config",
        "empty ema",
        "mixed",
    ],
)
def test_finds_the_weights_where_training_scripts_put_them(
    tmp_path: Path, content: object, where: str
) -> None:
    checkpoint = load_checkpoint(saved(tmp_path / "c.pt", content))
    assert_same(checkpoint.tensors, state())
    assert where in checkpoint.note


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod."])
def test_strips_wrappers_that_every_name_shares(tmp_path: Path, prefix: str) -> None:
    wrapped = {prefix + name: tensor for name, tensor in state().items()}
    checkpoint = load_checkpoint(saved(tmp_path / "c.pt", {"state_dict": wrapped}))
    assert_same(checkpoint.tensors, state())
    assert checkpoint.note == f"state dict under 'state_dict', prefix '{prefix}' stripped"


def test_keeps_a_prefix_that_not_every_name_shares(tmp_path: Path) -> None:
    mixed = {"module.weight": torch.ones(2), "head.weight": torch.ones(2)}
    assert_same(load_checkpoint(saved(tmp_path / "c.pt", mixed)).tensors, mixed)


def test_averaged_model_loses_its_counter_and_prefix(tmp_path: Path) -> None:
    net = nn.Linear(2, 3)
    averaged = torch.optim.swa_utils.AveragedModel(net)
    assert "n_averaged" in averaged.state_dict()
    assert_same(
        load_checkpoint(saved(tmp_path / "c.pt", {"model_ema": averaged.state_dict()})).tensors,
        net.state_dict(),
    )


def test_tied_tensors_and_parameters(tmp_path: Path) -> None:
    weight = nn.Parameter(torch.randn(6, 4))
    tensors = load_checkpoint(
        saved(tmp_path / "c.pt", {"a": weight, "b": weight, "view": weight.detach()[1:3]})
    ).tensors
    assert torch.equal(tensors["a"], weight)
    assert torch.equal(tensors["b"], weight)
    assert torch.equal(tensors["view"], weight[1:3])
    assert not any(tensor.requires_grad for tensor in tensors.values())


def test_other_number_types(tmp_path: Path) -> None:
    tensors = {
        "half": torch.ones(3).half(),
        "bfloat": torch.ones(3).bfloat16(),
        "int": torch.arange(3),
        "bool": torch.tensor([True]),
        "float8": torch.ones(3).to(torch.float8_e4m3fn),
    }
    loaded = load_checkpoint(saved(tmp_path / "c.pt", tensors)).tensors
    assert {name: t.dtype for name, t in loaded.items()} == {
        name: t.dtype for name, t in tensors.items()
    }


@pytest.mark.parametrize("wrap", [lambda m: m, lambda m: {"model": m, "epoch": 1}, nn.DataParallel])
def test_a_pickled_module_needs_permission(
    tmp_path: Path, wrap: Callable[[nn.Module], object]
) -> None:
    net = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    path = saved(tmp_path / "c.pt", wrap(net))
    message = fault(path)
    assert "torch.nn." in message
    assert "--allow-pickle" in message
    checkpoint = load_checkpoint(path, pickle=True)
    assert isinstance(checkpoint.module, nn.Sequential)
    assert_same(checkpoint.tensors, net.state_dict())
    assert checkpoint.note.startswith("pickled Sequential")


def test_no_such_file(tmp_path: Path) -> None:
    assert "no checkpoint" in fault(tmp_path / "gone.pt")


def test_a_folder(tmp_path: Path) -> None:
    assert "folder" in fault(tmp_path)


@pytest.mark.parametrize("name", ["c.pt", "c.safetensors"])
def test_an_empty_file(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"")
    assert "empty" in fault(tmp_path / name)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ({"epoch": 3, "optimizer": {"state": {}}}, "'epoch', 'optimizer'"),
        ({}, "an empty dict"),
        ([torch.ones(2)], "a list"),
        (torch.ones(2), "a Tensor"),
        ({3: torch.ones(2)}, "keys are 3"),
        ({f"k{i}": i for i in range(20)}, "'k7', ..."),
    ],
    ids=["no state", "empty", "list", "tensor", "number as key", "many keys"],
)
def test_no_weights_inside(tmp_path: Path, content: object, says: str) -> None:
    message = fault(saved(tmp_path / "c.pt", content))
    assert "no weights" in message
    assert says in message


def test_a_dict_that_holds_itself(tmp_path: Path) -> None:
    content: dict[str, object] = {"epoch": 1}
    content["model"] = content
    assert "no weights" in fault(saved(tmp_path / "c.pt", content))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_infinite_values_are_counted_and_refused(tmp_path: Path, value: float) -> None:
    tensors = state()
    tensors["conv.weight"][1, :2, 0, 0] = value
    message = fault(saved(tmp_path / "c.pt", tensors))
    assert "conv.weight holds 2 NaN or infinite values of 108;" in message
    tensors["bn.running_mean"][0] = value
    assert "and 1 more tensors" in fault(saved(tmp_path / "c.pt", tensors))


def test_a_float64_that_float32_cannot_hold(tmp_path: Path) -> None:
    assert "1 NaN or infinite" in fault(
        saved(tmp_path / "c.pt", {"w": torch.tensor([1.0, 1e300]).double()})
    )


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.eye(3).to_sparse(),
        lambda: torch.empty(3, device="meta"),
        lambda: torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8),
    ],
    ids=["sparse", "meta", "quantized"],
)
@pytest.mark.filterwarnings("ignore")
def test_sparse_meta_and_quantized_tensors_are_refused(
    tmp_path: Path, make: Callable[[], torch.Tensor]
) -> None:
    assert "w is sparse, quantized or without data" in fault(
        saved(tmp_path / "c.pt", {"w": make()})
    )


def test_a_tensor_that_expands_one_number_a_trillion_times(tmp_path: Path) -> None:
    path = saved(tmp_path / "c.pt", {"w": torch.zeros(1).expand(10**12)})
    assert "claims more than" in fault(path)


def test_a_safetensors_header_that_claims_too_much(tmp_path: Path) -> None:
    path = tmp_path / "c.safetensors"
    for header in (
        b'{"w":{"dtype":"F32","shape":[1000000000000],"data_offsets":[0,4000000000000]}}',
        b'{"w":{"dtype":"F32","shape":[2],"data_offsets":[0,4]}}',
        b'{"w":{"dtype":"F99","shape":[1],"data_offsets":[0,4]}}',
        b'{"w":' * 9000,
    ):
        path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
        assert "no whole safetensors" in fault(path)
    path.write_bytes((2**62).to_bytes(8, "little") + b'{"w":1}')
    assert "no whole safetensors" in fault(path)
