"""Tensors are read in chunks from files of every kind, with the values that PyTorch reads."""

from __future__ import annotations

import subprocess
import sys
from collections import OrderedDict

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from ddqcli.checkpoint import chunks, torch_zip
from ddqcli.checkpoint.read import load_checkpoint
from ddqcli.checkpoint.tensors import open_tensors
from ddqcli.errors import CheckpointError

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]


def read_all(path, **kwargs) -> dict[str, np.ndarray]:
    tensors, _ = open_tensors(path, **kwargs)
    return {
        t.name: np.concatenate([np.zeros(0, np.float32), *t.chunks()]).reshape(t.shape)
        for t in tensors
    }


def assert_same(path, expected: dict[str, torch.Tensor], **kwargs):
    values = read_all(path, **kwargs)
    assert set(values) == set(expected)
    for name, tensor in expected.items():
        np.testing.assert_array_equal(values[name], tensor.float().numpy(), err_msg=name)


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(chunks, "CHUNK_VALUES", 7)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_every_float_dtype_is_read_in_chunks(tmp_path, small_chunks, dtype, suffix):
    state = {"a.weight": torch.randn(5, 4).to(dtype), "a.bias": torch.randn(14).to(dtype)}
    path = tmp_path / f"model{suffix}"
    (save_file if suffix == ".safetensors" else torch.save)(state, path)
    assert_same(path, state)
    tensors = {t.name: t for t in open_tensors(path)[0]}
    assert tensors["a.weight"].dtype == str(dtype).removeprefix("torch.")
    assert tensors["a.weight"].bytes == 20 * dtype.itemsize
    assert [len(chunk) for chunk in tensors["a.weight"].chunks()] == [7, 7, 6]


def test_a_torch_file_is_read_without_torch_whatever_the_layout(tmp_path, small_chunks):
    base = torch.randn(6, 5, 3, 3)
    state = OrderedDict(
        whole=base,
        part=base[2:4],
        column=base[:, 1],
        channels_last=torch.randn(4, 6, 3, 3).to(memory_format=torch.channels_last),
        transposed=torch.randn(5, 9).t(),
        parameter=torch.nn.Parameter(torch.randn(3, 3)),
        scalar=torch.tensor(3.5),
        empty=torch.zeros(0, 4),
    )
    path = tmp_path / "model.pt"
    torch.save(state, path)
    assert torch_zip.locate_state_dict(path) is not None
    assert_same(path, {name: tensor.detach() for name, tensor in state.items()})


def test_a_tensor_larger_than_its_storage_is_left_to_torch(tmp_path, small_chunks):
    """A few bytes of a file may declare a tensor of any size."""
    state = {"expanded": torch.randn(4, 1).expand(4, 3)}
    path = tmp_path / "model.pt"
    torch.save(state, path)
    assert torch_zip.locate_state_dict(path) is None
    assert_same(path, state)


def test_a_modules_state_dict_is_read_without_torch(tmp_path):
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8))
    path = tmp_path / "model.pth"
    torch.save(model.state_dict(), path)
    locations, note = torch_zip.locate_state_dict(path)
    assert note == "state dict at the top level"
    assert locations["1.num_batches_tracked"].dtype == "int64"
    counter = next(t for t in open_tensors(path)[0] if t.name == "1.num_batches_tracked")
    assert (counter.floating, counter.bytes, counter.parameters) == (False, 8, 1)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: {
            "epoch": 3,
            "state_dict": state,
            "best": 0.91,
            "optimizer": {"state": {0: torch.zeros(3)}},
        },
        lambda state: {"model": {"state_dict": state}},
        lambda state: {"state_dict": {"w": torch.zeros(2, 2)}, "model_ema": state},
        lambda state: {f"module.{name}": tensor for name, tensor in state.items()},
        lambda state: {
            "model": {f"_orig_mod.module.{name}": tensor for name, tensor in state.items()}
        },
    ],
    ids=["training state", "nested", "averaged first", "DataParallel", "compiled"],
)
def test_the_weights_are_found_where_the_checkpoint_loader_finds_them(tmp_path, wrap):
    state = {"a.weight": torch.randn(4, 4), "a.bias": torch.randn(4)}
    path = tmp_path / "model.pt"
    torch.save(wrap(state), path)
    assert torch_zip.locate_state_dict(path) is not None
    loaded = load_checkpoint(path)
    assert open_tensors(path)[1] == loaded.note
    assert_same(path, loaded.tensors)


def test_older_torch_files_go_through_torch(tmp_path):
    state = {"a.weight": torch.randn(4, 4)}
    path = tmp_path / "model.th"
    torch.save(state, path, _use_new_zipfile_serialization=False)
    assert torch_zip.locate_state_dict(path) is None
    assert_same(path, state)


@pytest.mark.parametrize("suffix", [".pt", ".th"])
def test_tensors_that_share_memory_are_marked(tmp_path, suffix):
    tied = torch.randn(5, 4)
    path = tmp_path / f"model{suffix}"
    torch.save(
        {"embed": tied, "head": tied, "part": tied[1:]},
        path,
        _use_new_zipfile_serialization=suffix == ".pt",
    )
    assert {t.name: t.same_as for t in open_tensors(path)[0]} == {
        "embed": None,
        "head": "embed",
        "part": None,
    }


@pytest.mark.parametrize("name", ["missing.pt", "missing.safetensors", "."])
def test_a_missing_file_or_a_folder_is_named(tmp_path, name):
    with pytest.raises(CheckpointError, match=str(tmp_path)):
        open_tensors(tmp_path / name)


def test_reading_needs_no_torch(tmp_path):
    path = tmp_path / "model.pt"
    torch.save({"a.weight": torch.ones(3, 3)}, path)
    code = (
        "import sys, pathlib; from ddqcli.checkpoint.tensors import open_tensors; "
        f"ts, _ = open_tensors(pathlib.Path({str(path)!r})); "
        "assert sum(c.sum() for t in ts for c in t.chunks()) == 9; "
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
