"""Find the state dict in what a training script saved, and the wrapper prefix that names share."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

# Keys under which scripts save a state dict. Averaged (EMA) weights first: they were evaluated.
STATE_KEYS = (
    *("state_dict_ema", "model_ema", "ema_state_dict", "ema"),
    *("state_dict", "model_state_dict", "model_state", "model"),
    *("network", "net", "weights", "params"),
)
WRAPPERS = ("module.", "_orig_mod.")  # prefixes by DataParallel and torch.compile
_MAX_DEPTH = 3  # no real file nests deeper, and a mapping may even contain itself


def find_state(content: Any, holds_weights: Callable[[Any], bool]) -> tuple[Any, str]:
    """Descend from `content` through STATE_KEYS to the weights.

    `holds_weights` decides whether a value may hold weights; a `model` entry may be a config.
    Returns the value and its position in words, such as "under 'model' > 'state_dict'".
    """
    keys: list[str] = []
    while isinstance(content, Mapping) and len(keys) < _MAX_DEPTH:
        key = next((key for key in STATE_KEYS if holds_weights(content.get(key))), None)
        if key is None:
            break
        content = content[key]
        keys.append(key)
    return content, "under " + " > ".join(map(repr, keys)) if keys else "at the top level"


def wrapper_prefix(names: Collection[str]) -> str:
    """Return the wrapper prefix that all names share, such as `module._orig_mod.`, or ""."""

    def shared(prefix: str) -> bool:
        return bool(names) and all(name.startswith(prefix) for name in names)

    prefix = ""
    while wrapper := next((w for w in WRAPPERS if shared(prefix + w)), ""):
        prefix += wrapper
    return prefix
