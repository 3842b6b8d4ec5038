"""Cross-entropy and top-1 accuracy, and outputs that do not fit the labels."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ddqcli.data.classification import classification
from ddqcli.errors import DataError


def test_default_loss_and_metric():
    loss, metric = classification(3, exact=True)
    output, target = torch.tensor([[2.0, 0.0, 1.0], [0.0, 1.0, 3.0]]), torch.tensor([0, 1])
    expected = -np.mean(
        [2 - np.log(np.exp([2.0, 0, 1]).sum()), 1 - np.log(np.exp([0.0, 1, 3]).sum())]
    )
    assert loss(output, target).item() == pytest.approx(expected, rel=1e-6)
    assert metric(output, target).tolist() == [1.0, 0.0]


@pytest.mark.parametrize(
    ("count", "exact", "output", "target", "message"),
    [
        (
            10,
            True,
            torch.zeros(2, 1000),
            torch.zeros(2).long(),
            "gives 1000 scores but the data have 10 classes",
        ),
        (
            10,
            False,
            torch.zeros(2, 9),
            torch.zeros(2).long(),
            "gives 9 scores but the data have 10 classes",
        ),
        (
            None,
            False,
            torch.zeros(2, 9),
            torch.tensor([0, 9]),
            "A label lies beyond the model's 9 scores",
        ),
        (
            None,
            False,
            torch.zeros(2, 9, 4),
            torch.zeros(2).long(),
            r"of shape \[2, 9, 4\], not scores",
        ),
        (None, False, (torch.zeros(2, 9),), torch.zeros(2).long(), "a tuple, not scores"),
        (None, False, torch.zeros(2, 9), torch.zeros(2), "not whole numbers"),
    ],
)
def test_outputs_that_do_not_fit_the_data(count, exact, output, target, message):
    loss, _ = classification(count, exact=exact)
    with pytest.raises(DataError, match=message):
        loss(output, target)


@pytest.mark.parametrize("label", [-1, 4, 9])
def test_a_label_that_is_no_index_of_the_scores_is_named_by_loss_and_metric(label):
    for judge in classification(None, exact=False):
        with pytest.raises(DataError, match=f"model's 4 scores: {label}; give labels from 0 to 3,"):
            judge(torch.zeros(3, 4), torch.tensor([0, label, 3]))


def test_beside_a_loss_of_their_own_labels_without_score_count_as_errors():
    _, metric = classification(None, exact=False, own_loss=True)
    assert metric(torch.eye(4)[:2], torch.tensor([0, 255])).tolist() == [1, 0]


def test_labels_that_cross_entropy_ignores_count_as_errors_of_the_metric():
    _, metric = classification(None, exact=False)
    assert metric(torch.eye(4)[:2], torch.tensor([0, -100])).tolist() == [1, 0]


def test_more_scores_than_labels_are_allowed_where_class_names_are_unknown():
    loss, _ = classification(10, exact=False)
    assert loss(torch.zeros(2, 1000), torch.zeros(2).long()).item() == pytest.approx(
        np.log(1000), rel=1e-6
    )
