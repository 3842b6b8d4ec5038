"""A finished run folder and the file exported from it, made by hand without training."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ddqcli.artifact.encode import encode_artifact
from ddqcli.qat.frozen import FrozenModel
from ddqcli.recipe.schema import Recipe
from ddqcli.runs.evaluation import Accuracy
from ddqcli.runs.report import Course, Report, SweepRow, SweepTable
from ddqcli.runs.run import Run

SCALE, ZERO = 1 / 128, 100  # of every tensor; the scale has few bits, as a file wants it
KINDS = ("Conv2d", "depthwise Conv2d", "Linear")
STEPS = 100


def make_run(
    folder: Path, layers: int = 4, *, axis: int | None = None, names: Sequence[str] | None = None
) -> Run:
    """Make a run of `layers` layers and one bias; with `axis`, each channel has its own levels.

    `names` are those of the layers.
    """
    names = names or [f"block{k + 1}.conv.weight" for k in range(layers)]
    run = Run.create(folder, "made")
    run.write_recipe(Recipe.model_validate({"name": "made", "budget": {"target_bits": 4}}))
    entries = [_entry(name, k, axis) for k, name in enumerate(names)]
    entries.append(_entry("fc.bias", 9, None))
    frozen = {
        "quantized": [{**entry["quantized"]} for entry in entries],
        "trained": {},
        "activations": [],
        "floats": {"bn.weight": torch.ones(8)},
        "aliases": {},
        "weights": {entry["quantized"]["name"]: entry["weights"] for entry in entries},
    }
    run.save("final.pt", frozen)
    run.write_report(make_report([_row(entry, k) for k, entry in enumerate(entries)]))
    (folder / "metrics.jsonl").write_text(
        "".join(f"{json.dumps(line)}\n" for line in _lines(entries))
    )
    return run


def make_sweep(folder: Path, *targets: int, finished: bool = True) -> Run:
    """Make a sweep of a run for each target in bits, the largest first."""
    recipes = [Recipe.model_validate({"budget": {"target_bits": target}}) for target in targets]
    sweep = Run.create(folder, "made")
    sweep.write_recipe(*recipes)
    rows = []
    for target, recipe in zip(targets, recipes, strict=True):
        run = make_run(sweep.path / f"{target}-bits")
        run.write_recipe(recipe)
        accuracy = Accuracy.of(92.5, 92.5 - 8 / target)
        totals = run.report().totals.model_copy(update={"bytes": 1000 * target})
        run.write_report(run.report().model_copy(update={"accuracy": accuracy, "totals": totals}))
        rows.append(SweepRow.of(recipe.budget.target, run.report(), run.path.name))
    if finished:
        sweep.write_sweep(SweepTable.of(run.report(), rows))
    return sweep


def export_made(run: Run, path: Path) -> Path:
    """Write the file that `ddq export` would write, without its verification."""
    frozen = FrozenModel.from_state(torch.load(run.path / "final.pt"))
    meta = {"report": run.report().embedded()}
    path.write_bytes(encode_artifact(frozen.quantized, [], frozen.floats, {}, meta)[0])
    return path


def make_report(rows: list[dict[str, Any]] | None = None) -> Report:
    """Return a report of these layers, or of one."""
    rows = rows or [_row(_entry("conv.weight", 0, None), 0)]
    quantized = sum(row["bytes"] for row in rows)
    weights = sum(row["float_bytes"] // 4 for row in rows)
    totals = {
        "bytes": quantized + 32,
        "float_bytes": 4 * weights + 32,
        "budget_bytes": quantized + 100,
        "average_bits": round(8 * quantized / weights, 4),
        "quantized_bytes": quantized,
        "kept_bytes": 32,
        "weights": weights,
    }
    source = {"path": "some/net.pt", "sha256": "0" * 64, "arch": "net.py:build", "ddq": "0.1.0"}
    return Report.model_validate(
        {
            "version": 1,
            "layers": rows,
            "totals": totals,
            "accuracy": {"float": 92.5, "quantized": 91.25, "drop": 1.25},
            "course": make_course().data(),
            "activations": [],
            "kept_float": {"bn.weight": "no layer's weight"},
            "source": source,
            "run": {"steps": STEPS, "seed": 0},
            "warnings": ["levels that no weight takes"],
        }
    )


def make_course(**changes: Any) -> Course:
    """Return the course of a run that training improved, with `changes` to its fields."""
    accuracies = {"float": 92.5, "quantized": 85.0, "compensated": 90.5, "trained": 91.25}
    course = {
        "stages": [{"name": name, "accuracy": value} for name, value in accuracies.items()],
        "delivered": "trained",
        "looks": 6,
        "best_step": 80,
    }
    return Course.model_validate(course | changes)


def weights_of(run: Run) -> dict[str, np.ndarray]:
    return {
        name: value.numpy() for name, value in torch.load(run.path / "final.pt")["weights"].items()
    }


def dequantized(run: Run) -> dict[str, np.ndarray]:
    """Return every quantized tensor's values by definition, one by one, in float64."""
    found = {}
    for q in torch.load(run.path / "final.pt")["quantized"]:
        values = np.zeros(q["shape"])
        for place in np.ndindex(*q["shape"]):
            group = 0 if q["axis"] is None else place[q["axis"]]
            level = float(q["levels"][group][int(q["indices"][place])])
            values[place] = (level - float(q["zero_point"][group])) * float(q["scale"][group])
        found[q["name"]] = values
    return found


def _entry(name: str, k: int, axis: int | None) -> dict[str, Any]:
    """Return normal weights, rounded to the nearest of 2^bits uneven levels of the grid."""
    random = np.random.default_rng(k)
    shape = (8,) if name.endswith("bias") else (6, 4 + k % 5, 3, 3)
    weights = random.normal(0, 0.2, shape).clip(-0.75, 1.2).astype(np.float32)
    groups, bits = 1 if axis is None else shape[axis], 8 if name.endswith("bias") else 2 + k % 3
    levels = [
        np.arange(256, dtype=np.uint8)
        if bits == 8
        else np.sort(random.choice(np.arange(60, 150), 2**bits)).astype(np.uint8)
        for _ in range(groups)
    ]
    rows = (
        weights.reshape(1, -1)
        if axis is None
        else np.moveaxis(weights, axis, 0).reshape(groups, -1)
    )
    nearest = [
        np.argmin(abs(row[:, None] - (level.astype(float) - ZERO) * SCALE), 1)
        for row, level in zip(rows, levels, strict=True)
    ]
    indices = np.stack(nearest).astype(np.uint8)
    if axis is not None:
        indices = np.moveaxis(
            indices.reshape(groups, *np.moveaxis(weights, axis, 0).shape[1:]), 0, axis
        )
    quantized = {
        "name": name,
        "shape": shape,
        "axis": axis,
        "indices": torch.tensor(indices.reshape(shape)),
        "levels": [torch.tensor(level) for level in levels],
        "scale": torch.full((groups,), SCALE),
        "zero_point": torch.full((groups,), ZERO, dtype=torch.uint8),
    }
    return {"quantized": quantized, "weights": torch.tensor(weights), "bits": bits}


def _stored(q: dict[str, Any], bits: float) -> int:
    """Return the bytes of a tensor: its indices, and a table for each group."""
    table = (2**bits if bits < 8 else 0) + 6
    return math.ceil(math.prod(q["shape"]) * bits / 8) + round(len(q["levels"]) * table)


def _row(entry: dict[str, Any], k: int) -> dict[str, Any]:
    q, numel = entry["quantized"], math.prod(entry["quantized"]["shape"])
    return {
        "name": q["name"],
        "kind": "bias" if q["name"].endswith("bias") else KINDS[k % 3],
        "shape": q["shape"],
        "bits": entry["bits"],
        "levels": max(len(level.unique()) for level in q["levels"]),
        "bytes": _stored(q, entry["bits"]),
        "float_bytes": 4 * numel,
        "error": 0.01 * (k + 1),
    }


def _lines(entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return metrics every 10 steps, bits falling from 8 to the last; snapshots, looks every 20.

    The snapshots show no levels of layers 1 and 2 before step 40, as if they had 8 bits.
    """
    lines = []
    weights = sum(math.prod(e["quantized"]["shape"]) for e in entries)
    for step in range(0, STEPS + 1, 10):
        bits = {e["quantized"]["name"]: max(e["bits"], 8 - step / 20) for e in entries}
        stored = sum(_stored(e["quantized"], bits[e["quantized"]["name"]]) for e in entries)
        if step:
            metrics = {"step": step, "steps": STEPS, "epoch": 1, "lr": 0.1, "seconds": 1.0}
            metrics |= {"loss": 1 / step, "train_accuracy": step / 2}
            lines.append({**metrics, "average_bits": 8 * stored / weights, "bits": bits})
        if step % 20 == 0:
            shown = [
                e
                for e in entries[2 * (step < 40) :]
                if e["bits"] < 8 and len(e["quantized"]["levels"]) == 1
            ]
            levels = {
                e["quantized"]["name"]: (
                    (e["quantized"]["levels"][0].double() - ZERO) * SCALE
                ).tolist()
                for e in shown
            }
            errors = {
                e["quantized"]["name"]: 0.01 * (k + 1) + 1 / (step + 10)
                for k, e in enumerate(entries)
            }
            lines.append({"step": step, "error": errors, "levels": levels})
            held_out = {"held_out_loss": 1.2 / (step + 10), "held_out_accuracy": 5 + step / 3}
            lines.append({"step": step, **held_out})
    return lines
