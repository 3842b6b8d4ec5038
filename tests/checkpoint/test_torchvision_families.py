"""One small member of each of torchvision's families is trained for a step.

tests/benchmarks/registry_sweep.py runs every architecture whole.
"""

from __future__ import annotations

import importlib.util
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from small_models import recipe
from torch import nn
from torchvision import models
from torchvision.models.convnext import CNBlockConfig
from torchvision.models.googlenet import BasicConv2d, Inception
from torchvision.models.regnet import BlockParams
from torchvision.models.resnet import Bottleneck

from ddqcli.qat.convert import convert
from ddqcli.qat.model import quantized_state


def load_sweep() -> Any:
    path = Path(__file__).parents[1] / "benchmarks" / "registry_sweep.py"
    spec = importlib.util.spec_from_file_location("registry_sweep", path)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


sweep = load_sweep()


class SmallVGG(models.VGG):
    """The family's own classifier alone has 100 million weights."""

    def __init__(self) -> None:
        super().__init__(
            models.vgg.make_layers([8, "M", 8, "M", 512, "M"]), num_classes=10, init_weights=False
        )
        self.classifier = nn.Sequential(
            nn.Linear(512 * 7 * 7, 16), nn.ReLU(), nn.Dropout(), nn.Linear(16, 10)
        )


def small_alexnet() -> nn.Module:
    model = models.AlexNet(num_classes=10)
    model.classifier = nn.Sequential(
        nn.Dropout(), nn.Linear(256 * 6 * 6, 16), nn.ReLU(), nn.Linear(16, 10)
    )
    return model


def small_efficientnet() -> nn.Module:
    blocks, channels = models.efficientnet._efficientnet_conf(
        "efficientnet_b0", width_mult=0.25, depth_mult=0.3
    )
    return models.EfficientNet(blocks, 0.2, num_classes=10, last_channel=channels)


def small_googlenet() -> nn.Module:
    """The stem's kind and two of nine blocks."""
    return nn.Sequential(
        BasicConv2d(3, 8, kernel_size=7, stride=2, padding=3),
        nn.MaxPool2d(3, stride=2, ceil_mode=True),
        Inception(8, 8, 8, 16, 4, 8, 8),
        Inception(40, 8, 8, 16, 4, 8, 8),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(40, 10),
    )


def small_inception() -> nn.Module:
    """One block of each resolution; the whole network has 22 million weights."""
    blocks = models.inception
    return nn.Sequential(
        blocks.BasicConv2d(3, 8, kernel_size=3, stride=2),
        blocks.InceptionA(8, pool_features=8),
        blocks.InceptionB(232),
        blocks.InceptionC(712, channels_7x7=8),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(768, 10),
    )


def small_vit() -> nn.Module:
    model = models.VisionTransformer(32, 16, 2, 2, 16, 32, num_classes=10)
    nn.init.normal_(
        model.heads.head.weight
    )  # it starts at 0, which would hide everything before it
    return model


def small_regnet() -> nn.Module:
    shape = BlockParams.from_init_params(
        depth=5, w_0=16, w_a=16.0, w_m=2.0, group_width=8, se_ratio=0.25
    )
    return models.RegNet(shape, num_classes=10)


FAMILIES: dict[str, tuple[Any, int]] = {
    "alexnet": (small_alexnet, 64),
    "convnext": (
        partial(
            models.ConvNeXt, [CNBlockConfig(8, 16, 1), CNBlockConfig(16, None, 1)], num_classes=10
        ),
        32,
    ),
    "densenet": (partial(models.DenseNet, 8, (2, 2, 2, 2), 16, num_classes=10), 32),
    "efficientnet": (small_efficientnet, 32),
    "googlenet": (small_googlenet, 32),
    "inception": (small_inception, 32),
    "maxvit": (
        partial(models.MaxVit, (64, 64), 8, 2, [8, 8], [1, 1], 4, 0.0, num_classes=10),
        64,
    ),
    "mnasnet": (partial(models.MNASNet, 0.1, 10), 32),
    "mobilenet_v2": (partial(models.MobileNetV2, width_mult=0.25, num_classes=10), 32),
    "mobilenet_v3": (partial(models.mobilenet_v3_small, width_mult=0.25, num_classes=10), 32),
    "regnet": (small_regnet, 32),
    "resnet": (partial(models.ResNet, models.resnet.BasicBlock, [1, 1, 1, 1], num_classes=10), 32),
    "resnext": (
        partial(
            models.ResNet, Bottleneck, [1, 1, 1, 1], num_classes=10, groups=32, width_per_group=4
        ),
        32,
    ),
    "shufflenet": (partial(models.ShuffleNetV2, [2, 2, 2], [8, 16, 32, 64, 128], 10), 32),
    "squeezenet": (partial(models.SqueezeNet, "1_1", 10), 64),
    "swin": (
        partial(models.SwinTransformer, [4, 4], 8, [2, 2], [2, 2], [4, 4], num_classes=10),
        32,
    ),
    "vgg": (SmallVGG, 32),
    "vit": (small_vit, 32),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_member_of_each_family_trains_and_keeps_its_budget(family: str) -> None:
    build, size = FAMILIES[family]
    # Fitting levels at many bit-widths to every tensor would take most of the time.
    weights = {"min_bits": 3, "max_bits": 5, "init": "uniform"}
    row = sweep.check(
        family, build, size, weights=weights, budget={"target_bits": 4.5}, gates={"rule": "fixed"}
    )
    assert row.quantized >= 10
    assert row.inputs >= 5


@pytest.mark.parametrize(
    "family", ["convnext", "maxvit", "mnasnet", "regnet", "shufflenet", "squeezenet", "swin", "vit"]
)
def test_a_fresh_float_model_with_the_quantized_values_computes_the_same(family: str) -> None:
    build, size = FAMILIES[family]
    torch.manual_seed(0)
    model, fresh = build(), build()
    converted = convert(model, recipe(max_bits=4))
    fresh.load_state_dict(quantized_state(converted), strict=True)
    x = torch.randn(2, 3, size, size)
    with torch.no_grad():
        expected, found = fresh.eval()(x), model.eval()(x)
    assert torch.equal(found, expected)
    assert found.unique().numel() > 2


def test_the_sweep_knows_every_classification_architecture() -> None:
    known = models.list_models(module=models)
    assert {arch.split("_")[0].rstrip("0123456789") for arch in known} == {
        "alexnet", "convnext", "densenet", "efficientnet", "googlenet", "inception", "maxvit",
        "mnasnet", "mobilenet", "regnet", "resnet", "resnext", "shufflenet", "squeezenet", "swin",
        "vgg", "vit", "wide",
    }  # fmt: skip
    for arch in known:
        build, size = sweep.registry(arch)
        assert callable(build)
        assert 28 <= size <= 64 or arch in ("maxvit_t", "inception_v3")
