"""Errors that the user's network or loss raises, in one sentence with a remedy."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

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
