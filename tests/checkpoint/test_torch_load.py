"""Files of torch.save are read without running their code; any damage is one clear sentence."""

from __future__ import annotations

import argparse
import collections
import datetime
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
from weight_files import assert_same, fault, saved, state

from ddqcli.checkpoint.read import load_checkpoint
from ddqcli.errors import CheckpointError


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_common_values_beside_weights_need_no_pickle(tmp_path: Path, legacy: bool) -> None:
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


def test_a_plain_state_dict_is_read_safely_even_if_pickle_is_allowed(
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


@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors"])
def test_any_cut_and_any_damage_is_one_sentence(tmp_path: Path, kind: str) -> None:
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
