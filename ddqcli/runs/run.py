"""A run folder as an object: its recipe, metrics, training state, final model and report."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

from ddqcli.errors import DDQError, UsageError
from ddqcli.json_text import read_json
from ddqcli.recipe.file import differences, dump_recipes, load_recipes, require_whole
from ddqcli.recipe.schema import Recipe
from ddqcli.runs import find, folder
from ddqcli.runs import metrics as metrics_file
from ddqcli.runs.files import sync, write_atomic
from ddqcli.runs.marker import token_of
from ddqcli.runs.names import (
    FINAL,
    LAST,
    METRICS,
    OWN_FILES,
    RECIPE,
    REPORT,
    SWEEP,
    SWEEP_RECIPE,
)
from ddqcli.runs.record import Record
from ddqcli.runs.report import Report, SweepTable
from ddqcli.runs.state import check_resumable, load_torch, save_torch

__all__ = ["FINAL", "LAST", "METRICS", "RECIPE", "REPORT", "ReadOnlyRun", "Run"]


R = TypeVar("R", bound=Record)
T = TypeVar("T")


@dataclass(frozen=True)
class Run:
    """A run folder; `ddqcli.runs.names` lists its files."""

    path: Path
    trusted: bool = False  # the user said that the code it names may run

    @classmethod
    def create(cls, path: Path | None, name: str) -> Run:
        """Make a new folder at `path`, or at runs/<time>-<name>.

        Raises UsageError if it cannot be made or already holds a run.
        """
        return cls(folder.create_folder(path, name))

    @classmethod
    def open(cls, path: Path | None, target: str | None = None, *, trust: bool = False) -> Run:
        """Return the finished run at `path`, or the newest one for None; of a sweep, a `target`'s.

        `trust` allows the code it names (see `ddqcli.runs.trust`). Raises UsageError if there is
        no run.
        """
        return cls(find.find_finished(path, target), trust)

    @classmethod
    def unfinished(
        cls, path: Path | None, *, or_none: bool = False, trust: bool = False
    ) -> Run | None:
        """Return the run or sweep to resume: at `path`, or the newest unfinished one for None.

        A run inside a sweep stands for the whole sweep. If there is none, returns None with
        `or_none` and raises UsageError otherwise.
        """
        path = find.find_unfinished(path, or_none=or_none)
        return None if path is None else cls(path, trust)

    def locked(self) -> AbstractContextManager[None]:
        """Hold the folder's lock. Raises UsageError if another process holds it."""
        return folder.lock_folder(self.path)

    def held(self) -> AbstractContextManager[None]:
        """Keep others from writing while this process reads. Raises UsageError if one does."""
        return folder.hold_for_reading(self.path)

    def inputs(self) -> list[Path]:
        """Return the files of the run and of its recipe, which no output may replace."""
        recipe = self.recipe()
        source = recipe.data.source or ""
        teacher = recipe.train.teacher
        networks = [recipe.model.checkpoint, recipe.model.arch, teacher.checkpoint, teacher.arch]
        named = [*(name for name in networks if name), source]
        files = [Path(text) for name in named for text in (name, name.partition(":")[0])]
        splits = [Path(source, split) for split in ("train", "val", "test")]
        own = [self.path / name for name in OWN_FILES]
        return [*own, *(path for path in files if path.is_file()), *splits]

    def remove_if_untrained(self) -> None:
        """Remove the folder if it holds no training state; keep files that are not a run's."""
        folder.remove_if_untrained(self.path)

    # ---- recipe

    @property
    def recipe_path(self) -> Path:
        """Path of the resolved recipe, of the run or of the sweep."""
        return folder.recipe_path(self.path)

    def write_recipe(self, *recipes: Recipe) -> None:
        """Write the recipe of a run, or those of a sweep, which differ only in their targets."""
        name = SWEEP_RECIPE if len(recipes) > 1 else RECIPE
        self._write(name, dump_recipes(recipes, self.path).encode())

    def recipe(self) -> Recipe:
        """Return the resolved recipe of this run. Raises RecipeError if it is damaged."""
        return self.recipes()[0]

    def recipes(self) -> list[Recipe]:
        """Return the resolved recipe for each target. Raises RecipeError if they are damaged."""
        recipes = load_recipes(self.recipe_path)
        if token_of(self.path):  # folders of earlier versions have none, and recipes without an end
            require_whole(self.recipe_path)
        return recipes

    def recipe_text(self) -> str:
        """Return the text of recipe.yaml."""
        return (self.path / RECIPE).read_text(encoding="utf-8")

    def check_same_recipes(self, recipes: Sequence[Recipe]) -> None:
        """Raise UsageError, naming the difference, if the run was begun with other recipes."""
        first, second = (
            sorted(each, key=lambda recipe: recipe.budget.target)
            for each in (self.recipes(), recipes)
        )
        before, now = ([recipe.budget.target for recipe in each] for each in (first, second))
        if before != now and max(len(before), len(now)) > 1:
            changes = [f"targets: {', '.join(before)}, now {', '.join(now)}"]
        else:
            changes = differences(first[0], second[0])
        if changes:
            raise UsageError(
                f"{self.path} was begun with another recipe ({'; '.join(changes)}); begin a new "
                "run."
            )

    # ---- metrics

    def append_metrics(self, metrics: Any) -> None:
        """Append a dataclass with a `step` to metrics.jsonl: StepMetrics, Snapshot or Look."""
        metrics_file.append_line(self.path / METRICS, asdict(metrics))

    def metrics(self) -> list[dict[str, Any]]:
        """Return the metrics of the training steps, with the keys of StepMetrics."""
        return self._lines("step")

    def snapshots(self) -> list[dict[str, Any]]:
        """Return the snapshots, with the keys of Snapshot; for each step the last one written."""
        return _last_of_each_step(self._lines("snapshot"))

    def looks(self) -> list[dict[str, Any]]:
        """Return the evaluations on held-out training samples, with the keys of Look.

        For each step the last one written.
        """
        return _last_of_each_step(self._lines("look"))

    def truncate_metrics(self, step: int) -> None:
        """Remove the metrics of steps after `step`, which a resumed run writes again."""
        metrics_file.truncate(self.path / METRICS, step, token_of(self.path))

    def _lines(self, kind: metrics_file.Kind) -> list[dict[str, Any]]:
        entries = metrics_file.read_lines(self.path / METRICS)
        return [entry for entry in entries if metrics_file.kind_of(entry) == kind]

    # ---- training state and final model

    def save(self, name: str, state: dict[str, Any]) -> None:
        """Write the torch file `name` (LAST, FINAL) atomically.

        The metrics up to it are on the disk before, also if the power fails.
        """
        sync(self.path / METRICS)
        save_torch(self.path / name, state, token_of(self.path))

    def load(self, name: str) -> dict[str, Any]:
        """Read the torch file `name`. Raises as `parsed`."""
        return self.parsed(name, dict)

    def parsed(self, name: str, parse: Callable[[dict[str, Any]], T]) -> T:
        """Return what `parse` makes of the torch file `name`.

        Raises UsageError if the file is missing, DDQError if it is damaged: then `parse` fails.
        """
        path = self.path / name
        state = None
        try:
            state = load_torch(path)
            return parse(state)
        except FileNotFoundError as error:
            raise UsageError(
                f"{self.path} holds no {name}; the run did not get that far."
            ) from error
        except Exception as error:
            if state is not None and isinstance(error, DDQError):
                raise  # of `parse`, which knows what is wrong
            raise DDQError(
                f"{path} is damaged and cannot be read; {self._remedy(name)}."
            ) from error

    def probe(self) -> dict[str, Any] | None:
        """Return some inputs and the finished model's outputs, if the run holds any.

        As "input" and "output", of `ddqcli.training.evaluate.probe`; "contiguous" is True if the
        network needs tensors in the usual memory format. Raises as `parsed`.
        """

        def parse(state: dict[str, Any]) -> dict[str, Any] | None:
            if (probe := state.get("probe")) is None:
                return None
            outputs = {name: probe[name] for name in ("input", "output")}
            return {**outputs, "contiguous": bool(state.get("contiguous"))}

        return self.parsed(FINAL, parse)

    def load_resume_state(self, expected: dict[str, Any]) -> dict[str, Any] | None:
        """Return the last training state; None if the run ended before the first.

        Raises UsageError if the run was begun under other conditions than `expected` (see
        `ddqcli.runs.state.check_resumable`), DDQError if the file is damaged.
        """
        if not (self.path / LAST).exists():
            return None
        state = self.load(LAST)
        check_resumable(state, expected, self.path / RECIPE)
        return state

    # ---- results

    def write_sweep(self, table: SweepTable) -> None:
        """Write the table of a sweep, which marks it as finished."""
        self._write_record(SWEEP, table)

    def sweep_table(self) -> SweepTable:
        """Read sweep.json. Raises UsageError if it cannot be read, DDQError if it is damaged."""
        return self._read_record(SWEEP, SweepTable)

    def write_report(self, report: Report) -> None:
        self._write_record(REPORT, report)

    def report(self) -> Report:
        """Read report.json. Raises UsageError if it cannot be read, DDQError if it is damaged."""
        return self._read_record(REPORT, Report)

    def _write_record(self, name: str, record: Record) -> None:
        data = record.data()
        self._write(name, json.dumps({**data, "checksum": _checksum(data)}, indent=1).encode())

    def _read_record(self, name: str, kind: type[R]) -> R:
        try:
            data: dict[str, Any] = read_json(self.path / name)
            if data.pop("checksum") != _checksum(data):
                raise ValueError("the checksum differs")
            return kind.model_validate(data)
        except OSError as error:
            raise UsageError(f"{self.path / name} cannot be read: {error.strerror}.") from error
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise DDQError(f"{self.path / name} is damaged; {self._remedy(name)}.") from error

    def _remedy(self, name: str) -> str:
        """Return the advice for a damaged file."""
        if name == LAST:
            return "begin a new run"
        return f"`{folder.resume_command(self.path)}` writes it again"

    def _write(self, name: str, content: bytes) -> None:
        write_atomic(
            self.path / name,
            lambda temporary: temporary.write_bytes(content),
            owner=token_of(self.path),
        )


class ReadOnlyRun(Run):
    """A run folder for the processes of a distributed run that must not write: all but rank 0."""

    @contextmanager
    def locked(self) -> Iterator[None]:
        yield

    def append_metrics(self, metrics: Any) -> None:
        pass

    def truncate_metrics(self, step: int) -> None:
        pass

    def save(self, name: str, state: dict[str, Any]) -> None:
        pass

    def remove_if_untrained(self) -> None:
        pass

    def _write(self, name: str, content: bytes) -> None:
        pass


def _last_of_each_step(entries: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    return list({entry["step"]: entry for entry in entries}.values())


def _checksum(data: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()
