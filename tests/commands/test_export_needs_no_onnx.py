"""Only `--format onnx` needs the extra: the commands work where it is not installed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

BLOCKED = """
import sys
for name in ("onnx", "onnxruntime", "onnxscript"):
    sys.modules[name] = None  # importing it fails as if it were not there
sys.argv = ["ddq", *sys.argv[1:]]
from ddqcli.cli.app import main
main()
"""


def test_export_works_without_onnx(finished: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", BLOCKED, "export", "runs/done"],
        cwd=finished,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert "read back as trained" in done.stdout
