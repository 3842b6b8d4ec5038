"""The artifact: one safetensors file, as FORMAT.md describes it; written whole or not at all, read with the decoder.

The words: `quantized` tensors are indices into level vectors, `floats` are kept as they are (whatever their dtype),
`activations` are level vectors without indices, `aliases` are further names of a tensor that is shared.
"""

from __future__ import annotations

import bz2
import contextlib
import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ddqcli.artifact import decoder
from ddqcli.artifact.packing import pack_groups
from ddqcli.artifact.tensors import ActivationTable, QuantizedTensor, bits_of, tensor_bytes
from ddqcli.errors import DDQError, UsageError, VerificationError

Array = NDArray[Any]
__all__ = [
    "BFLOAT16",
    "ActivationTable",
    "Artifact",
    "QuantizedTensor",
    "Sizes",
    "decode_artifact",
    "decode_model",
    "encode_artifact",
    "read_artifact",
    "tensor_bytes",
    "write_artifact",
]
VERSION = "1"
BFLOAT16 = decoder.BFLOAT16  # numpy has none: its bits, as tensor.view(torch.uint16).numpy().view(BFLOAT16)
CODES = {np.dtype(dtype): code for code, dtype in decoder.DTYPES.items()}  # safetensors' names of dtypes


@dataclass(frozen=True)
class Sizes:
    """Where the bytes of a file went."""

    indices: int
    levels: int
    scales: int  # with the zero points
    gates: int
    floats: int  # tensors kept as they were, of any dtype
    manifest: int  # names, shapes, meta; compressed
    header: int  # of safetensors
    tensors: dict[str, int]  # bytes of each tensor and activation, by name; they add up to `payload`

    @property
    def payload(self) -> int:
        """What a budget counts: all but the manifest and the header."""
        return self.indices + self.levels + self.scales + self.gates + self.floats

    @property
    def file(self) -> int:
        return self.payload + self.manifest + self.header


@dataclass(frozen=True, eq=False)
class Artifact:
    """What a file holds, by name."""

    quantized: dict[str, QuantizedTensor]
    activations: dict[str, ActivationTable]
    floats: dict[str, Array]
    aliases: dict[str, str]
    meta: dict[str, Any]
    sizes: Sizes


def write_artifact(
    path: Path,
    quantized: Sequence[QuantizedTensor],
    activations: Sequence[ActivationTable],
    floats: Mapping[str, Array],
    aliases: Mapping[str, str],
    meta: Mapping[str, Any],
) -> Sizes:
    """Write a file, whole or not at all; the same content gives the same bytes, in whatever order it comes.

    `meta` is JSON without NaN. Raises ValueError where the content does not fit together, UsageError or DDQError where
    the file cannot be written.
    """
    raw, sizes = encode_artifact(quantized, activations, floats, aliases, meta)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(raw)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        wrong_path = isinstance(error, (FileNotFoundError, NotADirectoryError, IsADirectoryError, PermissionError))
        raise (UsageError if wrong_path else DDQError)(f"Cannot write {path}: {error.strerror}.") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()
    return sizes


def encode_artifact(
    quantized: Sequence[QuantizedTensor],
    activations: Sequence[ActivationTable],
    floats: Mapping[str, Array],
    aliases: Mapping[str, str],
    meta: Mapping[str, Any],
) -> tuple[bytes, Sizes]:
    """The bytes of the file that `write_artifact` writes, and where they went."""
    quantized = sorted(quantized, key=lambda tensor: tensor.name)
    activations = sorted(activations, key=lambda table: table.name)
    _check_names([t.name for t in quantized], [t.name for t in activations], list(floats), aliases)
    kept: dict[str, dict[str, Array]] = {}
    for name, array in sorted(floats.items()):
        kept.setdefault(_dtype_name(name, array), {})[name] = array
    manifest = {
        "quantized": {tensor.name: list(tensor.shape) for tensor in quantized},
        "axes": {tensor.name: tensor.axis for tensor in quantized if tensor.axis is not None},
        "activations": [table.name for table in activations],
        "kept": {dtype: {name: list(array.shape) for name, array in arrays.items()} for dtype, arrays in kept.items()},
        "aliases": dict(aliases),
        "meta": dict(meta),
    }
    levels = [level for tensor in quantized for level in tensor.levels] + [table.levels for table in activations]
    entries: dict[str, Array] = {
        "indices": _joined([pack_groups(list(tensor.rows()), tensor.bits) for tensor in quantized], "u1"),
        "levels": _joined([level for level in levels if len(level) < 256], "u1"),
        "scales": _joined([t.scale for t in quantized] + [t.arrays[0] for t in activations], "<f4"),
        "zero_points": _joined([t.zero_point for t in quantized] + [t.arrays[1] for t in activations], "u1"),
        "gates": np.array([2 ** bits_of(level) - 1 for level in levels], np.uint8),
        "manifest": np.frombuffer(bz2.compress(_canonical(manifest)), np.uint8),
    }
    for dtype, arrays in kept.items():
        entries[dtype] = _joined(list(arrays.values()), next(iter(arrays.values())).dtype.newbyteorder("<"))
    raw = _safetensors(entries)
    return raw, _sizes(quantized, activations, floats, 8 + int.from_bytes(raw[:8], "little"), len(raw))


def read_artifact(path: Path) -> Artifact:
    """What a file holds, as it was given to `write_artifact`.

    Raises UsageError on what cannot be opened or is no ddq file, VerificationError on a file that differs from what was
    written.
    """
    with _named_faults(path):
        tensors, manifest = decoder.read(path)
        quantized = {n: _quantized(n, tensors[n]) for n in sorted(manifest["quantized"])}
        activations = _tables(manifest)
        floats = {name: tensor for name, tensor in tensors.items() if name not in quantized}
        with path.open("rb") as file:
            header, total = 8 + int.from_bytes(file.read(8), "little"), file.seek(0, os.SEEK_END)
        sizes = _sizes(list(quantized.values()), list(activations.values()), floats, header, total)
    return Artifact(quantized, activations, floats, manifest["aliases"], manifest["meta"], sizes)


def decode_artifact(path: Path) -> tuple[dict[str, Array], dict[str, Any]]:
    """`decoder.decode`: every tensor as an array, and the manifest. Raises as `read_artifact`."""
    with _named_faults(path):
        return decoder.decode(path)


def decode_model(path: Path) -> tuple[dict[str, Array], dict[str, ActivationTable], dict[str, Any]]:
    """What a network needs of a file: every tensor as an array, the tables of its activations, and the manifest.

    Raises as `read_artifact`.
    """
    with _named_faults(path):
        tensors, manifest = decoder.read(path)
        tensors |= {name: decoder.dequantize(tensors[name]) for name in manifest["quantized"]}
        tensors |= {name: tensors[target] for name, target in manifest["aliases"].items()}
        return tensors, _tables(manifest), manifest


def _tables(manifest: Mapping[str, Any]) -> dict[str, ActivationTable]:
    return {
        name: ActivationTable(name, stored.levels[0], float(stored.scale[0]), int(stored.zero_point[0]))
        for name, stored in manifest["activations"].items()
    }


def _quantized(name: str, stored: decoder.Stored) -> QuantizedTensor:
    groups = len(stored.bits)
    as_levels = stored._replace(
        levels=[np.arange(2**bits, dtype=np.uint8) for bits in stored.bits],
        scale=np.ones(groups, np.float32),
        zero_point=np.zeros(groups, np.uint8),
    )
    indices = decoder.dequantize(as_levels).astype(np.uint8).reshape(-1)
    return QuantizedTensor(
        name, stored.shape, stored.axis, indices, tuple(stored.levels), stored.scale, stored.zero_point
    )


def _sizes(
    quantized: Sequence[QuantizedTensor],
    activations: Sequence[ActivationTable],
    floats: Mapping[str, Array],
    header: int,
    file: int,
) -> Sizes:
    bits = [bits for tensor in quantized for bits in tensor.bits] + [table.bits for table in activations]
    levels = sum(2**s for s in bits if s < 8)
    kept = {name: array.nbytes for name, array in floats.items()}
    tensors = {tensor.name: tensor.nbytes for tensor in quantized} | {table.name: table.nbytes for table in activations}
    return Sizes(
        indices=sum(tensors.values()) - levels - 6 * len(bits),
        levels=levels,
        scales=5 * len(bits),
        gates=len(bits),
        floats=sum(kept.values()),
        manifest=file - header - sum(tensors.values()) - sum(kept.values()),
        header=header,
        tensors=tensors | kept,
    )


def _check_names(quantized: list[str], activations: list[str], floats: list[str], aliases: Mapping[str, str]) -> None:
    counts = Counter([*quantized, *activations, *floats, *aliases])
    if twice := sorted(name for name, count in counts.items() if count > 1):
        raise ValueError(f"{', '.join(twice)}: more than one tensor, activation or alias has this name")
    if lost := sorted(set(aliases.values()) - {*quantized, *floats}):
        raise ValueError(f"{', '.join(lost)}: an alias points here, and there is no such tensor")


def _dtype_name(name: str, array: Array) -> str:
    """The entry that holds arrays of this dtype: float32, int64, bfloat16, ..."""
    if array.dtype.newbyteorder("<") not in CODES:
        raise ValueError(f"{name} has dtype {array.dtype}, which the file cannot hold")
    return str(array.dtype.names[0] if array.dtype.names else array.dtype.name)


def _joined(arrays: Sequence[Array], dtype: Any) -> Array:
    return np.concatenate([np.zeros(0, dtype), *(array.reshape(-1) for array in arrays)])


def _canonical(value: Any) -> bytes:
    """JSON that is the same for equal values: keys sorted, no spaces, ASCII."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode("ascii")


def _safetensors(entries: Mapping[str, Array]) -> bytes:
    """The file's bytes. The library's own writer orders the metadata at random; here equal entries give equal bytes."""
    header: dict[str, Any] = {"__metadata__": {"format": "ddq", "sha256": "0" * 64, "version": VERSION}}
    order, at = sorted(entries, key=lambda name: (-entries[name].itemsize, name)), 0  # widest first keeps all aligned
    for name in order:
        entry = entries[name]
        header[name] = {"data_offsets": [at, at + entry.nbytes], "dtype": CODES[entry.dtype], "shape": [entry.size]}
        at += entry.nbytes
    text = _canonical(header)
    text += b" " * (-len(text) % 8)
    raw = bytearray(b"".join([len(text).to_bytes(8, "little"), text, *(entries[name].tobytes() for name in order)]))
    digits = 8 + len(decoder.HEAD)
    raw[digits : digits + 64] = hashlib.sha256(raw).hexdigest().encode("ascii")
    return bytes(raw)


@contextlib.contextmanager
def _named_faults(path: Path) -> Iterator[None]:
    """The decoder's errors, and those of content that contradicts itself, as ours."""
    try:
        yield
    except OSError as error:
        raise UsageError(f"Cannot open {path}: {error.strerror}.") from error
    except decoder.NotAnArtifact as error:
        raise UsageError(f"{error}.") from error
    except decoder.ArtifactError as error:
        raise VerificationError(f"{error}.") from error
    except ValueError as error:
        raise VerificationError(f"{path} contradicts itself: {error}.") from error
