"""Read a checkpoint with PyTorch: any common file, or files, to one flat dict of finite tensors.

The file's contents, not its name, decide the reader: `torch.save`'s zip format, its older format,
or safetensors. No code in the file runs unless the user allows it.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

from ddqcli.checkpoint.safetensors_header import is_safetensors
from ddqcli.checkpoint.shards import INDEX, shard_files, weights_in
from ddqcli.checkpoint.state_keys import bare_names, find_state
from ddqcli.checkpoint.torch_load import first_line, load_torch_file
from ddqcli.errors import CheckpointError
from ddqcli.hashing import sha256_of_files
from ddqcli.recipe.missing_file import CHECKPOINTS, missing_file


@dataclass(frozen=True)
class Checkpoint:
    """The weights in a file. `tensors` may be memory-mapped from it: do not write to them."""

    path: Path
    sha256: str  # of the file, or of all files of a checkpoint in several
    tensors: dict[str, torch.Tensor]  # on the CPU, all finite
    note: str  # position of the weights in the file, and changes to their names
    module: nn.Module | None = None  # the pickled module, if the file holds one


def load_checkpoint(path: Path, *, pickle: bool = False) -> Checkpoint:
    """Read the weights in `path`.

    `pickle` allows a pickled module, whose code then runs. Raises CheckpointError if the file
    cannot be read, holds no weights, or holds NaN or infinite values.
    """
    path = weights_in(path) if os.path.isdir(path) else path
    files = shard_files(path) if path.name.endswith(INDEX) else [path]
    size = sum(_size_and_head(file)[0] for file in files)
    content = _load_file(files[0], pickle)
    for file in files[1:]:
        content = {**content, **_load_file(file, pickle)}
    state, position = find_state(content, _holds_weights)
    module = _without_wrappers(state) if isinstance(state, nn.Module) else None
    if module is not None:
        state = module.state_dict()
    entries = state if isinstance(state, Mapping) else {}
    tensors = {name: value.detach() for name, value in entries.items() if _is_weight(name, value)}
    if not tensors:
        raise CheckpointError(
            f"{path} holds no weights: {_describe(content)}. Save the model's state_dict() in it."
        )
    others = len(entries) - len(tensors)
    tensors, stripped = _without_wrapper_names(path, tensors)
    _check_tensors(path, size, tensors)
    kind = "state dict" if module is None else f"pickled {type(module).__name__}"
    note = f"{kind} {position}{stripped}"
    note += f", {others} entries that are no tensors left out" if others else ""
    note += f", in {len(files)} files" if len(files) > 1 else ""
    return Checkpoint(path, sha256_of_files(*files), tensors, note, module)


def _load_file(path: Path, pickle: bool) -> Any:
    """Return the content of one file."""
    size, head = _size_and_head(path)
    if is_safetensors(path, head):
        return _load_safetensors(path)
    return load_torch_file(path, size, head, pickle)


def _size_and_head(path: Path) -> tuple[int, bytes]:
    """Return the size in bytes and the first 16 bytes of a file that is not empty."""
    try:
        if not path.exists():
            raise CheckpointError(missing_file(path, "checkpoint", CHECKPOINTS))
        if not path.is_file():
            raise CheckpointError(
                f"{path} is not a regular file; name a checkpoint such as model.pt."
            )
        with path.open("rb") as file:
            head = file.read(16)
            size = file.seek(0, 2)
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"Cannot read {path}: {getattr(error, 'strerror', None) or error}."
        ) from error
    if not size:
        raise CheckpointError(f"Cannot read {path}: it is empty; download or save it again.")
    return size, head


def _load_safetensors(path: Path) -> dict[str, torch.Tensor]:
    try:
        return load_file(path)
    except Exception as error:  # SafetensorError, and what a damaged header makes Python raise
        raise CheckpointError(
            f"Cannot read {path}: it is no whole safetensors file ({first_line(error)}); download "
            "or save it again."
        ) from error


def _holds_weights(value: Any) -> bool:
    items = value.items() if isinstance(value, Mapping) else ()
    return isinstance(value, nn.Module) or any(_is_weight(*item) for item in items)


def _is_weight(name: Any, value: Any) -> bool:
    return isinstance(name, str) and isinstance(value, torch.Tensor)


def _without_wrappers(module: nn.Module) -> nn.Module:
    """Return the module inside DataParallel, AveragedModel or torch.compile's wrapper."""
    while list(dict(module.named_children())) in (["module"], ["_orig_mod"]):
        module = next(module.children())
    return module


def _without_wrapper_names(
    path: Path, tensors: dict[str, torch.Tensor]
) -> tuple[dict[str, torch.Tensor], str]:
    """Return the tensors under the names of the model without its wrappers, and a note."""
    without_counter = {name: t for name, t in tensors.items() if name != "n_averaged"}
    if without_counter and all(name.startswith("module.") for name in without_counter):
        tensors = without_counter  # the state dict of an AveragedModel
    try:
        bare, note = bare_names(tensors)
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}; save the state_dict() of one model.") from error
    return {bare[name]: tensor for name, tensor in tensors.items()}, note


def _check_tensors(path: Path, size: int, tensors: dict[str, torch.Tensor]) -> None:
    """Refuse tensors without plain data, beyond the file's size, or not finite in float32."""
    not_finite = {}
    for name, tensor in tensors.items():
        if tensor.layout is not torch.strided or tensor.is_meta or tensor.is_quantized:
            raise CheckpointError(
                f"{path}: {name} is sparse, quantized or without data; save plain float weights."
            )
        if tensor.numel() * tensor.element_size() > size:
            raise CheckpointError(
                f"Cannot read {path}: {name} claims more than the file's {size} bytes."
            )
        if tensor.is_floating_point():
            count = tensor.numel() - int(torch.isfinite(tensor.float()).sum())
            if count:
                not_finite[name] = count
    if not_finite:
        name, count = next(iter(not_finite.items()))
        others = len(not_finite) - 1
        more = f", and {others} more tensors hold such values" if others else ""
        raise CheckpointError(
            f"{path}: {name} holds {count} NaN or infinite values of {tensors[name].numel()}{more};"
            " the training that saved it had diverged: take an earlier checkpoint."
        )


def _describe(content: Any) -> str:
    """Describe the content of a file without weights, for an error message."""
    if isinstance(content, Mapping) and content:
        names = ", ".join(f"{name!r:.40}" for name in list(content)[:8])
        return f"its keys are {names}{', ...' if len(content) > 8 else ''}"
    article = "an empty" if isinstance(content, Mapping) else "a"
    return f"there is only {article} {type(content).__name__} in it"
