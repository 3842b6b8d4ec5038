"""The paper's rule (Sec. 4.2): gradient descent on the gates under the penalty of Eqn (7)."""

from __future__ import annotations

import torch
from torch import Tensor

from ddqcli.qat.budget import cost_of
from ddqcli.qat.model import QuantizedParameter
from ddqcli.qat.rules.base import Rule


class PaperRule(Rule):
    """Trains the gate logits by plain SGD, from all gates open.

    At the freeze (gates.freeze), gates are closed until the budget is met, and those that still fit
    are opened.
    """

    name = "paper"

    def start(self) -> None:
        """Open all gates at gates.init and let them have gradients."""
        if self.has_budget:
            for tensor in self.model.tensors:
                logits = tensor.quantizer.gate_logits
                logits.requires_grad_(not tensor.fixed)
                logits.data.fill_(self.recipe.gates.init)
        self.set_corrections()

    def before_step(self, step: int) -> None:
        """Meet the budget at the freeze."""
        if self.has_budget and step == self.frozen_from and self.weights_are_finite():
            self.close_excess()
            self.open_fitting()

    def reads_device(self, step: int) -> bool:
        """True until the freeze: bits follow the gradients of every step."""
        return self.has_budget and step <= self.frozen_from

    def after_backward(self, step: int, loss: Tensor) -> None:
        """Take one SGD step on the gate logits, until the freeze."""
        super().after_backward(step, loss)
        if self.has_budget and step < self.frozen_from:
            self._descend(float(loss))

    @torch.no_grad()
    def _descend(self, loss: float) -> None:
        cost = self.cost()
        for tensor in self.model.tensors:
            logits = tensor.quantizer.gate_logits
            if tensor.fixed or logits.grad is None:
                continue
            grad = logits.grad
            if self.budget.limit is not None and cost > self.budget.limit:
                self._add_penalty_gradient(grad, tensor, loss, cost)
            stepped = logits - self.recipe.gates.lr * grad * (logits.abs() <= 1)
            stepped[:, : tensor.min_bits].clamp_(min=0)
            logits.copy_(stepped.sort(dim=1, descending=True).values)
            logits.grad = None
            tensor.quantizer.update_bits()

    def _add_penalty_gradient(
        self, grad: torch.Tensor, tensor: QuantizedParameter, loss: float, cost: int
    ) -> None:
        """Add Eqn (7)'s gradient at the last open gate: -alpha * loss * bytes saved / all bytes."""
        bits = tensor.quantizer.bits
        here = cost_of(tensor, bits, self.budget.eqn6)
        for g, s in enumerate(bits):
            if s > tensor.min_bits:
                closed = (*bits[:g], s - 1, *bits[g + 1 :])
                saved = here - cost_of(tensor, closed, self.budget.eqn6)
                grad[g, s - 1] += -self.recipe.gates.alpha * loss * saved / cost
