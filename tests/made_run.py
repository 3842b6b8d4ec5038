"""A finished run folder, and the file exported from it, made by hand: no training, every number known."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ddqcli.artifact.tensors import QuantizedTensor
from ddqcli.artifact.write import write_artifact
from ddqcli.inspection.report import embedded_report
from ddqcli.recipe.schema import Recipe
from ddqcli.runs.run import Run

SCALE, ZERO = 1 / 128, 100  # of every tensor; the scale has few bits, as a file wants it
KINDS = ("Conv2d", "depthwise Conv2d", "Linear")
STEPS = 100


def make_run(folder: Path, layers: int = 4, *, axis: int | None = None) -> Run:
    """A run of so many layers and one bias; with `axis`, each channel has its own levels."""
    run = Run.create(folder, "made")
    run.write_recipe(Recipe.model_validate({"name": "made", "budget": {"target_bits": 4}}))
    entries = [_entry(f"block{k + 1}.conv.weight", k, axis) for k in range(layers)] + [
        _entry("fc.bias", 9, None)
    ]
    frozen = {
        "quantized": [{**entry["quantized"]} for entry in entries],
        "trained": {},
        "activations": [],
        "floats": {"bn.weight": torch.ones(8)},
        "aliases": {},
        "weights": {entry["quantized"]["name"]: entry["weights"] for entry in entries},
    }
    run.save("final.pt", frozen)
    run.write_report(_report([_row(entry, k) for k, entry in enumerate(entries)]))
    (folder / "metrics.jsonl").write_text(
        "".join(f"{json.dumps(line)}\n" for line in _lines(entries))
    )
    return run


def export_made(run: Run, path: Path) -> Path:
    """What `ddq export` would write, by the writer alone."""
    frozen = torch.load(run.path / "final.pt")
    tensors = [
        QuantizedTensor(
            q["name"], tuple(q["shape"]), q["axis"], q["indices"].numpy().reshape(-1),
            tuple(level.numpy() for level in q["levels"]), q["scale"].numpy(), q["zero_point"].numpy(),
        )
        for q in frozen["quantized"]
    ]  # fmt: skip
    floats = {name: value.numpy() for name, value in frozen["floats"].items()}
    write_artifact(path, tensors, [], floats, {}, {"report": embedded_report(run.report())})
    return path


def weights_of(run: Run) -> dict[str, np.ndarray]:
    return {
        name: value.numpy() for name, value in torch.load(run.path / "final.pt")["weights"].items()
    }


def dequantized(run: Run) -> dict[str, np.ndarray]:
    """Every quantized tensor's values by its definition, one by one, in float64."""
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
    """Normal weights, and the nearest of 2^bits levels of the grid, which are not evenly spread."""
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
        "name": name, "shape": shape, "axis": axis, "indices": torch.tensor(indices.reshape(shape)),
        "levels": [torch.tensor(level) for level in levels], "scale": torch.full((groups,), SCALE),
        "zero_point": torch.full((groups,), ZERO, dtype=torch.uint8),
    }  # fmt: skip
    return {"quantized": quantized, "weights": torch.tensor(weights), "bits": bits}


def _stored(q: dict[str, Any], bits: float) -> int:
    """Bytes of a tensor: its indices, and a table for each group."""
    table = (2**bits if bits < 8 else 0) + 6
    return math.ceil(math.prod(q["shape"]) * bits / 8) + round(len(q["levels"]) * table)


def _row(entry: dict[str, Any], k: int) -> dict[str, Any]:
    q, size = entry["quantized"], math.prod(entry["quantized"]["shape"])
    return {
        "name": q["name"], "kind": "bias" if q["name"].endswith("bias") else KINDS[k % 3], "shape": list(q["shape"]),
        "bits": entry["bits"], "levels": max(len(level.unique()) for level in q["levels"]),
        "bytes": _stored(q, entry["bits"]), "float_bytes": 4 * size, "error": 0.01 * (k + 1),
    }  # fmt: skip


def _report(rows: list[dict[str, Any]]) -> dict[str, Any]:
    quantized, weights = (
        sum(row["bytes"] for row in rows),
        sum(row["float_bytes"] // 4 for row in rows),
    )
    return {
        "version": 1, "layers": rows,
        "totals": {
            "bytes": quantized + 32, "float_bytes": 4 * weights + 32, "budget_bytes": quantized + 100,
            "average_bits": round(8 * quantized / weights, 4), "quantized_bytes": quantized, "kept_bytes": 32,
            "weights": weights,
        },
        "accuracy": {"float": 92.5, "quantized": 91.25, "drop": 1.25}, "activations": [],
        "kept_float": {"bn.weight": "no layer's weight"},
        "source": {"path": "some/net.pt", "sha256": "0" * 64, "arch": "net.py:build", "ddq": "0.1.0"},
        "run": {"steps": STEPS, "seed": 0}, "warnings": ["levels that no weight takes"],
    }  # fmt: skip


def _lines(entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Metrics every 10 steps, bits falling from 8 to the last; a snapshot each 20. Layers 1 and 2 have 8 bits at first."""
    lines = []
    weights = sum(math.prod(e["quantized"]["shape"]) for e in entries)
    for step in range(0, STEPS + 1, 10):
        bits = {e["quantized"]["name"]: max(e["bits"], 8 - step / 20) for e in entries}
        stored = sum(_stored(e["quantized"], bits[e["quantized"]["name"]]) for e in entries)
        if step:
            lines.append({
                "step": step, "steps": STEPS, "epoch": 1, "loss": 1 / step, "train_accuracy": step / 2, "lr": 0.1,
                "average_bits": 8 * stored / weights, "seconds": 1.0, "bits": bits,
            })  # fmt: skip
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
    return lines
