"""A small model with one of everything, made without random numbers so that it never changes."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ddqcli.artifact.encode import encode_artifact
from ddqcli.artifact.tensors import BFLOAT16, ActivationTable, QuantizedTensor

ENTRIES = ("quantized", "manifest")
FLOAT_ENTRIES = ("f32", "f64", "f16", "bf16", "i64", "u8", "bool")


@dataclass(frozen=True)
class Contents:
    quantized: list[QuantizedTensor]
    activations: list[ActivationTable]
    floats: dict[str, np.ndarray]
    aliases: dict[str, str]
    meta: dict[str, Any]

    def arguments(self) -> tuple[Any, ...]:
        return self.quantized, self.activations, self.floats, self.aliases, self.meta


def noise(count: int, below: int, seed: int) -> np.ndarray:
    """`count` integers in 0..below - 1."""
    return np.array(
        [(seed * 2654435761 + i * i * 40503 + i * 2531011) // 7 % below for i in range(count)],
        np.uint8,
    )


def quantized(
    name: str, shape: tuple[int, ...], axis: int | None, bits: list[int], seed: int
) -> QuantizedTensor:
    """Return a tensor whose groups have these `bits`; indices are drawn one element at a time."""
    numel = int(np.prod(shape))
    group_of = np.zeros(numel, int) if axis is None else np.indices(shape)[axis].reshape(-1)
    draws = noise(numel, 256, seed)
    return QuantizedTensor(
        name,
        shape,
        axis,
        np.array([int(draws[i]) % 2 ** bits[group_of[i]] for i in range(numel)], np.uint8),
        tuple(
            np.arange(256, dtype=np.uint8) if s == 8 else np.sort(noise(2**s, 256, seed + s))
            for s in bits
        ),
        np.array([(2049 + 2 * g) * 2.0**-18 for g in range(len(bits))], np.float32),
        noise(len(bits), 256, seed + 1),
    )


def example() -> Contents:
    return Contents(
        quantized=[
            quantized("conv.weight", (4, 3, 3, 3), None, [4], 1),
            quantized("depthwise.weight", (5, 1, 3, 3), 0, [3, 1, 8, 5, 2], 2),
            quantized("up.weight", (3, 4, 2), 1, [2, 7, 7, 6], 3),
            quantized("fc.weight", (3, 7), 0, [3, 3, 3], 4),
            quantized("fc.bias", (3,), None, [8], 5),
            quantized("scalar", (), None, [2], 6),
            quantized("none", (0, 3), None, [1], 7),
            quantized("nothing", (0, 3), 0, [], 8),
        ],
        activations=[
            ActivationTable("conv (input)", np.arange(256, dtype=np.uint8), 4095 * 2.0**-20, 0),
            ActivationTable("fc (input)", np.array([0, 9, 9, 200], np.uint8), 0.5, 9),
        ],
        floats={
            "bn.weight": np.array([1.5, -0.0, np.inf, 1e-42], np.float32),
            "bn.num_batches_tracked": np.array(1234567890123, np.int64),
            "half": np.array([[1.5, -2.0]], np.float16),
            "brain": np.array([[0x3F80], [0xC000], [0x7FC1]], np.uint16).view(BFLOAT16),
            "double": np.array([0.1], np.float64),
            "mask": np.array([True, False, True]),
            "empty": np.zeros((2, 0), np.float32),
            "mask.below": np.array([7, 255], np.uint8),
        },
        aliases={"tied.weight": "fc.weight", "tied.count": "bn.num_batches_tracked"},
        meta={"accuracy": 0.9165, "ddq": "0.1.0", "note": "grüße"},
    )


# After a change of the format: PYTHONPATH=. python tests/artifact/artifact_example.py
if __name__ == "__main__":
    golden, _ = encode_artifact(*example().arguments())
    Path(__file__).with_name("golden.ddq").write_bytes(golden)
    print(hashlib.sha256(golden).hexdigest(), "is GOLDEN_SHA256 of test_decoder.py")  # noqa: T201
