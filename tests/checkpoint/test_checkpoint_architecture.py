"""Factories are imported and their faults told in one sentence; weights are loaded strictly; torchvision's networks are
found by their shapes."""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import nn
from torchvision import models as zoo

from ddqcli.checkpoint import torchvision_models as models
from ddqcli.checkpoint.architecture import build_model
from ddqcli.checkpoint.read import Checkpoint
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


def holding(tensors: dict[str, torch.Tensor], module: nn.Module | None = None) -> Checkpoint:
    return Checkpoint(
        Path("weights.pt"), "", {name: t.detach() for name, t in tensors.items()}, "", module
    )


def trained(model: nn.Module) -> nn.Module:
    """The model with every tensor moved off what a fresh one holds."""
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.copy_(
                torch.rand(tensor.shape) + 0.5 if tensor.is_floating_point() else tensor + 1
            )
    return model


def assert_holds(model: nn.Module, tensors: dict[str, torch.Tensor]) -> None:
    state = model.state_dict()
    assert state.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(state[name], tensor.to(state[name].dtype)), name
    assert not any(part.training for part in model.modules())
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def sentence(error: pytest.ExceptionInfo[UsageError]) -> str:
    message = str(error.value)
    assert "\n" not in message
    assert len(message) < 700
    return message


# ---- factories


def test_a_factory_in_a_module() -> None:
    assert import_factory("json.decoder:JSONDecoder") is json.decoder.JSONDecoder


def test_a_factory_in_a_file_absolute_and_relative_is_one(
    nets: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = import_factory(f"{nets}:net")
    monkeypatch.chdir(nets.parent)
    assert import_factory("mine_nets.py:net") is first
    assert import_factory(f"../{nets.parent.name}/mine_nets.py:net") is first
    assert import_factory("mine_nets:net") is first, "as a module of the working folder too"
    assert sys.modules["mine_nets"].net is first, "so that worker processes can import it"


def test_siblings_are_found_while_importing_and_when_called(tmp_path: Path) -> None:
    (tmp_path / "mine_early.py").write_text("value = 1")
    (tmp_path / "mine_late.py").write_text("value = 2")
    (tmp_path / "mine_main.py").write_text(
        "import mine_early\ndef both():\n    import mine_late\n    return mine_early.value, mine_late.value"
    )
    assert import_factory(f"{tmp_path / 'mine_main.py'}:both")() == (1, 2)
    assert sys.path[-1] == str(tmp_path), (
        "last: its files must not stand in for others' from now on"
    )
    assert sys.path.count(str(tmp_path)) == 1


def test_a_file_named_like_a_module_replaces_nothing(tmp_path: Path) -> None:
    (tmp_path / "json.py").write_text("def net(): return 'mine'")
    assert import_factory(f"{tmp_path / 'json.py'}:net")() == "mine"
    assert sys.modules["json"] is json


def test_two_files_of_the_same_name(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "mine_same.py").write_text(f"def where(): return {folder!r}")
    assert [import_factory(f"{tmp_path / f / 'mine_same.py'}:where")() for f in "ab"] == ["a", "b"]


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("resnet18", "names no function; write it as package.module:factory"),
        ("nets.py:", "names no function"),
        (":net", "names no function"),
        ("no/such/nets.py:net", "There is no file no/such/nets.py"),
        ("no_such_package.nets:net", "There is no module no_such_package"),
        ("json.no_such:net", "There is no module json.no_such"),
        ("not a module:net", "neither a Python module nor a .py file"),
        ("json:lods", "lods is not there in json; it has loads, load,"),
    ],
)
def test_a_factory_that_cannot_be_found(spec: str, says: str) -> None:
    with pytest.raises(UsageError) as error:
        import_factory(spec)
    assert says in sentence(error)


@pytest.mark.parametrize(
    ("source", "says"),
    [
        (
            "def other(): pass\nfrom os.path import join",
            "net is not there in .*mine_bad.py; it has other.",
        ),
        ("net = 3", "net is no function in .*; it has no functions"),
        ("raise RuntimeError('two\\nlines')", "mine_bad.py raised RuntimeError: two lines"),
        ("import sys; sys.exit(4)", "mine_bad.py raised SystemExit: 4"),
        ("def net(:", "mine_bad.py raised SyntaxError: .*line 1"),
        (
            "import no_such_dependency",
            "raised ModuleNotFoundError: No module named 'no_such_dependency'",
        ),
    ],
)
def test_a_file_that_cannot_be_imported(tmp_path: Path, source: str, says: str) -> None:
    path = tmp_path / "mine_bad.py"
    path.write_text(source)
    with pytest.raises(UsageError, match=says) as error:
        import_factory(f"{path}:net")
    sentence(error)
    path.write_text("def net(): return 1\n" + " " * len(source))
    if "raise" in says:
        assert import_factory(f"{path}:net")() == 1, "a failed import leaves nothing behind"


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


# ---- weights into a factory's network


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


# ---- torchvision


def shapes_only(name: str, **kwargs: object) -> dict[str, torch.Tensor]:
    """The state of a torchvision network without memory for it, as it was before num_batches_tracked."""
    with models._Blank():
        state = zoo.get_model(name, weights=None, **kwargs).state_dict()
    return {key: tensor for key, tensor in state.items() if not key.endswith("num_batches_tracked")}


@pytest.mark.parametrize("given", [True, False], ids=["named", "found"])
@pytest.mark.parametrize(
    ("name", "classes"),
    [
        ("squeezenet1_1", 1000),
        ("resnet18", 10),
        ("mobilenet_v3_small", 7),
        ("regnet_y_400mf", 3),
        ("shufflenet_v2_x0_5", 1),
        ("mnasnet0_5", 100),
    ],
)
def test_torchvision_by_name_and_by_shapes(name: str, classes: int, given: bool) -> None:
    tensors = trained(zoo.get_model(name, weights=None, num_classes=classes)).state_dict()
    by_name = dict(sorted(tensors.items()))  # as safetensors files are
    built = build_model(holding(by_name), name if given else None, {})
    assert_holds(built.model, tensors)
    assert built.arch == name
    found = "" if given else ", found by its keys and shapes"
    assert built.note == f"torchvision {name} with {classes} classes{found}"
    assert built.model(torch.zeros(2, 3, 64, 64)).shape == (2, classes)


def test_files_without_num_batches_tracked_and_with_a_prefix() -> None:
    tensors = trained(zoo.resnet18(num_classes=10)).state_dict()
    old = {
        f"model.{name}": t
        for name, t in tensors.items()
        if not name.endswith("num_batches_tracked")
    }
    built = build_model(holding(old), None, {})
    assert (
        built.note
        == "torchvision resnet18 with 10 classes, found by its keys and shapes, prefix 'model.' stripped"
    )
    assert torch.equal(built.model.layer1[0].bn1.running_var, tensors["layer1.0.bn1.running_var"])


@pytest.mark.parametrize("given", [True, False], ids=["named", "found"])
def test_auxiliary_heads_are_left_out_unless_asked_for(given: bool) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        full = trained(zoo.googlenet(weights=None, num_classes=10, init_weights=False))
    with warnings.catch_warnings():
        warnings.simplefilter(
            "error"
        )  # torchvision warns of every GoogLeNet it builds; ddq's user has no part in it
        built = build_model(holding(full.state_dict()), "googlenet" if given else None, {})
    served = {name: t for name, t in full.state_dict().items() if not name.startswith("aux")}
    assert_holds(built.model, served)
    assert "with 10 classes" in built.note
    assert "auxiliary heads left out" in built.note
    assert "transform_input" in built.note
    image = torch.rand(2, 3, 64, 64)
    assert torch.equal(built.model(image), full.eval()(image))
    assert build_model(holding(served), "googlenet", {}).note.count("auxiliary") == 0
    whole = build_model(
        holding(full.state_dict()), "googlenet", {"aux_logits": True, "transform_input": True}
    )
    assert_holds(whole.model, full.state_dict())


def test_names_in_the_files_torchvision_publishes() -> None:
    tensors = trained(zoo.densenet121(weights=None, num_classes=4)).state_dict()
    old = {
        name.replace("norm1.", "norm.1.").replace("conv2.", "conv.2.")
        if "denselayer" in name
        else name: t
        for name, t in tensors.items()
    }
    assert "features.denseblock1.denselayer1.norm.1.weight" in old
    assert_holds(build_model(holding(old), None, {}).model, tensors)
    old = {
        name.replace("mlp.0.", "mlp.linear_1.").replace("mlp.3.", "mlp.linear_2."): t
        for name, t in shapes_only("vit_b_16").items()
    }
    assert "encoder.layers.encoder_layer_0.mlp.linear_1.weight" in old
    assert models._discover(Path("w"), models._current(old, False), {})[0] == "vit_b_16"


def test_the_image_size_of_a_vision_transformer() -> None:
    name, kwargs = models._discover(
        Path("w"), shapes_only("vit_b_32", image_size=384, num_classes=5), {}
    )
    assert (name, kwargs) == ("vit_b_32", {"image_size": 384, "num_classes": 5})


def test_every_network_is_told_by_its_shapes_and_found_in_its_family() -> None:
    """What _discover relies on: no two share keys and shapes, classes aside, and names lead to the family."""
    names: dict[str, set[str]] = {}
    families: dict[str, str] = {}  # module -> its first network
    seen: dict[tuple[object, ...], str] = {}
    for name in models._names():
        kwargs = {"init_weights": False} if name in models._WITH_AUX else {}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            state = shapes_only(name, **kwargs)
        shapes = tuple(
            sorted((key, tuple(n for n in t.shape if n != 1000)) for key, t in state.items())
        )
        assert shapes not in seen, f"{name} and {seen[shapes]} cannot be told apart"
        seen[shapes] = name
        names[name] = set(state)
        families.setdefault(zoo.get_model_builder(name).__module__, name)
    assert len(names) >= 80
    for name, keys in names.items():
        likely = max(families, key=lambda family: len(names[families[family]] & keys))
        assert likely == zoo.get_model_builder(name).__module__, name


def test_a_blank_network_computes_nothing_and_has_every_shape() -> None:
    real = zoo.swin_t(weights=None)
    blank = shapes_only("swin_t")
    assert {name: t.shape for name, t in blank.items()} == {
        name: t.shape for name, t in real.state_dict().items()
    }
    assert all(t.is_meta for name, t in blank.items() if name.endswith("qkv.weight"))


def lacking(name: str) -> dict[str, torch.Tensor]:
    tensors = zoo.get_model(name, weights=None).state_dict()
    tensors.popitem()
    return tensors


@pytest.mark.parametrize(
    ("tensors", "says"),
    [
        (
            lambda: lacking("resnet18"),
            "the closest, resnet18, has 102 tensors, of which it has 101, 101 in the same shape",
        ),
        (
            lambda: zoo.MobileNetV2(width_mult=0.35).state_dict(),
            "the closest, mobilenet_v2, has 262",
        ),
        (lambda: nn.Linear(3, 2).state_dict(), "of which it has 0"),
    ],
    ids=["one tensor short", "another width", "foreign"],
)
def test_no_torchvision_network_names_the_closest(
    tensors: Callable[[], dict[str, torch.Tensor]], says: str
) -> None:
    with pytest.raises(UsageError) as error:
        build_model(holding(tensors()), None, {})
    message = sentence(error)
    assert says in message
    assert "--arch path/to/file.py:factory" in message


@pytest.mark.parametrize(
    ("arch", "kwargs", "says"),
    [
        (
            "resnet19",
            {},
            "no classification network 'resnet19' .did you mean resnet1.*package.module:factory",
        ),
        ("mine.net", {}, "no classification network 'mine.net'; one of your own, write it as"),
        ("fcn_resnet50", {}, "no classification network 'fcn_resnet50'"),
        ("resnet18", {"depth": 3}, "resnet18 called with .depth=3. raised TypeError"),
        (None, {"width_mult": 0.5}, "width_mult.*name it with --arch"),
    ],
)
def test_torchvision_networks_that_cannot_be_built(
    arch: str | None, kwargs: dict[str, object], says: str
) -> None:
    with pytest.raises(UsageError, match=says) as error:
        build_model(holding({"w": torch.ones(1)}), arch, kwargs)
    sentence(error)


def test_torchvision_weights_that_do_not_fit() -> None:
    tensors = zoo.resnet18(num_classes=10).state_dict()
    with pytest.raises(CheckpointError, match="does not fit resnet34: it lacks 80 tensors"):
        build_model(holding(tensors), "resnet34", {})
    with pytest.raises(CheckpointError, match="only the classes differ: give --set model"):
        build_model(holding(tensors), "resnet18", {"num_classes": 4})
