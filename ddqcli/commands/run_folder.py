"""The folder of a run while `ddq finetune` works in it: made, locked, recorded and cleaned up."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from ddqcli.errors import DDQError, Interrupted
from ddqcli.recipe.schema import Recipe
from ddqcli.runs.elsewhere import remember_folder
from ddqcli.runs.folder import is_sweep, resume_command
from ddqcli.runs.run import ReadOnlyRun, Run
from ddqcli.runs.trust import remember
from ddqcli.training import distributed

Note = Callable[[str], None]


def opened(run: Run | None, run_dir: Path | None, recipe: Recipe, note: Note) -> Run:
    """Return `run`, or a new run at `run_dir`. Ranks other than 0 get it read-only."""
    if distributed.is_main():
        name = recipe.name or Path(recipe.model.checkpoint or "model").stem
        run = run or Run.create(run_dir, name)
        if not is_sweep(run.path.parent):  # a sweep names its runs itself
            note(f"run: {run.path}")
            if run_dir and (reason := remember_folder(run.path)):
                note(f"other commands find it by its name only: no record is kept ({reason})")
    path = distributed.broadcast(run and run.path)
    return run if run and distributed.is_main() else ReadOnlyRun(path)


@contextmanager
def run_folder(run: Run | None, run_dir: Path | None, recipe: Recipe, note: Note) -> Iterator[Run]:
    """Hold the folder of `run`, or of a new run, locked.

    If an error ends a new run before its first checkpoint, the folder is removed. Errors that leave
    something to resume say how.
    """
    is_new, run = run is None, opened(run, run_dir, recipe, note)
    remedy = f"`{resume_command(run.path)}` continues it."
    with run.locked():
        try:
            if is_new:
                if distributed.is_main():
                    remember(run, recipe)  # first: a run that can be resumed is a known one
                run.write_recipe(recipe)
            distributed.barrier()
            yield run
        except (KeyboardInterrupt, Interrupted) as stop:
            number = stop.exit_code - 128 if isinstance(stop, Interrupted) else signal.SIGINT
            raise Interrupted(f"{str(stop) or 'Interrupted'}; {remedy}", number) from stop
        except Exception as error:
            if distributed.is_lost_peer(error):
                raise DDQError(
                    "Another process of this run ended or is silent, and this one cannot continue "
                    f"alone; {remedy}"
                ) from error
            if is_new:
                run.remove_if_untrained()
            raise


def record_code(run: Run, recipe: Recipe, note: Note) -> None:
    """Record on this machine that its user made the run, now that all of its code is imported."""
    if distributed.is_main() and (reason := remember(run, recipe)):
        note(
            f"this machine keeps no record of the run ({reason}), so `ddq export` checks its "
            "outputs, and --resume goes on with it, only with --trust"
        )
