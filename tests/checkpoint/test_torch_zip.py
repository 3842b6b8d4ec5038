"""Tensors are located in files of torch.save without PyTorch, and no damage is believed."""

from __future__ import annotations

import io
import zipfile

import numpy as np
import pytest
import torch

from ddqcli.checkpoint import torch_zip
from ddqcli.checkpoint.chunks import located_chunks
from ddqcli.checkpoint.tensors import open_tensors
from ddqcli.errors import CheckpointError


def test_a_flipped_bit_inside_a_tensor_is_noticed(tmp_path):
    path = tmp_path / "model.pt"
    torch.save({"a.weight": torch.randn(40, 40)}, path)
    (location,) = torch_zip.locate_state_dict(path)[0].values()
    content = bytearray(path.read_bytes())
    content[location.start + 3217] ^= 1
    path.write_bytes(content)
    assert torch_zip.locate_state_dict(path) is None
    with pytest.raises(CheckpointError, match="its record model/data/0 is damaged"):
        open_tensors(path)


def test_a_pickle_with_code_in_it_is_refused_and_not_run(tmp_path):
    class Trap:
        def __reduce__(self):
            return (open, (str(tmp_path / "sprung"), "w"))

    path = tmp_path / "model.pt"
    torch.save({"a.weight": torch.randn(2, 2), "trap": Trap()}, path)
    assert torch_zip.locate_state_dict(path) is None
    with pytest.raises(CheckpointError):
        open_tensors(path)
    assert not (tmp_path / "sprung").exists()


def test_locations_outside_their_storage_are_refused(tmp_path):
    storage = ("float32", 100, 12)
    rebuild = torch_zip._Unpickler._tensor
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
    assert torch_zip.locate_state_dict(squeezed) is None
    with pytest.raises(CheckpointError):
        open_tensors(squeezed)


def test_random_damage_never_raises(tmp_path):
    rng = np.random.default_rng(0)
    path = tmp_path / "model.pt"
    torch.save({"a.weight": torch.randn(8, 8)}, path)
    whole = bytearray(path.read_bytes())
    for _ in range(150):
        damaged = bytearray(whole)
        for at in rng.integers(0, len(whole), 4):
            damaged[at] = rng.integers(256)
        path.write_bytes(damaged)
        found = torch_zip.locate_state_dict(path)
        for location in found[0].values() if found else ():
            np.concatenate([np.zeros(0, np.float32), *located_chunks(path, location)])


def test_the_unpickler_refuses_names_that_state_dicts_do_not_need(tmp_path):
    for module, name in [
        ("builtins", "eval"),
        ("os", "system"),
        ("torch", "load"),
        ("collections", "Counter"),
    ]:
        data = b"\x80\x02c" + f"{module}\n{name}\n".encode() + b"."
        with pytest.raises(KeyError):
            torch_zip._Unpickler(io.BytesIO(data), {}, "", None).load()
