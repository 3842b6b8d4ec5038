"""`ddq export --format onnx`: the file holds what was trained, and answers as torch does."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from tiny_project import ddq, inside

from ddqcli.commands import export_onnx
from ddqcli.errors import VerificationError
from ddqcli.onnx.export import OnnxModel
from ddqcli.onnx.readback import require_same_model
from ddqcli.onnx.seal import opened, sealed
from ddqcli.runs.run import Run

FILE = Path("runs/done/model.onnx")


@pytest.fixture(scope="module")
def trained(pristine: Path) -> OnnxModel:
    """The ONNX model of the finished run, to which files are compared."""
    with inside(pristine):
        return export_onnx._expected(Run.open(Path("runs/done")), "onnxruntime").model


@pytest.fixture
def exported(finished: Path, trained: OnnxModel) -> Path:
    """The folder with a finished run and the ONNX file exported from it."""
    FILE.write_bytes(trained.raw)
    return finished


def test_a_good_file_is_confirmed_and_the_same_each_time(exported: Path) -> None:
    raw = FILE.read_bytes()
    answer = ddq("export", "--check", FILE)
    assert (answer.code, answer.err) == (0, "")
    assert "are unpacked as trained" in answer.out
    data = ddq("export", "--format", "onnx", "--json").data
    assert FILE.read_bytes() == raw
    assert data["sizes"]["file"] == len(raw)
    assert data["verified"] == {"tensors": 3, "values": 72 + 8 * 16 * 9 + 64}
    assert data["bench"] is None
    assert data["openvino"] is None


def test_any_flipped_bit_is_exit_code_4(exported: Path) -> None:
    raw, draw = FILE.read_bytes(), random.Random(0)
    for bit in draw.sample(range(8 * len(raw)), 500):
        damaged = bytearray(raw)
        damaged[bit // 8] ^= 1 << bit % 8
        with pytest.raises(VerificationError, match="damaged"):
            opened(bytes(damaged), "file")
    FILE.write_bytes(damaged)
    answer = ddq("export", "--check", FILE)
    assert answer.code == 4
    assert answer.err.startswith(f"Error: {FILE} is damaged")


def change(name: str, exporter: str | None = None) -> None:
    """Change one number of an initializer, and the checksum with it."""
    proto = onnx.load(FILE)
    (tensor,) = [t for t in proto.graph.initializer if name in t.name][:1]
    array = numpy_helper.to_array(tensor).copy()
    array.view(np.uint8).reshape(-1)[-1] ^= 1
    tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
    about = {p.key: p.value for p in proto.metadata_props}
    FILE.write_bytes(sealed(proto, about | ({"exporter": exporter} if exporter else {})))


@pytest.mark.parametrize(
    "name",
    ["3.weight.values", "3.weight.packed", "3.weight.scale", "8.weight.minus_shift", "zero_point"],
)
def test_a_changed_number_under_a_right_checksum_is_named(
    exported: Path, trained: OnnxModel, name: str
) -> None:
    change(name)
    message = rf"{FILE} differs from what was trained in \S*{name}"
    with pytest.raises(VerificationError, match=message):
        require_same_model(FILE.read_bytes(), trained, FILE)


def test_a_changed_node_under_a_right_checksum_is_noticed(exported: Path) -> None:
    proto = onnx.load(FILE)
    (node,) = [node for node in proto.graph.node if node.op_type == "ReduceMean"]
    node.op_type = "ReduceMax"
    FILE.write_bytes(sealed(proto, {p.key: p.value for p in proto.metadata_props}))
    answer = ddq("export", "--check", FILE)
    assert answer.code == 4
    assert "in its nodes or metadata" in answer.err


def test_a_file_of_another_exporter_is_compared_tensor_by_tensor(
    exported: Path, trained: OnnxModel
) -> None:
    raw = FILE.read_bytes()
    proto = onnx.load(FILE)
    about = {p.key: p.value for p in proto.metadata_props} | {"exporter": "torch 2.10.0"}
    FILE.write_bytes(sealed(proto, about))
    answer = ddq("export", "--check", FILE)
    assert answer.code == 0
    assert "unchecked  the nodes of" in answer.out
    assert "torch 2.10.0" in answer.out
    FILE.write_bytes(raw)
    change("3.weight.packed", exporter="torch 2.10.0")
    with pytest.raises(VerificationError, match=r"3\.weight\.packed"):
        require_same_model(FILE.read_bytes(), trained, FILE)


def test_a_target_may_be_the_size_of_the_onnx_file(project: Path) -> None:
    start = ("finetune", "model.pt", "--max-steps", "2", "--target-format", "onnx")
    answer = ddq(*start, "--target-size", "5800", "--run-dir", "runs/small")
    assert answer.code == 0, answer.err
    assert "target: an ONNX file of 5800; its nodes and floats take up to 4," in answer.err
    assert "ddq export runs/small --format onnx" in answer.out
    sizes = "sizes      of the safetensors file; the target is for the onnx file, "
    assert sizes in answer.out
    assert sizes in ddq("report", "runs/small").out
    data = ddq("export", "runs/small", "--format", "onnx", "--json").data
    assert data["sizes"]["file"] <= 5800
    bits = [layer["bits"] for layer in ddq("report", "runs/small", "--json").data["layers"]]
    assert min(bits) < 8
    too_small = ddq(*start, "--target-size", "4kB")
    assert too_small.code == 2
    assert "nodes and floats of the ONNX file" in too_small.err
    alone = ddq("finetune", "model.pt", "--target-format", "onnx")
    assert alone.code == 2
    assert "target_format says which file target_size is for" in alone.err


def test_a_file_beyond_the_target_is_not_written(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = ("--target-size", "6500", "--target-format", "onnx", "--max-steps", "1", "-q")
    assert ddq("finetune", "model.pt", "--run-dir", "runs/small", *flags).code == 0
    monkeypatch.setattr("ddqcli.commands.export_onnx.parse_size", lambda *_: 3000)
    answer = ddq("export", "runs/small", "--format", "onnx")
    assert answer.code == 3
    assert "and the budget of the run is 3,000 (6500)" in answer.err
    assert not Path("runs/small/model.onnx").exists()


def test_what_is_no_file_of_ddq_is_exit_code_4(exported: Path) -> None:
    for raw in (b"", b"\x00" * 49, b"onnx", FILE.read_bytes()[:-1]):
        FILE.write_bytes(raw)
        assert ddq("export", "--check", FILE).code == 4


def test_bench_times_float_and_quantized_and_names_slow_layers(exported: Path) -> None:
    data = ddq("export", "--check", FILE, "--bench", "--json").data["bench"]
    assert data["float_ms"] > 0
    assert data["quantized_ms"] > 0
    assert data["speedup"] > 0
    assert {layer["name"] for layer in data["layers"]} <= {"0", "1", "3", "4", "8"}
    assert all(layer["quantized_ms"] > layer["float_ms"] for layer in data["layers"])
    answer = ddq("export", "--format", "onnx", "--bench")
    assert "ms a sample, " in answer.out
    assert ddq("export", "--bench").code == 2


def test_openvino_verifies_too_when_asked(exported: Path) -> None:
    pytest.importorskip("openvino")
    data = ddq("export", "--check", FILE, "--openvino", "--json").data["openvino"]
    assert data["outputs"] < 0.1
    assert data["accuracy"] == pytest.approx(data["torch_accuracy"], abs=7)
    assert "outputs    OpenVINO: " in ddq("export", "--check", FILE, "--openvino").out


def test_a_file_for_openvino_is_checked_as_such(exported: Path) -> None:
    pytest.importorskip("openvino")
    raw = FILE.read_bytes()
    data = ddq("export", "--format", "onnx", "--openvino", "--bench", "--json").data
    assert data["openvino"]["outputs"] < 0.1
    assert data["bench"]["runtime"] == "openvino"
    assert FILE.read_bytes() != raw
    assert ddq("export", "--check", FILE).code == 0


def test_openvino_applies_to_onnx_files_alone(exported: Path) -> None:
    assert ddq("export", "--openvino").code == 2
