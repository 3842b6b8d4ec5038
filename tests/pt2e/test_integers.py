"""Int8 around 0: the trained integers as they are, and rounded only where they do not fit."""

from __future__ import annotations

import numpy as np

from ddqcli.onnx.kernel import Kernel
from ddqcli.pt2e.integers import Symmetric


def kernel(rows: list[list[int]], scale: list[float], zero_point: int, shift: float) -> Kernel:
    channels = len(rows)
    return Kernel(
        np.array(rows, np.int8),
        np.array(scale, np.float32),
        np.full(channels, zero_point, np.int8),
        np.full(channels, shift, np.float32),
    )


def test_integers_that_fit_are_the_trained_ones() -> None:
    value = Symmetric.of(kernel([[-127, 0, 127], [1, 2, -3]], [0.5, 0.25], 0, 1.0), 0.1)
    assert value.integers.tolist() == [[-127, 0, 127], [1, 2, -3]]
    assert value.scale.tolist() == [0.5, 0.25]
    assert value.exact.all()


def test_a_negative_scale_negates_the_integers() -> None:
    value = Symmetric.of(kernel([[5, -7]], [-0.5], 0, 1.0), 0.1)
    assert (value.integers.tolist(), value.scale.tolist()) == ([[-5, 7]], [0.5])
    assert value.exact.all()


def test_a_zero_point_is_taken_off_and_what_then_does_not_fit_is_rounded() -> None:
    given = kernel([[-128, 127], [0, 10]], [0.25, 0.25], -20, 0.0)  # -108 to 147; 20 and 30
    value = Symmetric.of(given, 0.1)
    assert value.exact.tolist() == [False, True]
    assert value.integers[1].tolist() == [20, 30]
    weights = (np.array([[-128, 127]]) + 20) * 0.25
    stored = value.integers[:1].astype(float) * value.scale[0]
    assert np.abs(value.integers).max() == 127
    assert np.abs(stored - weights).max() <= value.scale[0] / 2 * (1 + 1e-6)


def test_minus_128_is_rounded_in_either_sign() -> None:
    for sign in (1, -1):
        value = Symmetric.of(kernel([[-128, 64]], [0.5 * sign], 0, 0.0), 1.0)
        assert not value.exact.any()
        assert value.integers[0, 0] == -127 * sign
        assert np.isclose(value.scale[0] * 127, 64)


def test_a_shift_far_above_its_scale_keeps_its_value_in_int32() -> None:
    value = Symmetric.of(kernel([[100, -100], [0, 0]], [1e-12, 0.0], 0, 3.0), 0.01)
    units = value.shift.astype(np.float64) / (value.scale.astype(np.float64) * 0.01)
    assert np.abs(units).max() < 2**30
    assert np.allclose(np.rint(units) * value.scale.astype(np.float64) * 0.01, 3.0, rtol=1e-6)
    assert (value.scale > 0).all()
    assert not value.integers.any()


def test_channels_of_zeros_without_a_shift_have_a_scale() -> None:
    value = Symmetric.of(kernel([[0, 0]], [0.0], 0, 0.0), 0.01)
    assert (value.integers.tolist(), value.scale.tolist()) == ([[0, 0]], [1.0])
