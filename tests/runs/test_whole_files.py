"""Every output is written under another name and moved: a crash leaves the old file or the new."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from crashes import crashes, recording
from made_run import make_report
from run_files import Metrics
from tiny_project import exit_code, in_child

from ddqcli.errors import UsageError
from ddqcli.recipe.schema import Recipe
from ddqcli.runs.files import write_atomic, write_folder
from ddqcli.runs.run import LAST, METRICS, Run

OLD, NEW = b"old" * 1000, b"new" * 2000


def write_new(path: Path) -> None:
    def write(temporary: Path) -> None:
        with temporary.open("wb", buffering=0) as file:
            for start in range(0, len(NEW), 1000):
                file.write(NEW[start : start + 1000])
                os.stat(path)  # a place to die at, in the middle of a file

    write_atomic(path, write)


def dying_at(call: int) -> Callable[[], None]:
    """Return a function that lets this process die at its n-th system call of these."""

    def prepare() -> None:
        count = 0
        for name in ("open", "stat", "fsync", "replace", "unlink", "close"):
            original = getattr(os, name)

            def counting(*args: Any, original: Any = original, **kwargs: Any) -> Any:
                nonlocal count
                count += 1
                if count == call:
                    os._exit(9)
                return original(*args, **kwargs)

            setattr(os, name, counting)

    return prepare


def test_a_kill_at_any_call_leaves_the_old_or_the_new_file(tmp_path: Path) -> None:
    path, seen = tmp_path / "file", []
    for call in range(1, 40):
        path.write_bytes(OLD)
        child = os.fork()
        if not child:
            dying_at(call)()
            write_new(path)
            os._exit(0)
        code = exit_code(child)
        seen.append(path.read_bytes())
        assert seen[-1] in (OLD, NEW)
        others = [other for other in tmp_path.iterdir() if other != path]
        assert all(re.fullmatch(r"\.ddq-[0-9a-f]{32}\.tmp", other.name) for other in others)
        for other in others:
            other.unlink()
        if code == 0:
            break
    else:
        raise AssertionError("no call was the last")
    assert {OLD, NEW} <= set(seen[:-1]), "killed before and after the file was there"


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere, folders cannot be exchanged")
def test_a_crash_leaves_the_old_or_the_new_folder(tmp_path: Path) -> None:
    root, seen = tmp_path / "root", []
    (root / "package").mkdir(parents=True)
    (root / "package/file").write_bytes(OLD)

    def write(temporary: Path) -> None:
        (temporary / "below").mkdir(parents=True)
        for name in ("file", "below/other"):
            (temporary / name).write_bytes(NEW)

    child = os.fork()
    if not child:
        recording(root, tmp_path / "recorded")()
        write_folder(root / "package", write, is_own=lambda _: True)
        os._exit(0)
    assert exit_code(child) == 0
    for tree in crashes(tmp_path / "recorded"):
        seen.append(tree["package/file"])
        assert seen[-1] == OLD or seen[-1] == tree["package/below/other"] == NEW
    assert {OLD, NEW} <= set(seen)


def test_a_file_is_on_the_disk_before_its_name_and_the_name_before_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_bytes(OLD)
    calls: list[tuple[str, Any]] = []
    fsync, replace = os.fsync, os.replace

    def record_fsync(descriptor: int) -> None:
        target = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        calls.append(("sync", tmp_path if target.is_dir() else target.read_bytes()))
        fsync(descriptor)

    def record_replace(source: Any, target: Any) -> None:
        calls.append(("move", Path(target)))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", record_fsync)
    monkeypatch.setattr(os, "replace", record_replace)
    write_new(tmp_path / "file")
    assert calls == [("sync", NEW), ("move", tmp_path / "file"), ("sync", tmp_path)]


def test_metrics_are_on_the_disk_before_a_state_that_counts_on_them(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    run.append_metrics(Metrics(1))
    calls, fsync = [], os.fsync

    def record(descriptor: int) -> None:
        calls.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", record)
    run.save(LAST, {"step": 1})
    assert calls[0] == METRICS
    assert len(calls) == 3


@pytest.mark.parametrize(
    "write",
    [
        lambda run: run.write_recipe(Recipe()),
        lambda run: run.write_report(make_report()),
        lambda run: run.save(LAST, {}),
        lambda run: run.append_metrics(Metrics(1)),
    ],
    ids=["recipe", "report", "state", "metrics"],
)
def test_a_pipe_or_a_folder_in_the_place_of_a_file_is_refused(
    run: Run, write: Callable[[Run], None]
) -> None:
    for name in ("recipe.yaml", "report.json", LAST, METRICS):
        (run.path / name).unlink(missing_ok=True)
        os.mkfifo(run.path / name)
    with pytest.raises(UsageError, match="it is no regular file"):
        write(run)


# ---- every command

WHOLE = r"\.ddq-([0-9a-f]{32}-)?[0-9a-f]{32}\.tmp"
APPENDED = {METRICS, ".lock", ".ddq", "child.txt"}


def logging_writes(log: Path) -> Callable[[], None]:
    """Return a function that logs the names of the files that this process opens to write."""

    def prepare() -> None:
        here, out = str(Path.cwd()), os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

        def note(event: str, args: tuple[Any, ...]) -> None:
            if event == "open" and isinstance(args[0], str) and args[2] is not None:
                path, flags = os.path.abspath(args[0]), args[2]
                if flags & (os.O_WRONLY | os.O_RDWR) and path.startswith(here):
                    os.write(out, f"{os.path.basename(path)}\n".encode())

        sys.addaudithook(note)

    return prepare


@pytest.mark.parametrize(
    ("commands", "files"),
    [
        (["finetune model.pt --run-dir run --max-steps 2 -q"], 5),
        (["finetune model.pt --target-bits 6,4 --run-dir run --max-steps 0 -q"], 9),
        (["export runs/done -o a.safetensors"], 1),
        (["report runs/done --html a.html"], 1),
        (["inspect model.pt -o pictures", "inspect runs/done -o more"], 10),
    ],
    ids=["finetune", "sweep", "export", "report", "inspect"],
)
def test_every_command_writes_whole_files(
    finished: Path, tmp_path: Path, commands: list[str], files: int
) -> None:
    log = tmp_path / "log.txt"
    child = in_child(*commands, before=logging_writes(log))
    assert exit_code(child) == 0, Path("child.txt").read_text()
    written = [name for name in log.read_text().splitlines() if not name.endswith(".pyc")]
    in_place = {name for name in written if not re.fullmatch(WHOLE, name)}
    assert in_place <= APPENDED
    assert sum(name not in APPENDED for name in written) >= files
