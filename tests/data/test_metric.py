"""A user's own metric: name, unit, direction, and the scores that it may return."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ddqcli.data.distance import sample_differences
from ddqcli.data.metric import own_metric, own_metrics
from ddqcli.errors import DataError
from ddqcli.runs.evaluation import Accuracy, Metric


def score(output: Any, target: Any) -> torch.Tensor:
    return output[:, 0]


def test_a_function_alone_is_an_accuracy_and_its_scores_are_shares() -> None:
    function, metric = own_metric(score, "data.py:f")
    assert metric == Metric(name="accuracy", unit="%", better="higher")
    assert function(torch.tensor([[0.25], [1.0]]), None).tolist() == [0.25, 1.0]
    with pytest.raises(DataError, match=r"scores from 0.5 to 31, and an accuracy is a share.*PSNR"):
        function(torch.tensor([[0.5], [31.0]]), None)


def test_a_mapping_names_what_is_measured() -> None:
    given = {"name": "PSNR", "unit": "dB", "function": score}
    function, metric = own_metric(given, "f")
    assert metric == Metric(name="PSNR", unit="dB", better="higher")
    assert function(torch.tensor([[31.0]]), None).tolist() == [31.0]
    _, metric = own_metric({"name": "loss", "better": "lower", "function": score}, "f")
    assert metric == Metric(name="loss", unit="", better="lower")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (3, "no function"),
        ({"name": "PSNR"}, "no function"),
        ({"function": score}, "holds function; give it a name"),
        ({"name": "a", "better": "more", "function": score}, 'direction \\("higher" or "lower"\\)'),
        ({"name": "a", "units": "dB", "function": score}, "holds name, units, function"),
    ],
)
def test_faulty_metrics_are_refused(given: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        own_metric(given, "data.py:f")


def test_of_several_metrics_the_first_decides_and_names_are_distinct() -> None:
    psnr = {"name": "PSNR", "unit": "dB", "function": score}
    loss = {"name": "loss", "better": "lower", "function": score}
    assert [m.name for _, m in own_metrics([psnr, loss, score], "f")] == [
        "PSNR", "loss", "accuracy",
    ]  # fmt: skip
    assert [m.name for _, m in own_metrics(psnr, "f")] == ["PSNR"]
    for faulty in ([], [psnr, psnr], [score, score]):
        with pytest.raises(DataError, match="give at least one, and each a name of its own"):
            own_metrics(faulty, "f")


@pytest.mark.parametrize("returned", [torch.tensor(0.5), 0.5, torch.zeros(2, 2)])
def test_scores_are_one_for_each_sample(returned: Any) -> None:
    function, _ = own_metric(lambda output, target: returned, "data.py:f")
    with pytest.raises(DataError, match="4 scores are needed, one a sample"):
        function(torch.zeros(4, 2), {"class": torch.zeros(4)})


def test_values_and_differences_in_the_unit_of_the_metric() -> None:
    accuracy, psnr = Metric(), Metric(name="PSNR", unit="dB")
    error = Metric(name="error", unit="", better="lower")
    assert [accuracy.text(91.25), accuracy.text(91.25, " ")] == ["91.25%", "91.25 %"]
    assert [psnr.text(31.6423), error.text(0.0312)] == ["31.642 dB", "0.0312"]
    assert accuracy.change(92.5, 91.25) == "-1.25 points"
    assert psnr.change(31, 31.5) == "+0.5 dB"
    assert [accuracy.drop(90, 89), error.drop(0.25, 0.5)] == [1, 0.25]
    assert [m.label for m in (accuracy, psnr, error)] == ["accuracy, %", "PSNR, dB", "error"]
    assert Accuracy.of(0.25, 0.5, error) == Accuracy(float=0.25, quantized=0.5, drop=0.25)
    assert Accuracy.of(1e-7, 2e-7, error).quantized == 2e-7
    assert [m.scale for m in (accuracy, psnr)] == [100, 1]


def test_the_distance_of_outputs_is_the_largest_of_their_tensors() -> None:
    """Against float64 sums in numpy's order."""
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(3, 4, generator=generator) for _ in range(2))
    c = torch.tensor([1.0, 2.0, 3.0])
    moved = c + torch.tensor([0.0, 0.0, 5.0])
    first = [
        (sum((x - y) ** 2 for x, y in zip(p, q, strict=True)) / 4) ** 0.5
        for p, q in zip(a.double().tolist(), b.double().tolist(), strict=True)
    ]
    size = (sum(x * x for x in b.double().flatten().tolist()) / 12) ** 0.5
    second = [0.0, 0.0, 5 / (14 / 3) ** 0.5]
    expected = [max(f / size, s) for f, s in zip(first, second, strict=True)]
    found = sample_differences({"a": a, "c": moved}, {"a": b, "c": c})
    assert found.tolist() == pytest.approx(expected)
    assert sample_differences(c, c).tolist() == [0, 0, 0]
    number = torch.tensor(2.0)  # without axes, as a mean over the batch
    assert sample_differences((c, number), (c, number)).tolist() == [0, 0, 0]
    assert sample_differences((c, 1.5 * number), (c, number)).tolist() == [0.5, 0.5, 0.5]
    assert sample_differences(1.5 * number, number).tolist() == [0.5]
    assert sample_differences(torch.zeros(2, 3), torch.zeros(2, 3)).tolist() == [0, 0]
    assert sample_differences(c, b).tolist() == [torch.inf]
    assert sample_differences((c,), (c, c)).tolist() == [torch.inf]
