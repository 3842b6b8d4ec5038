"""torchvision's networks are built by name, and recognized by their keys and shapes."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from networks import assert_holds, holding, sentence, trained
from torch import nn
from torchvision import models as zoo

from ddqcli.checkpoint import torchvision_models
from ddqcli.checkpoint.architecture import build_model
from ddqcli.errors import CheckpointError, UsageError


def shapes_only(name: str, **kwargs: object) -> dict[str, torch.Tensor]:
    """Return a network's state on the meta device, without num_batches_tracked as in old files."""
    with torchvision_models.ShapesOnly():
        state = zoo.get_model(name, weights=None, **kwargs).state_dict()
    return {key: tensor for key, tensor in state.items() if not key.endswith("num_batches_tracked")}


CLASSES = {
    "squeezenet1_1": 1000,
    "resnet18": 10,
    "mobilenet_v3_small": 7,
    "regnet_y_400mf": 3,
    "shufflenet_v2_x0_5": 1,
    "mnasnet0_5": 100,
}


@pytest.mark.parametrize(
    ("name", "given"),
    [(name, k % 2 == 0) for k, name in enumerate(CLASSES)],
)
def test_torchvision_by_name_and_by_shapes(name: str, given: bool) -> None:
    classes = CLASSES[name]
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
    assert built.note == (
        "torchvision resnet18 with 10 classes, found by its keys and shapes, "
        "prefix 'model.' stripped"
    )
    assert torch.equal(built.model.layer1[0].bn1.running_var, tensors["layer1.0.bn1.running_var"])


@pytest.mark.parametrize("given", [True, False], ids=["named", "found"])
def test_auxiliary_heads_are_dropped_unless_requested(given: bool) -> None:
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
    assert (
        torchvision_models.recognize(
            Path("w"), torchvision_models._current_names(old, keep_auxiliary=False), {}
        )[0]
        == "vit_b_16"
    )


def test_the_image_size_of_a_vision_transformer() -> None:
    name, kwargs = torchvision_models.recognize(
        Path("w"), shapes_only("vit_b_32", image_size=384, num_classes=5), {}
    )
    assert (name, kwargs) == ("vit_b_32", {"image_size": 384, "num_classes": 5})


def test_every_network_has_its_own_shapes_and_is_found_in_its_family() -> None:
    """`recognize` relies on both: no two share keys and shapes, and names lead to the family."""
    names: dict[str, set[str]] = {}
    families: dict[str, str] = {}  # module -> its first network
    seen: dict[tuple[object, ...], str] = {}
    for name in torchvision_models.classifier_names():
        kwargs = {"init_weights": False} if name in torchvision_models._WITH_AUXILIARY_HEADS else {}
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


def test_shapes_are_known_without_memory_or_initial_values() -> None:
    real = zoo.swin_t(weights=None)
    shapes = shapes_only("swin_t")
    assert {name: t.shape for name, t in shapes.items()} == {
        name: t.shape for name, t in real.state_dict().items()
    }
    assert all(t.is_meta for name, t in shapes.items() if name.endswith("qkv.weight"))


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
            "is no classification network of torchvision; say how",
        ),
        (lambda: nn.Linear(3, 2).state_dict(), "of torchvision; say how to build it"),
    ],
    ids=["one tensor short", "another width", "foreign"],
)
def test_no_torchvision_network_names_the_closest_if_most_shapes_match(
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
