"""ddq: finetune a trained PyTorch model under a memory budget with Differentiable Dynamic Quantization (ICML 2021)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ddqcli.qat.load import load as load

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name == "load":  # imports torch, which `ddq --help` does without
        from ddqcli.qat.load import load

        return load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
