"""More than one device: `torchrun` starts the processes, and this is all that sets them apart from a single one.

Every process holds the whole model and a shard of each batch; DDP averages the gradients, so weights, levels and gates move alike
everywhere. What only one process may decide or write, process 0 does.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ddqcli.data.batches import WHOLE, Shard
from ddqcli.data.fingerprint import sha256_of_tensors
from ddqcli.errors import DDQError

_LOST = ("closed by peer", "reset by peer", "remote process exit")


def shard() -> Shard:
    """This process's rank and the number of processes, as torchrun says; (0, 1) without it."""
    count = int(os.environ.get("WORLD_SIZE", "1"))
    return Shard(int(os.environ["RANK"]), count) if count > 1 else WHOLE


def is_main() -> bool:
    """Whether this process is the one that writes and reports."""
    return shard().rank == 0


def local_device(device: torch.device) -> torch.device:
    """This process's own device of that kind."""
    if device.type != "cuda" or shard().count == 1:
        return device
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


@contextmanager
def process_group(device: torch.device) -> Iterator[None]:
    """Within: the processes can talk to each other, over NCCL for CUDA devices and gloo otherwise."""
    if shard().count == 1 or dist.is_initialized():
        yield
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield
    finally:
        dist.destroy_process_group()


def data_parallel(model: nn.Module) -> nn.Module:
    """The model with its gradients averaged over all processes; itself where there is but one."""
    if shard().count == 1:
        return model
    warnings.filterwarnings(
        "ignore", "Grad strides do not match bucket view strides"
    )  # costs a copy of small tensors
    return DistributedDataParallel(model, find_unused_parameters=True)


def broadcast(value: Any) -> Any:
    """Process 0's value, in every process; plain objects and tensors on the CPU."""
    if shard().count == 1:
        return value
    box = [value if is_main() else None]
    dist.broadcast_object_list(box)
    return box[0]


def barrier() -> None:
    """Until all processes are here: what process 0 wrote can then be read."""
    if shard().count > 1:
        dist.barrier()


def any_rank(wish: bool, now: bool) -> bool:
    """Whether any process wishes it. Asked where `now` is true only; a single process needs to ask nobody."""
    if shard().count == 1:
        return wish
    return now and bool(sum_ranks(torch.tensor(float(wish))))


def sum_ranks(value: Tensor) -> Tensor:
    """The sum of a tensor over all processes."""
    if shard().count > 1:
        device = "cuda" if dist.get_backend() == "nccl" else "cpu"
        value = value.to(device)
        dist.all_reduce(value)
    return value


def mean_ranks(value: float) -> float:
    """The mean of a number over all processes."""
    return value if shard().count == 1 else float(sum_ranks(torch.tensor(value))) / shard().count


def is_lost_peer(error: BaseException) -> bool:
    """Whether `error` is how a process learns that another one is gone; gloo and NCCL have no class of their own for it."""
    return (
        shard().count > 1
        and isinstance(error, RuntimeError)
        and any(word in str(error) for word in _LOST)
    )


def check_identical(tensors: Iterable[Tensor], what: str) -> None:
    """Raise DDQError if the tensors are not bit for bit the same in all processes."""
    if shard().count == 1:
        return
    found: list[Any] = [None] * shard().count
    dist.all_gather_object(found, sha256_of_tensors(tensors))
    if len(set(found)) > 1:
        raise DDQError(
            f"{what} differ between the processes; this run cannot go on. Resume it from its last state."
        )
