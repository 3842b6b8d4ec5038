"""After a crash at any write, power losses included, a run folder is as before or as after it."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from crashes import Tree, crashes, recording, restore
from tiny_project import ddq, exit_code, in_child, inside

from ddqcli.runs.marker import read_marker
from ddqcli.runs.run import FINAL, LAST, METRICS, REPORT, Run

RUN = Path("out/deep/run")
COMMAND = f"finetune model.pt --run-dir {RUN} --max-steps 3 --set train.save_every=1 -q"


@pytest.fixture(scope="module")
def recorded(pristine: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Tree]]:
    """A project as working folder, with all that crashes of a run could leave in out/."""
    folder = tmp_path_factory.mktemp("crashes") / "project"
    shutil.copytree(pristine, folder, ignore=shutil.ignore_patterns("runs", "__pycache__"))
    with inside(folder):
        Path("out").mkdir()
        child = in_child(COMMAND, before=recording(Path("out"), Path("recorded")))
        assert exit_code(child) == 0, Path("child.txt").read_text()
        assert ddq("export", RUN, "-o", "whole.safetensors").code == 0
        os.rename("out", "whole")
        yield crashes(Path("recorded"))


def replay(tree: Tree) -> None:
    shutil.rmtree("out", ignore_errors=True)
    restore(tree, Path("out"))


def lines(run: Path) -> list[dict[str, Any]]:
    """Return the whole lines of metrics.jsonl without their times."""
    parts = (run / METRICS).read_text().split("\n")[:-1] if (run / METRICS).exists() else []
    return [{k: v for k, v in json.loads(part).items() if k != "seconds"} for part in parts]


def test_each_file_is_whole_and_comes_after_those_it_counts_on(recorded: list[Tree]) -> None:
    whole = lines(Path("whole/deep/run"))
    seen = set()
    for tree in recorded:
        replay(tree)
        names = {path.name for path in RUN.glob("[!.]*")}
        seen.add(frozenset(names))
        if not names:
            continue
        run, found = Run(RUN), lines(RUN)
        assert read_marker(RUN)
        assert run.recipe().train.max_steps == 3
        assert found == whole[: len(found)]
        if LAST in names:
            assert len(found) >= sum(line["step"] < run.load(LAST)["step"] for line in whole)
        if FINAL in names:
            assert found == whole
            assert run.load(FINAL)["probe"]
        if REPORT in names:
            assert FINAL in names
            assert run.report().totals.bytes
    assert len(seen) >= 5, "before the recipe, the state, the final model and the report, and after"


def test_the_same_command_with_resume_gives_the_same_files(recorded: list[Tree]) -> None:
    """From each training state with the fewest metrics, and from before there was a recipe."""
    by_state: dict[bytes | None, Tree] = {}
    for tree in recorded:
        state, metrics = (tree.get(f"deep/run/{name}") for name in (LAST, METRICS))
        fewest = by_state.get(state, tree).get(f"deep/run/{METRICS}")
        if len(metrics or b"") <= len(fewest or b""):
            by_state[state] = tree
    assert len(by_state) >= 4
    for tree in by_state.values():
        replay(tree)
        for command in ("report out/deep/run", "export out/deep/run", "runs out"):
            answer = ddq(*command.split())
            assert answer.code in (0, 2), answer.err
            assert answer.code == 0 or answer.err.startswith("Error: ")
        answer = ddq(*COMMAND.split(), "--resume")
        assert answer.code == 0, answer.err
        assert lines(RUN) == lines(Path("whole/deep/run"))
        assert (RUN / REPORT).read_bytes() == (Path("whole/deep/run") / REPORT).read_bytes()
        assert not list(RUN.glob(".ddq-*"))
        assert ddq("export", RUN, "-o", "again.safetensors").code == 0
        assert Path("again.safetensors").read_bytes() == Path("whole.safetensors").read_bytes()
