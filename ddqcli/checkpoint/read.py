"""Reading a checkpoint: from any file PyTorch users have to one flat dict of finite tensors, without running its code.

The file's contents decide how it is read: torch.save's zip, its older format, or safetensors. Every fault is one
CheckpointError.
"""

from __future__ import annotations

import hashlib
import re
import warnings
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

from ddqcli.checkpoint.state_keys import STATE_KEYS, WRAPPERS
from ddqcli.errors import CheckpointError

# What training scripts store beside the weights. ddq needs none of it, so none of it is made: _Ignored stands in.
_BESIDE_WEIGHTS = (
    *("argparse.Namespace", "types.SimpleNamespace", "datetime.datetime", "datetime.timedelta"),
    *(
        "numpy.dtype",
        "numpy.ndarray",
        "numpy.core.multiarray.scalar",
        "numpy.core.multiarray._reconstruct",
    ),
    *("numpy._core.multiarray.scalar", "numpy._core.multiarray._reconstruct"),
    *(
        "pathlib.PosixPath",
        "pathlib.WindowsPath",
        "pathlib._local.PosixPath",
        "pathlib._local.WindowsPath",
    ),
    *("builtins.list", "builtins.dict", "builtins.int", "builtins.float"),  # named by a defaultdict
)


@dataclass(frozen=True)
class Checkpoint:
    """The weights in a file. `tensors` may be mapped from the file; do not write to them."""

    path: Path
    sha256: str  # of the file
    tensors: dict[str, torch.Tensor]  # on the CPU, all finite
    note: str  # where the weights were found and what was done to their names
    module: nn.Module | None = None  # only from a pickled module


def load_checkpoint(path: Path, *, pickle: bool = False) -> Checkpoint:
    """Read the weights in `path`; `pickle` allows a pickled module, whose code then runs. Raises CheckpointError."""
    size, head = _look(path)
    if path.suffix == ".safetensors" or head[8:9] == b"{":
        content: Any = _read_safetensors(path)
    else:
        content = _read_torch(path, size, head, pickle)
    found, keys = _unwrap(content)
    where = "under " + " > ".join(repr(key) for key in keys) if keys else "at the top level"
    module = _bare(found) if isinstance(found, nn.Module) else None
    entries = (
        module.state_dict() if module is not None else found if isinstance(found, Mapping) else {}
    )
    tensors = {name: value.detach() for name, value in entries.items() if _is_weight(name, value)}
    if not tensors:
        raise CheckpointError(
            f"{path} holds no weights: {_contents(content)}. Save the model's state_dict() in it."
        )
    others = len(entries) - len(tensors)
    tensors, prefix = _without_wrappers(tensors)
    _check(path, size, tensors)
    note = f"{'state dict' if module is None else 'pickled ' + type(module).__name__} {where}"
    note += f", prefix '{prefix}' stripped" if prefix else ""
    note += f", {others} entries that are no tensors left out" if others else ""
    return Checkpoint(path, _sha256(path), tensors, note, module)


def _look(path: Path) -> tuple[int, bytes]:
    """Size in bytes and first 16 bytes of a file that is there, is a file, and is not empty."""
    try:
        if path.is_dir():
            raise CheckpointError(f"{path} is a folder; name the checkpoint file in it.")
        if not path.exists():
            raise CheckpointError(f"There is no checkpoint {path}.")
        if not path.is_file():
            raise CheckpointError(
                f"{path} is no ordinary file; name a checkpoint such as model.pt."
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


def _read_safetensors(path: Path) -> dict[str, torch.Tensor]:
    try:
        return load_file(path)
    except Exception as error:  # besides SafetensorError: what a header can make Python raise
        raise CheckpointError(
            f"Cannot read {path}: it is no whole safetensors file ({_line(error)}); download or save it again."
        ) from error


def _read_torch(path: Path, size: int, head: bytes, pickle: bool) -> Any:
    """What torch.save wrote to `path`, read by torch's restricted unpickler; by the real one only if that refuses."""
    zipped = head.startswith(b"PK\x03\x04")
    if zipped:
        _check_zip(path, size)
    elif not head.startswith(b"\x80"):  # pickle's first opcode
        raise CheckpointError(
            f"{path} is not a checkpoint: it begins with {head[:8]!r}, unlike any file of torch.save or safetensors."
        )
    try:
        return _torch_load(path, weights_only=True, mmap=zipped)
    except UnpicklingError as error:
        if not pickle:
            raise CheckpointError(_refusal(path, error)) from error
    except Exception as error:  # damaged bytes make torch raise nearly anything
        raise _damaged(path, error) from error
    try:
        return _torch_load(path, weights_only=False, mmap=False)
    except (AttributeError, ImportError) as error:
        raise CheckpointError(
            f"Cannot unpickle {path}: {_line(error)}; put the folder of the code it was saved with on PYTHONPATH."
        ) from error
    except Exception as error:
        raise _damaged(path, error) from error


def _torch_load(path: Path, *, weights_only: bool, mmap: bool) -> Any:
    stand_ins = [(_Ignored, name) for name in _BESIDE_WEIGHTS]
    safe = torch.serialization.safe_globals([*stand_ins, (_plain_dict, "collections.defaultdict")])
    with warnings.catch_warnings(), safe:
        warnings.simplefilter("ignore")
        try:
            return torch.load(path, map_location="cpu", weights_only=weights_only, mmap=mmap)
        except (OSError, RuntimeError) as error:
            if "mmap" not in str(error):
                raise
            return torch.load(
                path, map_location="cpu", weights_only=weights_only
            )  # a file system without mapping


class _Ignored:
    """Stands in for a value ddq has no use for: takes whatever the file passes and does nothing with it."""

    def __new__(cls, *_: object) -> _Ignored:
        return super().__new__(cls)

    def __init__(self, *_: object) -> None:
        pass

    def __setstate__(self, _: object) -> None:
        pass


def _plain_dict(*_: object) -> dict[Any, Any]:
    return {}  # in place of a defaultdict, which torch's restricted unpickler does not fill


def _check_zip(path: Path, size: int) -> None:
    """torch.save stores records as they are, so they can neither be compressed nor claim more than the file holds."""
    try:
        with zipfile.ZipFile(path) as archive:
            records = archive.infolist()
    except Exception as error:  # zipfile raises more than BadZipFile for a damaged directory
        raise CheckpointError(
            f"Cannot read {path}: it is cut short or damaged; download or save it again."
        ) from error
    names = {record.filename.rpartition("/")[2] for record in records}
    if "constants.pkl" in names:
        raise CheckpointError(
            f"{path} is a TorchScript archive; save the state_dict() of what torch.jit.load makes of it."
        )
    if "data.pkl" not in names:
        raise CheckpointError(
            f"{path} is not a checkpoint but another kind of zip file (it has no data.pkl)."
        )
    for record in records:
        if record.compress_type != zipfile.ZIP_STORED:
            raise CheckpointError(
                f"Cannot read {path}: its record {record.filename} is compressed ({record.compress_size} bytes claim "
                f"to be {record.file_size}), which torch.save never does; save it again with torch.save."
            )
    if sum(record.file_size for record in records) > size:
        raise CheckpointError(
            f"Cannot read {path}: its records claim more than its {size} bytes; save it again."
        )
    with zipfile.ZipFile(path) as archive:  # torch writes checksums but does not look at them
        try:
            broken = archive.testzip()
        except Exception as error:
            raise _damaged(path, error) from error
    if broken:
        raise CheckpointError(
            f"Cannot read {path}: its record {broken} is damaged; download or save it again."
        )


def _refusal(path: Path, error: UnpicklingError) -> str:
    blocked = re.search(r"GLOBAL (\S+)", str(error))
    what = f"a pickled object, {blocked[1]}" if blocked else f"more than weights ({_line(error)})"
    return (
        f"Cannot read {path} safely: it holds {what}, and unpickling can run any code; save its state_dict() instead, "
        "or give --allow-pickle if you trust the file."
    )


def _damaged(path: Path, error: Exception) -> CheckpointError:
    return CheckpointError(
        f"Cannot read {path}: it is cut short or damaged ({_line(error)}); get or save it again."
    )


def _line(error: Exception) -> str:
    """What an exception says, on one line and without torch's advice around it."""
    text = str(error).rpartition("WeightsUnpickler error: ")[2].strip() or type(error).__name__
    return text.splitlines()[0].rstrip(".")[:200]


def _unwrap(content: Any) -> tuple[Any, list[str]]:
    """The state dict or module inside what a training script saved, and the keys that lead to it."""
    keys: list[str] = []
    while (
        isinstance(content, Mapping) and len(keys) < 3
    ):  # deeper is no real file (a dict may even hold itself)
        key = next((key for key in STATE_KEYS if _may_hold_weights(content.get(key))), None)
        if key is None:
            break
        content = content[key]
        keys.append(key)
    return content, keys


def _may_hold_weights(value: Any) -> bool:
    inner = value.values() if isinstance(value, Mapping) else ()
    return isinstance(value, nn.Module) or any(
        isinstance(item, (torch.Tensor, Mapping, nn.Module)) for item in inner
    )


def _is_weight(name: Any, value: Any) -> bool:
    return isinstance(name, str) and isinstance(value, torch.Tensor)


def _bare(module: nn.Module) -> nn.Module:
    """The module inside DataParallel, AveragedModel or torch.compile's wrapper."""
    while list(dict(module.named_children())) in (["module"], ["_orig_mod"]):
        module = next(module.children())
    return module


def _without_wrappers(tensors: dict[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], str]:
    """The tensors without the wrappers' names that every one of them carries, and these names."""
    counted = {
        name: tensor for name, tensor in tensors.items() if name != "n_averaged"
    }  # AveragedModel's counter
    if counted and all(name.startswith("module.") for name in counted):
        tensors = counted
    prefix = ""
    while step := next(
        (step for step in WRAPPERS if all(name.startswith(step) for name in tensors)), ""
    ):
        tensors = {name.removeprefix(step): tensor for name, tensor in tensors.items()}
        prefix += step
    return tensors, prefix


def _check(path: Path, size: int, tensors: dict[str, torch.Tensor]) -> None:
    """Refuse tensors whose numbers are not there, or are not numbers in float32."""
    faulty = {}
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
            bad = tensor.numel() - int(torch.isfinite(tensor.float()).sum())
            if bad:
                faulty[name] = bad
    if faulty:
        name, bad = next(iter(faulty.items()))
        more = f", and {len(faulty) - 1} more tensors hold such values" if len(faulty) > 1 else ""
        raise CheckpointError(
            f"{path}: {name} holds {bad} NaN or infinite values of {tensors[name].numel()}{more}; "
            "the training that saved it had diverged: take an earlier checkpoint."
        )


def _contents(content: Any) -> str:
    if isinstance(content, Mapping) and content:
        names = ", ".join(f"{name!r:.40}" for name in list(content)[:8])
        return f"its keys are {names}{', ...' if len(content) > 8 else ''}"
    return f"there is only {'an empty' if isinstance(content, Mapping) else 'a'} {type(content).__name__} in it"


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
