"""Several processes that train one model, started by ``torchrun``.

Every process reads its own rows of each batch; gradients are averaged by DistributedDataParallel. What is computed does
not depend on the number of processes, but for rounding: the loss of a step is the mean over all valid targets of all
processes, not the mean of their means.
"""

from __future__ import annotations

import atexit
import contextlib
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

__all__ = ["Processes", "data_parallel", "join_processes", "synchronised", "without_data_parallel"]


@dataclass(frozen=True, kw_only=True)
class Processes:
    """This process among those that train together.

    Args:
        rank: Its number, from 0. Only rank 0 writes files.
        world_size: How many there are.
        device: Where this one computes.
    """

    rank: int = 0
    world_size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def is_main(self) -> bool:
        """Whether this process writes the files and the progress."""
        return self.rank == 0

    def sum(self, *values: float) -> list[float]:
        """Each value summed over all processes, in float64. All must call it."""
        if self.world_size == 1:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return [float(value) for value in total.tolist()]

    def wait(self) -> None:
        """Go on when all processes are here."""
        if self.world_size > 1:
            self.sum(0.0)


@contextlib.contextmanager
def join_processes(device: str = "auto") -> Iterator[Processes]:
    """Join the processes that ``torchrun`` started, over NCCL on CUDA and gloo elsewhere, until this one ends.

    Without ``torchrun`` there is this process alone. A process group that exists already is used.

    Args:
        device: ``"auto"``, or a torch device. ``"auto"`` and ``"cuda"`` give each process of a machine its own GPU.

    Raises:
        ValueError: For a device that torch does not know or that is not there.
    """
    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    chosen = choose_device(device, int(os.environ.get("LOCAL_RANK", "0")))
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    if dist.is_available() and dist.is_initialized():
        yield Processes(rank=dist.get_rank(), world_size=dist.get_world_size(), device=chosen)
        return
    if world_size == 1:
        yield Processes(device=chosen)
        return
    # The group stays until the process ends: a second one would meet the first one's addresses in torchrun's store.
    dist.init_process_group("cpu:gloo,cuda:nccl" if chosen.type == "cuda" else "gloo", rank=rank, world_size=world_size)
    atexit.register(_leave)
    yield Processes(rank=rank, world_size=world_size, device=chosen)


def data_parallel(module: nn.Module, processes: Processes, *, find_unused: bool = False) -> nn.Module:
    """`module`, with its gradients averaged over the processes; itself where there is one process.

    Args:
        module: Its forward returns what is differentiated and nothing else.
        find_unused: Whether some parameters get no gradient; looking for them costs a little in each step.
    """
    if processes.world_size == 1:
        return module
    devices = [processes.device.index] if processes.device.type == "cuda" else None
    return DistributedDataParallel(
        module, device_ids=devices, broadcast_buffers=False, find_unused_parameters=find_unused
    )


def without_data_parallel(module: nn.Module) -> nn.Module:
    """The module that `data_parallel` was given."""
    return module.module if isinstance(module, DistributedDataParallel) else module


def synchronised(module: nn.Module, last: bool) -> AbstractContextManager[object]:
    """The context of one micro-batch: gradients are exchanged with the last one of a step only."""
    if last or not isinstance(module, DistributedDataParallel):
        return contextlib.nullcontext()
    return module.no_sync()


def _leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def choose_device(name: str, local_rank: int = 0) -> torch.device:
    """The device that a name means, "auto" and "cuda" for the process of this rank on its machine.

    Raises:
        ValueError: For a device that torch does not know or that is not there.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"device: expected 'auto', 'cpu', 'cuda', 'cuda:0' or 'mps', got {name!r}") from None
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise ValueError(f"device: {name!r} was asked for, but torch {torch.__version__} finds no CUDA device here")
        count = torch.cuda.device_count()
        index = local_rank if device.index is None else device.index
        if index >= count:
            raise ValueError(
                f"device: cuda:{index} was asked for, but there are {count} here; "
                "start at most one process per GPU (torchrun --nproc-per-node)"
            )
        device = torch.device("cuda", index)
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise ValueError("device: 'mps' was asked for, but torch finds no such device here")
    return device
