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
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ddqcli.artifact import decoder
from ddqcli.artifact.packing import pack
from ddqcli.artifact.tensors import ActivationTable, QuantizedTensor, tensor_bytes
from ddqcli.errors import DDQError, UsageError, VerificationError

Array = NDArray[Any]
__all__ = [
    "BFLOAT16",
    "ActivationTable",
    "Artifact",
    "QuantizedTensor",
    "Sizes",
    "decode_model",
    "dtype_name",
    "encode_artifact",
    "read_artifact",
    "tensor_bytes",
    "write_artifact",
]
VERSION = "1"
BFLOAT16 = (
    decoder.BFLOAT16
)  # numpy has none: its bits, as tensor.view(torch.uint16).numpy().view(BFLOAT16)
CODES = {
    np.dtype(dtype): code for code, dtype in decoder.DTYPES.items()
}  # safetensors' names of dtypes


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
    tensors: dict[
        str, int
    ]  # bytes of each tensor and activation, by name; they add up to `payload`

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
        wrong_path = isinstance(
            error, (FileNotFoundError, NotADirectoryError, IsADirectoryError, PermissionError)
        )
        raise (UsageError if wrong_path else DDQError)(
            f"Cannot write {path}: {error.strerror}."
        ) from error
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
    tables: list[QuantizedTensor | ActivationTable] = sorted(
        [*quantized, *activations], key=lambda table: table.name
    )
    _check_names([table.name for table in tables], floats, aliases)
    _check_aliases(aliases, {*floats, *(tensor.name for tensor in quantized)})
    leaves: dict[str, list[Any]] = {name: ["alias", target] for name, target in aliases.items()}
    parts: dict[str, list[Array]] = {"quantized": []}  # of each entry
    for table in tables:
        leaves[table.name] = (
            [table.axis, *table.shape] if isinstance(table, QuantizedTensor) else ["levels"]
        )
        parts["quantized"] += _record(table)
    for name, array in sorted(floats.items()):
        leaves[name] = [_code(name, array).lower(), *array.shape]
        parts.setdefault(leaves[name][0], []).append(array)
    parts["manifest"] = [
        np.frombuffer(
            bz2.compress(_canonical({"meta": dict(meta), "tensors": _tree(leaves)})), "u1"
        )
    ]
    raw = _safetensors(
        {
            entry: _joined(arrays, decoder.DTYPES.get(entry.upper(), "u1"))
            for entry, arrays in parts.items()
        }
    )
    return raw, _sizes(
        quantized, activations, floats, 8 + int.from_bytes(raw[:8], "little"), len(raw)
    )


def read_artifact(path: Path) -> Artifact:
    """What a file holds, as it was given to `write_artifact`.

    Raises UsageError on what cannot be opened or is no ddq file, VerificationError on a file that differs from what was
    written.
    """
    with _named_faults(path):
        tensors, activations, aliases, meta = decoder.read(path)
        stored = {
            name: tensor for name, tensor in tensors.items() if isinstance(tensor, decoder.Stored)
        }
        quantized = {name: _quantized(name, tensor) for name, tensor in stored.items()}
        floats = {name: tensor for name, tensor in tensors.items() if name not in stored}
        tables = _tables(activations)
        _check_aliases(aliases, tensors)
        with path.open("rb") as file:
            header, total = 8 + int.from_bytes(file.read(8), "little"), file.seek(0, os.SEEK_END)
        sizes = _sizes(list(quantized.values()), list(tables.values()), floats, header, total)
    return Artifact(quantized, tables, floats, aliases, meta, sizes)


def decode_model(path: Path) -> tuple[dict[str, Array], dict[str, ActivationTable]]:
    """What a network needs of a file: every tensor as an array, and the tables of its activations.

    Raises as `read_artifact`.
    """
    with _named_faults(path):
        stored, activations, aliases, _ = decoder.read(path)
        tensors = {
            name: decoder.dequantize(t) if isinstance(t, decoder.Stored) else t
            for name, t in stored.items()
        }
        return tensors | {name: tensors[target] for name, target in aliases.items()}, _tables(
            activations
        )


def _tables(activations: Mapping[str, decoder.Stored]) -> dict[str, ActivationTable]:
    return {
        name: ActivationTable(
            name, _levels(stored)[0], float(stored.scale[0]), int(stored.zero_point[0])
        )
        for name, stored in activations.items()
    }


def _quantized(name: str, stored: decoder.Stored) -> QuantizedTensor:
    levels, groups = _levels(stored), len(stored.bits)
    own = [
        np.arange(len(level), dtype=np.uint8) for level in levels if len(level) < 256
    ]  # then a value is its index
    plain = stored._replace(
        levels=np.concatenate([stored.levels[:0], *own]),
        scale=np.ones(groups, np.float32),
        zero_point=np.zeros(groups, np.uint8),
    )
    indices = decoder.dequantize(plain).astype(np.uint8).reshape(-1)
    return QuantizedTensor(
        name, stored.shape, stored.axis, indices, levels, stored.scale, stored.zero_point
    )


def _levels(stored: decoder.Stored) -> tuple[Array, ...]:
    """[G] level vectors."""
    ends = np.cumsum(np.where(stored.bits < 8, 1 << stored.bits, 0))
    vectors = np.split(stored.levels, ends)[:-1]
    return tuple(
        decoder.BYTES if s == 8 else vector for s, vector in zip(stored.bits, vectors, strict=True)
    )


def _record(tensor: QuantizedTensor | ActivationTable) -> list[Array]:
    """What the entry `quantized` holds of it."""
    if isinstance(tensor, QuantizedTensor):
        levels, scale, zero_point, packed = (
            tensor.levels,
            tensor.scale,
            tensor.zero_point,
            pack(tensor.rows(), tensor.bits),
        )
    else:
        levels, (scale, zero_point), packed = (tensor.levels,), tensor.arrays, np.zeros(0, np.uint8)
    gates = np.array([len(level) - 1 for level in levels], np.uint8)  # 2^s - 1: s of them are open
    return [
        gates,
        zero_point,
        scale.astype("<f4").view("u1"),
        *(level for level in levels if len(level) < 256),
        packed,
    ]


def _tree(leaves: Mapping[str, list[Any]]) -> dict[str, Any]:
    """Names as a tree of their parts between dots: most of them begin alike. A name stays whole below one that ends there."""
    tree: dict[str, Any] = {}
    for name, leaf in leaves.items():
        head, dot, rest = name.partition(".")
        if dot and head not in leaves:
            tree.setdefault(head, {})[rest] = leaf
        else:
            tree[name] = leaf
    return {
        name: _tree(below) if isinstance(below, dict) else below for name, below in tree.items()
    }


def _sizes(
    quantized: Sequence[QuantizedTensor],
    activations: Sequence[ActivationTable],
    floats: Mapping[str, Array],
    header: int,
    file: int,
) -> Sizes:
    bits = [bits for tensor in quantized for bits in tensor.bits] + [
        table.bits for table in activations
    ]
    levels = sum(2**s for s in bits if s < 8)
    kept = {name: array.nbytes for name, array in floats.items()}
    tensors = {tensor.name: tensor.nbytes for tensor in quantized} | {
        table.name: table.nbytes for table in activations
    }
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


def _check_names(*names: Iterable[str]) -> None:
    counts = Counter(chain(*names))
    if twice := sorted(name for name, count in counts.items() if count > 1):
        raise ValueError(
            f"{', '.join(twice)}: more than one tensor, activation or alias has this name"
        )


def _check_aliases(aliases: Mapping[str, str], tensors: Collection[str]) -> None:
    if lost := sorted({target for target in aliases.values() if target not in tensors}):
        raise ValueError(f"{', '.join(lost)}: an alias points here, and there is no such tensor")


def dtype_name(array: Array) -> str:
    """float32, bfloat16, ..."""
    return str(array.dtype.names[0] if array.dtype.names else array.dtype.name)


def _code(name: str, array: Array) -> str:
    """safetensors' name of the dtype."""
    if array.dtype.newbyteorder("<") not in CODES:
        raise ValueError(f"{name} has dtype {array.dtype}, which the file cannot hold")
    return CODES[array.dtype.newbyteorder("<")]


def _joined(arrays: Sequence[Array], dtype: Any) -> Array:
    return np.concatenate([np.zeros(0, dtype), *(array.reshape(-1) for array in arrays)])


def _canonical(value: Any) -> bytes:
    """JSON that is the same for equal values: keys sorted, no spaces, ASCII."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode("ascii")


def _safetensors(entries: Mapping[str, Array]) -> bytes:
    """The file's bytes. The library's own writer orders the metadata at random; here equal entries give equal bytes."""
    header: dict[str, Any] = {
        "__metadata__": {"format": "ddq", "sha256": "0" * 64, "version": VERSION}
    }
    order, at = (
        sorted(entries, key=lambda name: (-entries[name].itemsize, name)),
        0,
    )  # widest first keeps all aligned
    for name in order:
        entry = entries[name]
        header[name] = {
            "data_offsets": [at, at + entry.nbytes],
            "dtype": CODES[entry.dtype],
            "shape": [entry.size],
        }
        at += entry.nbytes
    text = _canonical(header)
    text += b" " * (-len(text) % 8)
    raw = bytearray(
        b"".join(
            [len(text).to_bytes(8, "little"), text, *(entries[name].tobytes() for name in order)]
        )
    )
    digits = 8 + len(decoder.HEAD)
    raw[digits : digits + 64] = hashlib.sha256(raw).hexdigest().encode("ascii")
    return bytes(raw)


@contextlib.contextmanager
def _named_faults(path: Path) -> Iterator[None]:
    """The decoder's errors, and those of content that contradicts itself, as ours."""
    try:
        yield
    except decoder.NotAnArtifact as error:
        raise UsageError(f"{error}.") from error
    except decoder.ArtifactError as error:
        raise VerificationError(f"{error}.") from error
    except Exception as error:  # whatever a file made on purpose to mislead leads to
        if isinstance(error, OSError) and error.strerror:  # bzip2 raises one without
            raise UsageError(f"Cannot open {path}: {error.strerror}.") from error
        raise VerificationError(
            f"{path} contradicts itself ({type(error).__name__}: {error})."
        ) from error
