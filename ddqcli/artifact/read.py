"""Reading: the content of a ddq file, decoded with `decoder.py` and checked."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ddqcli.artifact import decoder
from ddqcli.artifact.decoder import Constant, PackedTensor
from ddqcli.artifact.sizes import Sizes, measure
from ddqcli.artifact.tensors import ActivationTable, QuantizedTensor, check_aliases
from ddqcli.errors import UsageError, VerificationError

Array = NDArray[Any]


@dataclass(frozen=True, eq=False)
class Artifact:
    """The content of a file, by name."""

    quantized: dict[str, QuantizedTensor]
    activations: dict[str, ActivationTable]
    floats: dict[str, Array]  # unquantized tensors of any dtype
    aliases: dict[str, str]  # further names of shared tensors
    meta: dict[str, Any]
    sizes: Sizes
    constants: dict[str, Array]  # unquantized tensors of equal elements

    @property
    def dtypes(self) -> dict[str, str]:
        """Return float32, bfloat16, ... of each unquantized tensor."""
        return {
            name: str(array.dtype.names[0] if array.dtype.names else array.dtype.name)
            for name, array in self.floats.items()
        }


def read_artifact(path: Path) -> Artifact:
    """Read a file as it was passed to `encode_artifact`.

    Raises UsageError if the file cannot be opened or is no ddq file, VerificationError if it is
    damaged or contradicts itself.
    """
    with _translated_errors(path):
        tensors, activations, aliases, meta = decoder.read(path)
        quantized = {
            name: _quantized(name, tensor)
            for name, tensor in tensors.items()
            if isinstance(tensor, PackedTensor)
        }
        constants = {
            name: decoder.to_array(tensor)
            for name, tensor in tensors.items()
            if isinstance(tensor, Constant)
        }
        others = quantized.keys() | constants.keys()
        floats = {name: tensor for name, tensor in tensors.items() if name not in others}
        tables = _tables(activations)
        check_aliases(aliases, tensors)
        with path.open("rb") as file:
            header, total = 8 + int.from_bytes(file.read(8), "little"), file.seek(0, os.SEEK_END)
        sizes = measure(
            list(quantized.values()), list(tables.values()), floats, header=header, file=total
        )
    return Artifact(quantized, tables, floats, aliases, meta, sizes, constants)


def decode_model(
    path: Path,
) -> tuple[dict[str, Array], dict[str, ActivationTable], dict[str, Any]]:
    """Return every tensor as an array, the level tables of activations, and the meta.

    Raises as `read_artifact`.
    """
    with _translated_errors(path):
        packed, activations, aliases, meta = decoder.read(path)
        tensors = {name: decoder.to_array(tensor) for name, tensor in packed.items()}
        tensors |= {name: tensors[target] for name, target in aliases.items()}
        return tensors, _tables(activations), meta


def _tables(activations: Mapping[str, PackedTensor]) -> dict[str, ActivationTable]:
    return {
        name: ActivationTable(
            name, _levels(packed)[0], float(packed.scale[0]), int(packed.zero_point[0])
        )
        for name, packed in activations.items()
    }


def _quantized(name: str, packed: PackedTensor) -> QuantizedTensor:
    levels, groups = _levels(packed), len(packed.bits)
    # Dequantized with the levels 0, 1, 2, ..., zero point 0 and scale 1, each value is its index.
    identity = [np.arange(len(level), dtype=np.uint8) for level in levels if len(level) < 256]
    plain = packed._replace(
        levels=np.concatenate([packed.levels[:0], *identity]),
        scale=np.ones(groups, np.float32),
        zero_point=np.zeros(groups, np.uint8),
    )
    indices = decoder.dequantize(plain).astype(np.uint8).reshape(-1)
    return QuantizedTensor(
        name, packed.shape, packed.axis, indices, levels, packed.scale, packed.zero_point
    )


def _levels(packed: PackedTensor) -> tuple[Array, ...]:
    """[G] level vectors."""
    ends = np.cumsum(np.where(packed.bits < 8, 1 << packed.bits, 0))
    vectors = np.split(packed.levels, ends)[:-1]
    return tuple(
        decoder.BYTES if s == 8 else vector for s, vector in zip(packed.bits, vectors, strict=True)
    )


def _other_reader(path: Path) -> str:
    """Return the command for a file that is none of ddq's, by its ending, or nothing."""
    name = shlex.quote(str(path))
    if path.suffix in (".onnx", ".h"):
        return f"; `ddq export --check {name}` verifies an exported {path.suffix} file"
    if path.suffix in (".pt", ".pth", ".th", ".safetensors"):
        return f"; `ddq inspect {name}` shows a checkpoint"
    return ""


@contextmanager
def _translated_errors(path: Path) -> Iterator[None]:
    """Turn errors of the decoder, and of content that contradicts itself, into DDQErrors."""
    if path.exists() and not path.is_file():  # a pipe would never end
        raise UsageError(f"Cannot open {path}: it is no regular file.")
    try:
        yield
    except decoder.NotAnArtifact as error:
        raise UsageError(f"{error}{_other_reader(path)}.") from error
    except decoder.ArtifactError as error:
        raise VerificationError(f"{error}.") from error
    except Exception as error:  # anything a forged file can lead to
        if isinstance(error, OSError) and error.strerror:  # bzip2 raises one without
            raise UsageError(f"Cannot open {path}: {error.strerror}.") from error
        raise VerificationError(
            f"{path} contradicts itself ({type(error).__name__}: {error})."
        ) from error
