"""A finished run as the bytes of its file, which a budget in bytes counts to the last."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ddqcli.artifact.encode import encode_artifact
from ddqcli.artifact.sizes import Sizes
from ddqcli.qat.frozen import FrozenModel
from ddqcli.recipe.schema import Recipe
from ddqcli.runs.report import Report

_TEXT_STEP = 64  # bytes


def encode_run(
    frozen: FrozenModel, report: Report, recipe: Recipe, extra: Mapping[str, Any]
) -> tuple[bytes, Sizes]:
    """Return the bytes of a run's file, and where they went.

    A file beyond a target in bytes leaves out what only informs: first the recipe, then warnings,
    the course of the run and metrics that decide nothing. `make_budget` reserved the bytes of a
    typical report, so that few files need this.
    """
    limit = report.totals.budget_bytes if recipe.budget.target_size is not None else None
    for meta in _metas(report, recipe):
        raw, sizes = encode_artifact(
            frozen.quantized,
            frozen.activations,
            frozen.floats,
            frozen.aliases,
            {**meta, **extra},
            frozen.constants,
        )
        if limit is None or sizes.file <= limit:
            break
    return raw, sizes


def with_file_size(report: Report, frozen: FrozenModel, recipe: Recipe) -> Report:
    """Return the report with the size of its own file, in which it is written.

    A target in bits counts no text. Its budget in bytes grows if the file says more than was
    reserved; in steps, since its digits are part of the text, which is packed.
    """
    sized = _sized(report, frozen, recipe)
    if recipe.budget.target_size is not None:
        return sized
    while (budget := sized.totals.budget_bytes) is not None and sized.totals.bytes > budget:
        steps = (sized.totals.bytes - budget) // _TEXT_STEP + 1
        sized = _sized(report.with_budget(budget + steps * _TEXT_STEP), frozen, recipe)
    return sized


def _sized(report: Report, frozen: FrozenModel, recipe: Recipe) -> Report:
    _, sizes = encode_run(frozen, report, recipe, {})
    return report.with_manifest(sizes.manifest + sizes.header)


def file_meta(report: Report, recipe: Recipe) -> dict[str, Any]:
    """Return what the file of a run says about it."""
    return {"report": report.embedded(), "recipe": portable_recipe(recipe)}


def _metas(report: Report, recipe: Recipe) -> Iterator[dict[str, Any]]:
    """Yield what the file may say, the most first."""
    yield file_meta(report, recipe)
    yield {"report": report.embedded()}
    yield {"report": report.embedded() | {"warnings": [], "course": None, "other_metrics": []}}


def portable_recipe(recipe: Recipe) -> dict[str, Any]:
    """Return what differs from the recipe's defaults, with paths reduced to file names."""
    settings = recipe.model_dump(exclude_defaults=True)
    for section, field in (("model", "checkpoint"), ("model", "arch"), ("data", "source")):
        if value := settings.get(section, {}).get(field):
            names = [Path(part).name or part for part in value.split(":")]
            settings[section][field] = ":".join(names)
    for section in ("model", "data"):
        if kwargs := settings.get(section, {}).get("kwargs"):
            settings[section]["kwargs"] = _without_folders(kwargs)
    return settings


def _without_folders(value: Any) -> Any:
    """Reduce every absolute path in nested lists and dicts to its name."""
    if isinstance(value, dict):
        return {key: _without_folders(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_folders(item) for item in value]
    return Path(value).name if isinstance(value, str) and value.startswith(("/", "~")) else value
