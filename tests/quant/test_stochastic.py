"""Sampling between two bit-widths: draws, and the gradient of the choice against enumeration."""

from __future__ import annotations

import math

import pytest
import torch

from ddqcli.quant.quantizer import DDQuantizer
from ddqcli.quant.stochastic import Choice, logistic_noise, sigmoid, slope

# ---- draws


def test_draws_depend_on_seed_and_step_alone() -> None:
    first = logistic_noise(5, seed=3, step=7)
    torch.rand(11)  # other random numbers do not disturb them
    assert logistic_noise(5, seed=3, step=7) == first
    others = [logistic_noise(5, seed=3, step=8), logistic_noise(5, seed=4, step=7)]
    assert all(set(other).isdisjoint(first) for other in others)
    assert logistic_noise(3, seed=3, step=7) == first[:3]  # the first tensors draw alike


@pytest.mark.parametrize("z", [-3.0, -0.4, 0.0, 1.7])
def test_the_larger_bit_width_is_drawn_with_the_dbps_probability(z: float) -> None:
    draws = [z + n >= 0 for step in range(200) for n in logistic_noise(100, 0, step)]
    expected = 1 / (1 + math.exp(-z))
    spread = math.sqrt(expected * (1 - expected) / len(draws))
    assert abs(sum(draws) / len(draws) - expected) < 4 * spread


# ---- the slope


@pytest.mark.parametrize("z", [-2.0, 0.0, 0.9])
def test_the_slope_is_that_of_the_gumbel_sigmoid_at_low_temperature(z: float) -> None:
    """The mean of d/dz sigmoid((z + noise) / tau) over the draws of one choice, by quadrature."""
    tau, n = 1e-3, 4_000_001
    u = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    reached = z + u.log() - (1 - u).log()
    soft = torch.sigmoid(reached / tau)
    slopes = soft * (1 - soft) / tau
    for larger in (True, False):
        mean = float(slopes[(reached >= 0) == larger].mean())
        assert mean == pytest.approx(slope(z, larger), rel=3e-3)


@pytest.mark.parametrize("kind", ["learned", "uniform"])
@pytest.mark.parametrize(("larger", "smaller"), [(3, 2), (2, 1), (8, 6)])
@pytest.mark.parametrize("z", [-1.5, 0.0, 0.6])
def test_the_gradients_expectation_is_the_derivative_of_the_mean_loss(
    kind: str, larger: int, smaller: int, z: float
) -> None:
    """Both choices are enumerated, for a quadratic loss in float64; no draw is involved."""
    torch.manual_seed(larger)
    w, target = torch.randn(60), torch.randn(60, dtype=torch.float64)
    root = torch.randn(60, 60, dtype=torch.float64) / 8
    hessian = root @ root.T

    def loss_of(x_q: torch.Tensor) -> torch.Tensor:
        difference = x_q.double() - target
        return difference @ hessian @ difference / 2

    quantizer = DDQuantizer.from_tensor(w, 8, larger, kind=kind)  # type: ignore[arg-type]
    quantized, clips = {}, {}
    for bits in (larger, smaller):
        if kind == "uniform":
            quantizer.fit(w, bits)  # a range of its own at each
        clips[bits] = quantizer.log2_clip.detach().clone()
        quantizer.bits = (bits,)
        quantized[bits] = quantizer(w).detach()
    quantizer.gate_logits.requires_grad_()
    difference = quantized[larger] - quantized[smaller]
    p, expectation = sigmoid(z), 0.0
    for bits, probability in ((larger, p), (smaller, 1 - p)):
        quantizer.bits = (bits,)
        quantizer.log2_clip.data.copy_(clips[bits])
        quantizer.choice = Choice(difference, larger - 1)
        quantizer.gate_logits.grad = None
        x_q = quantizer(w)
        assert torch.equal(x_q, quantized[bits])
        loss_of(x_q).backward()
        grad = quantizer.gate_logits.grad
        assert grad is not None
        assert int(grad.count_nonzero()) == 1
        expectation += probability * float(grad[0, larger - 1]) * slope(z, bits == larger)

    def mean_loss(at: float) -> float:
        share = 1 / (1 + math.exp(-at))
        large, small = (float(loss_of(quantized[s])) for s in (larger, smaller))
        return share * large + (1 - share) * small

    exact = (mean_loss(z + 1e-4) - mean_loss(z - 1e-4)) / 2e-4
    assert expectation == pytest.approx(exact, rel=1e-4, abs=1e-7)


def test_a_choice_leaves_the_other_gradients_as_they_are() -> None:
    torch.manual_seed(0)
    w, weight = torch.randn(200), torch.randn(200)
    quantizer = DDQuantizer.from_tensor(w, 4, 3)
    grads = []
    for choice in (None, Choice(torch.randn(200), 2)):
        x = w.clone().requires_grad_()
        quantizer.levels.grad = None
        quantizer.choice = choice
        quantizer.gate_logits.requires_grad_(choice is not None)
        (quantizer(x) * weight).sum().backward()
        grads.append((x.grad, quantizer.levels.grad))
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))
