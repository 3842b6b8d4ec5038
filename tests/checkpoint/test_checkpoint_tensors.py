"""Tensors read piece by piece from files of every kind, against torch's own reading."""

from __future__ import annotations

import json
import pickle
import struct
import subprocess
import sys
import zipfile
from collections import OrderedDict

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from ddqcli.checkpoint import read as checkpoint
from ddqcli.checkpoint import tensors as stored
from ddqcli.checkpoint import torch_zip as torchfile
from ddqcli.checkpoint.tensors import open_tensors
from ddqcli.errors import CheckpointError

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]


def contents(path, **kwargs) -> dict[str, np.ndarray]:
    tensors, _ = open_tensors(path, **kwargs)
    return {
        t.name: np.concatenate([np.zeros(0, np.float32), *t.pieces()]).reshape(t.shape)
        for t in tensors
    }


def assert_same(path, expected: dict[str, torch.Tensor], **kwargs):
    found = contents(path, **kwargs)
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        np.testing.assert_array_equal(found[name], tensor.float().numpy(), err_msg=name)


@pytest.fixture
def small_pieces(monkeypatch):
    monkeypatch.setattr(stored, "PIECE", 7)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_every_float_dtype_is_read_in_pieces(tmp_path, small_pieces, dtype, suffix):
    state = {"a.weight": torch.randn(5, 4).to(dtype), "a.bias": torch.randn(14).to(dtype)}
    path = tmp_path / f"model{suffix}"
    (save_file if suffix == ".safetensors" else torch.save)(state, path)
    assert_same(path, state)
    tensors = {t.name: t for t in open_tensors(path)[0]}
    assert tensors["a.weight"].dtype == str(dtype).removeprefix("torch.")
    assert tensors["a.weight"].bytes == 20 * dtype.itemsize
    assert [len(piece) for piece in tensors["a.weight"].pieces()] == [7, 7, 6]


def test_a_torch_file_is_read_without_torch_whatever_the_layout(tmp_path, small_pieces):
    base = torch.randn(6, 5, 3, 3)
    state = OrderedDict(
        whole=base,
        part=base[2:4],
        column=base[:, 1],
        channels_last=torch.randn(4, 6, 3, 3).to(memory_format=torch.channels_last),
        transposed=torch.randn(5, 9).t(),
        expanded=torch.randn(4, 1).expand(4, 3),
        parameter=torch.nn.Parameter(torch.randn(3, 3)),
        scalar=torch.tensor(3.5),
        empty=torch.zeros(0, 4),
    )
    path = tmp_path / "model.pt"
    torch.save(state, path)
    assert torchfile.locate_tensors(path) is not None
    assert_same(path, {name: tensor.detach() for name, tensor in state.items()})


def test_a_modules_state_dict_is_read_without_torch(tmp_path):
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8))
    path = tmp_path / "model.pth"
    torch.save(model.state_dict(), path)
    places, note = torchfile.locate_tensors(path)
    assert note == "state dict at the top level"
    assert places["1.num_batches_tracked"].dtype == "int64"
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
    assert torchfile.locate_tensors(path) is not None
    loaded = checkpoint.load_checkpoint(path)
    assert open_tensors(path)[1] == loaded.note
    assert_same(path, loaded.tensors)


def test_the_keys_looked_for_are_those_of_the_checkpoint_loader():
    assert torchfile.STATE_KEYS == checkpoint.STATE_KEYS
    assert stored.WRAPPERS == checkpoint.WRAPPERS


def test_older_torch_files_go_through_torch(tmp_path):
    state = {"a.weight": torch.randn(4, 4)}
    path = tmp_path / "model.th"
    torch.save(state, path, _use_new_zipfile_serialization=False)
    assert torchfile.locate_tensors(path) is None
    assert_same(path, state)


def test_a_bit_that_changed_inside_a_tensor_is_noticed(tmp_path):
    path = tmp_path / "model.pt"
    torch.save({"a.weight": torch.randn(40, 40)}, path)
    (place,) = torchfile.locate_tensors(path)[0].values()
    content = bytearray(path.read_bytes())
    content[place.start + 3217] ^= 1
    path.write_bytes(content)
    assert torchfile.locate_tensors(path) is None
    with pytest.raises(CheckpointError, match="its record model/data/0 is damaged"):
        open_tensors(path)


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


def test_a_pickle_with_code_in_it_is_refused_and_not_run(tmp_path):
    class Trap:
        def __reduce__(self):
            return (open, (str(tmp_path / "sprung"), "w"))

    path = tmp_path / "model.pt"
    torch.save({"a.weight": torch.randn(2, 2), "trap": Trap()}, path)
    assert torchfile.locate_tensors(path) is None
    with pytest.raises(CheckpointError):
        open_tensors(path)
    assert not (tmp_path / "sprung").exists()


def test_places_outside_their_storage_are_not_believed(tmp_path):
    storage = ("float32", 100, 12)
    rebuild = torchfile._Unpickler._tensor
    assert rebuild(storage, 0, (3, 4), (4, 1)).start == 100
    for offset, shape, strides in [
        (1, (3, 4), (4, 1)),
        (0, (3, 4), (5, 1)),
        (0, (3, 4), (-4, 1)),
        (0, (3,), (4, 1)),
    ]:
        with pytest.raises(ValueError, match=r".*"):
            rebuild(storage, offset, shape, strides)


@pytest.mark.parametrize("keep", [0.0, 0.3, 0.9, 0.999])
def test_a_torch_file_cut_short_is_refused(tmp_path, keep):
    path = tmp_path / "model.pt"
    torch.save({"a.weight": torch.randn(64, 64)}, path)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * keep)])
    with pytest.raises(CheckpointError):
        open_tensors(path)


def test_a_compressed_torch_file_is_not_unpacked(tmp_path):
    path, squeezed = tmp_path / "model.pt", tmp_path / "squeezed.pt"
    torch.save({"a.weight": torch.zeros(64, 64)}, path)
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(squeezed, "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
    assert torchfile.locate_tensors(squeezed) is None
    with pytest.raises(CheckpointError):
        open_tensors(squeezed)


def safetensors(header: object, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


ENTRY = {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "no whole safetensors file"),
        (b"{}", "no whole safetensors file"),
        (safetensors({"w": ENTRY}, bytes(16), length=10**9), "no whole safetensors file"),
        (safetensors(b"{nonsense"), "no whole safetensors file"),
        (safetensors([1]), "no whole safetensors file"),
        (safetensors({"w": 3}), "no whole safetensors file"),
        (safetensors({"w": {**ENTRY, "shape": [-2, -2]}}, bytes(16)), "no whole safetensors file"),
        (safetensors({"w": {**ENTRY, "shape": "ab"}}, bytes(16)), "no whole safetensors file"),
        (
            safetensors({"w": ENTRY}, bytes(15)),
            r"it ends after \d+ of \d+ bytes; download it again",
        ),
        (safetensors({"w": {**ENTRY, "shape": [2, 3]}}, bytes(16)), r"w has 16 bytes for \(2, 3\)"),
        (
            safetensors({"w": {**ENTRY, "dtype": "F8_E4M3"}}, bytes(16)),
            "w is stored as F8_E4M3; save it in float32",
        ),
        (
            safetensors({"__metadata__": {"format": "ddq"}, "w": ENTRY}, bytes(16)),
            "is an exported artifact",
        ),
    ],
)
def test_a_faulty_safetensors_file_is_refused_with_its_reason(tmp_path, content, message):
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        open_tensors(path)


def test_a_safetensors_file_is_known_by_its_content_too(tmp_path):
    path = tmp_path / "weights.bin"
    save_file({"a": torch.ones(2, 2)}, path)
    assert open_tensors(path)[1] == "safetensors"


def test_layers_of_a_safetensors_file_are_in_numeric_order(tmp_path):
    names = ["layer10.w", "layer2.w", "layer1.w", "head.w"]
    path = tmp_path / "model.safetensors"
    save_file({name: torch.ones(2, 2) for name in names}, path)
    assert [t.name for t in open_tensors(path)[0]] == [
        "head.w",
        "layer1.w",
        "layer2.w",
        "layer10.w",
    ]


@pytest.mark.parametrize("name", ["missing.pt", "missing.safetensors", "."])
def test_what_is_no_file_is_named(tmp_path, name):
    with pytest.raises(CheckpointError, match=str(tmp_path)):
        open_tensors(tmp_path / name)


def test_random_bytes_never_end_in_anything_but_our_error(tmp_path):
    rng = np.random.default_rng(0)
    path = tmp_path / "model.pt"
    torch.save({"a.weight": torch.randn(8, 8)}, path)
    whole = bytearray(path.read_bytes())
    for _ in range(150):
        damaged = bytearray(whole)
        for at in rng.integers(0, len(whole), 4):
            damaged[at] = rng.integers(256)
        path.write_bytes(damaged)
        found = torchfile.locate_tensors(path)
        for place in found[0].values() if found else ():
            np.concatenate([np.zeros(0, np.float32), *stored._place_pieces(path, place)])


def test_pickles_refer_to_nothing_but_what_state_dicts_need(tmp_path):
    for module, name in [
        ("builtins", "eval"),
        ("os", "system"),
        ("torch", "load"),
        ("collections", "Counter"),
    ]:
        data = b"\x80\x02c" + f"{module}\n{name}\n".encode() + b"."
        with pytest.raises(KeyError):
            torchfile._Unpickler(__import__("io").BytesIO(data), {}, "", None).load()
    assert issubclass(torchfile._Unpickler, pickle.Unpickler)


def test_reading_needs_no_torch(tmp_path):
    path = tmp_path / "model.pt"
    torch.save({"a.weight": torch.ones(3, 3)}, path)
    code = (
        "import sys, pathlib; from ddqcli.checkpoint.tensors import open_tensors; "
        f"ts, _ = open_tensors(pathlib.Path({str(path)!r})); "
        "assert sum(p.sum() for t in ts for p in t.pieces()) == 9; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
