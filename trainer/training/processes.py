"""One process, or several that torchrun started, each on its device."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import distributed, nn

from dspark_edge.engines.errors import InvalidInputError

__all__ = ["Processes", "open_processes"]


@dataclass(frozen=True, slots=True)
class Processes:
    """This process among all."""

    rank: int
    count: int
    device: torch.device

    @property
    def first(self) -> bool:
        return self.rank == 0

    def sum(self, value: torch.Tensor) -> torch.Tensor:
        """A tensor's sum over all processes."""
        if self.count > 1:
            value = value.clone()
            distributed.all_reduce(value)
        return value

    def wait(self) -> None:
        if self.count > 1:
            distributed.barrier()

    def wrap(self, module: nn.Module) -> nn.Module:
        """Average gradients over the processes."""
        if self.count == 1:
            return module
        from torch.nn.parallel import DistributedDataParallel

        devices = [self.device] if self.device.type == "cuda" else None
        return DistributedDataParallel(module, device_ids=devices)


def pick_device(wanted: str | None, local_rank: int = 0) -> torch.device:
    """The device asked for, or the GPU where there is one.

    Raises:
        InvalidInputError: there is no such device.
    """
    name = wanted or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise InvalidInputError(f"--device is {name!r}, expected cpu, cuda or cuda:N") from None
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise InvalidInputError("--device is cuda, but torch finds no GPU here")
        device = torch.device("cuda", local_rank if device.index is None else device.index)
        torch.cuda.set_device(device)
    return device


@contextmanager
def open_processes(wanted: str | None) -> Iterator[Processes]:
    """Join the other processes, if torchrun started this one; leave them in the end.

    What `wrap` returned has to be out of reach by then. It is part of cycles, so it is collected here: a process that
    ends while one still holds the group's threads is aborted by C++ ("terminate called without an active exception").
    """
    count = int(os.environ.get("WORLD_SIZE", "1"))
    device = pick_device(wanted, int(os.environ.get("LOCAL_RANK", "0")))
    if count == 1:
        yield Processes(0, 1, device)
        return
    distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield Processes(distributed.get_rank(), count, device)
    finally:
        gc.collect()
        distributed.destroy_process_group()
