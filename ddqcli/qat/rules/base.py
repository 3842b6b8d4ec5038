"""The interface of the rules that decide bit-widths, and what all rules share.

A rule moves bits as it likes while it trains; `finish` then keeps the promise that the result fits
the budget. Shared are also the estimate of the loss increase and the gradient-correction factors.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor

from ddqcli.errors import BudgetError, DDQError
from ddqcli.qat.budget import ResolvedBudget, cost_of, costs_of, make_budget
from ddqcli.qat.loss_increase import AS_IT_IS, FisherEstimate, bit_options
from ddqcli.qat.model import QuantizedModel
from ddqcli.quant.knapsack import BitOptions, allocate, minimum_cost
from ddqcli.recipe.schema import Recipe

_BUFFERS_GREW = (
    "The network's buffers grew while it ran; "
    "register those that need not be stored with persistent=False."
)
_FISHER_EVERY = 4  # steps between two looks at the gradients; their mean square changes slowly


class Rule(ABC):
    """Decides the bits of all tensors during a run.

    A rule implements `start` and, if bits move while training, `before_step`, `after_backward`,
    `reads_device` and `limit`. It may use `allocate_start`, `close_excess`, `open_fitting` and
    `set_corrections`.

    Attributes:
        name: value of the recipe's gates.rule; sdq for its method sdq.
        budget: of the model as it was at the last `recount`.
        fisher: estimated Fisher of every tensor.
    """

    name: ClassVar[str]

    def __init__(
        self,
        model: QuantizedModel,
        recipe: Recipe,
        budget: ResolvedBudget,
        steps: int,
        batch_size: int,
    ) -> None:
        """`steps` of the whole run; `batch_size` of the gradients that `watch` gets."""
        self.model, self.recipe, self.budget, self.steps = model, recipe, budget, steps
        self.fisher = FisherEstimate(model.tensors, batch_size)

    @property
    def frozen_from(self) -> int:
        """The step from which no bits move."""
        last_step = max(0, self.steps - 1)  # at least one step trains what is delivered
        return min(int(self.recipe.gates.freeze * self.steps), last_step)

    # ---- the interface, in the order of a run

    def watch(self, share: float = 1.0) -> None:
        """Update the Fisher estimate from the current gradients.

        Each is averaged over the fraction `share` of a batch.
        """
        self.fisher.update(share)

    def recount(self) -> None:
        """Resolve the budget again: a forward pass shows unused layers, and can make buffers.

        Raises BudgetError if it cannot be met.
        """
        self.model.explain_buffers()
        old = self.budget
        self.budget = make_budget(self.model, self.recipe, old.float_bytes, old.meta, old.reserve)

    @abstractmethod
    def start(self) -> None:
        """Set the first bits and the gradient-correction factors."""

    def before_step(self, step: int) -> None:  # noqa: B027 - a rule need not move bits
        """Move bits if this is a step to do so."""

    def reads_device(self, step: int) -> bool:
        """True if `before_step` or `after_backward` waits for the device at this step."""
        return False

    def after_backward(self, step: int, loss: Tensor) -> None:
        """Read the gradients of a step, and its loss (a scalar)."""
        if step % _FISHER_EVERY == 0 and step <= self.frozen_from:
            self.watch()

    def probabilities(self) -> dict[str, float]:
        """Return the probability of the larger of two bit-widths by tensor, if bits are sampled."""
        return {}

    def finish(self) -> None:
        """Make the result fit the budget. Raises DDQError for a network that grew beyond it."""
        self._recount_trained()
        self.close_excess()

    def check_kept(self) -> None:
        """Raise DDQError if the result no longer fits, after it was evaluated."""
        self._recount_trained()
        if self.budget.limit is not None and self.cost() > self.budget.limit:
            raise DDQError(
                f"The quantized tensors take {self.cost():,} of the {self.budget.limit:,} bytes "
                f"left to them. {_BUFFERS_GREW}"
            )

    def state(self) -> dict[str, Any]:
        """Return what a resumed run needs beside the model's state."""
        return {
            "fisher": dict(self.fisher.mean_square),
            "seen": self.fisher.seen,
            "error_share": self.fisher.error_share,
            "bits": {t.name: t.quantizer.bits for t in self.model.tensors},
            "correction": {t.name: t.quantizer.correction for t in self.model.tensors},
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Restore what `state` returned."""
        self.fisher.mean_square, self.fisher.seen = dict(state["fisher"]), state["seen"]
        self.fisher.error_share = dict(state["error_share"])
        for tensor in self.model.tensors:
            tensor.quantizer.bits = tuple(state["bits"][tensor.name])
            tensor.quantizer.correction = state["correction"][tensor.name]

    # ---- budget

    @property
    def has_budget(self) -> bool:
        """True if there is a budget to be met."""
        return self.budget.limit is not None

    def cost(self) -> int:
        """Return the cost of the bits in force, in the budget's own measure."""
        return sum(cost_of(t, t.quantizer.bits, self.budget.eqn6) for t in self.model.tensors)

    def limit(self, step: int) -> int:
        """Return the cost allowed at a step. Needs a budget."""
        assert self.budget.limit is not None
        return self.budget.limit

    def falling_limit(self, step: int) -> int:
        """Return a limit that falls along a cubic to the budget, until the freeze at the latest.

        It begins with all tensors at their most bits, and falls for gates.descent of the run. Needs
        a budget.
        """
        assert self.budget.limit is not None
        if step >= self.frozen_from:
            return self.budget.limit
        span = self.recipe.gates.descent * self.steps
        remaining = max(0.0, 1 - step / span) ** 3 if span else 0.0
        most = sum(costs_of(t, self.budget.eqn6)[t.max_bits] for t in self.model.tensors)
        return int(self.budget.limit + remaining * max(0, most - self.budget.limit))

    def penalty(self) -> float:
        """Eqn (7)'s factor of the loss, (desired / practical memory)^alpha; 1 within the budget."""
        if self.budget.limit is None:
            return 1.0
        cost = self.cost()
        excess = cost > self.budget.limit
        return (self.budget.limit / cost) ** self.recipe.gates.alpha if excess else 1.0

    # ---- for rules to use

    def options(self) -> list[BitOptions]:
        """Return cost and loss increase of every bit-width on offer, for each tensor."""
        return [
            bit_options(t, costs_of(t, self.budget.eqn6), self.fisher) for t in self.model.tensors
        ]

    def allocate_start(self) -> None:
        """Give all tensors the bits of least loss increase within the limit at step 0.

        If even the minimum exceeds the limit, use the minimum: a dry run's limit counts the inputs
        of layers that are never called.
        """
        options = self.options()
        self.refit(allocate(options, max(self.limit(0), minimum_cost(options))))

    def close_excess(self) -> None:
        """Close the gates of least loss increase per byte until the budget is met.

        No tensor gets more bits, unless those cost less.
        """
        if self.budget.limit is not None and self.cost() > self.budget.limit:
            self._move(self.budget.limit, rise=False)

    def open_fitting(self) -> None:
        """Open the gates that lower the loss most, as far as the budget has room."""
        if self.budget.limit is not None:
            self._move(self.budget.limit, rise=True)

    def refit(self, bits: dict[str, int]) -> None:
        """Give tensors these bits by name, and fit their levels to the weights as they are now."""
        for tensor in self.model.tensors:
            if tensor.name in bits:
                uniform = self.recipe.weights.init == "uniform"
                tensor.quantizer.fit(tensor.parameter, bits[tensor.name], uniform=uniform)

    def set_corrections(self) -> None:
        """Set Eqn (9)'s lambda in units of loss, so that one number serves every layer."""
        for tensor in self.model.tensors:
            tensor.quantizer.correction = self.recipe.train.correction * self.fisher.of(tensor)

    def weights_are_finite(self) -> bool:
        """False after a divergence, which the next loss reports: there is nothing to fit then."""
        return all(bool(t.parameter.isfinite().all()) for t in self.model.tensors)

    # ---- private

    def _recount_trained(self) -> None:
        try:
            self.recount()
        except BudgetError as error:
            raise DDQError(f"{error} {_BUFFERS_GREW}") from error

    def _move(self, limit: int, *, rise: bool) -> None:
        """Take the bits of least loss increase in the limit that cost more (`rise`), or less."""
        bits = allocate(self._options_from_here(rise=rise), limit)
        self.refit({name: s for name, s in bits.items() if s != AS_IT_IS})

    @torch.no_grad()
    def _options_from_here(self, *, rise: bool) -> list[BitOptions]:
        """Return for each tensor: as it is, or with bits that cost more (`rise`), or less.

        As it is, its channels may have different bits.
        """
        options = []
        for tensor in self.model.tensors:
            here = cost_of(tensor, tensor.quantizer.bits, self.budget.eqn6)
            costs = {AS_IT_IS: here}
            for s, cost in costs_of(tensor, self.budget.eqn6).items():
                if cost > here if rise else cost < here:
                    costs[s] = cost
            x = tensor.parameter.detach()
            error = float((tensor.quantizer(x) - x).double().square().sum())
            options.append(bit_options(tensor, costs, self.fisher, error))
        return options
