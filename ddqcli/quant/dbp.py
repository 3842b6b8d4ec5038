"""DBPs, SDQ's differentiable bit-width parameters: their steps, under a constraint on the cost."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from ddqcli.quant.stochastic import sigmoid, slope

_FURTHEST = math.log(99)  # so that a DBP can come back: probabilities of 0.01 and 0.99
_MEMORY = 50  # gradients over which the running mean square reaches back
_SMALLEST_SCALE = 1e-3  # of the largest root mean square: a DBP without a gradient moves as well


@dataclass
class DBP:
    """The differentiable bit-width parameter of a tensor, at its boundary between two bit-widths.

    Attributes:
        larger, smaller: the bit-widths between which it is sampled.
        z: its value; sigmoid(z) is the probability of the larger bit-width.
        mean_square: running mean of the squared gradient of the loss.
        seen: gradients in the mean.
        range_ratio: [G] log2 of the range at the larger bit-width over that at the smaller one.
            Uniform and power-of-two levels have a range of their own at each.
    """

    larger: int
    smaller: int
    z: float
    mean_square: float = 0.0
    seen: int = 0
    range_ratio: list[float] = field(default_factory=list)

    @property
    def probability(self) -> float:
        """Probability of the larger bit-width."""
        return sigmoid(self.z)

    @property
    def bits(self) -> int:
        """The more probable bit-width."""
        return self.larger if self.z >= 0 else self.smaller

    def descend(self, difference: float, larger: bool, rate: float) -> None:
        """Step against the gradient of the loss, in units of its running root mean square.

        `difference` is the sum of G * (Q_larger - Q_smaller) at the choice `larger`.
        """
        self.seen += 1
        weight = max(1 / self.seen, 1 / _MEMORY)
        self.mean_square += weight * (difference**2 - self.mean_square)
        if self.mean_square:
            self.z -= rate * slope(self.z, larger) * difference / math.sqrt(self.mean_square)


def meet(dbps: Sequence[DBP], saved: Sequence[int], cost: float) -> None:
    """Step against the gradient of the expected cost until it is `cost`.

    The expected cost is the sum of probability * saved, where `saved` is what each tensor's smaller
    bit-width saves. Its gradient in z is probability * (1 - probability) * saved, taken in the same
    units as that of the loss. The size of the step is the constraint's multiplier, found by
    bisection. Where even all larger bit-widths cost less, nothing moves.
    """
    if not dbps or sum(saved) <= cost:
        return
    largest = max(dbp.mean_square for dbp in dbps) or 1.0
    slopes = [
        dbp.probability * (1 - dbp.probability) * s / _scale(dbp, largest)
        for dbp, s in zip(dbps, saved, strict=True)
    ]

    def moved(multiplier: float) -> list[float]:
        zs = (dbp.z - multiplier * k for dbp, k in zip(dbps, slopes, strict=True))
        return [min(max(z, -_FURTHEST), _FURTHEST) for z in zs]

    def excess(multiplier: float) -> float:
        return sum(sigmoid(z) * s for z, s in zip(moved(multiplier), saved, strict=True)) - cost

    multiplier = _root(excess, 1 / max(slopes))
    for dbp, z in zip(dbps, moved(multiplier), strict=True):
        dbp.z = z


def _scale(dbp: DBP, largest: float) -> float:
    return math.sqrt(max(dbp.mean_square, _SMALLEST_SCALE**2 * largest))


def _root(decreasing: Callable[[float], float], unit: float) -> float:
    """Return where a function falls through 0; at most 2^60 units away, if it does not."""
    low = high = 0.0
    reach = unit
    while decreasing(high) > 0 and reach < 2**60 * unit:
        low, high, reach = high, reach, 2 * reach
    reach = unit
    while decreasing(low) < 0 and reach < 2**60 * unit:
        low, high, reach = -reach, low, 2 * reach
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if decreasing(middle) > 0 else (low, middle)
    return high
