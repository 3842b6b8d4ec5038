"""The run folder: what a finetuning writes, each file whole or not at all.

runs/20260131-142310-resnet20/
    recipe.yaml     the resolved recipe, with every default written out
    metrics.jsonl   one JSON object a line: what training reported, and now and then a snapshot of the tensors
    last.pt         the training state, for resuming
    final.pt        the quantized model: indices, levels, gates, and what stays float; and the float weights behind it
    report.json     what `ddq report` shows; written last, so a folder with it is a finished run

A sweep over several targets is a folder of runs, one a target, with
    sweep.yaml      the resolved recipe with all targets
    sweep.json      the table; written last
"""

from __future__ import annotations

import hashlib
import json
import re
import time
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from itertools import count
from pathlib import Path
from typing import Any

from ddqcli.errors import DDQError, UsageError
from ddqcli.recipe.file import differences, dump_recipes, load_recipes
from ddqcli.recipe.schema import Recipe
from ddqcli.runs.report import Report
from ddqcli.runs.files import disk_errors, try_lock, write_atomic

RUNS = "runs"
REPORT = "report.json"
RECIPE = "recipe.yaml"
SWEEP = "sweep.json"
SWEEP_RECIPE = "sweep.yaml"
METRICS = "metrics.jsonl"
LAST = "last.pt"
FINAL = "final.pt"
_LOCK = ".lock"


@dataclass(frozen=True)
class Run:
    """A run folder."""

    path: Path

    @classmethod
    def create(cls, path: Path | None, name: str) -> Run:
        """A new folder at `path`, or at runs/<time>-<name>; raises UsageError if it cannot be or holds a run."""
        if path is not None and cls(path).recipe_path.exists():
            raise UsageError(
                f"{path} already holds a run; give another --run-dir, or --resume to go on with it."
            )
        plain = re.sub(r"[^\w.-]+", "-", name)
        stem = Path(RUNS) / f"{time.strftime('%Y%m%d-%H%M%S')}-{plain}"
        try:
            if path is not None:
                path.mkdir(parents=True, exist_ok=True)
                return cls(path)
            for n in count():
                with suppress(FileExistsError):  # another run begun in the same second
                    path = Path(f"{stem}-{n}") if n else stem
                    path.mkdir(parents=True)
                    return cls(path)
        except OSError as error:
            raise UsageError(f"The run folder {path} cannot be made: {error.strerror}.") from error
        raise AssertionError("unreachable")

    @classmethod
    def open(cls, path: Path | None) -> Run:
        """The finished run at `path`, or the newest one under runs/; raises UsageError if there is none."""
        if path is None:
            return cls(_newest(Path(RUNS)))
        if not path.is_dir():
            raise UsageError(f"{path} is no run folder; `ddq finetune` makes one under {RUNS}/.")
        if (path / REPORT).is_file():
            return cls(path)
        if finished := sorted(
            str(p.parent) for p in path.glob(f"*/{REPORT}") if cls(path).is_sweep
        ):
            raise UsageError(f"{path} holds several runs; name one: {', '.join(finished)}.")
        raise UsageError(f"{path} holds no finished run: {REPORT} is missing.")

    @classmethod
    def unfinished(cls, path: Path | None, *, or_none: bool = False) -> Run | None:
        """The run or sweep to go on with: at `path` (finished or not), or the newest unfinished one under runs/.

        A run of a sweep stands for the whole sweep. If there is none: None if that will do, else UsageError.
        """
        if path is None:
            begun = [
                cls(p)
                for p in Path(RUNS).glob("*")
                if cls(p).recipe_path.is_file() and not cls(p).is_finished
            ]
            where = f"under {Path(RUNS).resolve()}; name one with --run-dir"
        else:
            sweep = cls(path.parent if path.name else path.absolute().parent)
            begun = [
                run
                for run in (sweep if sweep.is_sweep else cls(path),)
                if run.recipe_path.is_file()
            ]
            where = f"in {path}: {RECIPE} is missing"
        if begun:
            return max(begun, key=lambda run: run.recipe_path.stat().st_mtime_ns)
        if or_none:
            return None
        raise UsageError(f"There is no unfinished run {where}.")

    @property
    def is_sweep(self) -> bool:
        """Whether this folder holds one run for each of several targets."""
        return (self.path / SWEEP_RECIPE).is_file()

    @property
    def is_finished(self) -> bool:
        return (self.path / (SWEEP if self.is_sweep else REPORT)).is_file()

    @property
    def recipe_path(self) -> Path:
        return self.path / (SWEEP_RECIPE if self.is_sweep else RECIPE)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Within: no other process writes into this folder. Raises UsageError if one does now."""
        with disk_errors(self.path):
            lock = (self.path / _LOCK).open("a")
        with lock:
            if not try_lock(lock):
                raise UsageError(
                    f"Another process is working in {self.path}; wait for it, or name another folder with --run-dir."
                )
            for left in self.path.glob(".*.tmp"):  # by a process that was killed while it wrote
                left.unlink(missing_ok=True)
            yield

    def discard_if_empty(self) -> None:
        """Remove a folder in which nothing was trained."""
        if not any(self.path.glob(f"*/{RECIPE}" if self.is_sweep else LAST)):
            for name in (RECIPE, SWEEP_RECIPE, _LOCK):
                (self.path / name).unlink(missing_ok=True)
            with suppress(OSError):  # they hold other files
                self.path.rmdir()
                Path(RUNS).rmdir()

    def check_same(self, asked: Sequence[Recipe]) -> None:
        """Raise UsageError, saying what differs, if this was begun with another recipe, or other targets, than asked for."""
        begun, asked = (
            sorted(recipes, key=lambda r: r.budget.target) for recipes in (self.recipes(), asked)
        )
        targets, now = ([recipe.budget.target for recipe in recipes] for recipes in (begun, asked))
        if targets != now and max(len(targets), len(now)) > 1:
            changed = [f"targets: {', '.join(targets)}, now {', '.join(now)}"]
        else:
            changed = differences(begun[0], asked[0])
        if changed:
            raise UsageError(
                f"{self.path} was begun with another recipe ({'; '.join(changed)}); begin a new run."
            )

    def saved(self, facts: dict[str, Any]) -> dict[str, Any] | None:
        """The last training state; None if the run ended before the first.

        Raises UsageError if the run was begun with other `facts` (`format` of the state, `sha256` of the checkpoint, `recipe`
        as a file's text, `steps`, `data` as their fingerprint), and DDQError if the file is damaged.
        """
        if not (self.path / LAST).exists():
            return None
        state = self.load(LAST)
        for fact, now in facts.items():
            then = state.get(fact)
            if then == now:
                continue
            if fact == "format":
                what = f"This version of ddq is not the one (training states of format {now}, then {then})"
            elif fact == "sha256":
                what = f"The checkpoint is not the one (SHA-256 {now:.12}…, then {then!s:.12}…)"
            elif fact == "steps":
                what = f"The data are not the ones ({now} steps, then {then})"
            elif fact == "data":
                what = "The data, though as many, are not the ones"
            else:
                what = f"{self.path / RECIPE} is not the recipe ({_changed_lines(str(then), now)})"
            raise UsageError(
                f"{what} that {self.path} was begun with; go back to that, or begin a new run."
            )
        return state

    def metrics(self) -> list[dict[str, Any]]:
        """What training reported, as StepMetrics has it."""
        return [entry for entry in self._entries() if "levels" not in entry]

    def snapshots(self) -> list[dict[str, Any]]:
        """The tensors at some moments, as Snapshot has it; of two at the same step the later."""
        return list(
            {entry["step"]: entry for entry in self._entries() if "levels" in entry}.values()
        )

    def _entries(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl, but for one that a kill cut short."""
        path = self.path / METRICS
        lines = path.read_bytes().decode("utf-8", "replace").splitlines() if path.exists() else []
        return [entry for line in lines if (entry := _entry(line)) is not None]

    def cut_metrics(self, step: int) -> None:
        """Drop what was reported after `step`, which a resumed run reports again."""
        kept = [entry for entry in self._entries() if entry["step"] <= step]
        self._write(METRICS, "".join(f"{json.dumps(entry)}\n" for entry in kept).encode())

    def add_metrics(self, metrics: Any) -> None:
        """Append one line to metrics.jsonl."""
        with (
            disk_errors(self.path / METRICS),
            (self.path / METRICS).open("a", encoding="utf-8") as file,
        ):
            file.write(json.dumps(asdict(metrics)) + "\n")

    def write_recipe(self, *recipes: Recipe) -> None:
        """Keep the recipe of a run, or those of a sweep, which differ in their targets alone."""
        self._write(
            SWEEP_RECIPE if len(recipes) > 1 else RECIPE, dump_recipes(recipes, self.path).encode()
        )

    def recipe(self) -> Recipe:
        """The resolved recipe of this run; raises RecipeError if it is damaged."""
        return self.recipes()[0]

    def recipes(self) -> list[Recipe]:
        """The resolved recipes of this sweep, one for each target; raises RecipeError if they are damaged."""
        return load_recipes(self.recipe_path)

    def recipe_text(self) -> str:
        """recipe.yaml as it is."""
        return (self.path / RECIPE).read_text(encoding="utf-8")

    def save(self, name: str, state: dict[str, Any]) -> None:
        """Write a torch file, whole or not at all."""
        import torch

        def write(temporary: Path) -> None:
            with temporary.open("wb") as file:
                torch.save(state, file)

        write_atomic(self.path / name, write)

    def load(self, name: str) -> dict[str, Any]:
        """Read a torch file of this run; raises UsageError if it is missing, DDQError if any bit of it changed."""
        import torch

        path = self.path / name
        try:
            with zipfile.ZipFile(
                path
            ) as archive:  # torch writes checksums but does not look at them
                if broken := archive.testzip():
                    raise zipfile.BadZipFile(f"{broken} has another checksum")
            state: dict[str, Any] = torch.load(path, weights_only=True, map_location="cpu")
            if not isinstance(state, dict):
                raise TypeError(f"{name} holds a {type(state).__name__}")
        except FileNotFoundError as error:
            raise UsageError(
                f"{self.path} holds no {name}; the run did not get that far."
            ) from error
        except Exception as error:
            raise DDQError(f"{path} is damaged and cannot be read; {self._again(name)}.") from error
        return state

    def write_sweep(self, table: dict[str, Any]) -> None:
        self._write(SWEEP, json.dumps(table, indent=1).encode())

    def write_report(self, report: Report) -> None:
        data = report.data()
        self._write(REPORT, json.dumps({**data, "checksum": _checksum(data)}, indent=1).encode())

    def report(self) -> Report:
        """Read report.json. Raises UsageError if it cannot be read, DDQError if it is damaged."""
        try:
            data: dict[str, Any] = json.loads((self.path / REPORT).read_bytes())
            if data.pop("checksum") != _checksum(data):
                raise ValueError("the checksum differs")
            return Report.model_validate(data)
        except OSError as error:
            raise UsageError(f"{self.path / REPORT} cannot be read: {error.strerror}.") from error
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            raise DDQError(f"{self.path / REPORT} is damaged; {self._again(REPORT)}.") from error

    def _again(self, name: str) -> str:
        """How to get a file of this run once more."""
        if name == LAST:
            return "begin a new run"
        return f"`ddq finetune --resume --run-dir {self.path}` writes it again"

    def _write(self, name: str, content: bytes) -> None:
        write_atomic(self.path / name, lambda temporary: temporary.write_bytes(content))


class ReadOnlyRun(Run):
    """A run folder in the hands of a process that must not write into it: of several, the first alone does."""

    @contextmanager
    def locked(self) -> Iterator[None]:
        yield

    def add_metrics(self, metrics: Any) -> None:
        pass

    def save(self, name: str, state: dict[str, Any]) -> None:
        pass

    def discard_if_empty(self) -> None:
        pass

    def _write(self, name: str, content: bytes) -> None:
        pass


def _checksum(report: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(report, sort_keys=True).encode()).hexdigest()


def _entry(line: str) -> dict[str, Any] | None:
    """One line of metrics; None for one that a kill cut short."""
    try:
        entry = json.loads(line)
        return entry if isinstance(entry["step"], int) else None
    except (ValueError, LookupError, TypeError):
        return None


def _changed_lines(then: str, now: str) -> str:
    """The lines in which two texts of a recipe differ, as `lr: 0.01, now lr: 0.02`."""
    pairs = zip(then.splitlines(), now.splitlines(), strict=False)
    changed = [f"{a.strip()}, now {b.strip()}" for a, b in pairs if a != b]
    return "; ".join(changed[:3]) or "it has more or fewer lines"


def _newest(folder: Path) -> Path:
    found = (*folder.glob(f"*/{REPORT}"), *folder.glob(f"*/*/{REPORT}"))  # the latter of sweeps
    runs = sorted(p.parent for p in found)
    if runs:
        return max(runs, key=lambda p: (p / REPORT).stat().st_mtime_ns)
    begun = len([*folder.glob(f"*/{RECIPE}"), *folder.glob(f"*/{SWEEP_RECIPE}")])
    what = f"{begun} unfinished and no finished run" if begun else "no run"
    raise UsageError(
        f"There is {what} under {folder.resolve()}; `ddq finetune MODEL` makes one, or name a run folder."
    )
