"""`ddq finetune` with several targets, the largest budget first.

Each further target starts from the trained weights of the one before.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ddqcli import plots
from ddqcli.commands.finetune import finetune, plan
from ddqcli.commands.run_folder import opened
from ddqcli.errors import BudgetError, DDQError, UsageError
from ddqcli.inspection.layer_figures import output_folder
from ddqcli.recipe.schema import Recipe
from ddqcli.runs.find import target_folder
from ddqcli.runs.names import SWEEP_PICTURE
from ddqcli.runs.report import Report, SweepRow, SweepTable
from ddqcli.runs.run import FINAL, Run
from ddqcli.runs.trust import remember
from ddqcli.training import distributed
from ddqcli.training.device import resolve_device
from ddqcli.training.listener import Listener, main_listener


@dataclass(frozen=True)
class SweepResult:
    """A finished sweep. After a dry run `run_dir` is None, and nothing was trained."""

    run_dir: Path | None
    table: SweepTable
    seconds: float  # that the command took; of a resumed sweep, since it was resumed
    file_format: str = "safetensors"  # of the files that the budgets are for

    def data(self) -> dict[str, Any]:
        """Return the result as JSON-able values."""
        run_dir = None if self.run_dir is None else str(self.run_dir)
        return {"run_dir": run_dir, "seconds": round(self.seconds, 1), **self.table.data()}


def sweep(
    checkpoint_path: Path,
    recipes: Sequence[Recipe],
    *,
    run: Run | None = None,
    run_dir: Path | None = None,
    dry_run: bool = False,
    listener: Listener | None = None,
) -> SweepResult:
    """Finetune a checkpoint to the target of each recipe; the recipes differ in nothing else.

    `run` is an unfinished sweep to continue; without it, a new one is made at `run_dir`. All
    targets are checked before the first is trained. Raises DDQError and its children.
    """
    began = time.monotonic()
    listener = main_listener(listener)
    recipes = [recipe.with_checkpoint(checkpoint_path) for recipe in recipes]
    checked = _check_targets(checkpoint_path, recipes)
    if dry_run:
        finetune(checkpoint_path, recipes[0], dry_run=True, listener=listener)  # for its data
        rows = [SweepRow.of(recipe.budget.target, report, None) for recipe, report in checked]
        return SweepResult(None, SweepTable.of(checked[0][1], rows), time.monotonic() - began)
    recipes_by_size = [recipe for recipe, _ in checked]
    device = distributed.local_device(resolve_device(recipes[0].train.device))
    with distributed.process_group(device), _in_folder(run, run_dir, recipes, listener) as run:
        reports = _finetune_each(checkpoint_path, recipes_by_size, run, listener)
        rows = [
            SweepRow.of(recipe.budget.target, report, target_folder(recipe.budget.target))
            for recipe, report in zip(recipes_by_size, reports, strict=True)
        ]
        table = SweepTable.of(reports[0], rows)
        if distributed.is_main():
            _write_picture(table, run.path)
            run.write_sweep(table)
    file_format = recipes[0].budget.target_format
    return SweepResult(run.path, table, time.monotonic() - began, file_format)


def _check_targets(checkpoint_path: Path, recipes: Sequence[Recipe]) -> list[tuple[Recipe, Report]]:
    """Return each recipe with the report of its first bits, the largest budget first.

    Raises BudgetError, which names the target, if one cannot be met, and UsageError if two are the
    same size.
    """
    checked = [(recipe, _plan(checkpoint_path, recipe)) for recipe in recipes]
    target_of_size: dict[int | None, str] = {}
    for recipe, report in checked:
        target, size = recipe.budget.target, report.totals.budget_bytes
        if recipe.budget.target_size and target_of_size.setdefault(size, target) != target:
            raise UsageError(
                f"The targets {target_of_size[size]} and {target} are the same: {size:,} bytes."
            )
    return sorted(
        checked,
        key=lambda pair: pair[0].budget.target_bits or pair[1].totals.budget_bytes or 0,
        reverse=True,
    )


def _plan(checkpoint_path: Path, recipe: Recipe) -> Report:
    try:
        return plan(checkpoint_path, recipe)
    except BudgetError as error:
        raise BudgetError(f"Target {recipe.budget.target}: {error}") from error


def _finetune_each(
    checkpoint_path: Path, recipes: Sequence[Recipe], sweep_run: Run, listener: Listener
) -> list[Report]:
    """Finetune to each target that is not finished, and return all reports."""
    reports: list[Report] = []
    start: Run | None = None
    introduced = False
    for number, recipe in enumerate(recipes):
        run = Run(sweep_run.path / target_folder(recipe.budget.target))
        origin = f", starting from {start.path}" if start and start.report().is_trained else ""
        listener.note(
            f"target {recipe.budget.target} ({number + 1} of {len(recipes)}): {run.path}{origin}"
        )
        listener.target(recipe.budget.target)
        unfinished = run if run.recipe_path.exists() else None
        if unfinished:
            unfinished.check_same_recipes([recipe])
        if not _is_complete(run):
            distributed.barrier()  # until all processes have looked
            finetune(
                checkpoint_path,
                recipe,
                run=unfinished,
                run_dir=run.path,
                start=start,
                introduced=introduced,
                listener=listener,
            )
            introduced = True
        distributed.barrier()  # until the process that writes has written
        reports.append(run.report())
        start = run
    return reports


def _is_complete(run: Run) -> bool:
    """True if the run is finished and undamaged; any other is continued from its last state."""
    try:
        run.load(FINAL)
        run.report()
    except DDQError:
        return False
    return True


@contextmanager
def _in_folder(
    run: Run | None, run_dir: Path | None, recipes: Sequence[Recipe], listener: Listener
) -> Iterator[Run]:
    """Hold the folder of the sweep to continue, or a new one.

    A new folder is removed again if an error leaves nothing in it.
    """
    new, run = run is None, opened(run, run_dir, recipes[0], listener.note)
    with run.locked():
        try:
            if distributed.is_main():
                remember(run, recipes[0])  # the first target's run tells if that fails
            if new:
                run.write_recipe(*recipes)
            yield run
        except BaseException:
            if new:
                run.remove_if_untrained()
            raise


def _write_picture(table: SweepTable, folder: Path) -> None:
    """Draw size against the metric of all targets, and of the float model."""
    points = [(row.bytes, _value(row.accuracy), row.target) for row in table.targets]
    float_model = (table.float.bytes, _value(table.float.accuracy))
    with output_folder(folder):
        figure = plots.size_against_accuracy_figure(
            {"quantized": points}, float_model, table.metric.label
        )
        plots.save(figure, folder / SWEEP_PICTURE)


def _value(accuracy: float | None) -> float:
    return float("nan") if accuracy is None else accuracy  # a finished run measured it
