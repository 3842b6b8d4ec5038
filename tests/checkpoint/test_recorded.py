"""The network that an exported file names: built without code or arguments of a stranger's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torchvision import models as zoo

from ddqcli.checkpoint.recorded import build_recorded
from ddqcli.errors import CheckpointError, UsageError

FILE = Path("some/m.safetensors")


def meta_of(arch: Any, **kwargs: Any) -> dict[str, Any]:
    recipe = {"model": {"kwargs": kwargs}} if kwargs else {}
    return {"report": {"source": {"arch": arch}}, "recipe": recipe}


def test_a_network_of_torchvision_is_built_with_the_numbers_of_its_run() -> None:
    torch.manual_seed(0)
    net = zoo.squeezenet1_1(num_classes=7, dropout=0.25)
    state = net.state_dict()
    for meta in (meta_of("squeezenet1_1", dropout=0.25), meta_of("squeezenet1_1")):
        built: Any = build_recorded(FILE, state, meta)
        assert all(torch.equal(value, state[name]) for name, value in built.state_dict().items())
        assert not built.training
        assert built.classifier[0].p == (0.25 if meta["recipe"] else 0.5)
    del state["classifier.1.bias"]
    with pytest.raises(CheckpointError):
        build_recorded(FILE, state, meta_of("squeezenet1_1"))


@pytest.mark.parametrize(
    ("meta", "message"),
    [
        ({"ddq": "0.1.0"}, "does not say how its network is built"),
        ({"report": {"source": {"arch": "resnet18"}}}, "does not say how"),  # left out for size
        ({"report": 3, "recipe": {}}, "does not say how"),
        (meta_of("net.py:build"), "was made from net.py:build, which is no network of"),
        (meta_of("os:system"), "was made from os:system, which is no network of"),
        (meta_of("raft_large"), "was made from raft_large, which is no"),
        (meta_of(["resnet18"]), "which is no network of"),
        (meta_of("resnet18", weights="DEFAULT"), "weights='DEFAULT', and load takes only numbers"),
        (meta_of("resnet18", progress=None), "progress=None, and load takes only numbers"),
    ],
)
def test_anything_else_is_one_sentence_with_its_remedy(meta: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        build_recorded(FILE, {}, meta)
    assert str(caught.value).endswith('pass the float network: ddqcli.load("m.safetensors", net).')


def test_a_name_of_timm_must_be_in_its_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    timm = pytest.importorskip("timm")
    net = timm.create_model("test_resnet", num_classes=3)
    built = build_recorded(FILE, net.state_dict(), meta_of("timm:test_resnet", num_classes=3))
    assert built.state_dict().keys() == net.state_dict().keys()
    for name in ("hf_hub:someone/net", "local-dir:/tmp", "no_such_net"):
        with pytest.raises(UsageError, match="no network of torchvision or timm"):
            build_recorded(FILE, {}, meta_of(f"timm:{name}"))
    with pytest.raises(UsageError, match="load takes only numbers"):
        build_recorded(FILE, {}, meta_of("timm:test_resnet", checkpoint_path="x.pth"))


def test_a_missing_timm_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UsageError, match="was made from timm:resnet18; run pip install timm"):
        build_recorded(FILE, {}, meta_of("timm:resnet18"))
