"""Errors of the user's network name the layer at fault where they can."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ddqcli.errors import UsageError
from ddqcli.recipe.schema import Recipe
from ddqcli.training.user_errors import explain_user_errors


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Identity(), nn.Embedding(20, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.body(x)
        return out


@pytest.mark.parametrize("index", [20, -1])
def test_an_index_beyond_an_embedding_names_the_layer(index: int) -> None:
    message = r"^It fails: an index .* 20 embeddings of body\.1; give indices from 0 to 19\.$"
    with (
        pytest.raises(UsageError, match=message),
        explain_user_errors("It fails", UsageError, Recipe()),
    ):
        Net()(torch.tensor([[0, index]]))


def test_other_errors_of_an_index_keep_their_message() -> None:
    with (
        pytest.raises(UsageError, match=r"^It fails: IndexError: list index out of range; `ddq "),
        explain_user_errors("It fails", UsageError, Recipe()),
    ):
        [][0]
