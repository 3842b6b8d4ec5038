"""Sizes: each part against the real bytes, and the whole against arithmetic."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import safetensors
from artifact_example import ENTRIES, FLOAT_ENTRIES, Contents

from ddqcli.artifact.encode import encode_artifact
from ddqcli.artifact.sizes import tensor_bytes
from ddqcli.artifact.tensors import ActivationTable, QuantizedTensor


@pytest.mark.parametrize(
    ("numel", "bits", "expected"),
    [
        ([432], [4], 216 + 16 + 6),
        ([9, 9, 9], [3, 1, 8], 14 + 8 + 2 + 18),
        ([0], [8], 6),
        ([], [], 0),
        ([3], [1], 9),
    ],
)
def test_tensor_bytes(numel: list[int], bits: list[int], expected: int) -> None:
    assert tensor_bytes(numel, bits) == expected


def test_sizes_are_the_real_bytes(file: Path, contents: Contents) -> None:
    _, sizes = encode_artifact(*contents.arguments())
    with safetensors.safe_open(file, "pt") as opened:
        real = {name: opened.get_tensor(name).nbytes for name in (*ENTRIES, *FLOAT_ENTRIES)}
    bits = [s for tensor in contents.quantized for s in tensor.bits] + [
        table.bits for table in contents.activations
    ]
    assert sizes.gates == len(bits)
    assert sizes.scales == 5 * len(bits)
    assert sizes.levels == sum(2**s for s in bits if s < 8)
    assert sizes.indices + sizes.levels + sizes.scales + sizes.gates == real.pop("quantized")
    assert sizes.manifest == real.pop("manifest")
    assert sizes.floats == sum(real.values())
    assert sizes.file == file.stat().st_size
    assert (
        sum(sizes.tensors.values()) == sizes.payload == sizes.file - sizes.manifest - sizes.header
    )
    by_hand = {
        "conv.weight": 54 + 16 + 6,
        "fc.bias": 3 + 6,
        "conv (input)": 6,
        "fc (input)": 4 + 6,
        "bn.num_batches_tracked": 8,
    }
    by_hand["depthwise.weight"] = (9 * (3 + 1 + 8 + 5 + 2) + 7) // 8 + (8 + 2 + 32 + 4) + 5 * 6
    assert by_hand.items() <= sizes.tensors.items()


Arrays = dict[str, np.ndarray]


def resnet20(bits: int) -> tuple[list[QuantizedTensor], Arrays, Arrays]:
    """Shapes and names of a CIFAR ResNet-20; random values of the right kind, and constants."""
    shapes: dict[str, tuple[int, ...]] = {"conv1.weight": (16, 3, 3, 3)}
    norms, before = {"bn1": 16}, 16
    for stage, width in enumerate((16, 32, 64), 1):
        for block in (f"layer{stage}.{i}" for i in range(3)):
            for k in (1, 2):
                shapes[f"{block}.conv{k}.weight"], norms[f"{block}.bn{k}"] = (
                    (width, before, 3, 3),
                    width,
                )
                before = width
    random = np.random.default_rng(0)

    def tensor(name: str, shape: tuple[int, ...], bits: int) -> QuantizedTensor:
        levels = np.sort(random.choice(256, 2**bits, replace=False)).astype(np.uint8)
        indices = random.integers(0, 2**bits, int(np.prod(shape)), dtype=np.uint8)
        scale = np.array([random.integers(2048, 4096) * 2.0**-18], np.float32)
        return QuantizedTensor(
            name, shape, None, indices, (levels,), scale, np.array([128], np.uint8)
        )

    shapes["fc.weight"] = (10, 64)
    floats, constants = {}, {}
    for norm, width in norms.items():
        for part in ("weight", "bias"):
            floats[f"{norm}.{part}"] = random.random(width, np.float32)
        constants[f"{norm}.running_mean"] = np.zeros(width, np.float32)
        constants[f"{norm}.running_var"] = np.full(width, 1 - 1e-5, np.float32)
        constants[f"{norm}.num_batches_tracked"] = np.array(0)
    weights = [tensor(name, shape, bits) for name, shape in shapes.items()]
    return [*weights, tensor("fc.bias", (10,), 8)], floats, constants


def test_resnet20_is_at_most_one_percent_above_arithmetic() -> None:
    """With quantized inputs, and all that `ddq export` puts into the file of a run at 4/8."""
    quantized, floats, constants = resnet20(4)
    weights = sum(tensor.indices.size for tensor in quantized)
    assert (len(quantized), len(floats), weights) == (21, 38, 268_346)
    random = np.random.default_rng(1)
    layers = [t.name.removesuffix(".weight") for t in quantized if "weight" in t.name]
    inputs = [
        ActivationTable(
            f"{name} (input)",
            np.arange(256, dtype=np.uint8),
            random.integers(2048, 4096) * 2.0**-18,
            0,
        )
        for name in layers
    ]
    report = {
        "kind": ["Conv2d" if "conv" in tensor.name else "Linear" for tensor in quantized],
        "error": [float(f"{error:.3g}") for error in random.random(len(quantized)) / 100],
        "learned": [],
        "budget_bytes": 145_453,
        "float_bytes": 1_084_544,
        "accuracy": {"float": 91.8342, "quantized": 91.2719, "drop": 0.5623},
        "source": {
            "path": "resnet20_cifar10.pt",
            "sha256": random.bytes(32).hex(),
            "ddq": "0.1.0",
            "arch": "cifar_nets.py:resnet20",
        },
        "run": {"steps": 782, "seed": 0},
        "warnings": [],
    }
    recipe = {
        "name": "resnet20_w4a8",
        "model": {"checkpoint": "resnet20_cifar10.pt", "arch": "cifar_nets.py:resnet20"},
        "data": {"source": "cifar10"},
        "activations": {"bits": 8},
        "budget": {"target_bits": 4.0},
        "train": {"epochs": 2},
    }
    meta = {"recipe": recipe, "report": report}
    raw, sizes = encode_artifact(quantized, inputs, floats, {}, meta, constants)
    exact = (
        268_336 * 4 // 8
        + 20 * (16 + 6)
        + (10 + 6)
        + 20 * 6
        + sum(array.nbytes for array in floats.values())
    )
    assert sizes.payload == exact
    # Bytes of neither the weights, which the target is about, nor unquantized tensors.
    beside = len(raw) - exact + 20 * 6
    assert beside <= 0.01 * (4 * weights / 8 + sizes.floats)
