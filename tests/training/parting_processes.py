"""One of two processes that join, train a step and part, over and over, while a thread keeps the interpreter busy.

python parting_processes.py RANK FOLDER TIMES
"""

from __future__ import annotations

import os
import sys
import threading
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from subspace3d.training import device


def main(rank: int, folder: Path, times: int) -> None:
    torch.set_num_threads(1)
    busy = True

    def keep_busy() -> None:
        while busy:
            sum(range(1000))

    threading.Thread(target=keep_busy, daemon=True).start()
    os.environ.update(RANK=str(rank), WORLD_SIZE="2")
    start = dist.init_process_group
    for time in range(times):
        dist.init_process_group = lambda backend, timeout, time=time: start(
            backend, timeout=timeout, init_method=f"file://{folder}/{time}", rank=rank, world_size=2
        )
        with device.joined_processes(torch.device("cpu")) as processes:
            model = torch.nn.Linear(4, 4)
            wrapped = DistributedDataParallel(model)
            wrapped(torch.ones(2, 4)).sum().backward()
            processes.sum([1.0], torch.device("cpu"))
            processes.wait()
            # as `train` does: the wrapper goes before the processes part; what is left of it is garbage in a cycle
            wrapped.itself = [wrapped]
            del wrapped
    busy = False
    print("parted", times, "times")


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
