"""`torch.load` for files of unknown origin: runs no code, and turns any fault into CheckpointError.

A file is first read by torch's restricted unpickler, which builds tensors and plain containers
only. The full unpickler follows if that one refuses and the user allowed it.
"""

from __future__ import annotations

import re
import warnings
import zipfile
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch

from ddqcli.errors import CheckpointError
from ddqcli.recipe.consent import require_consent

_ZIP_MAGIC = b"PK\x03\x04"
_PICKLE_MAGIC = b"\x80"  # the opcode PROTO

# Types that training scripts store beside the weights. None is needed, so none is built: the
# restricted unpickler gets _Ignored in their place.
_IGNORED_TYPES = (
    *("argparse.Namespace", "types.SimpleNamespace", "datetime.datetime", "datetime.timedelta"),
    *("numpy.dtype", "numpy.ndarray"),
    *("numpy.core.multiarray.scalar", "numpy.core.multiarray._reconstruct"),
    *("numpy._core.multiarray.scalar", "numpy._core.multiarray._reconstruct"),
    *("pathlib.PosixPath", "pathlib.WindowsPath"),
    *("pathlib._local.PosixPath", "pathlib._local.WindowsPath"),
    *("builtins.list", "builtins.dict", "builtins.int", "builtins.float"),  # in a defaultdict
)


def load_torch_file(path: Path, size: int, head: bytes, pickle: bool) -> Any:
    """Return the object that `torch.save` wrote to `path`, a file of `size` bytes.

    `head` is the beginning of the file. `pickle` allows the full unpickler, which may run code.
    Raises CheckpointError.
    """
    is_zip = head.startswith(_ZIP_MAGIC)
    if is_zip:
        check_zip(path, size)
    elif not head.startswith(_PICKLE_MAGIC):
        raise CheckpointError(
            f"{path} is not a checkpoint: it begins with {head[:8]!r}, unlike any file of "
            "torch.save or safetensors."
        )
    try:
        return _torch_load(path, weights_only=True, mmap=is_zip)
    except UnpicklingError as error:
        if not pickle:
            raise CheckpointError(_refusal(path, error)) from error
        require_consent(str(path))
    except Exception as error:  # damaged bytes make torch raise nearly anything
        raise _damaged(path, error) from error
    try:
        return _torch_load(path, weights_only=False, mmap=False)
    except (AttributeError, ImportError) as error:
        raise CheckpointError(
            f"Cannot unpickle {path}: {first_line(error)}; put the folder of the code it was saved "
            "with on PYTHONPATH."
        ) from error
    except Exception as error:
        raise _damaged(path, error) from error


def first_line(error: Exception) -> str:
    """Return an exception's message as one line, without torch's advice around it."""
    text = str(error).rpartition("WeightsUnpickler error: ")[2].strip() or type(error).__name__
    return text.splitlines()[0].rstrip(".")[:200]


def _torch_load(path: Path, *, weights_only: bool, mmap: bool) -> Any:
    stand_ins = [(_Ignored, name) for name in _IGNORED_TYPES]
    safe = torch.serialization.safe_globals([*stand_ins, (_empty_dict, "collections.defaultdict")])
    with warnings.catch_warnings(), safe:
        warnings.simplefilter("ignore")
        try:
            return torch.load(path, map_location="cpu", weights_only=weights_only, mmap=mmap)
        except (OSError, RuntimeError) as error:
            if "mmap" not in str(error):
                raise
            # The file system does not support memory mapping.
            return torch.load(path, map_location="cpu", weights_only=weights_only)


class _Ignored:
    """A stand-in that accepts any arguments and state, and drops them."""

    def __new__(cls, *_: object) -> _Ignored:
        return super().__new__(cls)

    def __init__(self, *_: object) -> None:
        pass

    def __setstate__(self, _: object) -> None:
        pass


def _empty_dict(*_: object) -> dict[Any, Any]:
    """Replace a defaultdict, which torch's restricted unpickler cannot fill."""
    return {}


def check_zip(path: Path, size: int) -> None:
    """Refuse zip files that `torch.save` did not write, and damaged ones.

    `torch.save` stores records uncompressed. A compressed record, or records larger than the file
    in all, would be a zip bomb.
    """
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
            f"{path} is a TorchScript archive; load it with torch.jit.load and save the "
            "state_dict() of that."
        )
    if "data.pkl" not in names:
        raise CheckpointError(
            f"{path} is not a checkpoint but another kind of zip file (it has no data.pkl)."
        )
    for record in records:
        if record.compress_type != zipfile.ZIP_STORED:
            raise CheckpointError(
                f"Cannot read {path}: its record {record.filename} is compressed "
                f"({record.compress_size} bytes claim to be {record.file_size}), which torch.save "
                "never does; save it again with torch.save."
            )
    if sum(record.file_size for record in records) > size:
        raise CheckpointError(
            f"Cannot read {path}: its records claim more than its {size} bytes; save it again."
        )
    _check_checksums(path)


def _check_checksums(path: Path) -> None:
    """Verify the CRC of each record, which torch writes but does not check."""
    with zipfile.ZipFile(path) as archive:
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
    other = f"more than weights ({first_line(error)})"
    content = f"a pickled object, {blocked[1]}" if blocked else other
    return (
        f"Cannot read {path} safely: it holds {content}, and unpickling can run any code; save its "
        "state_dict() instead, or give --allow-pickle if you trust the file."
    )


def _damaged(path: Path, error: Exception) -> CheckpointError:
    return CheckpointError(
        f"Cannot read {path}: it is cut short or damaged ({first_line(error)}); get or save it "
        "again."
    )
