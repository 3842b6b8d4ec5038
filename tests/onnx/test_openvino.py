"""OpenVINO answers as onnxruntime does, on packed weights of every number of bits."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from quantized_net import quantize, shake
from test_onnx import residual_net

import ddqcli
from ddqcli.errors import UsageError, VerificationError
from ddqcli.onnx import openvino
from ddqcli.onnx.export import make_onnx
from ddqcli.onnx.runtime import onnxruntime_answers


def test_without_the_extra_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"pip install 'ddqcli\[openvino\]'"):
        openvino.require_openvino()


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, 6])
def test_it_unpacks_and_computes_as_onnxruntime(bits: int, tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    torch.manual_seed(bits)
    model, x = shake(residual_net()), torch.randn(4, 3, 16, 16)
    made = quantize(model, x, tmp_path / "model.safetensors", bits=bits, act_bits=None)
    path = tmp_path / "model.onnx"
    path.write_bytes(make_onnx(ddqcli.load(made.path, model), made.weights, x, {}).raw)
    feed = {"input": x.numpy()}
    (ours,) = openvino.openvino_answers(path)(feed)
    (theirs,) = onnxruntime_answers(path, optimized=True)(feed)
    assert abs(ours - theirs).max() < 2e-5 * abs(theirs).max()


def test_quantized_inputs_come_near(tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    model, x = shake(residual_net()), torch.randn(4, 3, 16, 16)
    made = quantize(model, x, tmp_path / "model.safetensors")
    path = tmp_path / "model.onnx"
    loaded, feed = ddqcli.load(made.path, model), {"input": x.numpy()}
    for runtime in ("onnxruntime", "openvino"):
        path.write_bytes(make_onnx(loaded, made.weights, x, {}, runtime).raw)
        (ours,) = openvino.openvino_answers(path)(feed)
        (theirs,) = onnxruntime_answers(path, optimized=True)(feed)
        assert abs(ours - theirs).max() < 0.05 * abs(theirs).max()


def test_a_file_it_cannot_load_is_a_mismatch(tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    path = tmp_path / "model.onnx"
    path.write_bytes(b"no model")
    with pytest.raises(VerificationError, match="OpenVINO cannot load"):
        openvino.openvino_answers(path)
