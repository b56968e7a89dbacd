"""Functions and commands run in processes, by a server that forks them with torch already loaded."""

from __future__ import annotations

import contextlib
import datetime
import multiprocessing
import os
import signal
import socket
import tempfile
import warnings
from multiprocessing import forkserver
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist

from fastdiff.cli import commands

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    ["pytest", "torch._dynamo", "sklearn.datasets", "processes", "fastdiff.networks", "fastdiff.training"]
)


def started(function, *arguments):
    # where the server finds this file, and without torch's own stacks of a store whose process was killed
    with mock.patch.dict(os.environ, {"PYTHONPATH": str(Path(__file__).parent), "TORCH_CPP_LOG_LEVEL": "ERROR"}):
        forkserver.ensure_running()
    process = CONTEXT.Process(target=function, args=arguments, daemon=True)
    process.start()
    return process


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
    with tempfile.TemporaryDirectory() as folder:
        pipes, processes = [], []
        for rank in range(world):
            ours, theirs = CONTEXT.Pipe()
            store = Path(folder) / "store"
            processes.append(started(_run, theirs, function, rank, world, store, timeout, arguments))
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


def _command(words, rank, world, port, log):
    torch.set_num_threads(1)
    # which a shell's background job, and so its children, ignore
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if world > 1:
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    with open(log, "a") as said, contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        code = commands.main(words)
    raise SystemExit(code)


def command(*words, world=1, log=os.devnull):
    """The processes of a command of fastdiff, as torchrun starts them where there are several."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    return [started(_command, [str(word) for word in words], rank, world, port, log) for rank in range(world)]
