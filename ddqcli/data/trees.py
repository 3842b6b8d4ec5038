"""Trees of tensors: what a network takes, gives and is judged by, in any nesting.

A tree is a tensor, or a tuple, list, mapping, named tuple or dataclass of trees, as PyTorch's
pytree has them. Leaves that are no tensors pass through unchanged.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils.data import default_collate

Tree = Any


def tensors(tree: Tree) -> list[Tensor]:
    """Return the tensors of a tree in their order."""
    return [leaf for leaf in _leaves(tree) if isinstance(leaf, Tensor)]


def tensor_names(tree: Tree, name: str) -> list[str]:
    """Return a name for each tensor of a tree, by its place.

    It is `name` for a tensor alone, `name_0` in a tuple or list, and the key in a mapping.
    """
    _leaves(tree)
    names = []
    for path, leaf in pytree.tree_flatten_with_path(tree)[0]:
        if isinstance(leaf, Tensor):
            keys = [_key_text(key) for key in path]
            in_mapping = bool(path) and not isinstance(path[0], pytree.SequenceKey)
            names.append("_".join(keys if in_mapping else [name, *keys]))
    return names


def input_names(inputs: Tree) -> list[str]:
    """Return a name for each tensor of a network's inputs, whichever of their forms it is."""
    return tensor_names(plain_arguments(inputs), "input")


def map_tensors(function: Callable[..., Any], tree: Tree, *others: Tree) -> Tree:
    """Return the tree with `function` of each tensor in its place.

    `function` also gets the tensors of `others`, trees of the same structure. Raises ValueError if
    a structure differs.
    """
    for each in (tree, *others):
        _leaves(each)  # which makes new types known

    def mapped(leaf: Any, *leaves: Any) -> Any:
        return function(leaf, *leaves) if isinstance(leaf, Tensor) else leaf

    return pytree.tree_map(mapped, tree, *others)


def with_tensors(tree: Tree, values: Sequence[Tensor]) -> Tree:
    """Return the tree with these values, in their order, in place of its tensors."""
    replacements = iter(values)
    return map_tensors(lambda x: next(replacements).to(x.device), tree)


def copied(tree: Tree) -> Tree:
    """Return the tree with a copy of each tensor: a network may change its input in place."""
    return map_tensors(torch.clone, tree)


def as_float32(tree: Tree) -> Tree:
    """Return the tree with its floating-point tensors in float32."""
    return map_tensors(lambda x: x.float() if x.is_floating_point() else x, tree)


def concatenated(trees: Sequence[Tree]) -> Tree:
    """Return trees of one structure as one, their tensors concatenated along the first axis."""
    return map_tensors(lambda *parts: torch.cat(parts) if parts[0].ndim else parts[0], *trees)


def stacked(samples: Sequence[Tree]) -> Tree:
    """Return the trees of single samples as one of a batch, as default_collate does.

    None stays None, and dataclasses are stacked too. Raises ValueError or TypeError for samples
    that do not fit together.
    """
    for sample in samples:
        _leaves(sample)  # which makes new types known
    _, structure = pytree.tree_flatten(samples[0])
    rows = []
    for sample in samples:
        try:
            rows.append(structure.flatten_up_to(sample))
        except ValueError as error:
            message = f"one is {_outline(samples[0])}, another {_outline(sample)}"
            raise ValueError(message) from error
    columns = zip(*rows, strict=True)
    return pytree.tree_unflatten([_stacked_leaves(list(each)) for each in columns], structure)


def _stacked_leaves(leaves: list[Any]) -> Any:
    missing = [leaf is None for leaf in leaves]
    if all(missing):
        return None
    if any(missing):
        raise ValueError("a value is None in some of them alone")
    return default_collate(leaves)


def _outline(tree: Tree) -> str:
    """Return the kinds of a tree's values, for an error message."""
    return " ".join(str(pytree.tree_map(lambda leaf: type(leaf).__name__, tree)).split())[:150]


def shared_length(tree: Tree) -> int | None:
    """Return the length that the first axis of all tensors has; None if it differs.

    Tensors without axes do not count.
    """
    lengths = {len(tensor) for tensor in tensors(tree) if tensor.ndim}
    return lengths.pop() if len(lengths) == 1 else None


def has_numbers(tree: Tree) -> bool:
    """True if a leaf is a number, or a tensor without axes."""
    return any(
        not leaf.ndim if isinstance(leaf, Tensor) else isinstance(leaf, (int, float))
        for leaf in _leaves(tree)
    )


def sliced(tree: Tree, index: Any) -> Tree:
    """Return the tree with the samples at `index`, along the first axis of each tensor."""
    return map_tensors(lambda x: x[index] if x.ndim else x, tree)


def all_finite(tree: Tree) -> bool:
    """True if no floating-point tensor holds NaN or infinite values."""
    return all(bool(x.isfinite().all()) for x in tensors(tree) if x.is_floating_point())


def is_plain(tree: Tree) -> bool:
    """True if plain tuples, lists and dictionaries hold the tree, which any file can store."""
    if type(tree) in (tuple, list, dict):
        children = tree.values() if isinstance(tree, dict) else tree
        return all(map(is_plain, children))
    return isinstance(tree, (Tensor, bool, int, float, str, type(None)))


def arguments(inputs: Tree) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the positional and keyword arguments that a network gets.

    A tuple or list is several arguments, a mapping named ones; anything else is one.
    """
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    return (tuple(inputs) if isinstance(inputs, (tuple, list)) else (inputs,)), {}


def plain_arguments(inputs: Tree) -> Tree:
    """Return inputs that reach a network as these do, in a plain tuple or dictionary."""
    positional, named = arguments(inputs)
    return named or (positional if isinstance(inputs, (tuple, list)) else inputs)


def call(model: nn.Module, inputs: Tree) -> Tree:
    """Return the answer of a network: of `model(x)`, `model(*xs)` or `model(**mapping)`."""
    positional, named = arguments(inputs)
    return answer(model(*positional, **named))


def answer(output: Tree) -> Tree:
    """Return what loss and metric get of a network's output: all, or its `logits` if it has them.

    GoogLeNet and Inception give more in train mode, Hugging Face's networks always.
    """
    return output.logits if hasattr(output, "logits") else output


def take_tensors_alone(model: nn.Module, example: Tree) -> None:
    """Let the forward take and give tensors, as a graph does, and no trees such as `example`."""
    forward = model.forward

    def flat(*values: Tensor) -> list[Tensor]:
        positional, named = arguments(with_tensors(example, values))
        return tensors(answer(forward(*positional, **named)))

    model.forward = flat


def _key_text(key: Any) -> str:
    """Return an index, a mapping's key or a field's name, as a tree's paths have them."""
    return str(next(getattr(key, a) for a in ("idx", "key", "name") if hasattr(key, a)))


def _leaves(tree: Tree) -> list[Any]:
    """Return the leaves of a tree, after its dataclasses and mappings are known to pytree."""
    leaves = pytree.tree_leaves(tree)
    new = {type(leaf) for leaf in leaves if _is_container(leaf)}
    for kind in new:
        _register(kind)
    return _leaves(tree) if new else leaves


def _is_container(leaf: Any) -> bool:
    is_record = dataclasses.is_dataclass(leaf) and not isinstance(leaf, type)
    return is_record or isinstance(leaf, Mapping)


def _register(kind: type[Any]) -> None:
    """Let pytree look into instances of `kind`, a dataclass or a mapping."""

    def flatten(value: Any) -> tuple[list[Any], list[Any]]:
        if isinstance(value, Mapping):
            return list(value.values()), list(value)
        names = [field.name for field in dataclasses.fields(value)]
        return [getattr(value, name) for name in names], names

    def unflatten(values: Any, names: list[Any]) -> Any:
        items = dict(zip(names, values, strict=True))
        if issubclass(kind, Mapping):
            return kind(items)  # type: ignore[call-arg]
        value = object.__new__(kind)  # its __init__ may compute what is already there
        for name, item in items.items():
            object.__setattr__(value, name, item)
        return value

    def flatten_with_keys(value: Any) -> tuple[list[tuple[Any, Any]], list[Any]]:
        values, names = flatten(value)
        return [(pytree.MappingKey(n), v) for n, v in zip(names, values, strict=True)], names

    pytree.register_pytree_node(kind, flatten, unflatten, flatten_with_keys_fn=flatten_with_keys)
