"""Trees of tensors: any nesting is looked into, kept, and passed on to a network."""

from __future__ import annotations

from collections import OrderedDict, UserDict
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.data import default_collate

from ddqcli.data.trees import (
    all_finite,
    as_float32,
    call,
    concatenated,
    input_names,
    is_plain,
    map_tensors,
    plain_arguments,
    shared_length,
    sliced,
    stacked,
    tensor_names,
    tensors,
    with_tensors,
)


class Pair(NamedTuple):
    first: Any
    second: Any


@dataclass(frozen=True)
class Record:
    image: Any
    name: str = "x"


class OwnDict(dict):
    pass


X, Y = torch.arange(6.0).reshape(3, 2), torch.arange(3)
TREES = {
    "tensor": X,
    "tuple": (X, Y),
    "list": [X, [Y]],
    "dict": {"x": X, "y": {"z": Y}},
    "ordered": OrderedDict(b=X, a=Y),
    "subclass of dict": OwnDict(x=X),
    "mapping": UserDict({"x": X, "y": Y}),
    "named tuple": Pair(X, (Y, None)),
    "dataclass": [Record(X), Record(Record(Y))],
}


@pytest.mark.parametrize("name", TREES)
def test_every_tensor_is_found_and_its_place_kept(name: str) -> None:
    tree = TREES[name]
    doubled = map_tensors(lambda x: 2 * x, tree)
    assert type(doubled) is type(tree)
    assert [x.tolist() for x in tensors(doubled)] == [(2 * x).tolist() for x in tensors(tree)]
    assert len(tensors(tree)) == len(repr(tree).split("tensor(")) - 1  # found independently
    assert shared_length(tree) == 3
    first = sliced(tree, torch.tensor([0]))
    assert shared_length(first) == 1
    again = concatenated([first, sliced(tree, slice(1, 3))])
    assert all(map(torch.equal, tensors(again), tensors(tree)))


def test_what_is_no_tensor_stays() -> None:
    tree = {"name": "a", "value": 3, "none": None, "x": X}
    assert {**map_tensors(torch.zeros_like, tree), "x": 0} == {**tree, "x": 0}
    record = map_tensors(lambda x: x + 1, Record(X, "kept"))
    assert record.name == "kept"
    assert torch.equal(record.image, X + 1)


def test_lengths_that_differ_are_no_number_of_samples() -> None:
    assert shared_length((X, torch.zeros(2))) is None
    assert shared_length((X, torch.tensor(1.0))) == 3
    assert shared_length("no tensor") is None


def test_floats_alone_are_converted_and_checked() -> None:
    half = as_float32({"a": X.bfloat16(), "b": Y})
    assert (half["a"].dtype, half["b"].dtype) == (torch.float32, torch.int64)
    assert all_finite((X, Y))
    assert not all_finite([Y, {"a": X / 0}])


def test_names_tell_the_place_of_each_tensor() -> None:
    names = {name: tensor_names(tree, "input") for name, tree in TREES.items()}
    assert names == {
        "tensor": ["input"],
        "tuple": ["input_0", "input_1"],
        "list": ["input_0", "input_1_0"],
        "dict": ["x", "y_z"],
        "ordered": ["b", "a"],
        "subclass of dict": ["x"],
        "mapping": ["x", "y"],
        "named tuple": ["first", "second_0"],
        "dataclass": ["input_0_image", "input_1_image_image"],
    }


def test_values_take_the_place_of_tensors() -> None:
    replaced = with_tensors({"a": X, "n": 3, "b": (Y,)}, [torch.zeros(1), torch.ones(2)])
    assert (replaced["a"].tolist(), replaced["n"], replaced["b"][0].tolist()) == ([0], 3, [1, 1])


@pytest.mark.parametrize("name", TREES)
def test_plain_trees_are_those_that_a_safe_file_gives_back(name: str, tmp_path: Any) -> None:
    torch.save(TREES[name], tmp_path / "tree.pt")
    if is_plain(TREES[name]):
        loaded = torch.load(tmp_path / "tree.pt", weights_only=True)
        assert all(map(torch.equal, tensors(loaded), tensors(TREES[name])))
    else:
        assert name in ("ordered", "subclass of dict", "mapping", "named tuple", "dataclass")


class Adds(nn.Module):
    def forward(self, x: Tensor, y: Tensor | float = 0.0, *, scale: float = 1.0) -> Tensor:
        return scale * (x + y)


@pytest.mark.parametrize(
    ("inputs", "factor"),
    [
        (X, 1),
        ((X,), 1),
        ([X, X], 2),
        (Pair(X, X), 2),
        ({"x": X, "scale": 3.0}, 3),
        (UserDict({"x": X, "y": X}), 2),
    ],
)
def test_a_network_gets_one_tensor_several_or_named_ones(inputs: Any, factor: float) -> None:
    assert torch.equal(call(Adds(), inputs), factor * X)


@pytest.mark.parametrize("name", TREES)
def test_plain_arguments_reach_a_network_alike_under_the_same_names(name: str) -> None:
    class Takes(nn.Module):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return args, kwargs

    tree = TREES[name]
    plain = plain_arguments(tree)
    assert str(call(Takes(), plain)) == str(call(Takes(), tree))
    assert input_names(plain) == input_names(tree)
    assert type(plain) in (Tensor, tuple, dict)


SAMPLES = {
    "pair": (torch.ones(2), 3),
    "mapping": {"x": torch.ones(2), "path": "a.png", "n": [1, 2.5], "empty": []},
    "named tuple": Pair(np.ones(2, np.float32), (torch.ones(()), True)),
}


@pytest.mark.parametrize("name", SAMPLES)
def test_samples_are_stacked_as_torch_does(name: str) -> None:
    ours, theirs = (collate([SAMPLES[name]] * 3) for collate in (stacked, default_collate))
    leaves = zip(tree_leaves(ours), tree_leaves(theirs), strict=True)
    assert all(torch.equal(a, b) if isinstance(a, Tensor) else a == b for a, b in leaves)


def test_samples_with_none_and_of_dataclasses_are_stacked_too() -> None:
    batch = stacked([(Record(torch.tensor(k)), {"a": None, "b": k}) for k in range(3)])
    assert batch[0].image.tolist() == [0, 1, 2]
    assert batch[1]["a"] is None
    assert batch[1]["b"].tolist() == [0, 1, 2]
    by_key = stacked([{"a": 1, "b": 2}, {"b": 20, "a": 10}])
    assert {key: value.tolist() for key, value in by_key.items()} == {"a": [1, 10], "b": [2, 20]}


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        ([{"x": X}, {"x": X, "y": Y}], r"one is {'x': 'Tensor'}, another {.*'y': 'Tensor'}"),
        ([(X, None), (X, 1)], "None in some of them alone"),
        ([(1, X), (None, X)], "None in some of them alone"),
        ([[X], [X, X]], "one is"),
    ],
)
def test_samples_that_do_not_fit_together_are_named(samples: list[Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        stacked(samples)


def test_of_an_output_with_logits_those_count() -> None:
    class Both(nn.Module):
        def forward(self, x: Tensor) -> Any:
            return Result(x, 2 * x)

    class Result(NamedTuple):
        logits: Tensor
        aux: Tensor

    assert torch.equal(call(Both(), X), X)
