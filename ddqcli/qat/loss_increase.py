"""Estimated increase of the loss by quantizing a tensor: its Fisher times its squared error.

Where weights are rounded with compensation, only a share of that error reaches the outputs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ddqcli.qat.model import QuantizedParameter
from ddqcli.quant.error_curve import squared_error_by_bits
from ddqcli.quant.histogram import Histogram
from ddqcli.quant.knapsack import BitOptions
from ddqcli.quant.layout import by_group

AS_IT_IS = 0  # in place of a bit-width: a tensor with the levels and bits in force

_CHANNELS = 16  # of a tensor quantized by channel, whose error stands for that of all
_MEMORY = 50  # gradients over which the running mean reaches back


class FisherEstimate:
    """Running mean of every tensor's mean squared gradient, of which its empirical Fisher is made.

    The Fisher of a mean loss over batches of B samples is B times the mean squared gradient.

    Attributes:
        mean_square: by tensor.
        seen: number of gradients in the mean.
        error_share: by tensor, the share of its error that compensated rounding leaves
            (`quant.compensation.error_share`); 1 for tensors that it lacks.
    """

    def __init__(
        self,
        tensors: Sequence[QuantizedParameter],
        batch_size: int,
        mean_square: Mapping[str, float] | None = None,
    ) -> None:
        self.tensors, self.batch_size = tensors, batch_size
        self._mean_square = dict(mean_square or {})
        self._unread: list[tuple[float, float, list[QuantizedParameter], Tensor | None]] = []
        self.seen = 0
        self.error_share: dict[str, float] = {}

    def update(self, share: float = 1.0) -> None:
        """Take in the gradients that the parameters hold, means over a `share` of a batch.

        Their norms stay on the device until the mean is needed.
        """
        grads = [(t, t.parameter.grad) for t in self.tensors if t.parameter.grad is not None]
        norms = torch._foreach_norm([grad for _, grad in grads])
        squares = torch.stack(list(norms)).square() if norms else None
        self.seen += 1
        weight = max(1 / self.seen, 1 / _MEMORY)
        self._unread.append((weight, share, [t for t, _ in grads], squares))

    @property
    def mean_square(self) -> dict[str, float]:
        """Mean squared gradient, by tensor. Synchronizes with the device after an update."""
        unread, self._unread = self._unread, []
        for weight, share, tensors, squares in unread:
            values = [] if squares is None else squares.tolist()
            for tensor, square in zip(tensors, values, strict=True):
                mean = self._mean_square.get(tensor.name, 0.0)
                new = share * square / tensor.parameter.numel()
                self._mean_square[tensor.name] = mean + weight * (new - mean)
        return self._mean_square

    @mean_square.setter
    def mean_square(self, value: Mapping[str, float]) -> None:
        self._mean_square, self._unread = dict(value), []

    def of(self, tensor: QuantizedParameter) -> float:
        """Return a tensor's Fisher: lambda, where the loss increase is lambda / 2 * squared error.

        It is the same for all tensors before any gradient. Of a frozen tensor it is unknown, and
        taken for the mean over the values of those that are not.
        """
        mean_square = self.mean_square
        if not mean_square:
            return 1.0
        unknown = 0.0 if tensor.parameter.requires_grad else self._mean()
        return self.batch_size * mean_square.get(tensor.name, unknown)

    def _mean(self) -> float:
        sizes = {t.name: t.parameter.numel() for t in self.tensors if t.name in self.mean_square}
        total = sum(self.mean_square[name] * size for name, size in sizes.items())
        return total / sum(sizes.values())


def bit_options(
    tensor: QuantizedParameter,
    costs: Mapping[int, int],
    fisher: FisherEstimate,
    error_as_it_is: float = 0.0,
) -> BitOptions:
    """Return a tensor's bit-widths in `costs` with the loss increase, lambda / 2 * share * error.

    `costs` may hold AS_IT_IS, whose squared error then is `error_as_it_is`.
    """
    if len(costs) == 1:
        return BitOptions(tensor.name, dict(costs), dict.fromkeys(costs, 0.0))
    weight = fisher.of(tensor) / 2 + 1e-30  # without gradients more bits are still better
    share = fisher.error_share.get(tensor.name, 1.0)
    # Two levels leave little room to make up for errors: of 36 layers, some with a share of 0.2
    # kept 0.4 to 0.75 of their error at 1 bit, and none of them at 2 bits or more.
    shares = {s: share**0.5 if s == 1 else share for s in costs}
    widths = [s for s in costs if s != AS_IT_IS]
    errors = {AS_IT_IS: error_as_it_is} | error_curve(tensor, range(min(widths), max(widths) + 1))
    return BitOptions(tensor.name, dict(costs), {s: weight * shares[s] * errors[s] for s in costs})


def error_curve(tensor: QuantizedParameter, bits: range) -> dict[int, float]:
    """Return the squared error of the whole tensor at each bit-width, with levels fitted anew.

    Where every channel has its own levels, it is extrapolated from some of the channels.
    """
    groups = len(tensor.quantizer.bits)
    rows = by_group(tensor.parameter.detach().float().cpu(), tensor.quantizer.axis, groups)
    energy = torch.linalg.vector_norm(rows, dim=1, dtype=torch.float64).square()
    nonzero = energy.nonzero()[:, 0]  # channels of zeros have no error
    order = torch.randperm(len(nonzero), generator=torch.Generator().manual_seed(0))
    chosen = nonzero[order[:_CHANNELS]]
    share = float(energy[chosen].sum() / energy.sum()) if len(nonzero) else 1.0
    curves = [
        squared_error_by_bits(Histogram.of(rows[g].numpy()), bits, tensor.quantizer.kind)
        for g in chosen.tolist()
    ]
    return {s: sum(curve[s] for curve in curves) / share for s in bits}
