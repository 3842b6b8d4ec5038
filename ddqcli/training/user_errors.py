"""Errors that the user's network or loss raises, in one sentence with a remedy."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

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
        if isinstance(error, IndexError) and (fault := _embedding_fault(error)):
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


def _embedding_fault(error: IndexError) -> str | None:
    """Return a sentence if an index beyond an embedding raised the error, with the layer's name."""
    outer: nn.Module | None = None
    for frame, _ in traceback.walk_tb(error.__traceback__):
        module = frame.f_locals.get("self")
        if isinstance(module, nn.Module):
            outer = outer or module
            if isinstance(module, nn.Embedding):
                name = next((n for n, m in outer.named_modules() if m is module), "")
                count = module.num_embeddings
                return (
                    f"an index in the inputs lies beyond the {count:,} embeddings of "
                    f"{name or 'the network'}; give indices from 0 to {count - 1}."
                )
    return None
