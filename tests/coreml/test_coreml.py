"""Core ML packages: our levels and indices as palettes, read back from the disk. Needs no Mac."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from quantized_net import quantize, shake
from torch import Tensor, nn

import ddqcli
from ddqcli.artifact.tensors import QuantizedTensor
from ddqcli.coreml.package import OFFERED_BITS, Palette, make_package, stored_bits
from ddqcli.errors import UsageError, VerificationError


def test_widths_that_core_ml_lacks_become_the_next() -> None:
    assert [stored_bits(s) for s in range(1, 9)] == [1, 2, 3, 4, 6, 6, 8, 8]
    assert all(stored_bits(s) == s for s in OFFERED_BITS)


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_a_palette_gives_the_values_of_the_tensor(dtype: Any) -> None:
    random = np.random.default_rng(0)
    levels = tuple(np.sort(random.choice(256, 2**s, replace=False)) for s in (3, 5, 1))
    tensor = QuantizedTensor(
        "up.weight",
        (4, 3, 2),
        1,
        random.integers(0, 2, 24).astype(np.uint8),
        tuple(level.astype(np.uint8) for level in levels),
        np.array([2049, 2051, 2053], np.float32) * np.float32(2.0**-18),
        np.array([128, 100, 7], np.uint8),
    )
    palette = Palette.of(tensor, dtype)
    assert palette.tables.shape == (3, 64)
    values = np.stack([t[i] for t, i in zip(palette.tables, palette.indices, strict=True)])
    expected = np.moveaxis(tensor.dequantize(), 1, 0).reshape(3, -1)
    assert np.array_equal(values, expected.astype(dtype))
    assert palette.nbytes == palette.tables.nbytes + 24 * 6 // 8


class Net(nn.Module):
    """Every kind of layer that has a palette, BatchNorm, and an LSTM, which has none."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Sequential(
            nn.Conv2d(3, 16, 3, padding=1, bias=False),
            nn.BatchNorm2d(16),
            nn.ReLU(),
            nn.Conv2d(16, 16, 3, padding=1, groups=16),
            nn.BatchNorm2d(16),
            nn.Hardswish(),
            nn.ConvTranspose2d(16, 8, 2, stride=2, bias=False),
        )
        self.lstm = nn.LSTM(8, 6, batch_first=True)
        self.head = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x).mean(2).transpose(1, 2)
        return self.head(self.lstm(x)[0][:, -1])


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize(("bits", "granularity"), [(3, "layer"), (5, "channel")])
def test_every_table_and_index_is_read_back(
    half: bool, bits: int, granularity: str, tmp_path: Path
) -> None:
    pytest.importorskip("coremltools")
    from ddqcli.coreml.readback import require_same_palettes

    x = torch.rand(2, 3, 8, 8)
    made = quantize(shake(Net()), x, tmp_path / "m", bits=bits, granularity=granularity)
    model = ddqcli.load(made.path, Net())
    package, palettes = make_package(model, made.weights, x, {"ddq": "0"}, half=half)
    assert {"conv.0.weight", "conv.3.weight", "conv.6.weight", "head.weight"} == palettes.keys()
    tables = {name: palette.tables.shape for name, palette in palettes.items()}
    assert tables["conv.0.weight"] == ((1, 8) if granularity == "layer" else (16, 64))
    assert tables["conv.6.weight"] == ((1, 8) if granularity == "layer" else (8, 64))
    path = tmp_path / "m.mlpackage"
    package.save(str(path))
    dtype = np.float16 if half else np.float32
    floats = {
        name: value.numpy().astype(dtype)
        for name, value in model.state_dict().items()
        if name.endswith(("weight", "bias")) and value.ndim == 1
    }
    assert require_same_palettes(path, palettes, floats, path) == []

    palette = palettes["head.weight"]
    changed = palette.indices.copy()
    changed[0, 0] ^= 1
    for other in (
        replace(palette, indices=changed),
        replace(palette, tables=np.nextafter(palette.tables, dtype(9))),
    ):
        with pytest.raises(VerificationError, match=r"was trained in head\.weight"):
            require_same_palettes(path, palettes | {"head.weight": other}, {}, path)
    assert require_same_palettes(path, {}, {"a": np.array([1.25, 3], dtype)}, path) == ["a"]

    blob = path / "Data" / "com.apple.CoreML" / "weights" / "weight.bin"
    blob.write_bytes(blob.read_bytes()[:100])
    with pytest.raises(VerificationError, match=r"cannot be read|differs"):
        require_same_palettes(path, palettes, {}, path)


def test_networks_that_cannot_be_converted_are_one_sentence(tmp_path: Path) -> None:
    pytest.importorskip("coremltools")
    with pytest.raises(UsageError, match="takes a network of tensors alone"):
        make_package(nn.Linear(2, 2), {}, {"x": torch.zeros(1, 2)}, {}, half=False)

    class Odd(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.special.bessel_j0(x)

    with pytest.raises(UsageError, match="coremltools cannot convert the model: "):
        make_package(Odd(), {}, torch.zeros(1, 2), {}, half=False)
