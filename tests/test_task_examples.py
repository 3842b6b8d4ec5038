"""The examples in recipes/README.md run as they stand, from finetuning to the verified file."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_project import ddq

import ddqcli

TEXT = (Path(__file__).parents[1] / "recipes" / "README.md").read_text(encoding="utf-8")
_EXAMPLE = r"^### ([^\n]+)\n(?:(?!^###? ).)*?```python\n(.*?)```"
EXAMPLES = dict(re.findall(_EXAMPLE, TEXT, re.M | re.S))
METRICS = {  # that a report must speak of, where it is no accuracy
    "Autoencoder": "PSNR",
    "Segmentation": "mIoU",
    "Detection": "IoU",
    "Detection with raw outputs": "IoU",
    "Sequences (CTC)": "wrong lines",
    "Language model": "entropy",
    "Without labels": "distance from the float outputs",
}
FLAGS = {"Segmentation": ("--set", "train.distill.weight=0.9")}


@pytest.mark.filterwarnings("ignore")  # of the exporter, about its own code
def test_a_detector_with_boxes_is_exported_by_torch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The command in the text; onnxruntime finds the boxes that torch finds."""
    onnxruntime = pytest.importorskip("onnxruntime")
    monkeypatch.chdir(tmp_path)
    scope: dict[str, Any] = {"ddqcli": ddqcli, "torch": torch}
    exec(EXAMPLES["Detection"], scope)
    torch.manual_seed(0)
    net = scope["build"]()
    batch = tuple(x[None] for x in scope["data"]()["train"][0][0])
    ddqcli.quantize(net, bits=5, act_bits=8, calibration=[batch])
    ddqcli.save(net, "model.safetensors")
    (command,) = re.findall(r"`(torch\.onnx\.export\(.*?\))`", TEXT, re.S)
    exec(command, scope)
    image = torch.rand(3, 64, 64)
    with torch.no_grad():
        wanted = ddqcli.load("model.safetensors", scope["build"]()).net.eval()([image])[0]
    session = onnxruntime.InferenceSession("model.onnx")
    boxes, *_ = session.run(None, {session.get_inputs()[0].name: image.numpy()})
    assert len(boxes) > 5
    torch.testing.assert_close(torch.from_numpy(boxes), wanted["boxes"], atol=0.01, rtol=0)


def test_there_is_an_example_of_each_kind() -> None:
    assert len(EXAMPLES) == TEXT.count("\n### ") == 9
    assert set(METRICS) | {"Classifier", "Two inputs, two tasks"} == set(EXAMPLES)


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("task.py").write_text(EXAMPLES[name])
    scope: dict[str, Any] = {}
    exec(EXAMPLES[name], scope)
    torch.manual_seed(0)
    torch.save(scope["build"]().state_dict(), "model.pt")
    (command,) = re.findall(r"^ddq (finetune .*)$", TEXT, re.M)
    limits = ("--max-steps", 2, "--set", "data.batch_size=8", "--set", "data.workers=0")
    answer = ddq(*command.split(), "--run-dir", "run", *limits, *FLAGS.get(name, ()))
    assert answer.code == 0, answer.err
    report = ddq("report", "run", "--json").data
    assert report["metric"]["name"] == METRICS.get(name, "accuracy")
    assert report["totals"]["average_bits"] <= 6
    exported = ddq("export", "run", "-o", "model.safetensors", "--json")
    assert exported.code == 0, exported.out
    assert exported.data["behaviour"]["unchecked"] == []
    if name == "Detection with raw outputs":
        in_onnx = ddq("export", "run", "--format", "onnx", "--json")
        assert in_onnx.code == 0, in_onnx.out
        assert in_onnx.data["unchecked"] == []
