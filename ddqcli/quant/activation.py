"""ActivationQuantizer: learned levels (Eqn 3) up to 4 bits, a learned uniform step size above."""

from __future__ import annotations

import math
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from ddqcli.quant.grid import LEVEL_BITS, fit_grid, representable_scale
from ddqcli.quant.histogram import Histogram, squared_error
from ddqcli.quant.levels import spread_levels
from ddqcli.quant.lloyd_max import lloyd_max
from ddqcli.quant.quantizer import DDQuantizer, check_finite
from ddqcli.quant.straight_through import ReplaceForward
from ddqcli.quant.uniform_kernels import UniformFakeQuantize

_SAMPLED = 2**16  # about as many values of an input after the first are observed
_SCALE_OF_ZEROS = 1e-25  # no input that is not zero has so small a step


class ActivationQuantizer(nn.Module):
    """Quantizes activations at a fixed bit-width.

    Until `fit` is called it returns its input as it is. While `observing`, it also takes a
    histogram of all calls, to which `fit` then fits the step size or the levels: of the whole first
    input, and of some values of the others beside their smallest and largest ones.

    Attributes:
        bits: bit-width a.
        log2_scale: trained; the step size is 2^log2_scale, rounded to 12 significant bits. In the
            logarithm, one learning rate fits all layers.
        zero_point: whole number; codes run from -zero_point to 2^a - 1 - zero_point. 0 after ReLU.
        learned: the DDQuantizer used in place of the step size for learned levels, or None.
        values: number of values in the first observed input.
        calls: observed so far in this forward pass.
        ranges: largest magnitude of each call of a pass: a layer may be called from several places.
        precomputed_scale: the step size for the current step (`batched`).
        use_compiled: use the kernels in C on a CPU. Worth it in long runs only.
    """

    zero_point: Tensor

    def __init__(self, bits: int, levels: Literal["auto", "learned", "uniform"] = "auto") -> None:
        super().__init__()
        self.bits = bits
        self.use_compiled = False
        self.log2_scale = nn.Parameter(torch.zeros((), dtype=torch.float32))
        self.register_buffer("zero_point", torch.zeros((), dtype=torch.int32))
        self.low_code = 0  # -zero_point, without asking the device
        self.precomputed_scale: Tensor | None = None
        use_levels = levels == "learned" or (levels == "auto" and bits <= 4)
        self.learned = DDQuantizer(1, bits) if use_levels and bits < LEVEL_BITS else None
        self.observing = False
        self.histogram: Histogram | None = None
        self.values = 0
        self.calls = 0
        self.ranges: list[float] = []

    def extra_repr(self) -> str:
        return f"{self.bits} bits, {'learned levels' if self.learned else 'uniform levels'}"

    def forward(self, x: Tensor) -> Tensor:
        if self.observing:
            self._observe(x.detach())
            return x
        if self.learned is not None:
            self.learned.use_compiled = self.use_compiled
            return self.learned(x)  # type: ignore[no-any-return]
        high_code = self.low_code + 2**self.bits - 1
        quantized: Tensor = UniformFakeQuantize.apply(
            x, self.scale(), self.low_code, high_code, self.use_compiled
        )
        return quantized

    def observe_pass(self) -> None:
        """Observe the inputs of a forward pass that begins now."""
        self.observing, self.calls = True, 0

    def _observe(self, x: Tensor) -> None:
        """Add the values of an input to the histogram; the first one sets `values`."""
        if not x.numel():
            return
        check_finite(x)
        self._observe_range(float(x.abs().max()))
        if self.histogram is None:
            self.values = x.numel()
            self.histogram = Histogram.of(x.float().cpu().numpy())
            return
        flat = x.reshape(-1)
        some = flat[:: -(-flat.numel() // _SAMPLED)].float().cpu().numpy()
        low, high = (float(value) for value in flat.aminmax())
        sample = Histogram.of(some, low=low, high=high)
        self.histogram += sample.scaled(flat.numel() / some.size)

    def _observe_range(self, magnitude: float) -> None:
        """Keep the largest magnitude of the pass's next call."""
        if self.calls == len(self.ranges):
            self.ranges.append(0.0)
        self.ranges[self.calls] = max(magnitude, self.ranges[self.calls])
        self.calls += 1

    @property
    def range_ratio(self) -> float:
        """The largest of the ranges over the smallest; zeros alone do not count."""
        ranges = [each for each in self.ranges if each > 0]
        return max(ranges) / min(ranges) if ranges else 1.0

    @property
    def saw_only_zeros(self) -> bool:
        """True if it was fitted to zeros alone: any other value is then far outside its range."""
        return bool(self.table()["scale"] < _SCALE_OF_ZEROS)

    def scale(self) -> Tensor:
        """The step size in force, a scalar."""
        if self.precomputed_scale is not None:
            return self.precomputed_scale
        return step_sizes(self.log2_scale)

    @torch.no_grad()
    def table(self) -> dict[str, Any]:
        """Return `levels` (uint8 [2^a], grid positions), `scale` and `zero_point` for the file."""
        if self.learned is not None:
            levels, scales, zero_points = self.learned.effective_levels()
            return {
                "levels": levels[0].to(torch.uint8).cpu(),
                "scale": float(scales[0]),
                "zero_point": int(zero_points[0]),
            }
        codes = torch.arange(2**self.bits, dtype=torch.int32).to(torch.uint8)
        return {"levels": codes, "scale": float(self.scale()), "zero_point": -self.low_code}

    @torch.no_grad()
    def fit(self) -> bool:
        """Fit to the observed inputs and quantize from now on. False if none was observed."""
        histogram, self.histogram = self.histogram, None
        if histogram is None:
            return False
        self.observing = False
        if self.learned is not None:
            scale, zero_point = fit_grid(histogram)
            positions = lloyd_max(histogram, 2**self.bits) / scale + zero_point
            spread = spread_levels(positions, 2**self.bits)
            self.learned.scale.fill_(scale)
            self.learned.zero_point.fill_(zero_point)
            self.learned.levels.copy_(torch.from_numpy(spread)[None])
        else:
            scale, zero_point = _fit_step(histogram, self.bits)
            self.log2_scale.fill_(math.log2(scale))
            self.zero_point.fill_(zero_point)
            self.low_code = -zero_point
        return True

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self.low_code = -int(self.zero_point)
        self.observing = False


def step_sizes(log2_scale: Tensor) -> Tensor:
    """Return 2^log2_scale, rounded as levels need it, with the gradient of the power."""
    raw = torch.exp2(log2_scale)
    scale: Tensor = ReplaceForward.apply(raw, representable_scale(raw.detach()))
    return scale


def _fit_step(distribution: Histogram, bits: int) -> tuple[float, int]:
    """Step size and zero point of least squared error, over shares of the range around 0."""
    low, high = min(distribution.low, 0.0), max(distribution.high, 0.0)
    steps = 2**bits - 1
    best, best_error = (1.0, 0), math.inf
    for share in np.linspace(0.1, 1.0, 46):
        step = max(share * (high - low), 1e-30) / steps
        scale = float(representable_scale(torch.tensor(step, dtype=torch.float32)))
        zero_point = min(round(-share * low / scale), steps)
        error = squared_error(distribution, (np.arange(2**bits) - zero_point) * scale)
        if error < best_error:
            best, best_error = (scale, zero_point), error
    return best
