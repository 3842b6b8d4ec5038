"""Errors that the user's network or loss raises, in one sentence with a remedy."""

from __future__ import annotations

import re
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ddqcli.errors import DDQError
from ddqcli.recipe.schema import Recipe
from ddqcli.training import distributed

_MESSAGE_LIMIT = 300  # characters


@contextmanager
def explain_user_errors(what: str, kind: type[DDQError], recipe: Recipe) -> Iterator[None]:
    """Raise any error in the block as a `kind` whose message begins with `what`.

    A DDQError and a lost peer pass unchanged. Out of memory becomes a DDQError that names
    data.batch_size.
    """
    try:
        yield
    except DDQError:
        raise
    except (Exception, SystemExit) as error:
        if distributed.is_lost_peer(error):
            raise
        if fault := _embedding_fault(error) or _dtype_fault(error) or _argument_fault(error):
            raise kind(f"{what}: {fault}") from error
        message = " ".join(str(error).split())[:_MESSAGE_LIMIT]
        out_of_memory = isinstance(error, (torch.OutOfMemoryError, MemoryError))
        if out_of_memory or "allocate memory" in message:
            raise DDQError(
                f"{what}: out of memory; try a smaller --set data.batch_size "
                f"(now {recipe.data.batch_size})."
            ) from error
        raise kind(
            f"{what}: {type(error).__name__}: {message}; `ddq --debug ...` shows where."
        ) from error


def _embedding_fault(error: BaseException) -> str | None:
    """Return a sentence if an index beyond an embedding raised the error, with the layer's name."""
    if not isinstance(error, IndexError):
        return None
    for name, module, _ in _module_frames(error):
        if isinstance(module, nn.Embedding):
            count = module.num_embeddings
            return (
                f"an index in the inputs lies beyond the {count:,} embeddings of "
                f"{name or 'the network'}; give indices from 0 to {count - 1}."
            )
    return None


def _argument_fault(error: BaseException) -> str | None:
    """Return a sentence if the inputs are not the arguments of the network's forward."""
    wrong = re.search(r"forward\(\) (got an unexpected|missing|takes|got multiple)", str(error))
    if not isinstance(error, TypeError) or not wrong:
        return None
    return (
        f"{error}; a sample is (inputs, targets), where a tuple of inputs is the arguments of the "
        "network, and a mapping is its named arguments: give exactly those."
    )


def _dtype_fault(error: BaseException) -> str | None:
    """Return a sentence if a layer got an input of another type than its weights, as of NumPy."""
    if "type" not in str(error):
        return None
    for name, module, values in reversed(list(_module_frames(error))):
        weights = [p for p in module.parameters(recurse=False) if p.is_floating_point()]
        inputs = [v for v in values if isinstance(v, Tensor) and not isinstance(v, nn.Parameter)]
        if isinstance(module, nn.Embedding) or not weights or not inputs:
            continue
        given, needed = (str(x.dtype).removeprefix("torch.") for x in (inputs[0], weights[0]))
        if given != needed:
            return (
                f"the input of {name or 'the network'} is {given}, and its weights are {needed}; "
                f"give the data as {needed}, by x.float()."
            )
    return None


def _module_frames(error: BaseException) -> Iterator[tuple[str, nn.Module, list[Any]]]:
    """Yield name, module and local values of each forward that the error passed, outermost first.

    Names are those within the outermost module.
    """
    outer: nn.Module | None = None
    for frame, _ in traceback.walk_tb(error.__traceback__):
        module = frame.f_locals.get("self")
        if isinstance(module, nn.Module):
            outer = outer or module
            name = next((n for n, m in outer.named_modules() if m is module), "")
            yield name, module, list(frame.f_locals.values())
