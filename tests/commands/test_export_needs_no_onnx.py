"""Only `--format onnx` needs the extra: the commands work where it is not installed."""

from __future__ import annotations

import sys
from pathlib import Path

from tiny_project import exit_code, in_child


def without_onnx() -> None:
    """Let imports of the extra's packages fail, as if they were not there."""
    for name in list(sys.modules):
        if name.split(".")[0].startswith("onnx") or name.startswith("ddqcli.onnx"):
            del sys.modules[name]
    for name in ("onnx", "onnxruntime", "onnxscript"):
        sys.modules[name] = None  # type: ignore[assignment]


def test_export_works_without_onnx(finished: Path) -> None:
    child = in_child("export runs/done", before=without_onnx)
    assert exit_code(child) == 0, Path("child.txt").read_text()
    assert Path("runs/done/model.safetensors").exists()
