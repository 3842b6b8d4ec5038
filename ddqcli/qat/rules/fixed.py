"""The static rule: allocate bits once, before the first step."""

from __future__ import annotations

from ddqcli.qat.rules.base import Rule


class FixedRule(Rule):
    """Gives the bits of least loss increase within the budget, and leaves them."""

    name = "fixed"

    @property
    def frozen_from(self) -> int:
        """No bits ever move."""
        return 0

    def start(self) -> None:
        """Allocate within the budget."""
        if self.has_budget:
            self.allocate_start()
        self.set_corrections()
