"""Run a function in several gloo processes, with a time limit: a hang is a failed test, not a hung one."""

import faulthandler
import os
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

# Each process is one of several on few cores.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

SECONDS = 200


def _process(rank: int, world: int, folder: str, function: Callable[[int, int], Any]) -> None:
    # A process that dies of a signal says where it was.
    faulthandler.enable()
    torch.set_num_threads(1)
    # A file is the meeting point: no port that another test could have.
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world, timeout=timedelta(seconds=60)
    )
    torch.save(function(rank, world), f"{folder}/{rank}.pt")
    dist.destroy_process_group()
    # All is done and on disk. torch's static objects are not destroyed: threads of the groups that still use them have
    # ended finished processes by SIGABRT ("terminate called without an active exception", no Python frame left).
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def spawn(world: int, function: Callable[[int, int], Any]) -> list[Any]:
    """What `function(rank, world)` returns, by rank."""
    with tempfile.TemporaryDirectory() as folder:
        context = mp.start_processes(_process, (world, folder, function), world, join=False, start_method="spawn")
        end = time.monotonic() + SECONDS
        try:
            while not context.join(max(0.1, end - time.monotonic())):
                assert time.monotonic() < end, f"{world} processes did not finish in {SECONDS} s"
        finally:
            for process in context.processes:
                if process.is_alive():
                    process.kill()
        return [torch.load(Path(folder) / f"{rank}.pt", weights_only=False) for rank in range(world)]
