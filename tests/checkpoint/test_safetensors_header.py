"""Safetensors headers are read in numeric order of the layers, and their faults named."""

from __future__ import annotations

import json
import struct

import pytest
import torch
from safetensors.torch import save_file

from ddqcli.checkpoint.tensors import open_tensors
from ddqcli.errors import CheckpointError


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
        (
            safetensors({"__metadata__": "x", "w": ENTRY}, bytes(16)),
            "it is no whole safetensors file",
        ),
    ],
)
def test_a_faulty_safetensors_file_is_refused_with_its_reason(tmp_path, content, message):
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        open_tensors(path)


def test_a_safetensors_file_is_recognized_by_its_content(tmp_path):
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
