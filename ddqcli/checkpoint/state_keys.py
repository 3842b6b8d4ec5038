"""Find the state dict in what a training script saved, and the names without their wrappers."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

# Keys under which scripts save a state dict. Averaged (EMA) weights first: they were evaluated.
STATE_KEYS = (
    *("state_dict_ema", "model_ema", "ema_state_dict", "ema", "params_ema"),
    *("state_dict", "model_state_dict", "model_state", "model", "module"),
    *("network", "net", "weights", "params"),
)
# Parts of names that torch.compile, FSDP and activation checkpointing put before any layer.
_WRAPPED_LAYERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
_WRAPPED_MODEL = "module."  # by DataParallel, before all names
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


def bare_name(name: str) -> str:
    """Return a tensor's name without what wrappers of single layers put into it."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPED_LAYERS)


def bare_names(names: Collection[str]) -> tuple[dict[str, str], str]:
    """Map each name to that in the model without its wrappers; also return a note on the change.

    Raises ValueError if two tensors would get one name.
    """
    prefix = _shared_prefix(names)
    short = {name: name.removeprefix(prefix) for name in names}
    bare = {name: bare_name(rest) for name, rest in short.items()}
    inside = [part for part in _WRAPPED_LAYERS if any(part in n.split(".") for n in short.values())]
    if len(set(bare.values())) < len(bare):
        raise ValueError(f"without {' and '.join(inside)} two tensors would have one name")
    note = f", prefix '{prefix}' stripped" if prefix else ""
    note += f", {' and '.join(inside)} stripped from names" if inside else ""
    return bare, note


def _shared_prefix(names: Collection[str]) -> str:
    """Return the wrapper prefix that all names share, such as `module._orig_mod.`, or ""."""
    wrappers = [_WRAPPED_MODEL, *(f"{part}." for part in _WRAPPED_LAYERS)]

    def shared(prefix: str) -> bool:
        return bool(names) and all(name.startswith(prefix) for name in names)

    prefix = ""
    while wrapper := next((w for w in wrappers if shared(prefix + w)), ""):
        prefix += wrapper
    return prefix
