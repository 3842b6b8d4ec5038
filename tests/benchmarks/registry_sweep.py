"""Every classification architecture of torchvision: convert, calibrate, one training step, one evaluation, on noise.

    PYTHONPATH=. python tests/benchmarks/registry_sweep.py [--only NAME ...] [--threads N] [--json FILE]

All 80 take half an hour on one thread, the largest 11 GB; --only resnet takes those whose name contains "resnet".
The exit code is 1 if any failed.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F

from ddqcli.data.load import Data
from ddqcli.qat.budget import make_budget, stored_bytes
from ddqcli.qat.convert import convert
from ddqcli.qat.model import QuantizedModel, quantized_state
from ddqcli.qat.rules.base import Rule
from ddqcli.qat.rules.registry import make_rule
from ddqcli.recipe.schema import Recipe
from ddqcli.training.calibrate import calibrate
from ddqcli.training.evaluate import evaluate
from ddqcli.training.metrics import StepMetrics
from ddqcli.training.trainer import Trainer

CLASSES = 10
BATCH = 2
RECIPE = {
    "activations": {"bits": 8},
    "budget": {"target_bits": 4},
    "data": {"batch_size": BATCH},
    "train": {"optimizer": "sgd", "momentum": 0, "lr": 1e-4, "batch_norm": "batch"},
}


@dataclass(frozen=True)
class Row:
    """What became of one architecture."""

    arch: str
    size: int  # pixels
    values: int  # quantized
    quantized: int  # tensors
    kept: int  # tensors and layer inputs that stay float
    inputs: int  # layer inputs that are quantized
    bits: float  # average after the step, tables included
    seconds: float
    fault: str | None = None


class Noise:
    """One batch of random images."""

    samples = BATCH

    def __init__(self, size: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self.batch = (
            torch.randn(BATCH, 3, size, size, generator=generator),
            torch.arange(BATCH) % CLASSES,
        )

    def __len__(self) -> int:
        return 1

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        yield self.batch


def registry(arch: str) -> tuple[Callable[[], nn.Module], int]:
    """A factory for the architecture, and an image size that it takes."""
    size, kwargs = 64, {"num_classes": CLASSES}
    if arch.startswith("vit_"):
        size = 2 * int(arch.rsplit("_", 1)[1])  # two patches a side
        kwargs["image_size"] = size
    elif arch.startswith("maxvit"):
        size = 224  # its partition, 7, under five halvings
    elif arch.startswith("inception"):
        size = 299  # its auxiliary head has no padding
    if arch in ("googlenet", "inception_v3"):
        kwargs["init_weights"] = False  # takes a minute
    return lambda: torchvision.models.get_model(arch, weights=None, **kwargs), size


def check(arch: str, build: Callable[[], nn.Module], size: int, **sections: Any) -> Row:
    """Run one architecture through the engine, with these sections of the recipe. Raises whatever goes wrong."""
    began = time.monotonic()
    torch.manual_seed(0)
    recipe, noise = Recipe.model_validate({**RECIPE, **sections}), Noise(size)
    data = Data(
        *(noise, noise, noise),
        F.cross_entropy,
        lambda out, y: (out.argmax(1) == y).float(),
        None,
        "noise",
    )
    model = build()
    names = {name: (value.shape, value.dtype) for name, value in model.state_dict().items()}
    converted = convert(model, recipe)
    budget = make_budget(converted, recipe)
    gates = make_rule(recipe.gates.rule, converted, recipe, budget, 1, BATCH)
    order = executed(converted)
    calibrate(converted, data, 1, gates.watch)
    inputs = list(converted.activations)
    assert (order[0], order[-1]) == (inputs[0], inputs[-1]), (
        "the first and last layer executed are not those defined"
    )
    gates.start()
    metrics: list[StepMetrics] = []
    Trainer(converted, None, data, gates, recipe, 1).run(
        metrics.append, lambda _: None, lambda: None
    )
    accuracy = evaluate(converted.model, data)
    assert 0 <= accuracy <= 100
    assert gates.cost() <= (budget.limit or 0), "the budget is not kept"
    assert is_used(gates), "the budget is not used"
    state = quantized_state(converted)
    assert {name: (value.shape, value.dtype) for name, value in state.items()} == names, (
        "the float names have changed"
    )
    return Row(
        arch, size, budget.weights, len(converted.tensors), len(converted.kept_float), len(inputs),
        8 * gates.cost() / budget.weights, time.monotonic() - began,
    )  # fmt: skip


def is_used(gates: Rule) -> bool:
    """Whether the bits take 98 % of the budget, or else no tensor could have one more bit."""
    spare = (gates.budget.limit or 0) - gates.cost()
    rises = [
        stored_bytes(t, bits + 1) - stored_bytes(t)
        for t in gates.model.tensors
        if (bits := max(t.quantizer.bits)) < t.max_bits
    ]
    return spare <= 0.02 * (gates.budget.limit or 0) or spare < min(rises, default=0)


def executed(converted: QuantizedModel) -> list[str]:
    """A list that fills with the layers' names in the order in which their inputs are quantized."""
    order: list[str] = []
    for name, quantizer in converted.activations.items():
        quantizer.register_forward_pre_hook(lambda *_, name=name: order.append(name))
    return order


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--only",
        nargs="*",
        default=[""],
        metavar="NAME",
        help="architectures whose name contains one of these",
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    known = torchvision.models.list_models(module=torchvision.models)
    rows = []
    print(
        f"{'architecture':<22}{'px':>4}{'values':>13}{'tensors':>9}{'inputs':>8}{'kept':>6}{'bits':>7}{'s':>7}  outcome"
    )
    for arch in (a for a in known if any(part in a for part in options.only)):
        build, size = registry(arch)
        try:
            row = check(arch, build, size)
        except Exception as error:  # the sweep goes on and reports it
            traceback.print_exc(file=sys.stderr)
            row = Row(arch, size, 0, 0, 0, 0, 0.0, 0.0, f"{type(error).__name__}: {error}")
        print(
            f"{row.arch:<22}{row.size:>4}{row.values:>13,}{row.quantized:>9}{row.inputs:>8}{row.kept:>6}{row.bits:>7.3f}"
            f"{row.seconds:>7.1f}  {row.fault or 'ok'}",
            flush=True,
        )
        rows.append(row)
        gc.collect()
        if options.json:
            options.json.write_text(
                json.dumps([asdict(r) for r in rows], indent=1) + "\n", encoding="utf-8"
            )
    failed = sum(row.fault is not None for row in rows)
    print(f"{len(rows) - failed} of {len(rows)} ok")
    return 1 if failed or not rows else 0


if __name__ == "__main__":
    sys.exit(main())
