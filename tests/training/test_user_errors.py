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


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Linear(3, 2), (4, 3)),
        (nn.Conv2d(3, 2, 1, bias=False), (4, 3, 5, 5)),
        (nn.GRU(3, 2), (4, 3)),
        (nn.MultiheadAttention(3, 1), (4, 3)),
    ],
)
@pytest.mark.parametrize("dtype", ["float64", "float16", "uint8"])
def test_an_input_of_another_type_than_the_weights_names_the_layer(
    layer: nn.Module, shape: tuple[int, ...], dtype: str
) -> None:
    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.Identity(), layer)

        def forward(self, x: torch.Tensor) -> None:
            x = self.body[0](x)
            self.body[1](*[x] * 3) if isinstance(layer, nn.MultiheadAttention) else self.body[1](x)

    x = torch.zeros(shape, dtype=getattr(torch, dtype))
    message = rf"^It fails: the input of body\.1.* is {dtype}, and its weights are float32; give"
    with (
        pytest.raises(UsageError, match=message),
        explain_user_errors("It fails", UsageError, Recipe()),
    ):
        Wrapped()(x)


def test_other_errors_of_an_index_keep_their_message() -> None:
    with (
        pytest.raises(UsageError, match=r"^It fails: IndexError: list index out of range; `ddq "),
        explain_user_errors("It fails", UsageError, Recipe()),
    ):
        [][0]


@pytest.mark.parametrize("inputs", [{"image": 1}, {"x": 1, "path": "a.png"}, {}])
def test_inputs_that_are_not_the_arguments_say_what_a_sample_is(inputs: dict[str, object]) -> None:
    message = r"forward\(\) .*; a sample is \(inputs, targets\), .* give exactly those\.$"
    with (
        pytest.raises(UsageError, match=message),
        explain_user_errors("It fails", UsageError, Recipe()),
    ):
        Net()(**inputs)
