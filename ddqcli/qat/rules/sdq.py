"""SDQ's first phase: bit-widths sampled between neighbors, after Huang et al., ICML 2022.

`quant/METHOD.md` says what is SDQ's and what is ours.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from ddqcli.qat.budget import cost_of, costs_of
from ddqcli.qat.model import QuantizedParameter
from ddqcli.qat.rules.base import Rule
from ddqcli.quant.batched import batched
from ddqcli.quant.dbp import DBP, meet
from ddqcli.quant.knapsack import BitOptions, allocate, minimum_cost
from ddqcli.quant.stochastic import Choice, logistic_noise

_COMMIT_BELOW = 0.1  # probability of the larger bit-width below which the smaller one is final
_OPENED_AT = math.log(9)  # DBP of a new pair: 0.9 for the larger bit-width, which was in force
_FIRST = -0.01  # DBP of a first pair: nearly even, the smaller bit-width in force
_EVIDENCE = 4.0  # sum of all step sizes over the square root of their number


class SDQRule(Rule):
    """Samples the bits of each tensor anew at every step, until they freeze (gates.freeze).

    A tensor's DBP moves by the gradient of the loss and by a multiplier on the expected cost, which
    follows the budget. Below a threshold the smaller bit-width is final, and the pair below it
    opens. Between steps, the more probable bits are in force. At the freeze, the most probable
    bits within the budget are taken.
    """

    name = "sdq"

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.dbps: dict[str, DBP] = {}  # by tensor
        self._costs: dict[tuple[str, int], int] = {}  # by tensor and bit-width
        self.first_excess = 0.0  # of the expected cost, over the limit at step 0

    def start(self) -> None:
        """Take the bits of least loss increase within the limit as the smaller of the first pairs.

        So the start fits the budget, and the expected cost lies above it.
        """
        self.dbps = {}
        if self.has_budget:
            self.allocate_start()
            if self.frozen_from:
                self._open_first_pairs()
                self.first_excess = max(0.0, self.expected_cost() - self.limit(0))
        self.set_corrections()

    def before_step(self, step: int) -> None:
        """Commit what is certain and sample bits, or freeze them."""
        if self.dbps and step < self.frozen_from:
            self._commit()
            self._sample(step)
        elif self.dbps and self.weights_are_finite():
            self._freeze()

    def reads_device(self, step: int) -> bool:
        """True until the freeze: bits follow the gradients of every step."""
        return bool(self.dbps)

    def after_backward(self, step: int, loss: Tensor) -> None:
        """Move the DBPs, and put the more probable bits in force."""
        super().after_backward(step, loss)
        if self.dbps:
            self._descend()
            self._meet_schedule(step + 1)
            for tensor, dbp in self._sampled():
                self._put_in_force(tensor, dbp)

    def limit(self, step: int) -> int:
        """Return the cost allowed at a step, which may fall to the budget (gates.descent)."""
        return self.falling_limit(step)

    def penalty(self) -> float:
        """1: the multiplier on the expected cost takes the place of Eqn (7)."""
        return 1.0

    def probabilities(self) -> dict[str, float]:
        """Return the probability of the larger bit-width, by tensor."""
        return {name: dbp.probability for name, dbp in self.dbps.items()}

    def state(self) -> dict[str, Any]:
        """Return what a resumed run needs beside the model's state. Draws follow from the step."""
        dbps = {name: asdict(dbp) for name, dbp in self.dbps.items()}
        return {**super().state(), "dbps": dbps, "first_excess": self.first_excess}

    def load_state(self, state: dict[str, Any]) -> None:
        """Restore what `state` returned."""
        super().load_state(state)
        self.dbps = {name: DBP(**dbp) for name, dbp in state["dbps"].items()}
        self.first_excess = state["first_excess"]
        for tensor in self.model.tensors:
            tensor.quantizer.choice = None
            tensor.quantizer.gate_logits.requires_grad_(tensor.name in self.dbps)

    # ---- cost

    def schedule(self, step: int) -> float:
        """Return the expected cost for a step: from that of the first pairs down to the budget."""
        remaining = max(0.0, 1 - step / self.frozen_from)
        return self.limit(step) + self.first_excess * remaining

    def expected_cost(self) -> float:
        """Return the mean cost over all draws."""
        certain = sum(self._cost(t, t.quantizer.bits[0]) for t in self._certain())
        return certain + sum(
            self._cost(t, dbp.smaller) + dbp.probability * self._saved(t, dbp)
            for t, dbp in self._sampled()
        )

    def _cost(self, tensor: QuantizedParameter, bits: int) -> int:
        key = tensor.name, bits
        if key not in self._costs:
            groups = len(tensor.quantizer.bits)
            self._costs[key] = cost_of(tensor, (bits,) * groups, self.budget.eqn6)
        return self._costs[key]

    def _saved(self, tensor: QuantizedParameter, dbp: DBP) -> int:
        return self._cost(tensor, dbp.larger) - self._cost(tensor, dbp.smaller)

    def _sampled(self) -> Iterator[tuple[QuantizedParameter, DBP]]:
        return ((t, self.dbps[t.name]) for t in self.model.tensors if t.name in self.dbps)

    def _certain(self) -> Iterator[QuantizedParameter]:
        return (t for t in self.model.tensors if t.name not in self.dbps)

    # ---- pairs of bit-widths

    def _open_first_pairs(self) -> None:
        for tensor in self.model.tensors:
            now = tensor.quantizer.bits[0]
            widths = list(costs_of(tensor, self.budget.eqn6))
            more, less = (
                [s for s in widths if s > now][:1],
                [s for s in widths if s < now][-1:],
            )
            if more:
                self._open(tensor, more[0], now, _FIRST)
            elif less:
                self._open(tensor, now, less[0], _OPENED_AT)

    def _open(self, tensor: QuantizedParameter, larger: int, smaller: int, z: float) -> None:
        """Sample a tensor between two bit-widths. Fits its levels to the one that comes in force.

        The levels at the other are means of these or lie between them, except for uniform and
        power-of-two levels, whose range is fitted at both.
        """
        dbp = DBP(larger, smaller, z)
        quantizer = tensor.quantizer
        if quantizer.kind != "learned":
            ranges = []
            for bits in (larger, smaller):
                self.refit({tensor.name: bits})
                ranges.append(quantizer.log2_clip.detach().clone())
            dbp.range_ratio = (ranges[0] - ranges[1]).tolist()
        self.refit({tensor.name: dbp.bits})
        quantizer.gate_logits.requires_grad_()
        self.dbps[tensor.name] = dbp
        self._put_in_force(tensor, dbp)

    def _commit(self) -> None:
        """Open the pair below where the smaller bit-width is all but certain."""
        certain = [pair for pair in self._sampled() if pair[1].probability < _COMMIT_BELOW]
        if certain and self.weights_are_finite():
            for tensor, dbp in certain:
                less = [s for s in costs_of(tensor, self.budget.eqn6) if s < dbp.smaller]
                if less:
                    self._open(tensor, dbp.smaller, less[-1], _OPENED_AT)

    @torch.no_grad()
    def _put_in_force(self, tensor: QuantizedParameter, dbp: DBP) -> None:
        """Use the more probable bits; the gates between the two bit-widths show the DBP."""
        self._use(tensor, dbp, dbp.bits)
        tensor.quantizer.gate_logits[:, dbp.smaller : dbp.larger] = dbp.z

    @torch.no_grad()
    def _use(self, tensor: QuantizedParameter, dbp: DBP, bits: int) -> None:
        """Quantize at one of the two bit-widths, without moving gates."""
        quantizer = tensor.quantizer
        if dbp.range_ratio and bits != quantizer.bits[0]:
            ratio = quantizer.log2_clip.new_tensor(dbp.range_ratio)
            quantizer.log2_clip.add_(ratio if bits == dbp.larger else -ratio)
        quantizer.bits = (bits,) * len(quantizer.bits)

    # ---- a step

    def _sample(self, step: int) -> None:
        """Draw the bits of this step."""
        differences = self._differences()
        # One draw for each tensor of the model, so that they do not depend on commitments.
        noise = logistic_noise(len(self.model.tensors), self.recipe.train.seed, step)
        noise_of = {t.name: n for t, n in zip(self.model.tensors, noise, strict=True)}
        for tensor, dbp in self._sampled():
            larger = dbp.z + noise_of[tensor.name] >= 0
            self._use(tensor, dbp, dbp.larger if larger else dbp.smaller)
            tensor.quantizer.choice = Choice(differences[tensor.name], dbp.larger - 1)

    @torch.no_grad()
    def _differences(self) -> dict[str, Tensor]:
        """Return each tensor at its larger minus at its smaller bit-width."""
        at_larger, at_smaller = (self._all_at(larger) for larger in (True, False))
        return {name: at_larger[name] - at_smaller[name] for name in self.dbps}

    def _all_at(self, larger: bool) -> dict[str, Tensor]:
        for tensor, dbp in self._sampled():
            self._use(tensor, dbp, dbp.larger if larger else dbp.smaller)
        with batched([(t.quantizer, t.parameter) for t, _ in self._sampled()]):
            return {t.name: t.quantizer(t.parameter) for t, _ in self._sampled()}

    def _descend(self) -> None:
        """Step against the gradient of the loss. A tensor that was not used has none."""
        rate = _EVIDENCE / math.sqrt(self.frozen_from)
        for tensor, dbp in self._sampled():
            quantizer = tensor.quantizer
            grad = quantizer.gate_logits.grad
            difference = 0.0 if grad is None else float(grad[0, dbp.larger - 1])
            dbp.descend(difference, quantizer.bits[0] == dbp.larger, rate)
            quantizer.gate_logits.grad = quantizer.choice = None

    def _meet_schedule(self, step: int) -> None:
        pairs = list(self._sampled())
        saved = [self._saved(tensor, dbp) for tensor, dbp in pairs]
        sampled = sum(dbp.probability * s for (_, dbp), s in zip(pairs, saved, strict=True))
        others = self.expected_cost() - sampled
        meet([dbp for _, dbp in pairs], saved, self.schedule(step) - others)

    # ---- the freeze

    def _freeze(self) -> None:
        """Take the most probable bits within the budget, and open gates that still fit."""
        choices = [
            BitOptions(
                tensor.name,
                {dbp.smaller: self._cost(tensor, dbp.smaller)}
                | {dbp.larger: self._cost(tensor, dbp.larger)},
                {dbp.smaller: -math.log(1 - dbp.probability)}
                | {dbp.larger: -math.log(dbp.probability)},
            )
            for tensor, dbp in self._sampled()
        ]
        for tensor in self._certain():
            bits = tensor.quantizer.bits[0]
            choices.append(BitOptions(tensor.name, {bits: self._cost(tensor, bits)}, {bits: 0.0}))
        assert self.budget.limit is not None
        bits_of = allocate(choices, max(self.budget.limit, minimum_cost(choices)))
        for tensor, dbp in self._sampled():
            self._use(tensor, dbp, bits_of[tensor.name])
            tensor.quantizer.set_bits(tensor.quantizer.bits)
            tensor.quantizer.gate_logits.requires_grad_(False)
        self.dbps = {}
        self.close_excess()
        self.open_fitting()
        self.set_corrections()
