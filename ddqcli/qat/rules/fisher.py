"""The default rule: give bits where they reduce the expected loss most.

It reconsiders all bits about `gates.looks` times a run.
"""

from __future__ import annotations

from functools import cached_property

from ddqcli.qat.rules.base import Rule
from ddqcli.quant.knapsack import allocate

_REALLOCATE_BELOW = 0.97  # of the loss increase in force: less gain does not pay for fresh levels


class FisherRule(Rule):
    """Closes the gates that cost the least loss.

    Closing a gate costs lambda / 2 * (error at s - 1 bits - error at s bits), where lambda, the
    empirical Fisher of the tensor, is measured while training. At a few steps (gates.looks) bits
    are allocated again within the budget. The new ones are taken if they lower the loss by enough
    to start the changed levels afresh. From gates.freeze on, they stay.
    """

    name = "fisher"

    @cached_property
    def looks_at(self) -> set[int]:
        """The steps at which bits are allocated again."""
        interval = max(1, self.frozen_from // max(1, self.recipe.gates.looks))
        return set(range(interval, self.frozen_from, interval)) | {self.frozen_from}

    def start(self) -> None:
        """Allocate within the budget of step 0."""
        if self.has_budget:
            self.allocate_start()
        self.set_corrections()

    def reads_device(self, step: int) -> bool:
        """True at the steps at which bits are allocated again."""
        return self.has_budget and step in self.looks_at

    def before_step(self, step: int) -> None:
        """Allocate again if this is one of the steps to look at."""
        if self.reads_device(step) and self.weights_are_finite():
            self._reallocate(self.limit(step))
            self.set_corrections()

    def limit(self, step: int) -> int:
        """Return the cost allowed at a step, which may fall to the budget (gates.descent)."""
        return self.falling_limit(step)

    def _reallocate(self, limit: int) -> None:
        """Take the bits of least loss increase if those in force do not fit, or cost much more."""
        options = self.options()
        best = allocate(options, limit)
        in_force = {t.name: t.quantizer.bits[0] for t in self.model.tensors}
        if self.cost() <= limit:
            now, then = (
                sum(o.loss_increase[bits[o.name]] for o in options) for bits in (in_force, best)
            )
            if then >= _REALLOCATE_BELOW * now:
                return
        self.refit({name: s for name, s in best.items() if s != in_force[name]})
