"""Checkpoints as people have them are read; nothing in them runs; whatever else a file holds is one clear sentence."""

from __future__ import annotations

import argparse
import collections
import datetime
import hashlib
import io
import os
import pickle
import random
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from ddqcli.checkpoint.read import load_checkpoint
from ddqcli.errors import CheckpointError


def state(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "conv.weight": torch.randn(4, 3, 3, 3, generator=generator),
        "bn.running_mean": torch.randn(4, generator=generator),
        "bn.num_batches_tracked": torch.tensor(7),
    }


def saved(path: Path, content: object, **kwargs: object) -> Path:
    torch.save(content, path, **kwargs)
    return path


def fault(path: Path, *, allow: bool = False) -> str:
    """The one sentence load_checkpoint refuses `path` with."""
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(path, pickle=allow)
    message = str(caught.value)
    assert path.name in message
    assert "\n" not in message
    assert len(message) < 600
    return message


def assert_same(tensors: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert list(tensors) == list(expected)
    for name, tensor in expected.items():
        assert tensors[name].dtype == tensor.dtype
        assert torch.equal(tensors[name], tensor), name


# ---- what is read


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
def test_strips_wrappers_that_every_name_carries(tmp_path: Path, prefix: str) -> None:
    wrapped = {prefix + name: tensor for name, tensor in state().items()}
    checkpoint = load_checkpoint(saved(tmp_path / "c.pt", {"state_dict": wrapped}))
    assert_same(checkpoint.tensors, state())
    assert checkpoint.note == f"state dict under 'state_dict', prefix '{prefix}' stripped"


def test_keeps_a_prefix_that_not_every_name_carries(tmp_path: Path) -> None:
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


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_harmless_company_of_weights_needs_no_pickle(tmp_path: Path, legacy: bool) -> None:
    history = collections.defaultdict(list)
    history["loss"].append(np.float32(0.5))
    content = {
        "state_dict": state(),
        "args": argparse.Namespace(lr=0.1, out=Path("runs"), when=datetime.datetime(2020, 1, 2)),
        "best": np.float64(93.5),
        "confusion": np.eye(3),
        "history": history,
        "order": collections.OrderedDict(a=1),
        "counts": collections.Counter("aab"),
    }
    path = saved(tmp_path / "c.pt", content, _use_new_zipfile_serialization=not legacy)
    assert_same(load_checkpoint(path).tensors, state())


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


# ---- pickled objects


class Canary:
    """Unpickling this makes a folder."""

    def __init__(self, path: Path, function: Callable[[str], None]) -> None:
        self.path, self.function = str(path), function

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return self.function, (self.path,)


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize("function", [os.mkdir, os.makedirs], ids=["builtin", "python"])
def test_a_malicious_pickle_does_not_run(
    tmp_path: Path, legacy: bool, function: Callable[[str], None]
) -> None:
    canary = tmp_path / "canary"
    content = {"state_dict": state(), "extra": Canary(canary, function)}
    path = saved(tmp_path / "c.pt", content, _use_new_zipfile_serialization=not legacy)
    message = fault(path)
    assert function.__name__ in message
    assert "--allow-pickle" in message
    assert not canary.exists()
    load_checkpoint(path, pickle=True)
    assert canary.exists(), "the file would have run code: the test above means something"


def test_allowing_pickle_does_not_run_what_need_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = saved(tmp_path / "c.pt", state())
    seen = []
    real = torch.load
    monkeypatch.setattr(
        torch, "load", lambda *a, **k: (seen.append(k["weights_only"]), real(*a, **k))[1]
    )
    load_checkpoint(path, pickle=True)
    assert seen == [True]


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


def test_a_module_whose_code_is_not_here(tmp_path: Path) -> None:
    raw = io.BytesIO()
    torch.save(nn.Linear(2, 2), raw)
    records = zipfile.ZipFile(raw)
    path = tmp_path / "c.pt"
    with zipfile.ZipFile(path, "w") as other:
        for name in records.namelist():
            other.writestr(
                name,
                records.read(name).replace(b"ctorch.nn.modules.linear\n", b"cnot_installed_nets\n"),
            )
    assert "not_installed_nets" in fault(path)
    assert "PYTHONPATH" in fault(path, allow=True)


# ---- faults


def test_no_such_file(tmp_path: Path) -> None:
    assert "no checkpoint" in fault(tmp_path / "gone.pt")


def test_a_folder(tmp_path: Path) -> None:
    assert "folder" in fault(tmp_path)


@pytest.mark.parametrize("name", ["c.pt", "c.safetensors"])
def test_an_empty_file(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"")
    assert "empty" in fault(tmp_path / name)


@pytest.mark.parametrize("allow", [False, True])
def test_no_checkpoint_at_all(tmp_path: Path, allow: bool) -> None:
    page = tmp_path / "c.pth"
    page.write_text("<!DOCTYPE html><title>404</title>")
    assert "<!DOCTYP" in fault(page, allow=allow)
    npz = tmp_path / "a.npz"
    np.savez(npz, a=np.ones(3))
    assert "another kind of zip" in fault(npz, allow=allow)
    text = tmp_path / "c.safetensors"
    text.write_text("version https://git-lfs.github.com/spec/v1")
    assert "no whole safetensors" in fault(text, allow=allow)


@pytest.mark.filterwarnings("ignore")
def test_torchscript(tmp_path: Path) -> None:
    path = tmp_path / "c.pt"
    torch.jit.script(nn.Linear(2, 2)).save(str(path))
    assert "TorchScript" in fault(path)
    assert "TorchScript" in fault(path, allow=True)


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
def test_numbers_that_are_none(tmp_path: Path, value: float) -> None:
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
def test_tensors_that_hold_no_plain_numbers(
    tmp_path: Path, make: Callable[[], torch.Tensor]
) -> None:
    assert "w is sparse, quantized or without data" in fault(
        saved(tmp_path / "c.pt", {"w": make()})
    )


def test_pickle_protocol_of_other_tools(tmp_path: Path) -> None:
    path = saved(tmp_path / "c.pt", state(), pickle_protocol=4)
    assert "--allow-pickle" in fault(path)
    assert_same(load_checkpoint(path, pickle=True).tensors, state())


def rewritten(
    path: Path, *, compression: int = zipfile.ZIP_STORED, old: bytes = b"", new: bytes = b""
) -> Path:
    """The same zip with other compression, and `old` replaced in its pickle."""
    content = zipfile.ZipFile(io.BytesIO(path.read_bytes()))
    with zipfile.ZipFile(path, "w", compression) as other:
        for name in content.namelist():
            data = content.read(name)
            other.writestr(
                name, data.replace(old, new) if old and name.endswith("data.pkl") else data
            )
    return path


def test_a_zip_bomb_is_refused_before_it_is_read(tmp_path: Path) -> None:
    path = rewritten(
        saved(tmp_path / "c.pt", {"w": torch.zeros(1_000_000)}), compression=zipfile.ZIP_DEFLATED
    )
    assert path.stat().st_size < 20_000
    assert "is compressed" in fault(path)


def test_a_zip_whose_records_overlap_is_refused(tmp_path: Path) -> None:
    path = saved(tmp_path / "c.pt", {"w": torch.zeros(3000)})
    raw = path.read_bytes()
    entry = raw.rindex(
        b"PK\x01\x02", 0, raw.rindex(b"c/data/0")
    )  # its two sizes lie 20 bytes into the directory's entry
    path.write_bytes(raw[: entry + 20] + (2**31 - 1).to_bytes(4, "little") * 2 + raw[entry + 28 :])
    assert "claim more than" in fault(path)


@pytest.mark.parametrize("all_claims", [True, False], ids=["storage and shape", "shape alone"])
def test_a_pickle_that_claims_a_terabyte(tmp_path: Path, all_claims: bool) -> None:
    path = saved(tmp_path / "c.pt", {"w": torch.zeros(123)})
    huge = b"\x8a\x06" + (10**12).to_bytes(6, "little")  # LONG1
    old, new = (
        (b"K\x7b", huge) if all_claims else (b"K\x7b\x85", huge + b"\x85")
    )  # BININT1 123, TUPLE1
    assert "Cannot read" in fault(rewritten(path, old=old, new=new))


def test_a_tensor_of_one_number_seen_a_trillion_times(tmp_path: Path) -> None:
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


@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors"])
def test_any_cut_and_any_damage_ends_in_one_sentence(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "c.bin"
    if kind == "safetensors":
        save_file(state(), path)
    else:
        torch.save(
            {"state_dict": state(), "args": argparse.Namespace(a=1)},
            path,
            _use_new_zipfile_serialization=kind == "zip",
        )
    raw = path.read_bytes()
    for end in range(1, len(raw), max(len(raw) // 60, 1)):
        path.write_bytes(raw[:end])
        fault(path)
    rng, refused = random.Random(0), 0
    for _ in range(300):
        damaged = bytearray(raw)
        for _ in range(rng.choice((1, 3, 30))):
            damaged[rng.randrange(len(raw))] = rng.randrange(256)
        path.write_bytes(damaged)
        try:
            load_checkpoint(path)
        except CheckpointError:  # and nothing else
            refused += 1
    assert refused > 30


def test_a_plain_pickle_is_not_mistaken_for_weights(tmp_path: Path) -> None:
    path = tmp_path / "c.pkl"
    path.write_bytes(pickle.dumps({"w": [1.0]}, protocol=2))
    assert "Cannot read" in fault(path)
    assert "Cannot read" in fault(path, allow=True)
