"""ddq: finetune a trained PyTorch model under a memory budget with DDQ (ICML 2021).

The library is `quantize`, `parameter_groups`, `save` and `load`, with `Budget` and `DDQuantizer`.
The command line is `ddq`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ddqcli.library import Budget as Budget
    from ddqcli.library import load as load
    from ddqcli.library import parameter_groups as parameter_groups
    from ddqcli.library import quantize as quantize
    from ddqcli.library import save as save
    from ddqcli.quant.quantizer import DDQuantizer as DDQuantizer

__version__ = "0.1.0"
__all__ = [
    "Budget",
    "DDQuantizer",
    "__version__",
    "load",
    "parameter_groups",
    "quantize",
    "save",
]

# Imported when first used: they import torch, which `ddq --help` does without.
_MODULES = {
    "Budget": "ddqcli.library",
    "DDQuantizer": "ddqcli.quant.quantizer",
    "load": "ddqcli.library",
    "parameter_groups": "ddqcli.library",
    "quantize": "ddqcli.library",
    "save": "ddqcli.library",
}


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(importlib.import_module(_MODULES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
