"""A function run in several processes that can talk to each other."""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import distributed, multiprocessing


def in_processes(work: Callable[[int, int], Any], folder: Path, size: int = 2) -> list[Any]:
    """What ``work(rank, size)``, a function of a module, returns in each of the processes, which meet in ``folder``."""
    multiprocessing.spawn(_process, args=(work, size, str(folder)), nprocs=size)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(size)]


def _process(rank: int, work: Callable[[int, int], Any], size: int, folder: str) -> None:
    distributed.init_process_group(
        "gloo",
        init_method=f"file://{folder}/meeting",
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=60),  # processes that have parted wait for each other
    )
    torch.set_num_threads(1)
    torch.save(work(rank, size), f"{folder}/{rank}.pt")
    distributed.barrier()
    # A DistributedDataParallel keeps gloo's threads alive after destroy_process_group. On a busy machine one of them
    # can ask for the interpreter while it is being taken down: SIGABRT, with all the work done.
    os._exit(0)
