"""The looks of a run at held-out samples, and the best state that they have found."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from pydantic import TypeAdapter
from torch import nn

from ddqcli.qat.rules.base import Rule
from ddqcli.training.held_out import HeldOut, is_better, is_ruined
from ddqcli.training.metrics import Look

_LOOKS, _LOOK = TypeAdapter(list[Look]), TypeAdapter(Look | None)


class BestState:
    """Keeps the state that is delivered if training ends now.

    It is the first one within the budget, or the one of the lowest held-out loss if that is below
    the first one's by more than chance, and the metric is not worse.

    Args:
        model: the network in training.
        gates: its bit-widths.
        held_out: the samples that all looks are at.

    Attributes:
        looks: all of them. The first is from before training.
        start: the first look at a state within the budget.
        best: the look at the best state.
    """

    def __init__(self, model: nn.Module, gates: Rule, held_out: HeldOut) -> None:
        self.model, self.gates, self.held_out = model, gates, held_out
        self.looks: list[Look] = []
        self.start: Look | None = None
        self.best: Look | None = None
        self._model_and_gates: dict[str, Any] | None = None

    def add(self, look: Look) -> None:
        """Take in a look at the present state."""
        self.looks.append(look)
        if self.start is None and self._fits():
            self.start = look

    def keep_if_best(self, look: Look) -> None:
        """Keep the present state, at which this is the look, if it is the best so far."""
        if self._fits() and (self.best is None or self._is_better(look, self.best)):
            self.best = look
            self._model_and_gates = {
                "model": {k: v.clone() for k, v in self.model.state_dict().items()},
                "gates": self.gates.state(),
            }

    def is_ruined(self, look: Look) -> bool:
        """True if training has diverged since the start."""
        return is_ruined(look, self._comparable(look), self.held_out.data.judged_by)

    def is_harmed(self, look: Look) -> bool:
        """True if the loss is above that of the start."""
        return not look.held_out_loss <= self._comparable(look).held_out_loss

    def _fits(self) -> bool:
        limit = self.gates.budget.limit
        return limit is None or self.gates.cost() <= limit

    def _comparable(self, look: Look) -> Look:
        """Return the start. Bits that still come down, or are sampled, raise the loss as well."""
        return look if self.start is None or self.gates.probabilities() else self.start

    def _is_better(self, look: Look, best: Look) -> bool:
        metric, least_gain = self.held_out.data.judged_by, self.held_out.least_gain
        return is_better(look, best, self.start or look, metric, least_gain)

    def model_and_gates(self) -> dict[str, Any]:
        """Return the best states of the model and the gates, by these names."""
        assert self._model_and_gates is not None
        return self._model_and_gates

    def forget_after(self, step: int) -> None:
        """Forget looks after a step, to which training goes back."""
        self.looks = [look for look in self.looks if look.step <= step]

    def state(self) -> dict[str, Any]:
        """Return all that a resumed run needs."""
        return {
            "looks": [asdict(look) for look in self.looks],
            "start": self.start and asdict(self.start),
            "best": self.best and asdict(self.best),
            "best_state": self._model_and_gates,
        }

    def load(self, state: dict[str, Any]) -> None:
        """Continue from a saved state. Raises ValueError or LookupError if that is none."""
        self.looks = _LOOKS.validate_python(state["looks"])
        self.start, self.best = (_LOOK.validate_python(state[name]) for name in ("start", "best"))
        kept = state["best_state"]
        if (self.best is None) != (kept is None) or not isinstance(kept, dict | None):
            raise ValueError("the best look and the best state do not belong together")
        self._model_and_gates = kept
