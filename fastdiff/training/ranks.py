"""The processes of a training, on torch.distributed: each has the whole state, or its shard (`shards`), and its share of
every batch.

Step n's batch is that of one process: of B samples, process r of W takes r·B/W … (r + 1)·B/W − 1, with the indices, times
and noise that they have by their position in the whole batch. What the processes tell one another in a step is one sum: of the
gradients, of the samples' losses (each at its position), and of who wants to stop. So every process knows the same losses and
decides alike. The gradient is exchanged after the backward pass, in one piece, and not by DistributedDataParallel, whose hooks
do not see the gradients that losses with derivatives of the network ("ism", "ssm") take by torch.autograd.grad.
"""

from __future__ import annotations

import collections
import contextlib
import datetime
import hashlib
import itertools
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import TracebackType
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ..errors import ConfigError, RankError, one_line, short
from ..execution.torch_private import default_store

# Seconds after which a process looks whether others gave up, and in which those that live say so.
LOOK, GRACE = 1.0, 3.0
_runs: dict[str, Iterator[int]] = collections.defaultdict(itertools.count)  # of each group; its processes count alike


def single(collective: str) -> Callable[..., Any]:
    """torch's all_gather or reduce_scatter of one tensor, by the name that it has had since torch 2.13, or by that of before."""
    before = {"all_gather": "all_gather_into_tensor", "reduce_scatter": "reduce_scatter_tensor"}
    return getattr(dist, f"{collective}_single", None) or getattr(dist, before[collective])  # type: ignore[no-any-return]


class Launch(NamedTuple):
    """What torchrun says to a process: its number among all (rank), how many there are, its number on its machine."""

    rank: int = 0
    world: int = 1
    local: int = 0

    def device(self, name: str) -> str:
        """The device of this process: each on a machine has a GPU of its own where `name` is "cuda"."""
        return f"cuda:{self.local}" if name == "cuda" and self.world > 1 else name


def launched() -> Launch:
    """From the variables RANK, WORLD_SIZE and LOCAL_RANK, as torchrun sets them; one process where RANK or WORLD_SIZE lacks."""
    given = [os.environ.get(name, "") for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")]
    if not (given[0] and given[1]):
        return Launch()
    texts = [*given[:2], given[2] or given[0]]
    rank, world, local = (int(text) if text.isascii() and text.isdecimal() else -1 for text in texts)
    if not (0 <= rank < world and local >= 0):
        raise ConfigError(
            f"RANK, WORLD_SIZE and LOCAL_RANK must be 0 <= rank < world size, as torchrun sets them, got "
            f"{', '.join(map(short, given))}: unset them for one process"
        )
    return Launch(rank, world, local)


@contextlib.contextmanager
def joined(timeout: float) -> Iterator[Launch]:
    """The process group of what torchrun started, for a block; a process that is not there in `timeout` seconds is given up."""
    launch = launched()
    if launch.world == 1:
        yield launch
        return
    try:
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", timeout=datetime.timedelta(seconds=timeout)
        )
    except (RuntimeError, ValueError) as error:  # of the variables MASTER_ADDR and MASTER_PORT too
        raise RankError(
            f"process {launch.rank} of {launch.world} found no others ({' '.join(str(error).split())[:80]}): start all, as "
            "torchrun does",
            (),
        ) from error
    try:
        yield launch
    finally:
        dist.destroy_process_group()


class Ranks:
    """This process among those of a training; alone where there is no group, or one of a single process."""

    def __init__(self, group: Any, device: torch.device) -> None:
        available = dist.is_available() and dist.is_initialized()
        if group is not None and not available:
            raise ConfigError(
                f"group must be a torch.distributed process group, got {short(group)}: call init_process_group first"
            )
        self.group, self.device = group, device
        self.rank = dist.get_rank(group) if available else 0
        self.world = dist.get_world_size(group) if available else 1
        if self.rank < 0:
            raise ConfigError("group must hold the process that trains in it: call train in its processes alone")
        self.step, self.slowest, self.last = 0, 0.0, math.inf  # the longest step, the end of the last exchange
        self.failed = False
        if self.world > 1:
            name = str(dist.get_process_group_ranks(dist.group.WORLD if group is None else group))
            self.store = dist.PrefixStore(f"fastdiff {name} {next(_runs[name])}", default_store())

    @property
    def first(self) -> bool:
        """Whether this is the one that writes, shows and is heard."""
        return self.rank == 0

    def rows(self, size: int, parts: int) -> slice:
        """The positions of this process in a batch of `size`, which it takes in so many parts."""
        unit = self.world * parts
        if size % unit:
            lower = size // unit * unit
            some = f"{lower} or {lower + unit}" if lower else unit
            by = f" by accumulate={parts}" if parts > 1 else ""
            raise ConfigError(
                f"batch_size must be a multiple of the {self.world} processes that share each batch{by}, got {size}: give {some}"
            )
        share = size // self.world
        return slice(self.rank * share, (self.rank + 1) * share)

    def __enter__(self) -> Ranks:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Tell the others of an error that is this process's own."""
        if error is not None and self.world > 1 and not self.failed:
            with contextlib.suppress(RuntimeError):  # no store: the one that holds it is gone
                self.store.set(f"failed {self.rank}", one_line(str(error) or type(error).__name__)[:100])

    def alike(self, facts: Mapping[str, Any], advice: str, shows: bool = True) -> None:
        """RankError unless the processes have the same facts, such as options, by their texts."""
        if self.world == 1:
            return
        sums = [hashlib.sha256(f"{name}={value}".encode()).digest()[:16] for name, value in facts.items()]
        sums.insert(0, hashlib.sha256(" ".join(facts).encode()).digest()[:16])
        own = torch.tensor([list(each) for each in sums], dtype=torch.uint8, device=self.device)
        size = self.sum(torch.tensor([len(sums)], device=self.device))
        if int(size) != len(sums) * self.world:
            raise RankError(f"the processes have other options than each other: {advice}", ())
        every = [torch.empty_like(own) for _ in range(self.world)]
        self.finished(dist.all_gather(every, own, group=self.group, async_op=True))
        names = ["names", *facts]
        other = [(r, k) for r in range(1, self.world) for k in range(len(sums)) if not every[r][k].equal(every[0][k])]
        if other:
            r, k = other[0]
            mine = f", {short(facts[names[k]], 40)} in process {self.rank}" if k and shows else ""
            raise RankError(
                f"process {r} of {self.world} differs from process 0 in {names[k]}{mine}, in step {self.step}: {advice}",
                (r,),
            )

    def any(self, flag: bool) -> bool:
        """Whether it is so in any of the processes; all wait for one another."""
        return flag if self.world == 1 else bool(self.sum(torch.tensor([float(flag)], device=self.device)))

    @torch.no_grad()
    def share(self, tensors: Iterable[Tensor]) -> None:
        """Process 0's numbers, in all, whatever their dtypes."""
        values = [] if self.world == 1 else list(tensors)
        if not values:
            return
        raw = [value.detach().contiguous().reshape(-1).view(torch.uint8).to(self.device) for value in values]
        sent = torch.cat(raw)
        self.finished(dist.broadcast(sent, group=self.group, group_src=0, async_op=True))
        for value, piece in zip(values, sent.split([len(piece) for piece in raw])):
            # copies are aligned, pieces need not be
            value.copy_(piece.clone().view(value.dtype).view(value.shape))

    def tell(self, parts: list[Tensor], rows: slice, stopped: bool) -> Tensor | None:
        """[B + 1]: the losses of this process's rows, in parts, at their positions in the whole batch, and whether it wants to
        stop; None where it is alone."""
        if self.world == 1:
            return None
        values = torch.cat(parts)
        kind = torch.promote_types(values.dtype, torch.float32)
        told = torch.zeros(len(values) * self.world + 1, dtype=kind, device=values.device)
        told[rows] = values.detach()
        told[-1] = float(stopped)
        return told

    @torch.no_grad()
    def exchange(self, weights: list[Tensor], told: Tensor, buffers: list[Tensor], changed: bool) -> Tensor:
        """The mean over processes of the weights' gradients, in place; returns the sum of `told` [k], and leaves the buffers,
        where they changed in any process, as process 0 has them."""
        gradients = [w.grad for w in weights]
        sizes = [w.numel() for w in weights]
        has = torch.tensor([g is not None for g in gradients] + [changed], dtype=torch.float32, device=told.device)
        parts = [
            torch.zeros(n, dtype=told.dtype, device=told.device)
            if g is None
            else g.to_dense().reshape(-1).to(told.device)
            for g, n in zip(gradients, sizes)
        ]
        self.slowest = max(self.slowest, time.monotonic() - self.last)
        flat = self.sum(torch.cat([*parts, has, told]))
        self.last = time.monotonic()
        *means, has, told = flat.split([*sizes, len(has), len(told)])
        *there, any_changed = (count > 0 for count in has.tolist())
        for weight, mean, some in zip(weights, means, there):
            weight.grad = (mean / self.world).view(weight.shape).to(weight.device, weight.dtype) if some else None
        if any_changed:
            self.share(buffers)
        return told

    def gathered(self, own: Tensor) -> Tensor:
        """[W, *]: the tensors of all processes, which are of one shape."""
        every = own.new_empty(self.world * own.numel())
        self.finished(single("all_gather")(every, own.reshape(-1), group=self.group, async_op=True))
        return every.view(self.world, *own.shape)

    def sum(self, value: Tensor) -> Tensor:
        """Over the processes, in place."""
        self.finished(dist.all_reduce(value, group=self.group, async_op=True))
        return value

    def finished(self, work: Any) -> None:
        """Wait for the others; RankError where one of them ended, gave up, or hangs for as long as the group waits."""
        while True:
            try:
                # a GPU's stream waits by itself, and its group's own watchdog ends a process that waits too long
                work.wait() if self.device.type == "cuda" else work.wait(datetime.timedelta(seconds=LOOK))
                break
            except RuntimeError as error:
                if work.is_completed() or self._gave_up():
                    self.failed = True
                    raise self._lost(error) from error

    def _gave_up(self) -> dict[int, str]:
        """What the processes say that ended by an error of their own."""
        names = {r: f"failed {r}" for r in range(self.world) if r != self.rank}
        try:
            return {r: self.store.get(name).decode() for r, name in names.items() if self.store.check([name])}
        except RuntimeError:
            return {0: ""}  # the store was in a process that is gone

    def _lost(self, error: RuntimeError) -> RankError:
        """Which processes are no longer there: those that said so, or say nothing while the others do."""
        others = set(range(self.world)) - {self.rank}
        end = time.monotonic() + GRACE + min(2 * self.slowest, 30)
        said: dict[int, str] = {}
        with contextlib.suppress(RuntimeError):
            self.store.set(f"alive {self.rank}", "")
            while others and time.monotonic() < end and not said:
                said = self._gave_up()
                others = {r for r in others if not self.store.check([f"alive {r}"])} - said.keys()
                time.sleep(0.05)
        names = sorted(said) or sorted(others)
        why = next((f"failed: {text}" for text in said.values() if text), "ended, or hangs")
        if not names:
            why = f"cannot be reached: {' '.join(str(error).split())[:60]}"
            names = sorted(set(range(self.world)) - {self.rank})
        which = f"process {names[0]}" if len(names) == 1 else f"processes {', '.join(map(str, names[:5]))}"
        return RankError(
            f"{which} of {self.world} {why}, in step {self.step}: start all again, and the run goes on from its last checkpoint",
            tuple(names),
        )
