"""Warnings: each kind of trouble is named with its remedy, and healthy training gets none."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from small_models import trainer
from torch import nn

from ddqcli.engine.health import find_warnings
from ddqcli.engine.train import Trainer
from ddqcli.recipe import Recipe


def trained(**sections: Any) -> Trainer:
    """A network that has one step behind it, at 4 bits a tensor unless told otherwise."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(128, 10))
    sections = {"weights": {"max_bits": 4}, **sections}
    return trainer(model, Recipe.model_validate({"data": {"batch_size": 8}, **sections}), steps=12)
