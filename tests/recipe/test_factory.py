"""Factories are imported by module or file, and their faults told in one sentence."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from ddqcli.errors import UsageError
from ddqcli.recipe.factory import import_factory, missing_function


@pytest.fixture(autouse=True)
def _imports_undone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    before = set(sys.modules)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield
    for name in set(sys.modules) - before:
        if (getattr(sys.modules[name], "__file__", None) or "").startswith(str(tmp_path.resolve())):
            del sys.modules[name]


def sentence(error: pytest.ExceptionInfo[UsageError]) -> str:
    message = str(error.value)
    assert "\n" not in message
    assert len(message) < 700
    return message


def test_a_factory_in_a_module() -> None:
    assert import_factory("json.decoder:JSONDecoder") is json.decoder.JSONDecoder


def test_absolute_and_relative_paths_give_the_same_factory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine_nets.py").write_text("def net(): return 1")
    factory = import_factory(f"{tmp_path / 'mine_nets.py'}:net")
    monkeypatch.chdir(tmp_path)
    assert import_factory("mine_nets.py:net") is factory
    assert import_factory(f"../{tmp_path.name}/mine_nets.py:net") is factory
    assert import_factory("mine_nets:net") is factory, "as a module of the working folder too"
    assert sys.modules["mine_nets"].net is factory, "so that worker processes can import it"


def test_neighbor_modules_are_found_on_import_and_on_call(tmp_path: Path) -> None:
    (tmp_path / "mine_early.py").write_text("value = 1")
    (tmp_path / "mine_late.py").write_text("value = 2")
    (tmp_path / "mine_main.py").write_text(
        "import mine_early\n"
        "def both():\n    import mine_late\n    return mine_early.value, mine_late.value"
    )
    assert import_factory(f"{tmp_path / 'mine_main.py'}:both")() == (1, 2)
    assert sys.path[-1] == str(tmp_path), (
        "last: its files must not stand in for others' from now on"
    )
    assert sys.path.count(str(tmp_path)) == 1


def test_a_file_named_like_a_module_replaces_nothing(tmp_path: Path) -> None:
    (tmp_path / "json.py").write_text("def net(): return 'mine'")
    assert import_factory(f"{tmp_path / 'json.py'}:net")() == "mine"
    assert sys.modules["json"] is json


def test_two_files_of_the_same_name(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "mine_same.py").write_text(f"def where(): return {folder!r}")
    assert [import_factory(f"{tmp_path / f / 'mine_same.py'}:where")() for f in "ab"] == ["a", "b"]


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("resnet18", "names no function; write it as package.module:factory"),
        ("gone.py:", "There is no file gone.py"),
        (":net", "names no function"),
        ("no/such/nets.py:net", "There is no file no/such/nets.py: there is no folder"),
        ("no_such_package.nets:net", "There is no module no_such_package"),
        ("json.no_such:net", "There is no module json.no_such"),
        ("not a module:net", "neither a Python module nor a .py file"),
        ("json:lods", "lods is not there in json; it has loads, load,"),
    ],
)
def test_a_factory_that_cannot_be_found(spec: str, says: str) -> None:
    with pytest.raises(UsageError) as error:
        import_factory(spec)
    assert says in sentence(error)


@pytest.mark.parametrize(
    ("source", "says"),
    [
        (
            "def other(): pass\nfrom os.path import join",
            "net is not there in .*mine_bad.py; it has other.",
        ),
        ("net = 3", "net is no function in .*; it has no functions"),
        ("raise RuntimeError('two\\nlines')", "mine_bad.py raised RuntimeError: two lines"),
        ("import sys; sys.exit(4)", "mine_bad.py raised SystemExit: 4"),
        ("def net(:", "mine_bad.py raised SyntaxError: .*line 1"),
        (
            "import no_such_dependency",
            "raised ModuleNotFoundError: No module named 'no_such_dependency'",
        ),
    ],
)
def test_a_file_that_cannot_be_imported(tmp_path: Path, source: str, says: str) -> None:
    path = tmp_path / "mine_bad.py"
    path.write_text(source)
    with pytest.raises(UsageError, match=says) as error:
        import_factory(f"{path}:net")
    sentence(error)
    path.write_text("def net(): return 1\n" + " " * len(source))
    if "raise" in says:
        assert import_factory(f"{path}:net")() == 1, "a failed import leaves nothing behind"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (
            "raise SystemExit(9)\ndef build(): ...\nclass Net: ...\ndef _own(): ...",
            "write {0}:build or {0}:Net.",
        ),
        ("def build(:", "write {0}:FUNCTION."),
    ],
)
def test_a_file_without_a_function_lists_its_own_and_does_not_run(
    text: str, says: str, tmp_path: Path
) -> None:
    path = tmp_path / "nets.py"
    path.write_text(text)
    assert missing_function(path).endswith(says.format(path))
    with pytest.raises(UsageError, match="no function in it; write"):
        import_factory(f"{path}:")
