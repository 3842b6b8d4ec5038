"""The run folder: what a finetuning writes, each file whole or not at all.

runs/20260131-142310-resnet20/
    recipe.yaml     the resolved recipe, with every default written out
    metrics.jsonl   one JSON object a line: what training reported
    last.pt         the training state, for resuming
    final.pt        the quantized model: indices, levels, gates, and what stays float
    report.json     what `ddq report` shows; written last, so a folder with it is a finished run
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ddqcli.errors import DDQError, UsageError
from ddqcli.recipe import Recipe, load_recipe

RUNS = "runs"
REPORT = "report.json"
RECIPE = "recipe.yaml"
LAST = "last.pt"


@dataclass(frozen=True)
class Run:
    """A run folder."""

    path: Path

    @classmethod
    def create(cls, path: Path | None, name: str) -> Run:
        """A new folder at `path`, or at runs/<time>-<name>; raises UsageError if it cannot be or holds a run."""
        if path is None:
            stem = Path(RUNS) / f"{time.strftime('%Y%m%d-%H%M%S')}-{name}"
            path = next(p for n in range(1000) if not (p := stem if not n else Path(f"{stem}-{n}")).exists())
        elif (path / RECIPE).exists():
            raise UsageError(f"{path} already holds a run; give another --run-dir or remove it.")
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(f"The run folder {path} cannot be made: {error.strerror}.") from error
        return cls(path)

    @classmethod
    def open(cls, path: Path | None) -> Run:
        """The finished run at `path`, or the newest one under runs/; raises UsageError if there is none."""
        if path is None:
            return cls(_newest(Path(RUNS)))
        if not path.is_dir():
            raise UsageError(f"{path} is no run folder; `ddq finetune` makes one under {RUNS}/.")
        if not (path / REPORT).is_file():
            raise UsageError(f"{path} holds no finished run: {REPORT} is missing.")
        return cls(path)

    @classmethod
    def unfinished(cls, path: Path | None) -> Run:
        """The run to go on with: at `path`, or the newest unfinished one under runs/; raises UsageError if there is none."""
        if path is None:
            begun = [p.parent for p in Path(RUNS).glob(f"*/{RECIPE}") if not (p.parent / REPORT).exists()]
            if not begun:
                raise UsageError(f"There is no unfinished run under {Path(RUNS).resolve()}; name one with --run-dir.")
            return cls(max(begun, key=lambda p: (p / RECIPE).stat().st_mtime_ns))
        if not (path / RECIPE).is_file():
            raise UsageError(f"{path} holds no run to resume: {RECIPE} is missing.")
        return cls(path)

    @property
    def finished(self) -> bool:
        return (self.path / REPORT).exists()

    def saved(self, sha256: str) -> dict[str, Any] | None:
        """The last training state; None if the run ended before the first. Raises UsageError for another checkpoint's."""
        if not (self.path / LAST).exists():
            return None
        state = self.load(LAST)
        if state["sha256"] != sha256:
            raise UsageError(
                f"The checkpoint is not the one that {self.path} was begun with (SHA-256 {sha256[:12]}…, "
                f"then {state['sha256'][:12]}…); begin a new run."
            )
        return state

    def cut_metrics(self, step: int) -> None:
        """Drop what was reported after `step`, which a resumed run reports again."""
        path = self.path / "metrics.jsonl"
        if path.exists():
            lines = [line for line in path.read_text(encoding="utf-8").splitlines() if _step_of(line) <= step]
            self._write(path.name, "".join(f"{line}\n" for line in lines).encode())

    def write_recipe(self, recipe: Recipe) -> None:
        self._write(RECIPE, recipe.dump().encode())

    def recipe(self) -> Recipe:
        """The resolved recipe of this run; raises RecipeError if it is damaged."""
        return load_recipe(self.path / RECIPE)

    def add_metrics(self, metrics: Any) -> None:
        """Append one line to metrics.jsonl."""
        with _disk(self.path / "metrics.jsonl"), (self.path / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(metrics)) + "\n")

    def save(self, name: str, state: dict[str, Any]) -> None:
        """Write a torch file, whole or not at all."""
        import torch

        write_whole(self.path / name, lambda temporary: torch.save(state, temporary))

    def load(self, name: str) -> dict[str, Any]:
        """Read a torch file of this run; raises DDQError if it is missing or damaged."""
        import torch

        try:
            state: dict[str, Any] = torch.load(self.path / name, weights_only=True, map_location="cpu")
        except FileNotFoundError as error:
            raise UsageError(f"{self.path} holds no {name}; the run did not get that far.") from error
        except Exception as error:
            raise DDQError(f"{self.path / name} is damaged and cannot be read; run `ddq finetune` again.") from error
        return state

    def write_report(self, report: dict[str, Any]) -> None:
        self._write(REPORT, json.dumps(report, indent=1).encode())

    def report(self) -> dict[str, Any]:
        """report.json; raises DDQError if it is damaged."""
        try:
            report: dict[str, Any] = json.loads((self.path / REPORT).read_text(encoding="utf-8"))
            report["totals"]["bytes"], report["layers"][0]["name"]
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise DDQError(f"{self.path / REPORT} is damaged; `ddq finetune` writes it at the end of a run.") from error
        return report

    def _write(self, name: str, content: bytes) -> None:
        write_whole(self.path / name, lambda temporary: temporary.write_bytes(content))


def write_whole(path: Path, write: Callable[[Path], Any]) -> None:
    """Let `write` fill a temporary file beside `path`, then put it in place; raises DDQError if the disk refuses."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with _disk(path):
        try:
            write(temporary)
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


class _disk:
    """Turns what the disk refuses into one sentence."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, OSError):
            raise DDQError(
                f"{self.path} cannot be written: {error.strerror}; what was there before is kept."
            ) from error
        if isinstance(error, RuntimeError) and "PytorchStreamWriter" in str(
            error
        ):  # how torch.save reports a full disk
            raise DDQError(
                f"{self.path} cannot be written: the disk is full; what was there before is kept."
            ) from error


def _step_of(line: str) -> float:
    """The step of a line of metrics; infinite for one that a kill cut short."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, LookupError, TypeError):
        return float("inf")


def _newest(folder: Path) -> Path:
    runs = sorted(p.parent for p in folder.glob(f"*/{REPORT}")) if folder.is_dir() else []
    if runs:
        return max(runs, key=lambda p: (p / REPORT).stat().st_mtime_ns)
    begun = len(list(folder.glob(f"*/{RECIPE}"))) if folder.is_dir() else 0
    what = f"{begun} unfinished and no finished run" if begun else "no run"
    raise UsageError(f"There is {what} under {folder.resolve()}; `ddq finetune MODEL` makes one, or name a run folder.")
