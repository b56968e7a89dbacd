"""Functions run in several processes of one group, by a server that forks them with torch already loaded."""

from __future__ import annotations

import datetime
import multiprocessing
import os
import tempfile
import warnings
from multiprocessing import forkserver
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["pytest", "torch._dynamo", "processes", "fastdiff.networks", "fastdiff.training"])


def _run(pipe, function, rank, world, store, timeout, arguments):
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=world, timeout=datetime.timedelta(seconds=timeout)
    )
    try:
        pipe.send(function(rank, world, *arguments))
    except Exception as error:
        pipe.send(error)
    pipe.recv()  # stay until all are done: that others raise is not because this one ended


def among(world, function, *arguments, timeout=30, lost=None):
    """What function(rank, world, *arguments) returns or raises in each of `world` processes; None of the one that is `lost`."""
    with mock.patch.dict(os.environ, {"PYTHONPATH": str(Path(__file__).parent)}):  # where the server finds this file
        forkserver.ensure_running()
    with tempfile.TemporaryDirectory() as folder:
        store = Path(folder) / "store"
        pipes, processes = [], []
        for rank in range(world):
            ours, theirs = CONTEXT.Pipe()
            processes.append(
                CONTEXT.Process(
                    target=_run, args=(theirs, function, rank, world, store, timeout, arguments), daemon=True
                )
            )
            processes[-1].start()
            theirs.close()
            pipes.append(ours)
        results = []
        for rank, (pipe, process) in enumerate(zip(pipes, processes)):
            if rank == lost:
                results.append(None)
            else:
                results.append(pipe.recv() if pipe.poll(60) else TimeoutError(f"nothing from {process.name}"))
        for process in processes:
            process.kill()
            process.join()
        return results
