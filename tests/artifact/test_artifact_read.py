"""Reading: the content comes back as it was written, and faulty files are told apart."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from artifact_example import Contents

from ddqcli.artifact.encode import encode_artifact
from ddqcli.artifact.read import decode_model, read_artifact
from ddqcli.errors import UsageError, VerificationError


def same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


def test_content_comes_back_as_it_was_written(file: Path, contents: Contents) -> None:
    _, sizes = encode_artifact(*contents.arguments())
    found = read_artifact(file)
    assert (found.aliases, found.meta, found.sizes) == (contents.aliases, contents.meta, sizes)
    assert found.floats.keys() == contents.floats.keys()
    assert all(same_bits(found.floats[name], array) for name, array in contents.floats.items())
    assert len(found.quantized) == len(contents.quantized)
    for wrote in contents.quantized:
        read = found.quantized[wrote.name]
        assert (read.name, read.shape, read.axis, read.bits) == (
            wrote.name,
            wrote.shape,
            wrote.axis,
            wrote.bits,
        )
        assert same_bits(read.indices, wrote.indices)
        assert same_bits(read.scale, wrote.scale)
        assert same_bits(read.zero_point, wrote.zero_point)
        assert all(same_bits(a, b) for a, b in zip(read.levels, wrote.levels, strict=True))
    for table in contents.activations:
        read_table = found.activations[table.name]
        assert (read_table.scale, read_table.zero_point) == (table.scale, table.zero_point)
        assert same_bits(read_table.levels, table.levels)


def test_faulty_files_have_their_own_errors(file: Path) -> None:
    raw = file.read_bytes()
    with pytest.raises(UsageError, match="Cannot open"):
        read_artifact(file.with_name("missing"))
    file.write_bytes(b"PK" + bytes(500))
    with pytest.raises(UsageError, match="is not a ddq file"):
        read_artifact(file)
    onnx = file.with_name("my net.onnx")
    onnx.write_bytes(b"PK" + bytes(500))
    with pytest.raises(UsageError, match=r"a ddq file; `ddq export --check '.*/my net.onnx'` ver"):
        read_artifact(onnx)
    file.write_bytes(raw[:-1])
    for read in (read_artifact, decode_model):
        with pytest.raises(VerificationError, match="damaged or incomplete"):
            read(file)


@pytest.mark.parametrize("size", [8, 9, 30, 49, 50, 113, 114, 200])
def test_a_file_that_is_cut_short_is_damaged_and_not_of_another_kind(
    tmp_path: Path, size: int
) -> None:
    path = tmp_path / "cut.safetensors"
    path.write_bytes((Path(__file__).parent / "golden.ddq").read_bytes()[:size])
    with pytest.raises(VerificationError, match="incomplete"):
        read_artifact(path)
