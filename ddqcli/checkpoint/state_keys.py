"""Find the state dict in what a training script saved, and the names without their wrappers."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

# Keys under which scripts save a state dict. Averaged (EMA) weights first: they were evaluated.
STATE_KEYS = (
    *("state_dict_ema", "model_ema", "ema_state_dict", "ema", "params_ema"),
    *("state_dict", "model_state_dict", "model_state", "model", "module"),
    *("network", "net", "weights", "params"),
    "shadow",  # inside of "ema"
)
# Parts of names that torch.compile, FSDP and activation checkpointing put before any layer.
_WRAPPED_LAYERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
_WRAPPED_MODEL = "module."  # by DataParallel, before all names
_MAX_DEPTH = 3  # no real file nests deeper, and a mapping may even contain itself


def find_state(content: Any, holds_weights: Callable[[Any], bool]) -> tuple[Any, str]:
    """Descend from `content` through STATE_KEYS, or its only entry with weights, to the weights.

    `holds_weights` tells whether a value holds weights itself; a `model` entry may be a config.
    Returns the value and its position in words, such as "under 'model' > 'state_dict'".
    """
    keys = _path(content, holds_weights, _MAX_DEPTH)
    if keys is None and isinstance(content, Mapping):
        paths = ((key, _path(value, holds_weights, 1)) for key, value in content.items())
        found = [[key, *path] for key, path in paths if path is not None]
        keys = found[0] if len(found) == 1 else None
    for key in keys or []:
        content = content[key]
    return content, "under " + " > ".join(map(repr, keys)) if keys else "at the top level"


def _path(content: Any, holds_weights: Callable[[Any], bool], depth: int) -> list[str] | None:
    """Return the keys that lead to weights; None if none of STATE_KEYS does."""
    if isinstance(content, Mapping) and depth:
        for key in STATE_KEYS:
            rest = _path(content.get(key), holds_weights, depth - 1)
            if rest is not None:
                return [key, *rest]
    return [] if holds_weights(content) else None


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
