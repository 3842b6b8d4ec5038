"""Verification: the decoder, alone in a fresh process, must read every tensor bit for bit."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from ddqcli.artifact import decoder
from ddqcli.errors import VerificationError

_FINGERPRINTS = """
import hashlib, json, runpy, sys
tensors, info = runpy.run_path(sys.argv[1])["decode"](sys.argv[2])
tensors.update(info["activations"])
print(json.dumps({
    name: [str(t.dtype), list(t.shape), hashlib.sha256(t.tobytes()).hexdigest()]
    for name, t in tensors.items()
}))
"""


def require_same_tensors(
    file: Path, expected: Mapping[str, NDArray[Any]], *, name: Path, consequence: str = ""
) -> None:
    """Decode `file` in a process that knows numpy alone, and compare every bit with `expected`.

    Raises VerificationError, which calls the file `name` and ends with `consequence`.
    """
    command = [sys.executable, "-I", "-c", _FINGERPRINTS, decoder.__file__, str(file)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        reason = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise VerificationError(f"{name} cannot be decoded: {reason[-1]}{consequence}.")
    decoded = json.loads(done.stdout)
    if decoded.keys() != expected.keys():
        raise VerificationError(f"{name} does not hold the tensors that were trained{consequence}.")
    for tensor, array in expected.items():
        if decoded[tensor] != _fingerprint(array):
            raise VerificationError(
                f"{name} differs from what was trained in {tensor}{consequence}."
            )


def _fingerprint(array: NDArray[Any]) -> list[Any]:
    digest = hashlib.sha256(array.tobytes()).hexdigest()
    return [str(array.dtype), list(array.shape), digest]
