"""A copy of a network, which may hold tensors of its last forward pass."""

from __future__ import annotations

import copy
from typing import Any, TypeVar

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

M = TypeVar("M", bound=nn.Module)


def copy_network(model: M) -> M:
    """Return a deep copy of a network.

    Networks that keep what they computed last (RAFT its correlations) keep the graph behind it,
    which torch does not copy. The copy has the values alone.
    """
    with _ValuesAlone():
        return copy.deepcopy(model)


class _ValuesAlone(TorchFunctionMode):
    """Copies tensors that have a graph without it."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is Tensor.__deepcopy__ and not args[0].is_leaf:
            args = (args[0].detach(), *args[1:])
        return func(*args, **(kwargs or {}))
