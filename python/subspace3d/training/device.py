"""The device a run computes on, and the processes that share it when several were started by torchrun."""

from __future__ import annotations

import contextlib
import datetime
import gc
import os
import platform
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from subspace3d import system

_PARTNER_ANSWERS = datetime.timedelta(minutes=10)
"""A process that waits longer than this for another one takes it for lost; one that has ended is noticed at once."""


def choose_device(name: str) -> torch.device:
    """``auto`` is cuda when there is one, else cpu; any other name is taken as it is.

    Under torchrun every process gets the GPU of its local rank.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and "LOCAL_RANK" in os.environ:
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    return torch.device(name)


def device_name(name: str) -> str:
    """What `choose_device` takes, in words: the name of the GPU, or the CPU's architecture and cores."""
    device = choose_device(name)
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {os.cpu_count()} cores, {platform.machine()}"


def peak_memory(device: torch.device) -> int:
    """Bytes. CUDA: most memory allocated by tensors. CPU: most resident memory of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    # getrusage counts what the process that started this one held, too
    status = Path("/proc/self/status")
    if status.is_file():
        # a process may have colons in its name
        fields = dict(line.split(":", 1) for line in status.read_text(encoding="ascii").splitlines())
        return 1024 * int(fields["VmHWM"].split()[0])
    return system.peak_resident_bytes()


def available_memory(device: torch.device) -> int | None:
    """Bytes that tensors can still take on ``device``, or none where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    memory = system.memory()
    return None if memory is None else memory[1]


@dataclass(frozen=True)
class Processes:
    """The processes of one run: ``rank`` of ``count``. Every method does nothing when there is only one."""

    rank: int = 0
    count: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this process writes files and reports."""
        return self.rank == 0

    def share(self, items: int) -> range:
        """This process's part of ``items`` things: contiguous, sizes differ by at most one."""
        return range(self.rank * items // self.count, (self.rank + 1) * items // self.count)

    def sum(self, values: list[float], device: torch.device) -> list[float]:
        """Sum of every entry over all processes, in float64."""
        if self.count == 1:
            return values
        total = torch.tensor(values, dtype=torch.float64, device=device)
        dist.all_reduce(total)
        return total.tolist()

    def gather(self, tensor: torch.Tensor, device: torch.device) -> list[torch.Tensor]:
        """A CPU tensor of the same shape and type from every process, by rank."""
        if self.count == 1:
            return [tensor]
        mine = tensor.to(device)
        gathered = [torch.empty_like(mine) for _ in range(self.count)]
        dist.all_gather(gathered, mine)
        return [each.cpu() for each in gathered]

    def wait(self) -> None:
        """Return when all processes have come here."""
        if self.count > 1:
            dist.barrier()


@contextlib.contextmanager
def joined_processes(device: torch.device) -> Iterator[Processes]:
    """Join the processes torchrun started (nccl on GPUs, gloo on CPUs); a single process otherwise."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield Processes()
        return
    if dist.is_initialized():
        yield Processes(dist.get_rank(), dist.get_world_size())
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=_PARTNER_ANSWERS)
    try:
        yield Processes(dist.get_rank(), dist.get_world_size())
    except BaseException as error:
        # the frames it came through may hold what `_leave` has to drop
        traceback.clear_frames(error.__traceback__)
        if isinstance(error, RuntimeError) and _is_lost_partner(error):
            raise ConnectionError(
                "another process of this run has ended or does not answer; the last checkpoint is whole, and the same "
                f"command continues from it ({str(error).splitlines()[0][:200]})"
            ) from None
        raise
    finally:
        _leave()


def _leave() -> None:
    """Leave the process group, which nothing may use any more.

    A DistributedDataParallel holds the group in C++. If it were the last to let go of it, the group would end inside a
    destructor that keeps Python's interpreter lock, and wait for a thread of its own that needs this lock to release
    the tensor of a finished barrier: for ever. So whatever cycles of garbage hold one go first, and the group ends in
    Python's hands, where the lock is let go.
    """
    gc.collect()
    dist.destroy_process_group()


def _is_lost_partner(error: RuntimeError) -> bool:
    """gloo and nccl have no type of exception for it."""
    text = str(error)
    return isinstance(error, dist.DistError) or any(
        words in text
        for words in ("Connection closed by peer", "Connection reset by peer", "Timed out waiting", "gloo/")
    )
