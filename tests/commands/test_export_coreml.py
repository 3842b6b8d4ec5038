"""`ddq export --format coreml`: a verified package; bad combinations are refused at once."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_project import ddq

PACKAGE = Path("runs/done/model.mlpackage")


def test_a_package_is_written_and_replaced_whole(finished: Path) -> None:
    pytest.importorskip("coremltools")
    answer = ddq("export", "--format", "coreml", "-q")
    assert (answer.code, answer.err) == (0, "")
    assert "unchecked  outputs: Core ML runs on Apple's systems only" in answer.out
    data = ddq("export", "--format", "coreml", "--half", "--json").data
    size = sum(file.stat().st_size for file in PACKAGE.rglob("*") if file.is_file())
    assert data["sizes"]["file"] == size
    assert data["verified"] == {"tensors": 3, "values": 72 + 8 * 16 * 9 + 64}
    assert {row["name"] for row in data["layers"]} == {"0.weight", "3.weight", "8.weight"}
    assert not [path for path in PACKAGE.parent.iterdir() if path.name.endswith(".tmp")]
    other = Path("other.mlpackage")
    (other / "Data" / "com.apple.CoreML").mkdir(parents=True)
    (other / "Data" / "com.apple.CoreML" / "model.mlmodel").write_bytes(b"of another tool")
    answer = ddq("export", "--format", "coreml", "-o", other)
    assert answer.code == 2
    assert "other.mlpackage cannot be written: something else is there" in answer.err
    assert next(other.rglob("*.mlmodel")).read_bytes() == b"of another tool"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--format", "coreml", "--bench"), "--bench and --openvino run an ONNX file"),
        (("--check", "m.mlpackage"), "is verified when it is written; export it again"),
        (("--format", "coreml", "--check", "m"), "is verified when it is written"),
        (("--format", "coreml", "-o", "net.bin"), "name it net.mlpackage"),
    ],
)
def test_bad_combinations_are_refused_at_once(
    options: tuple[str, ...], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("ddqcli.commands.export_coreml.require_coreml", lambda: None)
    answer = ddq("export", *options)
    assert answer.code == 2
    assert message in answer.err


def test_without_coremltools_the_extra_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *rest: None)
    answer = ddq("export", "--format", "coreml")
    assert answer.code == 2
    assert "Core ML needs coremltools; run pip install 'ddqcli[coreml]'." in answer.err
