"""The estimated loss increase: error curves of tensors quantized by channel, and the Fisher."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from rule_runs import network, rule_of, rule_recipe
from small_models import RandomBatches, random_data
from torch import Tensor, nn

from ddqcli.data.batches import Shard
from ddqcli.qat.convert import convert
from ddqcli.qat.loss_increase import AS_IT_IS, FisherEstimate, bit_options, error_curve
from ddqcli.quant.quantizer import DDQuantizer
from ddqcli.training import distributed
from ddqcli.training.calibrate import calibrate

BY_CHANNEL = rule_recipe("fixed", {"target_bits": 6}, weights={"granularity": "channel"})


def assert_curve_matches(layer: nn.Linear, widths: tuple[int, ...], rel: float) -> None:
    """The curve is the squared error of levels fitted to each channel."""
    tensor = convert(nn.Sequential(nn.Flatten(), layer), BY_CHANNEL).tensors[0]
    weight = tensor.parameter.detach()
    curve = error_curve(tensor, range(min(widths), max(widths) + 1))
    for s in widths:
        fitted = DDQuantizer.from_tensor(weight, s, channel_axis=0)
        error = float((fitted(weight) - weight).detach().double().square().sum())
        assert curve[s] == pytest.approx(error, rel=rel)


def test_some_channels_stand_for_all_with_the_error_of_their_own_levels() -> None:
    """The scales of the 40 channels differ by a thousand, which one set of levels would feel."""
    layer = nn.Linear(3 * 8 * 8, 40)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(1))
    layer.weight.data *= torch.logspace(-3, 0, 40)[order][:, None]
    assert_curve_matches(layer, (2, 3, 4), rel=0.2)


@pytest.mark.parametrize("seed", range(3))
def test_channels_of_zeros_do_not_stand_for_the_others(seed: int) -> None:
    layer = nn.Linear(192, 64)
    layer.weight.data[torch.randperm(64, generator=torch.Generator().manual_seed(seed))[6:]] = 0
    assert_curve_matches(layer, (2,), rel=0.05)


@pytest.mark.parametrize("every", [2, 3, 4, 8])
def test_regular_patterns_of_channels_do_not_hide(every: int) -> None:
    """Pruned filters, or the gates of a recurrent layer, come at equal distances."""
    layer = nn.Linear(192, 64)
    layer.weight.data[::every] = 0
    assert_curve_matches(layer, (2,), rel=0.2)


def test_the_fisher_is_the_batch_size_times_the_mean_of_squared_gradients() -> None:
    tensors = convert(network(), rule_recipe("fisher", None)).tensors
    fisher = FisherEstimate(tensors, batch_size=8)
    assert [fisher.of(tensor) for tensor in tensors] == [1.0] * len(tensors)
    expected = dict.fromkeys((t.name for t in tensors), 0.0)
    for scale in (1.0, 3.0):
        for tensor in tensors:
            tensor.parameter.grad = scale * torch.randn(tensor.shape)
            expected[tensor.name] += float(tensor.parameter.grad.double().square().mean()) / 2
        fisher.update()
    assert fisher.mean_square == pytest.approx(expected, rel=1e-5)
    for tensor in tensors:
        assert fisher.of(tensor) == pytest.approx(8 * expected[tensor.name], rel=1e-5)


class NoiseShard(RandomBatches):
    """The part of one of `processes` in batches of noise whose labels say nothing."""

    def __init__(self, rank: int, processes: int) -> None:
        super().__init__(count=16, size=64)
        self.rank, self.processes = rank, processes

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        for x, y in super().epoch(epoch, start):
            random = torch.Generator().manual_seed(int(x.sum() * 1000) % 2**31)
            noise = torch.randn(x.shape, generator=random)
            yield noise[self.rank :: self.processes], y[self.rank :: self.processes]


@pytest.mark.parametrize("processes", [2, 4])
def test_several_processes_calibrate_to_the_fisher_of_one(
    processes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gradients of a part of a batch have more noise, which dominates where little is learned."""

    def fisher(rank: int, count: int) -> dict[str, float]:
        monkeypatch.setattr(distributed, "shard", lambda: Shard(rank, count))
        rule = rule_of(rule_recipe("fisher", None), batch_size=64)
        data = replace(random_data(), train=NoiseShard(rank, count))
        calibrate(rule.model, data, 16, rule.watch)
        return rule.fisher.mean_square

    whole, parts = fisher(0, 1), [fisher(rank, processes) for rank in range(processes)]
    ratios = [statistics.mean(part[name] for part in parts) / whole[name] for name in whole]
    assert 0.75 < statistics.median(ratios) < 1.25, ratios


def test_compensation_leaves_a_share_of_the_error_and_more_of_it_at_one_bit() -> None:
    tensor = convert(network(), rule_recipe("fisher", None)).tensors[0]
    plain, compensated = (FisherEstimate([tensor], 4, {tensor.name: 2.0}) for _ in range(2))
    compensated.error_share = {tensor.name: 0.25, "another": 0.1}
    costs = {AS_IT_IS: 9, 1: 10, 2: 20, 4: 40}
    before, after = (
        bit_options(tensor, costs, fisher, error_as_it_is=3.0).loss_increase
        for fisher in (plain, compensated)
    )
    shares = {AS_IT_IS: 0.25, 1: 0.5, 2: 0.25, 4: 0.25}
    assert after == pytest.approx({s: shares[s] * before[s] for s in costs})
    assert before[AS_IT_IS] == pytest.approx(4 * 2.0 / 2 * 3.0)
