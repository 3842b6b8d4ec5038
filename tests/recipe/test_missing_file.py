"""The sentence about a file that is not there."""

from __future__ import annotations

from pathlib import Path

import pytest

from ddqcli.recipe.missing_file import CHECKPOINTS, missing_file


@pytest.mark.parametrize(
    ("files", "path", "says"),
    [
        (["modle.pt", "net.py"], "model.pt", "model.pt in {}; did you mean modle.pt?"),
        (["best.pth", "net.py"], "model.pt", "model.pt in {}; it has best.pth."),
        (list("abcde"), "x", "x in {}; it has a, b, c, d and 1 more."),
        (["net.py"], "model.pt", "model.pt in {}, nor any other .pt or .pth or .th or"),
        ([], "gone/model.pt", "gone/model.pt: there is no folder {}/gone."),
    ],
)
def test_what_is_there_instead_is_named(
    files: list[str], path: str, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in files:
        Path(name).touch()
    suffixes = CHECKPOINTS if path.endswith(".pt") else ()
    text = missing_file(Path(path), "checkpoint", suffixes)
    assert text.startswith("There is no checkpoint " + says.format(tmp_path.resolve()))
