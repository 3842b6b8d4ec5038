"""Code that only a file names runs if this user made the run here, or says so; else it is named."""

from __future__ import annotations

import hashlib
import json
import os
import py_compile
import shutil
import struct
import sys
from importlib.util import cache_from_source
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_project import NET, RECIPE, Answer, ddq, make_project

EVIL = "from pathlib import Path\nPath({0!r}).touch()\n"
READERS = (
    "export -o new.safetensors",
    "export --check old.safetensors",
    "report --html page.html",
    "report old.safetensors",
    "inspect runs/done",
    "inspect old.safetensors",
)


@pytest.fixture
def exported(finished: Path, exported_file: Path) -> Path:
    """The project with its run, and a file exported from it."""
    shutil.copy(exported_file, "old.safetensors")
    return finished


@pytest.fixture
def stranger(exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The same on a machine that did not make the run; its code leaves a file `pwned`."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "empty"))
    poison(Path("net.py"))
    return exported


@pytest.fixture(autouse=True)
def compiled_files_as_usual(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "pycache_prefix", None)


def poison(path: Path) -> None:
    """Write code that leaves a file `pwned`; what was imported from there is forgotten."""
    for name, module in list(sys.modules.items()):
        if getattr(module, "__file__", None) == str(path.resolve()):
            del sys.modules[name]
    path.write_text(EVIL.format(str(Path("pwned").resolve())) + NET)


def unchecked(answer: Answer) -> str:
    assert answer.code == 0, answer.err
    assert answer.data["behaviour"]["outputs"] is None
    return " ".join(answer.data["behaviour"]["unchecked"])


def ran() -> bool:
    return Path("pwned").exists()


# ---- a run folder of a stranger


@pytest.mark.parametrize("command", READERS)
def test_no_reader_runs_code_of_a_run(stranger: Path, command: str) -> None:
    answer = ddq(*command.split())
    assert answer.code == 0, answer.err
    assert not ran()


def test_the_file_is_the_same_without_the_code(stranger: Path) -> None:
    answer = ddq("export", "-o", "new.safetensors", "--json")
    reason = unchecked(answer)
    assert "recipe.yaml names the code net.py:build, and this machine has no record" in reason
    assert "--trust (or set DDQ_TRUST=1)" in reason
    assert Path("new.safetensors").read_bytes() == Path("old.safetensors").read_bytes()


@pytest.mark.parametrize(
    "command", ["export --format onnx", "export --half", "finetune --resume --run-dir runs/done"]
)
def test_what_needs_the_code_is_refused_and_names_it(stranger: Path, command: str) -> None:
    answer = ddq(*command.split())
    assert answer.code == 2
    assert "net.py:build" in answer.err
    assert "--trust" in answer.err
    assert not ran()


def test_the_user_may_trust_the_code(stranger: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answer = ddq("export", "--trust", "--json")
    assert answer.data["behaviour"]["outputs"] == 0
    assert ran()
    Path("pwned").unlink()
    monkeypatch.setenv("DDQ_TRUST", "1")
    poison(Path("net.py"))
    assert ddq("export", "--json").data["behaviour"]["outputs"] == 0
    assert ran()
    assert ddq("finetune", "--resume", "--run-dir", "runs/done", "-q").code == 0
    monkeypatch.delenv("DDQ_TRUST")
    assert ddq("export", "--json").data["behaviour"]["outputs"] == 0, "now made here"


def test_a_pickle_that_a_run_names_is_not_loaded(stranger: Path) -> None:
    class Malicious:
        def __reduce__(self) -> Any:
            return os.mkdir, ("pwned",)

    recipe = Path("runs/done/recipe.yaml")
    text = recipe.read_text().replace("pickle: false", "pickle: true")
    recipe.write_text(text.replace("arch: ../../net.py:build", "arch: null"))
    torch.save(Malicious(), "model.pt")
    assert "names the code model.pt" in unchecked(ddq("export", "--json"))
    assert ddq("finetune", "--resume", "--run-dir", "runs/done").code == 2
    assert not ran()


def test_data_that_a_run_names_are_not_loaded_by_code(stranger: Path) -> None:
    recipe = Path("runs/done/recipe.yaml")
    text = recipe.read_text().replace("source: ../../images.npz", "source: ../../net.py:build")
    recipe.write_text(text.replace("arch: ../../net.py:build", "arch: resnet18"))
    unchecked(ddq("export", "--json"))
    assert ddq("finetune", "--resume", "--run-dir", "runs/done").code == 2
    assert not ran()


def test_a_report_names_no_code(stranger: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = Path("runs/done/recipe.yaml")
    recipe.write_text(recipe.read_text().replace("arch: ../../net.py:build", "arch: null"))
    path = Path("runs/done/report.json")
    report = json.loads(path.read_text())
    del report["checksum"]
    report["source"]["arch"] = "net.py:build"
    digest = hashlib.sha256(json.dumps(report, sort_keys=True).encode()).hexdigest()
    path.write_text(json.dumps({**report, "checksum": digest}))
    monkeypatch.setenv("DDQ_TRUST", "1")
    assert "no classification network" in unchecked(ddq("export", "--json"))
    assert not ran()


# ---- a run of this user's


def test_a_run_made_here_needs_no_flag_also_after_a_copy(exported: Path) -> None:
    assert ddq("export", "--json").data["behaviour"]["outputs"] == 0
    shutil.copytree(exported, exported.parent / "copy")
    os.chdir(exported.parent / "copy")
    assert ddq("export", "--json").data["behaviour"]["outputs"] == 0


def test_code_that_changed_is_refused(exported: Path) -> None:
    poison(Path("net.py"))
    assert "net.py has changed since this machine made the run" in unchecked(
        ddq("export", "--json")
    )
    assert not ran()


def test_code_may_be_a_link_to_a_file_elsewhere(project: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere.py"
    Path("net.py").rename(elsewhere)
    Path("net.py").symlink_to(elsewhere)
    assert ddq("finetune", "--run-dir", "runs/done").code == 0
    assert ddq("export", "--json").data["behaviour"]["outputs"] == 0
    poison(elsewhere)
    assert "net.py has changed since this machine made the run" in unchecked(
        ddq("export", "--json")
    )
    assert not ran()


def test_a_recipe_that_changed_is_refused(exported: Path) -> None:
    poison(Path("evil.py"))
    recipe = Path("runs/done/recipe.yaml")
    text = recipe.read_text()
    recipe.write_text(text.replace("net.py:build", "evil.py:build"))
    assert "evil.py has come to be" in unchecked(ddq("export", "--json"))
    recipe.write_text(text.replace("net.py:build", "net.py:Path"))
    assert "recipe.yaml has changed" in unchecked(ddq("export", "--json"))
    assert not ran()


@pytest.mark.parametrize("name", ["colorsys.py", "net.so", "wave/__init__.py"])
def test_a_file_that_hides_a_module_is_refused(exported: Path, name: str) -> None:
    Path(name).parent.mkdir(exist_ok=True)
    poison(Path(name))
    assert "has come to hide another module" in unchecked(ddq("export", "--json"))


def test_any_other_new_file_beside_the_code_is_no_matter(exported: Path) -> None:
    poison(Path("train_again.py"))
    assert ddq("export", "--json").data["behaviour"]["outputs"] == 0
    assert not ran()


def test_compiled_code_in_a_copy_is_not_taken_for_the_file(exported: Path) -> None:
    copy = exported.parent / "copy"
    shutil.copytree(exported, copy)
    os.chdir(copy)
    poison(Path("evil.py"))
    compiled = Path(cache_from_source(str(copy / "net.py")))
    py_compile.compile("evil.py", str(compiled))
    status = os.stat("net.py")
    head = struct.pack("<II", int(status.st_mtime), status.st_size)
    raw = compiled.read_bytes()
    compiled.write_bytes(raw[:8] + head + raw[16:])
    assert ddq("export", "--json").data["behaviour"]["outputs"] is not None
    assert not ran()


def test_a_record_that_another_user_could_have_written_is_none(
    exported: Path, state_home: Path
) -> None:
    token = Path("runs/done/.ddq").read_text().split()[0]
    record = state_home / "ddq" / "runs" / f"{token}.json"
    assert record.stat().st_mode & 0o077 == 0
    record.chmod(0o666)
    try:
        assert "no record" in unchecked(ddq("export", "--json"))
    finally:
        record.chmod(0o600)


def test_without_a_place_for_records_the_run_says_what_is_missing(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("XDG_STATE_HOME")
    monkeypatch.setenv("HOME", "/dev/null")
    answer = ddq("finetune", "model.pt", "--run-dir", "run", "--max-steps", "0")
    assert answer.code == 0
    (line,) = [line for line in answer.err.splitlines() if "keeps no record" in line]
    assert "Not a directory" in line
    assert "--trust" in line
    assert "no record" in unchecked(ddq("export", "run", "--json"))
    assert ddq("export", "run", "--trust", "--json").data["behaviour"]["outputs"] == 0


# ---- a recipe that was found


@pytest.fixture
def download(project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Another folder as working folder; the project in `there`."""
    (tmp_path / "work").mkdir()
    project.rename(tmp_path / "work" / "there")
    monkeypatch.chdir(tmp_path / "work")
    poison(Path("there/net.py"))
    return tmp_path / "work"


def test_a_recipe_beside_the_checkpoint_runs_no_code(download: Path) -> None:
    answer = ddq("finetune", "there/model.pt", "--dry-run")
    assert answer.code == 2
    assert "its model.arch: there/net.py:build does not run" in answer.err
    assert "--recipe there/ddq.yaml" in answer.err
    assert not ran()


def test_a_recipe_beside_the_checkpoint_names_no_code_for_data(download: Path) -> None:
    recipe = RECIPE.replace("source: images.npz", 'source: "net.py:build"')
    Path("there/ddq.yaml").write_text(recipe)
    Path("mine.py").write_text(NET)
    answer = ddq("finetune", "there/model.pt", "--arch", "mine.py:build", "--run-dir", "run")
    assert answer.code == 2
    assert "its data.source: there/net.py:build does not run" in answer.err
    assert not Path("run").exists()
    assert not ran()


def test_a_recipe_beside_the_checkpoint_may_set_numbers(download: Path) -> None:
    Path("mine.py").write_text(NET)
    Path("there/ddq.yaml").write_text(RECIPE.replace("target_bits: 4", "target_bits: 3"))
    answer = ddq("finetune", "there/model.pt", "--arch", "mine.py:build", "--dry-run", "--json")
    assert answer.code == 0, answer.err
    assert answer.data["totals"]["average_bits"] <= 3


@pytest.mark.parametrize("flags", [["--recipe", "there/ddq.yaml"], ["--trust"]])
def test_a_recipe_that_is_named_or_trusted_runs_its_code(download: Path, flags: list[str]) -> None:
    assert ddq("finetune", "there/model.pt", "--dry-run", *flags).code == 0
    assert ran()


def test_a_folder_of_ones_own_may_hold_a_recipe_with_code(project: Path) -> None:
    make_project(project)
    assert ddq("finetune", "model.pt", "--dry-run").code == 0
