"""Folders of Hugging Face: the network is built from config.json, without code or network access.

Skipped where transformers is not installed.
"""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_project import ddq

from ddqcli.checkpoint.architecture import build_model
from ddqcli.checkpoint.read import load_checkpoint
from ddqcli.errors import CheckpointError, UsageError

transformers: Any = pytest.importorskip("transformers")

VIT = "transformers:AutoModelForImageClassification"
BERT = "transformers:BertForSequenceClassification"
DATA = """
import torch
from torch.utils.data import TensorDataset

def data():
    torch.manual_seed(0)
    images, labels = torch.randn(40, 3, 16, 16), torch.randint(5, (40,))
    return {"train": TensorDataset(images, labels), "val": TensorDataset(images, labels)}
"""


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("the network was reached")

    monkeypatch.setattr(socket.socket, "connect", refuse)


def vit() -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.ViTConfig(
        **sizes, intermediate_size=32, image_size=16, patch_size=8, num_labels=5
    )
    return transformers.ViTForImageClassification(config).eval()


def test_a_folder_gives_the_network_that_was_saved_in_it(tmp_path: Path) -> None:
    net = vit()
    net.save_pretrained(tmp_path)
    built = build_model(load_checkpoint(tmp_path), VIT, {})
    x = torch.randn(2, 3, 16, 16)
    assert torch.equal(built.model(x).logits, net(x).logits)
    assert not built.model.training
    # Tensors under the network's own names, as an exported file has them.
    own = build_model(load_checkpoint(tmp_path), VIT, {}).model
    for value in own.parameters():
        value.data.zero_()
    own.load_state_dict(net.state_dict())
    assert torch.equal(own(x).logits, net(x).logits)


def test_half_weights_become_float32_and_stay_what_they_are(tmp_path: Path) -> None:
    net = vit().half()
    net.save_pretrained(tmp_path)
    built = build_model(load_checkpoint(tmp_path), VIT, {}).model.state_dict()
    for name, value in net.state_dict().items():
        assert built[name].dtype == torch.float32
        assert torch.equal(built[name], value.float())


def test_what_does_not_fit_is_one_sentence(tmp_path: Path) -> None:
    vit().vit.save_pretrained(tmp_path)  # without its last layer, which would be drawn at random
    checkpoint = load_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match=r"lacks 2 weights of transformers:.*classifier.bias"):
        build_model(checkpoint, VIT, {})
    with pytest.raises(UsageError, match="transformers:BertForSequenceClassification called"):
        build_model(checkpoint, BERT, {})
    with pytest.raises(UsageError, match="ViTNothing is not there in transformers"):
        build_model(checkpoint, "transformers:ViTNothing", {})
    (tmp_path / "config.json").unlink()
    with pytest.raises(UsageError, match=r"needs the config.json .* name the folder"):
        build_model(checkpoint, VIT, {})


def test_code_in_the_folder_does_not_run(tmp_path: Path) -> None:
    vit().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {"model_type": "other", "auto_map": {"AutoConfig": "code.Config"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "code.py").write_text("raise SystemExit('it ran')\n")
    with pytest.raises(UsageError, match="The configuration in") as caught:
        build_model(load_checkpoint(tmp_path), VIT, {})
    assert "it ran" not in str(caught.value)


def test_a_folder_is_finetuned_and_exported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    vit().save_pretrained("vit")
    Path("data.py").write_text(DATA)
    settings = ("--set", "data.batch_size=8", "--set", "data.workers=0", "--max-steps", 2)
    arguments = ("vit", "--arch", VIT, "--data", "data.py:data", "--target-bits", 5)
    answer = ddq("finetune", *arguments, *settings, "--run-dir", "run")
    assert answer.code == 0, answer.err
    exported = ddq("export", "run", "-o", "model.safetensors", "--json")
    assert exported.code == 0, exported.out
    assert exported.data["behaviour"]["outputs"] == 0
    assert exported.data["behaviour"]["unchecked"] == []
