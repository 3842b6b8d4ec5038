"""Encoding: a safetensors file with the same bytes for the same content, and what it refuses."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
import safetensors.numpy
import torch
from artifact_example import ENTRIES, FLOAT_ENTRIES, Contents

import ddqcli
from ddqcli.artifact import decoder
from ddqcli.artifact.encode import encode_artifact
from ddqcli.artifact.read import read_artifact
from ddqcli.artifact.tensors import BFLOAT16
from ddqcli.errors import VerificationError


def write(path: Path, *contents: Any) -> None:
    path.write_bytes(encode_artifact(*contents)[0])


def test_is_a_safetensors_file(tmp_path: Path, contents: Contents) -> None:
    floats = {
        name: array for name, array in contents.floats.items() if name != "brain"
    }  # numpy reads no bfloat16
    path = tmp_path / "model.ddq"
    write(path, contents.quantized, contents.activations, floats, contents.aliases, contents.meta)
    entries = safetensors.numpy.load_file(path)
    assert entries.keys() == {*ENTRIES, *FLOAT_ENTRIES} - {"bf16"}
    assert entries["i64"].tolist() == [1234567890123]
    assert entries["quantized"][0] == 255  # the gates of the first name, "conv (input)"
    assert safetensors.numpy.load(safetensors.numpy.save(entries)).keys() == entries.keys()


def test_bfloat16_has_the_bits_of_torch(tmp_path: Path) -> None:
    tensor = torch.tensor([[1.5, -3e38], [0.1, float("nan")]], dtype=torch.bfloat16)
    floats = {"brain": tensor.view(torch.uint16).numpy().view(BFLOAT16)}
    write(tmp_path / "model.ddq", [], [], floats, {}, {})
    with safetensors.safe_open(tmp_path / "model.ddq", "pt") as file:
        read = file.get_tensor("bf16")
    assert read.dtype == torch.bfloat16
    assert torch.equal(read.view(torch.uint16), tensor.reshape(-1).view(torch.uint16))
    back = torch.from_numpy(
        read_artifact(tmp_path / "model.ddq").floats["brain"].view(np.uint16)
    ).view(torch.bfloat16)
    assert torch.equal(back.view(torch.uint16), tensor.view(torch.uint16))


def test_an_empty_model_is_a_file_too(tmp_path: Path) -> None:
    write(tmp_path / "model.ddq", [], [], {}, {}, {})
    assert read_artifact(tmp_path / "model.ddq").sizes.payload == 0
    assert safetensors.numpy.load_file(tmp_path / "model.ddq")["quantized"].size == 0


SCRIPT = """
import sys; sys.path[:0] = sys.argv[1:3]
from pathlib import Path
from artifact_example import example
from ddqcli.artifact import decoder
from ddqcli.artifact.encode import encode_artifact
step = int(sys.argv[3])
in_order = (
    a[::step] if isinstance(a, list) else dict(list(a.items())[::step])
    for a in example().arguments()
)
Path(sys.argv[4]).write_bytes(encode_artifact(*in_order)[0])
"""


def test_same_bytes_in_any_process_and_order(tmp_path: Path, contents: Contents) -> None:
    expected, _ = encode_artifact(*contents.arguments())
    root, here = Path(ddqcli.__file__).parents[1], Path(__file__).parent
    for seed, step in (("0", 1), ("1", -1), ("4294967295", -1)):
        path = tmp_path / f"{seed}.ddq"
        environment = {**os.environ, "PYTHONHASHSEED": seed}
        subprocess.run(
            [sys.executable, "-c", SCRIPT, here, root, str(step), path], env=environment, check=True
        )
        assert path.read_bytes() == expected


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"aliases": {"fc.weight": "conv.weight"}}, "fc.weight: more than one"),
        ({"aliases": {"x": "y"}}, "y: an alias points here"),
        ({"aliases": {"x": "tied", "tied": "fc.weight"}}, "tied: an alias points here"),
        (
            {"floats": {"conv.weight": np.zeros(1, np.float32)}, "aliases": {}},
            "conv.weight: more than one",
        ),
        ({"floats": {"c": np.zeros(1, np.complex64)}, "aliases": {}}, "c has dtype complex64"),
        ({"meta": {"accuracy": float("nan")}}, "JSON"),
    ],
)
def test_content_that_cannot_be_stored_is_refused(
    contents: Contents, change: dict[str, Any], fault: str
) -> None:
    with pytest.raises(ValueError, match=fault):
        encode_artifact(*replace(contents, **change).arguments())


CONSTANTS: dict[str, np.ndarray] = {
    "norm.running_mean": np.zeros(64, np.float32),
    "norm.running_var": np.full(64, 1 - 1e-5, np.float32),
    "norm.num_batches_tracked": np.array(0, np.int64),
    "negative zero": np.full((2, 3), -0.0, np.float16),
    "mask": np.ones(5, bool),
}


def test_constants_take_bytes_of_the_manifest_alone(tmp_path: Path, contents: Contents) -> None:
    path = tmp_path / "model.ddq"
    arguments = replace(contents, floats={}, aliases={"tied": "negative zero"}).arguments()
    write(path, *arguments, CONSTANTS)
    artifact = read_artifact(path)
    assert artifact.floats == {}
    assert artifact.sizes.floats == 0
    assert b'"version":"2"' in path.read_bytes()[:200]
    tensors, _ = decoder.decode(path)
    for name, array in CONSTANTS.items():
        for found in (tensors[name], artifact.constants[name]):
            assert (found.dtype, found.shape) == (array.dtype, array.shape)
            assert found.tobytes() == array.tobytes()
    assert tensors["tied"].tobytes() == CONSTANTS["negative zero"].tobytes()
    entries = safetensors.numpy.load_file(path)
    assert entries.keys() == {*ENTRIES}


@pytest.mark.parametrize(
    ("array", "fault"),
    [
        (np.array([0.0, -0.0], np.float32), "its elements differ"),
        (np.zeros(0, np.float32), "cannot be a constant"),
        (np.zeros(2, np.uint16).view(BFLOAT16), "cannot be a constant"),
        (np.full(2, np.nan, np.float32), "JSON"),
    ],
)
def test_what_is_no_constant_is_refused(array: np.ndarray, fault: str) -> None:
    with pytest.raises(ValueError, match=fault):
        encode_artifact([], [], {}, {}, {}, {"c": array})


def test_a_forged_constant_takes_no_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "model.ddq"
    write(path, [], [], {}, {}, {}, {"c": np.zeros(9, np.float32)})
    monkeypatch.setattr(decoder, "MAX_CONSTANT", 8)
    with pytest.raises(VerificationError, match="its constants have more than 8 values"):
        read_artifact(path)
