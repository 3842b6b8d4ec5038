"""`ddq finetune` with several targets: the largest budget first, each of the others starts from the weights of the one before."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ddqcli import plots
from ddqcli.commands.finetune import FinetuneResult, finetune, opened
from ddqcli.errors import BudgetError, DDQError, UsageError
from ddqcli.inspection.figures import folder
from ddqcli.recipe.schema import Recipe
from ddqcli.runs.run import FINAL, Run
from ddqcli.training import distributed
from ddqcli.training.device import resolve_device
from ddqcli.training.listener import Listener, main_listener

SWEEP_VERSION = 1
PICTURE = "size-accuracy"


def sweep(
    checkpoint_path: Path,
    recipes: Sequence[Recipe],
    *,
    run: Run | None = None,
    run_dir: Path | None = None,
    dry_run: bool = False,
    listener: Listener | None = None,
) -> FinetuneResult:
    """Finetune a checkpoint to each recipe's target; the recipes differ in nothing else. Raises DDQError and its children.

    `run` is an unfinished sweep to go on with; otherwise a new one is made at `run_dir`. All targets are checked before the
    first is trained.
    """
    listener = main_listener(listener)
    recipes = [recipe.with_checkpoint(checkpoint_path) for recipe in recipes]
    checked = [(recipe, _dry(checkpoint_path, recipe)) for recipe in recipes]
    budgets: dict[int, str] = {}
    for recipe, report in checked:
        target, size = recipe.budget.target, report["totals"]["budget_bytes"]
        if recipe.budget.target_size and budgets.setdefault(size, target) != target:
            raise UsageError(
                f"The targets {budgets[size]} and {target} are the same: {size:,} bytes."
            )
    checked.sort(
        key=lambda pair: pair[0].budget.target_bits or pair[1]["totals"]["budget_bytes"],
        reverse=True,
    )
    if dry_run:
        return FinetuneResult(None, _table([(recipe, report, None) for recipe, report in checked]))
    device = distributed.local_device(resolve_device(recipes[0].train.device))
    with distributed.process_group(device), _in_folder(run, run_dir, recipes) as run:
        done: list[tuple[Recipe, dict[str, Any], Run]] = []
        introduced = False
        for number, (recipe, _) in enumerate(checked):
            here, before = Run(run.path / _folder_name(recipe)), done[-1][2] if done else None
            origin = f", starting from {before.path}" if before else ""
            listener.note(
                f"target {recipe.budget.target} ({number + 1} of {len(checked)}): {here.path}{origin}"
            )
            begun = here if here.recipe_path.exists() else None
            if begun:
                begun.check_same_recipes([recipe])
            if not _is_whole(here):
                distributed.barrier()  # until all have looked
                finetune(
                    checkpoint_path,
                    recipe,
                    run=begun,
                    run_dir=here.path,
                    start=before,
                    introduced=introduced,
                    listener=listener,
                )
                introduced = True
            distributed.barrier()  # for the one that writes
            done.append((recipe, here.report(), here))
        table = _table(done)
        if distributed.is_main():
            with folder(run.path):
                plots.save(_picture(table), run.path / PICTURE)
            run.write_sweep(table)
    return FinetuneResult(run.path, table)


def _dry(checkpoint_path: Path, recipe: Recipe) -> dict[str, Any]:
    """What a dry run reports. Raises BudgetError, which says which target cannot be met."""
    try:
        return finetune(checkpoint_path, recipe, dry_run=True).report
    except BudgetError as error:
        raise BudgetError(f"Target {recipe.budget.target}: {error}") from error


def _is_whole(run: Run) -> bool:
    """Whether a target is finished and its files can be read; others are made again from the last training state."""
    try:
        run.load(FINAL)
        run.report()
    except DDQError:
        return False
    return True


@contextmanager
def _in_folder(run: Run | None, run_dir: Path | None, recipes: Sequence[Recipe]) -> Iterator[Run]:
    """The sweep to go on with, or a new one, whose folder goes again if an error leaves nothing in it."""
    new, run = run is None, opened(run, run_dir, recipes[0])
    with run.locked():
        try:
            if new:
                run.write_recipe(*recipes)
            yield run
        except BaseException:
            if new:
                run.remove_if_untrained()
            raise


def _folder_name(recipe: Recipe) -> str:
    """`4-bits`, `150kB`, `12-percent`."""
    return re.sub(r"[^\w.-]+", "-", recipe.budget.target.replace("%", " percent"))


def _table(runs: Sequence[tuple[Recipe, dict[str, Any], Run | None]]) -> dict[str, Any]:
    """The sweep as plain JSON: what the float model has, and a row a target."""
    first = runs[0][1]
    return {
        "version": SWEEP_VERSION,
        "float": {
            "bytes": first["totals"]["float_bytes"],
            "accuracy": (first["accuracy"] or {}).get("float"),
        },
        "targets": [
            {
                "target": recipe.budget.target,
                **{key: report["totals"][key] for key in ("bytes", "budget_bytes", "average_bits")},
                "accuracy": (report["accuracy"] or {}).get("quantized"),
                "drop": (report["accuracy"] or {}).get("drop"),
                "run": run and run.path.name,  # within the sweep's folder
                "warnings": report["warnings"],
            }
            for recipe, report, run in runs
        ],
        "source": first["source"],
    }


def _picture(table: dict[str, Any]) -> Any:
    """Size against accuracy of all targets, and of the float model."""
    points = [(row["bytes"], row["accuracy"] / 100, row["target"]) for row in table["targets"]]
    return plots.size_against_accuracy_figure(
        {"quantized": points}, (table["float"]["bytes"], table["float"]["accuracy"] / 100)
    )
