"""Quantized tensors and activation tables: their values, and what they refuse."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from artifact_example import Contents

from ddqcli.artifact.tensors import ActivationTable


def test_values_equal_float64_element_by_element(contents: Contents) -> None:
    for tensor in contents.quantized:
        values, integers = tensor.dequantize(), tensor.integers()
        assert values.shape == integers.shape == tensor.shape
        for at in np.ndindex(tensor.shape):
            group = 0 if tensor.axis is None else at[tensor.axis]
            level = int(tensor.levels[group][tensor.indices.reshape(tensor.shape)[at]])
            assert integers[at] == level
            assert float(values[at]) == (level - int(tensor.zero_point[group])) * float(
                tensor.scale[group]
            )


def test_int8_with_zero_point_less_128_is_the_same_tensor(contents: Contents) -> None:
    tensor = contents.quantized[0]
    int8 = (tensor.integers().astype(np.int16) - 128).astype(np.int8)
    zero_point = np.int16(tensor.zero_point[0]) - 128
    values = (int8 - zero_point).astype(np.float32) * tensor.scale[0]
    assert values.tobytes() == tensor.dequantize().tobytes()


def test_activation_values() -> None:
    table = ActivationTable("fc (input)", np.array([0, 9, 9, 200], np.uint8), 0.5, 9)
    assert (table.layer, table.bits) == ("fc", 2)
    assert table.values().tolist() == [-4.5, 0, 0, 95.5]


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"axis": 4}, "no axis 4"),
        ({"axis": 0}, "4 groups, and 1 level vectors"),
        ({"shape": (4, 3, 3, 4)}, "has indices"),
        ({"indices": np.full(108, 16, np.uint8)}, "index 16 where there are 16 levels"),
        ({"indices": np.zeros(108, np.int64)}, "has indices int64"),
        ({"levels": (np.arange(16, dtype=np.uint8)[::-1],)}, "do not ascend"),
        ({"levels": (np.arange(15, dtype=np.uint8),)}, "level vector of shape"),
        ({"levels": (np.zeros(256, np.uint8),)}, "256 that are not 0 to 255"),
        ({"levels": (np.arange(16.0),)}, "uint8 levels"),
        ({"scale": np.array([0.1], np.float32)}, "12 significant bits"),
        ({"scale": np.array([4097 * 2.0**-20], np.float32)}, "12 significant bits"),
        ({"scale": np.array([0], np.float32)}, "12 significant bits"),
        ({"scale": np.array([-0.5], np.float32)}, "12 significant bits"),
        ({"scale": np.array([np.nan], np.float32)}, "12 significant bits"),
        ({"scale": np.array([2.0**-130], np.float32)}, "12 significant bits"),
        ({"scale": np.array([2.0**120], np.float32)}, "12 significant bits"),
        ({"scale": np.array([0.5])}, "float32 scales"),
        ({"zero_point": np.array([1], np.int32)}, "uint8 levels and zero points"),
    ],
)
def test_fields_that_contradict_each_other_are_refused(
    contents: Contents, change: dict[str, Any], fault: str
) -> None:
    with pytest.raises(ValueError, match=fault):
        replace(contents.quantized[0], **change)


def test_every_scale_of_12_bits_is_exact_at_every_level() -> None:
    difference = np.arange(-255, 256, dtype=np.float32)
    for mantissa in range(2048, 4096):
        scale = np.float32(mantissa * 2.0**-20)
        assert np.array_equal(
            (difference * scale).astype(np.float64), difference.astype(np.float64) * float(scale)
        )
