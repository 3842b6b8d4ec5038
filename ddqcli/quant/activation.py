"""Quantization of a layer's input: a learned uniform step above 4 bits, learned levels (Eqn 3) at 4 bits and below."""

from __future__ import annotations

import math
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from ddqcli.quant.compiled import compiled
from ddqcli.quant.grid import LEVEL_BITS, fit_grid, representable_scale
from ddqcli.quant.histogram import Histogram, squared_error
from ddqcli.quant.layout import from_rows, match_layout, to_rows
from ddqcli.quant.levels import spread_levels
from ddqcli.quant.lloyd_max import lloyd_max
from ddqcli.quant.quantizer import DDQuantizer, check_finite
from ddqcli.quant.straight_through import ReplaceForward


def _codes(x: Tensor, scale: Tensor, low: int, high: int) -> tuple[Tensor, Tensor]:
    """x in steps, and rounded to a code."""
    steps = x.float() / scale
    return steps, torch.clamp(torch.round(steps), low, high)


def _forward(x: Tensor, scale: Tensor, low: int, high: int) -> Tensor:
    """x on the grid. NaN and infinities become NaN, so that the loss shows them."""
    _, code = _codes(x, scale, low, high)
    code = torch.add(code, x, alpha=-0.0)  # makes -0 in the code 0, and an infinity NaN
    return (code * scale).to(x.dtype)


def _backward(grad: Tensor, x: Tensor, scale: Tensor, low: int, high: int) -> tuple[Tensor, Tensor]:
    """Straight through where x was inside the range; the step's gradient is LSQ's (Esser et al. 2020, Eqn 3)."""
    steps, code = _codes(x, scale, low, high)
    inside = (steps >= low) & (steps <= high)
    slope = code - torch.where(inside, steps, 0.0)
    return torch.where(inside, grad, 0.0), (grad.float() * slope).sum()


class _UniformFakeQuantize(torch.autograd.Function):
    """Keeps x alone for the backward, as a float layer does."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, scale: Tensor, low: int, high: int, use_compiled: bool
    ) -> Tensor:
        ctx.save_for_backward(x, scale)
        ctx.constants = (low, high, use_compiled)
        forward = compiled(_forward, x.device.type) if use_compiled else _forward
        return from_rows(forward(to_rows(x, 0, 1), scale, low, high), x, 0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, scale = ctx.saved_tensors
        low, high, use_compiled = ctx.constants
        backward = compiled(_backward, x.device.type) if use_compiled else _backward
        grad_x, grad_scale = backward(
            to_rows(match_layout(grads[0], x), 0, 1), to_rows(x, 0, 1), scale, low, high
        )
        return from_rows(grad_x, x, 0), grad_scale, None, None, None


class ActivationQuantizer(nn.Module):
    """Quantizes activations at a fixed bit-width; passes them through, and looks at them, until `fit` is called.

    Attributes:
        bits: bit-width a.
        log2_scale: learned; the step is 2^log2_scale rounded to 12 bits, so equal learning rates fit every layer.
        zero_point: whole number; codes run from -zero_point to 2^a - 1 - zero_point (0 for what follows a ReLU).
        learned: the DDQuantizer that takes the step's place where levels are learned.
    """

    zero_point: Tensor

    def __init__(self, bits: int, levels: Literal["auto", "learned", "uniform"] = "auto") -> None:
        super().__init__()
        self.bits = bits
        self.use_compiled = (
            False  # with torch.compile: set it where the work wins the compiling back
        )
        self.log2_scale = nn.Parameter(torch.zeros(()))
        self.register_buffer("zero_point", torch.zeros((), dtype=torch.int32))
        self.low = 0
        use_levels = levels == "learned" or (levels == "auto" and bits <= 4)
        self.learned = DDQuantizer(1, bits) if use_levels and bits < LEVEL_BITS else None
        self.seen: Histogram | None = None
        self.values = 0  # in the batch that was seen
        self.observing = False

    def extra_repr(self) -> str:
        return f"{self.bits} bits, {'learned levels' if self.learned else 'learned step'}"

    def forward(self, x: Tensor) -> Tensor:
        if self.observing:
            if self.seen is None:  # one batch says enough
                check_finite(x)
                self.seen = Histogram.of(x.detach().float().cpu().numpy())
            return x
        if self.learned is not None:
            self.learned.use_compiled = self.use_compiled
            return self.learned(x)  # type: ignore[no-any-return]
        low = -self.low
        quantized: Tensor = _UniformFakeQuantize.apply(
            x, self.scale(), low, low + 2**self.bits - 1, self.use_compiled
        )  # type: ignore[no-untyped-call]
        return quantized

    def scale(self) -> Tensor:
        """The step size in force, a scalar."""
        raw = torch.exp2(self.log2_scale)
        scale: Tensor = ReplaceForward.apply(raw, representable_scale(raw.detach()))  # type: ignore[no-untyped-call]
        return scale

    @torch.no_grad()
    def table(self) -> dict[str, Any]:
        """Levels in force (uint8 [2^a], grid positions), scale and zero point, as the file stores them."""
        if self.learned is not None:
            levels, scales, zero_points = self.learned.effective_levels()
            return {
                "levels": levels[0].to(torch.uint8).cpu(),
                "scale": float(scales[0]),
                "zero_point": int(zero_points[0]),
            }
        codes = torch.arange(2**self.bits, dtype=torch.int32).to(torch.uint8)
        return {"levels": codes, "scale": float(self.scale()), "zero_point": self.low}

    @torch.no_grad()
    def fit(self) -> bool:
        """Start from what was seen: the step, or the levels, of least squared error. False if nothing was seen."""
        seen, self.seen = self.seen, None
        if seen is None:
            return False  # never reached: goes on passing through
        self.observing, self.values = False, int(seen.count.sum())
        if self.learned is not None:
            scale, zero_point = fit_grid(seen)
            fitted = lloyd_max(seen, 2**self.bits) / scale + zero_point
            self.learned.scale.fill_(scale)
            self.learned.zero_point.fill_(zero_point)
            self.learned.levels.copy_(torch.from_numpy(spread_levels(fitted, 2**self.bits))[None])
            return True
        low, high = min(seen.low, 0.0), max(seen.high, 0.0)
        best, best_error = (1.0, 0), math.inf
        for share in np.linspace(0.1, 1.0, 46):
            scale = float(
                representable_scale(
                    torch.tensor(max(share * (high - low), 1e-30) / (2**self.bits - 1))
                )
            )
            zero_point = min(round(-share * low / scale), 2**self.bits - 1)
            error = squared_error(seen, (np.arange(2**self.bits) - zero_point) * scale)
            if error < best_error:
                best, best_error = (scale, zero_point), error
        self.log2_scale.fill_(math.log2(best[0]))
        self.zero_point.fill_(best[1])
        self.low = best[1]
        return True

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)  # type: ignore[no-untyped-call]
        self.low = int(self.zero_point)
        self.observing = False
