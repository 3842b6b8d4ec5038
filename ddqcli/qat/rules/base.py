"""The gates' three rules, and the budget that all of them keep.

`fisher` (ours): a gate is worth the loss that closing it would cost, lambda / 2 * (error at s - 1 bits - error at s bits), where
lambda, the empirical Fisher of the tensor, is measured while training (batch size times the mean square of the weight gradient).
At a few moments of the run it is seen whether other bits within the budget would do so much less damage in all that a fresh
start of the changed levels is worth it: a tensor whose bits change is re-centred on its weights. Then the gates freeze.
`paper`: Sec. 4.2 to the letter, SGD on the gate logits under Eqn (7); at the freeze, what is over the budget is closed, and what
is left of it is filled up.
`fixed`: one allocation before the first step.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from ddqcli.errors import BudgetError, DDQError
from ddqcli.qat.budget import Budget, cost_of, costs_of, make_budget
from ddqcli.qat.model import QuantizedModel, QuantizedParameter
from ddqcli.quant.error_curve import squared_error_by_bits
from ddqcli.quant.histogram import Histogram
from ddqcli.quant.knapsack import BitOptions, allocate, minimum_cost
from ddqcli.quant.layout import by_group
from ddqcli.recipe.schema import Recipe

_WORTH = 0.97  # bits that do more than this share of the damage in force are no reason to start levels anew
_CHANNELS = 16  # of a tensor quantized by channel, whose damage stands for that of all
_GROWS = "The network's buffers grew while it ran; register those that need not be stored with persistent=False."
_FISHER_EVERY = 4  # steps between two looks at the gradients; their mean square changes slowly


def _error_curve(tensor: QuantizedParameter, bits: range) -> dict[int, float]:
    """Squared error at each bit-width, of the whole tensor; where every channel has its levels, from some of the channels."""
    groups = len(tensor.quantizer.bits)
    rows = by_group(tensor.parameter.detach().float().cpu(), tensor.quantizer.axis, groups)
    energy = torch.linalg.vector_norm(rows, dim=1, dtype=torch.float64).square()
    live = energy.nonzero()[:, 0]  # channels of zeros do no damage
    chosen = live[torch.randperm(len(live), generator=torch.Generator().manual_seed(0))[:_CHANNELS]]
    share = float(energy[chosen].sum() / energy.sum()) if len(live) else 1.0
    curves = [
        squared_error_by_bits(Histogram.of(rows[g].numpy()), bits, tensor.quantizer.kind)
        for g in chosen.tolist()
    ]
    return {s: sum(curve[s] for curve in curves) / share for s in bits}


@dataclass
class Gates:
    """Moves the bits of all tensors while a run goes on."""

    converted: QuantizedModel
    recipe: Recipe
    budget: Budget
    steps: int  # of the whole run
    batch_size: int
    fisher: dict[str, float] = field(
        default_factory=dict
    )  # running mean of the gradient's mean square, by tensor
    seen: int = 0  # how many gradients that mean holds

    def __post_init__(self) -> None:
        rule = self.recipe.gates
        last = max(0, self.steps - 1)  # one step at least trains what is delivered
        self.frozen_from = 0 if rule.rule == "fixed" else min(int(rule.freeze * self.steps), last)
        span = max(1, self.frozen_from // max(1, rule.looks))
        self.looks_at = set(range(span, self.frozen_from, span)) | {self.frozen_from}
        if self.budget.limit is not None and rule.rule == "paper":
            for tensor in self.converted.tensors:
                gates = tensor.quantizer.gate_logits
                gates.requires_grad_(not tensor.fixed)
                gates.data.fill_(rule.init)

    @property
    def moving(self) -> bool:
        return self.budget.limit is not None

    def watch(self, share: float = 1.0) -> None:
        """Take the weights' gradients of one step, means over a `share` of a batch, into the Fisher's running mean."""
        grads = [
            (t, t.parameter.grad) for t in self.converted.tensors if t.parameter.grad is not None
        ]
        norms = torch._foreach_norm([g for _, g in grads])
        squares = torch.stack(norms).square().tolist() if norms else []
        self.seen += 1
        weight = max(1 / self.seen, 0.02)
        for (tensor, _), square in zip(grads, squares, strict=True):
            old = self.fisher.get(tensor.name, 0.0)
            self.fisher[tensor.name] = old + weight * (
                share * square / tensor.parameter.numel() - old
            )

    def start(self) -> None:
        """The first bits: where the budget stands at step 0, or everything at its maximum (the paper's rule)."""
        if self.moving and self.recipe.gates.rule != "paper":
            self._trade(self.limit(0), first=True)
        self._set_corrections()

    def before_step(self, step: int) -> None:
        """Trade bits if this is one of the moments for it."""
        if not self.moving or step > self.frozen_from or self.recipe.gates.rule == "fixed":
            return
        if self.recipe.gates.rule == "fisher":
            if step in self.looks_at and self._finite():
                self._trade(self.limit(step))
                self._set_corrections()
        elif step == self.frozen_from and self._finite():
            self._close_what_is_over()
            self._open_what_fits()

    def after_backward(self, step: int, loss: float) -> None:
        """Read the gradients: into the Fisher, and under the paper's rule into the gates."""
        if step % _FISHER_EVERY == 0 and step <= self.frozen_from:
            self.watch()
        if self.recipe.gates.rule == "paper" and self.moving and step < self.frozen_from:
            self._paper_step(loss)

    def recount(self) -> None:
        """Take the budget anew, of the model as it now is: a forward pass shows which layers are used, and can make buffers.

        Raises BudgetError if the target cannot be met.
        """
        self.converted.explain_buffers()
        self.budget = make_budget(self.converted, self.recipe, self.budget.float_bytes)

    def finish(self) -> None:
        """The promise: whatever the run did, the result fits. Raises DDQError for a network that grew until it cannot."""
        self._recount_trained()
        self._close_what_is_over()

    def check_kept(self) -> None:
        """Raise DDQError if the result, which was evaluated meanwhile, does not fit after all."""
        self._recount_trained()
        if self.budget.limit is not None and self.cost() > self.budget.limit:
            raise DDQError(
                f"The quantized tensors take {self.cost():,} of the {self.budget.limit:,} bytes left to them. {_GROWS}"
            )

    def _recount_trained(self) -> None:
        try:
            self.recount()
        except BudgetError as error:
            raise DDQError(f"{error} {_GROWS}") from error

    def penalty(self) -> float:
        """Eqn (7)'s factor (desired / practical memory)^alpha, with alpha = 0 where the constraint holds."""
        if not self.moving or self.budget.limit is None:
            return 1.0
        cost = self.cost()
        return (
            (self.budget.limit / cost) ** self.recipe.gates.alpha
            if cost > self.budget.limit
            else 1.0
        )

    def cost(self) -> int:
        """What the bits in force cost, in the budget's own measure."""
        return sum(cost_of(t, t.quantizer.bits, self.budget.eqn6) for t in self.converted.tensors)

    def limit(self, step: int) -> int:
        """The budget in force at a step: falls along a cubic from everything at its maximum to the target, till the freeze."""
        assert self.budget.limit is not None
        if step >= self.frozen_from:
            return self.budget.limit
        span = self.recipe.gates.descent * self.steps
        left = max(0.0, 1 - step / span) ** 3 if span else 0.0
        top = sum(costs_of(t, self.budget.eqn6)[t.max_bits] for t in self.converted.tensors)
        return int(self.budget.limit + left * max(0, top - self.budget.limit))

    def state(self) -> dict[str, Any]:
        """What a resumed run needs beside the model's own state."""
        return {
            "fisher": dict(self.fisher),
            "seen": self.seen,
            "bits": {t.name: t.quantizer.bits for t in self.converted.tensors},
            "correction": {t.name: t.quantizer.correction for t in self.converted.tensors},
        }

    def load(self, state: dict[str, Any]) -> None:
        """Take up a saved state."""
        self.fisher, self.seen = dict(state["fisher"]), state["seen"]
        for tensor in self.converted.tensors:
            tensor.quantizer.bits = tuple(state["bits"][tensor.name])
            tensor.quantizer.correction = state["correction"][tensor.name]

    def _finite(self) -> bool:
        """Whether there are weights to weigh: after a divergence there are not, and the next loss says so."""
        return all(bool(t.parameter.isfinite().all()) for t in self.converted.tensors)

    def _choices(self) -> list[BitOptions]:
        return [self._choice(t, costs_of(t, self.budget.eqn6)) for t in self.converted.tensors]

    @torch.no_grad()
    def _choices_from_here(self, *, rise: bool) -> list[BitOptions]:
        """A tensor as it is (0), its channels may have different bits, or with bits that cost more (`rise`), or less."""
        found = []
        for tensor in self.converted.tensors:
            here = cost_of(tensor, tensor.quantizer.bits, self.budget.eqn6)
            costs = {
                s: c
                for s, c in costs_of(tensor, self.budget.eqn6).items()
                if (c > here if rise else c < here)
            }
            x = tensor.parameter.detach()
            error = float((tensor.quantizer(x) - x).double().square().sum())
            found.append(self._choice(tensor, {0: here} | costs, error))
        return found

    def _choice(
        self, tensor: QuantizedParameter, costs: dict[int, int], as_it_is: float = 0.0
    ) -> BitOptions:
        """What the bits in `costs` do to the loss; `as_it_is`: the squared error of 0, the tensor as it is."""
        if len(costs) == 1:
            return BitOptions(tensor.name, costs, dict.fromkeys(costs, 0.0))
        weight = (
            self._lambda(tensor) / 2 + 1e-30
        )  # without gradients, more bits are still better than fewer
        asked = [s for s in costs if s]
        errors = {0: as_it_is} | _error_curve(tensor, range(min(asked), max(asked) + 1))
        return BitOptions(tensor.name, costs, {s: weight * errors[s] for s in costs})

    def _lambda(self, tensor: QuantizedParameter) -> float:
        """The tensor's empirical Fisher: loss per squared unit of weight error, twice. The same for all before any gradient.

        Of one that is frozen it is unknown, and taken for the mean over all values that are not.
        """
        if not self.fisher:
            return 1.0
        unknown = 0.0 if tensor.parameter.requires_grad else self._mean_fisher()
        return self.batch_size * self.fisher.get(tensor.name, unknown)

    def _mean_fisher(self) -> float:
        sizes = {
            t.name: t.parameter.numel() for t in self.converted.tensors if t.name in self.fisher
        }
        return sum(self.fisher[name] * size for name, size in sizes.items()) / sum(sizes.values())

    def _trade(self, limit: int, *, first: bool = False) -> None:
        """The bits of least damage within the limit, if those in force do not fit or do much more.

        The first are the fewest on offer if the limit is below: of a dry run, which cannot know what is never called.
        """
        choices = self._choices()
        bits = allocate(choices, max(limit, minimum_cost(choices)) if first else limit)
        in_force = {t.name: t.quantizer.bits[0] for t in self.converted.tensors}
        if not first and self.cost() <= limit:
            now, then = (
                sum(c.loss_increase[of[c.name]] for c in choices) for of in (in_force, bits)
            )
            if then >= _WORTH * now:
                return
        self._take({name: s for name, s in bits.items() if first or s != in_force[name]})

    def _take(self, bits: dict[str, int]) -> None:
        """Give these tensors these bits, and fit their levels anew."""
        for tensor in self.converted.tensors:
            if tensor.name in bits:
                tensor.quantizer.fit(
                    tensor.parameter,
                    bits[tensor.name],
                    uniform=self.recipe.weights.init == "uniform",
                )

    def _close_what_is_over(self) -> None:
        """Close the gates of least damage per byte until the budget is met; none gets more bits unless those cost less."""
        if self.budget.limit is not None and self.cost() > self.budget.limit:
            self._move(self.budget.limit, rise=False)

    def _open_what_fits(self) -> None:
        """Open gates where that takes off most damage, as far as the budget has room."""
        if self.budget.limit is not None:
            self._move(self.budget.limit, rise=True)

    def _move(self, limit: int, *, rise: bool) -> None:
        """The bits of least damage within the limit that cost more than those in force (`rise`), or less."""
        bits = allocate(self._choices_from_here(rise=rise), limit)
        self._take({name: s for name, s in bits.items() if s})

    def _set_corrections(self) -> None:
        """Eqn (9)'s lambda in units of loss, so that one number serves every layer."""
        for tensor in self.converted.tensors:
            tensor.quantizer.correction = self.recipe.train.correction * self._lambda(tensor)

    @torch.no_grad()
    def _paper_step(self, loss: float) -> None:
        """Plain SGD on the gate logits: the task's gradient, and Eqn (7)'s while the budget is exceeded."""
        assert self.budget.limit is not None
        cost, rule = self.cost(), self.recipe.gates
        for tensor in self.converted.tensors:
            quantizer = tensor.quantizer
            if tensor.fixed or quantizer.gate_logits.grad is None:
                continue
            grad = quantizer.gate_logits.grad
            if cost > self.budget.limit:
                whole = cost_of(tensor, quantizer.bits, self.budget.eqn6)
                for g, s in enumerate(quantizer.bits):
                    if s > tensor.min_bits:
                        closed = (*quantizer.bits[:g], s - 1, *quantizer.bits[g + 1 :])
                        saved = whole - cost_of(tensor, closed, self.budget.eqn6)
                        grad[g, s - 1] += -rule.alpha * loss * saved / cost
            step = rule.lr * grad * (quantizer.gate_logits.abs() <= 1)
            moved = quantizer.gate_logits - step
            moved[:, : tensor.min_bits].clamp_(min=0)
            quantizer.gate_logits.copy_(moved.sort(dim=1, descending=True).values)
            quantizer.gate_logits.grad = None
            quantizer.update_bits()
