"""Networks are built by a factory or taken from a pickled module, and weights loaded strictly."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from networks import assert_holds, holding, sentence, trained
from torch import nn

from ddqcli.checkpoint.architecture import build_model
from ddqcli.checkpoint.read import load_checkpoint
from ddqcli.errors import CheckpointError, UsageError
from ddqcli.recipe.factory import import_factory

NETS = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, classes, width):
        super().__init__()
        self.conv = nn.Conv2d(3, width, 3)
        self.bn = nn.BatchNorm2d(width)
        self.head = nn.Linear(width, classes)

    def forward(self, x):
        return self.head(self.bn(self.conv(x)).mean((2, 3)))

def net(num_classes=5, width=4):
    return Net(num_classes, width)

def wrapped():
    outer = nn.Module()
    outer.net = net()
    return outer

def nothing(): pass
def number(): return 3
def broken(): raise ValueError("no\\nluck")
def leaves(): raise SystemExit(3)
constant = 7
"""


@pytest.fixture(autouse=True)
def _imports_undone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    before = set(sys.modules)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield
    for name in set(sys.modules) - before:
        if (getattr(sys.modules[name], "__file__", None) or "").startswith(str(tmp_path.resolve())):
            del sys.modules[name]


@pytest.fixture
def nets(tmp_path: Path) -> Path:
    path = tmp_path / "mine_nets.py"
    path.write_text(NETS)
    return path


@pytest.mark.parametrize(
    ("name", "kwargs", "says"),
    [
        ("nothing", {}, "returned NoneType where a torch.nn.Module is expected"),
        ("number", {}, "returned int"),
        ("broken", {}, "called with .. raised ValueError: no luck"),
        ("leaves", {}, "raised SystemExit: 3"),
        (
            "net",
            {"depth": 3},
            "called with .depth=3. raised TypeError: .*unexpected keyword argument 'depth'",
        ),
        ("constant", {}, "constant is no function"),
    ],
)
def test_a_factory_that_makes_no_network(
    nets: Path, name: str, kwargs: dict[str, object], says: str
) -> None:
    with pytest.raises(UsageError, match=says) as error:
        build_model(holding({"w": torch.ones(1)}), f"{nets}:{name}", kwargs)
    sentence(error)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
def test_weights_are_loaded_in_float32_for_evaluation(nets: Path, dtype: torch.dtype) -> None:
    spec = f"{nets}:net"
    tensors = trained(import_factory(spec)(width=6)).to(dtype).state_dict()
    built = build_model(holding(tensors), spec, {"width": 6})
    assert_holds(built.model, tensors)
    assert built.arch == built.note == spec


def test_checkpoints_from_before_num_batches_tracked(nets: Path) -> None:
    tensors = trained(import_factory(f"{nets}:net")()).state_dict()
    del tensors["bn.num_batches_tracked"]
    built = build_model(holding(tensors), f"{nets}:net", {})
    assert built.model.bn.num_batches_tracked == 0
    assert torch.equal(built.model.bn.running_var, tensors["bn.running_var"])


@pytest.mark.parametrize(
    ("inside", "factory", "note"),
    [("", "wrapped", "'net.' added"), ("net.", "net", "'net.' stripped")],
)
def test_one_prefix_more_or_less(nets: Path, inside: str, factory: str, note: str) -> None:
    tensors = trained(import_factory(f"{nets}:net")()).state_dict()
    built = build_model(
        holding({inside + name: t for name, t in tensors.items()}), f"{nets}:{factory}", {}
    )
    assert_holds(built.model.net if factory == "wrapped" else built.model, tensors)
    assert built.note.endswith(f", prefix {note}")


def test_weights_that_do_not_fit(nets: Path) -> None:
    spec = f"{nets}:net"
    tensors = import_factory(spec)().state_dict()
    del tensors["conv.weight"], tensors["conv.bias"], tensors["bn.weight"], tensors["bn.bias"]
    tensors |= {"bn.running_mean": torch.ones(9), "fc.weight": torch.ones(3)}
    with pytest.raises(CheckpointError) as error:
        build_model(holding(tensors), spec, {})
    message = sentence(error)
    assert message.startswith(f"weights.pt does not fit {spec}: ")
    assert "lacks 4 tensors (conv.weight, conv.bias, bn.weight, ...)" in message
    assert "unknown 1 tensors (fc.weight)" in message
    assert "another shape 1 tensors (bn.running_mean [9] instead of [4])" in message


def test_another_number_of_classes_names_the_keyword(nets: Path) -> None:
    spec = f"{nets}:net"
    tensors = import_factory(spec)(num_classes=3).state_dict()
    with pytest.raises(
        CheckpointError,
        match=r"head.weight \[3, 4\] instead of \[5, 4\].*model.kwargs.num_classes=3",
    ):
        build_model(holding(tensors), spec, {})
    build_model(holding(tensors), spec, {"num_classes": 3})
    wider = import_factory(spec)(width=8).state_dict()
    with pytest.raises(CheckpointError, match="built with the same keywords"):
        build_model(holding(wider), spec, {})


def test_a_pickled_module_is_the_network() -> None:
    net = trained(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))).half().train()
    tensors = {name: t.clone() for name, t in net.state_dict().items()}
    built = build_model(holding(tensors, net), None, {})
    assert_holds(built.model, tensors)
    assert built.arch == "Sequential"


def test_a_network_of_timm_is_built_by_its_name(tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    net = timm.create_model("resnet10t", pretrained=False, num_classes=4).eval()
    torch.save(net.state_dict(), tmp_path / "c.pt")
    checkpoint = load_checkpoint(tmp_path / "c.pt")
    built = build_model(checkpoint, "timm:resnet10t", {"num_classes": 4})
    x = torch.randn(1, 3, 64, 64)
    assert torch.equal(built.model(x), net(x))
    with pytest.raises(UsageError, match="timm:resnet10tt called with"):
        build_model(checkpoint, "timm:resnet10tt", {})
    with pytest.raises(CheckpointError, match=r"model.kwargs.num_classes=4"):
        build_model(checkpoint, "timm:resnet10t", {})
