"""Convert, calibrate, train for one step and evaluate every classifier of torchvision, on noise.

    python tests/benchmarks/registry_sweep.py [--only TEXT ...] [--threads N] [--json FILE]

Each architecture must keep its budget, use it, and keep the names and shapes of its parameters.
`--only resnet` selects the architectures with "resnet" in their name. All 80 take half an hour on
one thread and up to 11 GB of memory. The exit code is 1 if any fails.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
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
from ddqcli.training.defaults import with_defaults
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
    """The result for one architecture."""

    arch: str
    size: int  # pixels
    values: int  # quantized values
    quantized: int  # quantized tensors
    kept: int  # tensors and layer inputs that stay float
    inputs: int  # quantized layer inputs
    bits: float  # average per value after the step, overhead bytes included
    seconds: float
    fault: str | None = None


class Noise:
    """A loader of one batch of random images."""

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
    """Return a factory for the architecture and an image size that it accepts."""
    size, kwargs = 64, {"num_classes": CLASSES}
    if arch.startswith("vit_"):
        size = 2 * int(arch.rsplit("_", 1)[1])  # two patches per side
        kwargs["image_size"] = size
    elif arch.startswith("maxvit"):
        size = 224  # five halvings must leave a multiple of its partition size, 7
    elif arch.startswith("inception"):
        size = 299  # smallest size for its unpadded auxiliary head
    if arch in ("googlenet", "inception_v3"):
        kwargs["init_weights"] = False  # initialization takes a minute
    return lambda: torchvision.models.get_model(arch, weights=None, **kwargs), size


def check(arch: str, build: Callable[[], nn.Module], size: int, **sections: Any) -> Row:
    """Check one architecture with these sections of the recipe; any exception is a failure."""
    began = time.monotonic()
    torch.manual_seed(0)
    recipe = with_defaults(Recipe.model_validate({**RECIPE, **sections}), 1, BATCH)
    noise = Noise(size)
    data = Data(
        *(noise, noise, noise),
        F.cross_entropy,
        lambda out, y: (out.argmax(1) == y).float(),
        None,
        "noise",
    )
    model = build()
    float_signature = signature(model.state_dict())
    quantized = convert(model, recipe)
    budget = make_budget(quantized, recipe)
    gates = make_rule(recipe.rule, quantized, recipe, budget, 1, BATCH)
    order = execution_order(quantized)
    calibrate(quantized, data, 1, gates.watch)
    inputs = list(quantized.activations)
    assert (order[0], order[-1]) == (inputs[0], inputs[-1]), (
        "the first and last layer executed are not those defined"
    )
    gates.start()
    metrics: list[StepMetrics] = []
    Trainer(quantized, None, data, gates, recipe, 1).run(
        metrics.append, lambda _: None, lambda: None
    )
    assert 0 <= evaluate(quantized.model, data) <= 100
    assert gates.cost() <= (budget.limit or 0), "the budget is exceeded"
    assert is_used(gates), "the budget is not used"
    assert signature(quantized_state(quantized)) == float_signature, "the float names have changed"
    return Row(
        arch, size, budget.weights, len(quantized.tensors), len(quantized.kept_float), len(inputs),
        8 * gates.cost() / budget.weights, time.monotonic() - began,
    )  # fmt: skip


def signature(state: Mapping[str, Tensor]) -> dict[str, tuple[torch.Size, torch.dtype]]:
    """Return the shape and dtype of each tensor of a state dict."""
    return {name: (value.shape, value.dtype) for name, value in state.items()}


def is_used(gates: Rule) -> bool:
    """True if the bits fill 98 % of the budget, or no tensor has room for one more bit."""
    spare = (gates.budget.limit or 0) - gates.cost()
    rises = [
        stored_bytes(t, bits + 1) - stored_bytes(t)
        for t in gates.model.tensors
        if (bits := max(t.quantizer.bits)) < t.max_bits
    ]
    return spare <= 0.02 * (gates.budget.limit or 0) or spare < min(rises, default=0)


def execution_order(quantized: QuantizedModel) -> list[str]:
    """Return a list that the next forward pass fills with layer names in execution order."""
    order: list[str] = []
    for name, quantizer in quantized.activations.items():
        quantizer.register_forward_pre_hook(lambda *_, name=name: order.append(name))
    return order


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--only", nargs="+", default=[""], metavar="TEXT", help="parts of architecture names"
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    archs = torchvision.models.list_models(module=torchvision.models)
    rows = []
    print(
        f"{'architecture':<22}{'px':>4}{'values':>13}{'tensors':>9}{'inputs':>8}{'kept':>6}"
        f"{'bits':>7}{'s':>7}  outcome"
    )
    for arch in (a for a in archs if any(part in a for part in options.only)):
        build, size = registry(arch)
        try:
            row = check(arch, build, size)
        except Exception as error:  # reported as this architecture's outcome
            traceback.print_exc(file=sys.stderr)
            row = Row(arch, size, 0, 0, 0, 0, 0.0, 0.0, f"{type(error).__name__}: {error}")
        print(
            f"{row.arch:<22}{row.size:>4}{row.values:>13,}{row.quantized:>9}{row.inputs:>8}"
            f"{row.kept:>6}{row.bits:>7.3f}{row.seconds:>7.1f}  {row.fault or 'ok'}",
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
