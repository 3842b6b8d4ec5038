"""Data-parallel training: collectives that are no-ops in a single process.

`torchrun` starts one process (rank) per device. Every rank holds the whole model and a shard of
each batch. DistributedDataParallel averages the gradients, so weights, levels and gates change
identically on all ranks. Rank 0 alone makes decisions, writes files and prints.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ddqcli.data.batches import WHOLE, Shard
from ddqcli.data.fingerprint import sha256_of_tensors
from ddqcli.errors import DDQError, UsageError

_TORCHRUN = ("RANK", "MASTER_ADDR", "MASTER_PORT")  # which it sets beside WORLD_SIZE

_PATIENCE = timedelta(minutes=30)  # a process that does not answer for so long is taken for dead

# gloo and NCCL have no exception class for this.
_LOST_PEER_MESSAGES = (
    "closed by peer",
    "reset by peer",
    "remote process exit",
    "Timed out waiting",
    "collective operation timeout",
    "timeout caused pair closure",
)


# ---- ranks and devices


def shard() -> Shard:
    """Return this process's rank and the world size, read from torchrun's environment.

    Other launchers set some of its variables, too: without a world size above 1, there is one
    process. Raises UsageError if there are several and torchrun's variables are incomplete.
    """
    if os.environ.get("WORLD_SIZE", "1") == "1":
        return WHOLE
    missing = [name for name in _TORCHRUN if name not in os.environ]
    rank, world_size = os.environ.get("RANK", ""), os.environ["WORLD_SIZE"]
    if not missing and rank.isdecimal() and world_size.isdecimal() and int(rank) < int(world_size):
        return Shard(int(rank), int(world_size))
    fault = f"{' and '.join(missing)} missing" if missing else f"RANK={rank} is no rank in it"
    raise UsageError(
        f"WORLD_SIZE={world_size} asks for several processes, but {fault}; start them with "
        "torchrun, or unset WORLD_SIZE."
    )


def is_main() -> bool:
    """True on rank 0, which writes and reports."""
    return shard().rank == 0


def local_device(device: torch.device) -> torch.device:
    """Return this rank's own device: `cuda:LOCAL_RANK` for CUDA, else `device`."""
    if device.type != "cuda" or shard().count == 1:
        return device
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


@contextmanager
def process_group(device: torch.device) -> Iterator[None]:
    """Hold the default process group open: NCCL for CUDA, gloo otherwise. May be nested.

    Raises DDQError if the other processes do not come. None waits for another for ever.
    """
    if shard().count == 1 or dist.is_initialized():
        yield
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    try:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=_PATIENCE)
    except dist.DistError as error:
        place = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise DDQError(
            f"The {shard().count} processes of this run did not meet at {place}: {error} Start all "
            "of them with torchrun, or unset WORLD_SIZE."
        ) from error
    try:
        yield
    finally:
        dist.destroy_process_group()


def data_parallel(model: nn.Module) -> nn.Module:
    """Wrap the model in DistributedDataParallel. Returns it unchanged in a single process."""
    if shard().count == 1:
        return model
    # The mismatch costs only a copy of small tensors.
    warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")
    return DistributedDataParallel(model, find_unused_parameters=True)


# ---- collectives: every rank must call them, in the same order


def broadcast(value: Any) -> Any:
    """Return rank 0's value on every rank. For picklable objects and CPU tensors."""
    if shard().count == 1:
        return value
    objects = [value if is_main() else None]
    dist.broadcast_object_list(objects)
    return objects[0]


def barrier() -> None:
    """Wait until every rank is here. Files that rank 0 wrote before can then be read."""
    if shard().count > 1:
        dist.barrier()


def any_rank(flag: bool, sync: bool) -> bool:
    """True on every rank if true on any rank.

    Ranks communicate only where `sync` is true, which must be the same on all of them; elsewhere
    False. A single process returns its flag at once.
    """
    if shard().count == 1:
        return flag
    return sync and bool(sum_ranks(torch.tensor(float(flag))))


def sum_ranks(value: Tensor) -> Tensor:
    """Return the sum over all ranks. The tensor may be reduced in place."""
    if shard().count > 1:
        value = value.to("cuda" if dist.get_backend() == "nccl" else "cpu")
        dist.all_reduce(value)
    return value


def mean_ranks(value: Tensor) -> Tensor:
    """Return the mean of a tensor over all ranks."""
    return value if shard().count == 1 else sum_ranks(value.clone()) / shard().count


# ---- failures


def is_lost_peer(error: BaseException) -> bool:
    """True if `error` is gloo's or NCCL's report that another rank has died or is silent."""
    return (
        shard().count > 1
        and isinstance(error, RuntimeError)
        and any(message in str(error) for message in _LOST_PEER_MESSAGES)
    )


def check_same(facts: Mapping[str, str]) -> None:
    """Raise UsageError, naming fact and ranks, if one that several ranks have is not the same."""
    if shard().count == 1:
        return
    found: list[Any] = [None] * shard().count
    dist.all_gather_object(found, dict(facts))
    for what, fact in found[0].items():
        others = [str(rank) for rank, theirs in enumerate(found) if theirs.get(what, fact) != fact]
        if others:
            raise UsageError(
                f"The processes of this run have different {what}: rank {', '.join(others)} "
                f"differs from rank 0; give all of them the same {what}."
            )


def check_identical(tensors: Iterable[Tensor], what: str) -> None:
    """Raise DDQError if the tensors are not bit-identical on all ranks."""
    if shard().count == 1:
        return
    digests: list[Any] = [None] * shard().count
    dist.all_gather_object(digests, sha256_of_tensors(tensors))
    if len(set(digests)) > 1:
        raise DDQError(
            f"{what} differ between the processes; this run cannot continue. Resume it from its "
            "last state."
        )
