"""The recipes in the repository: every one loads, and ImageNet's table selects what it says."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from ddqcli.recipe.assignments import with_assignments
from ddqcli.recipe.file import load_recipes
from ddqcli.recipe.schema import Recipe

REPOSITORY = Path(__file__).parents[1]
RECIPES = sorted((REPOSITORY / "recipes").rglob("*.y*ml"))
IMAGENET = REPOSITORY / "recipes" / "imagenet"


def load(path: Path, flags: str = "") -> Recipe:
    """Load one recipe with `--set` flags, as `ddq finetune` does."""
    assignments = [text for text in shlex.split(flags) if text != "--set"]
    (recipe,) = load_recipes(path, with_assignments({}, assignments))
    return recipe


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_every_recipe_loads(path: Path) -> None:
    assert load(path).name


def test_every_kind_of_recipe_is_found() -> None:
    assert {"ddq.yaml", "cifar10_resnet20.yaml", "resnet18.yaml"} <= {p.name for p in RECIPES}


# ---- ImageNet

NETWORKS = {
    "mobilenet_v2": ("MobileNet_V2_Weights.IMAGENET1K_V1", 4e-5),
    "resnet18": ("ResNet18_Weights.IMAGENET1K_V1", 1e-4),
}
# (W/A, precision) -> weights.max_bits, weights.min_bits, activations.bits, budget.target_bits.
SETTINGS = {
    ("4/8", "mixed"): (8, 2, 8, 4.0),
    ("4/4", "mixed"): (8, 2, 4, 4.0),
    ("2/4", "mixed"): (8, 1, 4, 2.0),
    ("2/2", "mixed"): (8, 1, 2, 2.0),
    ("4/8", "fixed"): (4, 4, 8, None),
    ("4/4", "fixed"): (4, 4, 4, None),
    ("2/4", "fixed"): (2, 2, 4, None),
    ("2/2", "fixed"): (2, 2, 2, None),
}


def table_of_flags() -> dict[tuple[str, str], str]:
    """The `--set` flags in the README's table by (W/A, precision)."""
    text = (IMAGENET / "README.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\d/\d) \| (\w+) \| (?:`(.*?)`)? ?\|", text, re.M)
    return {(bits, precision): flags for bits, precision, flags in rows}


def expected_recipe(network: str, setting: tuple[str, str]) -> dict[str, Any]:
    """Every field of the recipe in full: the defaults but for these."""
    max_bits, min_bits, act_bits, target_bits = SETTINGS[setting]
    torchvision_weights, weight_decay = NETWORKS[network]
    raw = {
        "name": network,
        "model": {"arch": network},
        "data": {"weights": torchvision_weights, "batch_size": 256, "workers": 8},
        "weights": {"max_bits": max_bits, "min_bits": min_bits},
        "activations": {"bits": act_bits},
        "budget": {"target_bits": target_bits},
        "train": {
            "epochs": 30,
            "optimizer": "sgd",
            "lr": 0.01,
            "batch_norm": "batch",
            "weight_decay": weight_decay,
            "distill": {"weight": 0},
            "save_every": 1000,
        },
    }
    return Recipe.model_validate(raw).model_dump()


def test_the_table_lists_every_setting() -> None:
    assert set(table_of_flags()) == set(SETTINGS)


@pytest.mark.parametrize("setting", SETTINGS, ids="-".join)
@pytest.mark.parametrize("network", NETWORKS)
def test_the_flags_in_the_table_select_the_setting(network: str, setting: tuple[str, str]) -> None:
    recipe = load(IMAGENET / f"{network}.yaml", table_of_flags()[setting])
    assert recipe.model_dump() == expected_recipe(network, setting)
