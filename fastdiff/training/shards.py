"""Weights, gradients, moments and averages in shards, one in each process of a training, by torch's FSDP2.

What is trained is a copy of the network with torch.distributed.fsdp.fully_shard (Zhao et al. 2023): each process holds some rows
of every parameter, gathers a block's for its forward and its backward pass, and gets its rows of the mean gradient. A step of the
optimiser or of an average is the same for each number, so that it needs no other rows. The caller's network stays whole, and gets
averages or weights where they are asked for.
"""

from __future__ import annotations

import collections
import contextlib
import copy
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..errors import ConfigError, short
from ..execution import modules
from ..files import reason
from ..losses import DENOISING
from ..model import ScoreModel
from ..networks.layers import TimeConditioned
from .ranks import Ranks, single

# Numbers of a block's parameters from which it is gathered by itself; smaller ones go with what holds them, as a message takes
# its time however short it is.
BLOCK = 2**16
ELEMENTWISE = ("adam", "adamw", "radam", "sgd")
HALF = (torch.float16, torch.bfloat16)


def check(net: nn.Module, ranks: Ranks, loss: str, optimizer: Any, compile: bool) -> None:
    """ConfigError for what cannot be trained in shards."""
    trained = [p for p in net.parameters() if p.requires_grad]
    kinds = {p.dtype for p in trained}
    if ranks.world == 1:
        raise ConfigError(
            "shard=True must have a process group of several processes, which hold a shard each, got one process: start "
            "several by torchrun, or leave shard out"
        )
    if loss not in DENOISING:
        raise ConfigError(
            f"shard=True must have a loss without derivatives of the network ({', '.join(DENOISING)}), got loss={loss!r}: "
            "take one of them, or leave shard out"
        )
    if optimizer not in ELEMENTWISE:
        raise ConfigError(
            f"shard=True must have an optimizer whose step is the same for each number ({', '.join(ELEMENTWISE)}), got "
            f"{short(optimizer, 40)}: take one of them, or leave shard out"
        )
    if compile:
        raise ConfigError("shard=True must have compile=False, got True: leave out one of them")
    if modules.inner(net) is not net:
        raise ConfigError(f"shard=True must have the network itself, got it within {type(net).__name__}: unwrap it")
    if len(kinds) > 1 or kinds & set(HALF):
        raise ConfigError(
            "shard=True must have trained parameters of one dtype, float32 or float64, got "
            f"{', '.join(sorted(map(str, kinds)))}: net.float(), and precision='bf16' for the speed of half precision"
        )
    places = {str(p.device) for p in [*net.parameters(), *net.buffers()]}
    if len(places) > 1:
        raise ConfigError(f"shard=True must have a network on one device, got {', '.join(sorted(places))}: net.to(one)")


class Shards:
    """A copy of a network whose trained parameters are in shards, and this process's parts of them.

    net      the copy, which is called in training; it shares the buffers and the frozen parameters of the `owner`, the caller's
             network, so that each has them as the other does
    weights  of each trained parameter, in the network's order, the rows of this process (some have none), by which the copy's
             own change; a parameter of no dimension is whole in all processes, and then its weight is
    whole    those weights: their gradients are not exchanged by the copy
    """

    def __init__(self, owner: nn.Module, ranks: Ranks) -> None:
        from torch.distributed.device_mesh import DeviceMesh
        from torch.distributed.fsdp import fully_shard

        self.owner, self.ranks = owner, ranks
        shared = [*owner.buffers(), *(p for p in owner.parameters() if not p.requires_grad)]
        try:
            self.net = copy.deepcopy(owner, {id(value): value for value in shared})
        except Exception as error:
            raise ConfigError(
                f"shard=True must have a network that copy.deepcopy copies, got {type(owner).__name__} ({reason(error)}): leave "
                "shard out"
            ) from error
        trained = [p for p in self.net.parameters() if p.requires_grad]
        self.shapes = [p.shape for p in trained]
        for p in trained:
            p.data = p.data.contiguous()
        group = dist.group.WORLD if ranks.group is None else ranks.group
        mesh = DeviceMesh.from_group(group, ranks.device.type)  # type: ignore[arg-type]
        left = {p for p in trained if p.ndim}
        for module in [*_blocks(self.net), self.net]:
            own = {p for p in module.parameters() if p in left}
            if module is self.net or sum(p.numel() for p in own) >= BLOCK:
                left -= own
                rows = [ranks.world * _rows(p.shape, ranks.world) * p[:1].numel() for p in own]
                ignored = {p for p in module.parameters() if not (p.ndim and p.requires_grad)}
                module.register_forward_hook(_no_view)  # before FSDP's own
                sharded: Any = fully_shard(module, mesh=mesh, ignored_params=ignored)
                sharded.set_custom_all_gather(_Gather(ranks))
                sharded.set_custom_reduce_scatter(_ReduceScatter(ranks, sum(rows)))
        # one process may make no use of a parameter of which another does; older ones of torch cannot: see _ReduceScatter
        if hasattr(self.net, "set_reduce_scatter_unused_params"):
            self.net.set_reduce_scatter_unused_params(True)
        self.parameters = [p for p in self.net.parameters() if p.requires_grad]
        with torch.no_grad():
            self.weights = [p if p.ndim == 0 else _local(p).requires_grad_() for p in self.parameters]
        self.whole = [w for w in self.weights if w.ndim == 0]

    def model(self, model: ScoreModel) -> ScoreModel:
        """The model with the copy for its network."""
        made = copy.copy(model)
        made._modules = {**model._modules, "net": self.net}
        return made

    @contextlib.contextmanager
    def calling(self) -> Iterator[None]:
        """Around calls of the copy: a network that reads a block's weights past the block's forward is named as the cause."""
        try:
            yield
        except RuntimeError as error:
            if "DTensor" not in str(error):
                raise
            raise ConfigError(
                "shard=True must have a network that calls the members of its ModuleLists and Sequentials, got one that uses "
                "their weights without a call: leave shard out"
            ) from error

    def take_gradients(self) -> None:
        """The weights' gradients are their parameters'."""
        for p, weight in zip(self.parameters, self.weights):
            weight.grad = p.grad if p.grad is None or p.ndim == 0 else _local(p.grad)

    def norm(self, own: Tensor) -> Tensor:
        """The norm of all gradients, from that of this process's."""
        square = own.double().square()
        if not self.ranks.first:  # of those that all have, one counts
            square -= sum(
                (w.grad.double().square() for w in self.whole if w.grad is not None), torch.zeros_like(square)
            )
        return self.ranks.sum(square).sqrt().to(own.dtype)

    def gathered(
        self, of: Sequence[Tensor], numbers: Sequence[int] | None = None, to_file: bool = False
    ) -> list[Tensor]:
        """Tensors of which each process has its rows, as of the weights, or of those of these `numbers`, in one piece; all
        processes take part. What is not of its weight's shape, such as a count of steps, is everyone's.

        to_file  in the CPU's memory of the first process alone; the others keep their rows
        """
        found = []
        for k, own in zip(range(len(of)) if numbers is None else numbers, of):
            whole = own
            if own.shape == self.weights[k].shape and own.ndim:
                shape = self.shapes[k]
                padded = own.new_zeros(_rows(shape, self.ranks.world), *shape[1:])
                padded[: len(own)] = own.detach()
                whole = self.ranks.gathered(padded).flatten(0, 1)[: shape[0]]
            found.append(whole if not to_file else whole.cpu() if self.ranks.first else own)
        for mine, theirs in zip(self.owner.modules(), self.net.modules()):
            mine._buffers.update(theirs._buffers)  # of which a step may have put others in their place
        return found

    def part(self, k: int, whole: Tensor) -> Tensor:
        """This process's rows of a tensor of weight k's shape."""
        if not whole.ndim or whole.shape != self.shapes[k]:
            return whole
        rows = _rows(whole.shape, self.ranks.world)
        return whole[self.ranks.rank * rows : (self.ranks.rank + 1) * rows]

    def follow(self) -> None:
        """What a checkpoint changed in the caller's network beside the trained parameters."""
        if isinstance(self.net, TimeConditioned) and "time_scale" in self.net.config:
            self.net.set_time_scale(self.owner.config["time_scale"])  # type: ignore[index]
        for mine, theirs in zip(self.net.modules(), self.owner.modules()):
            mine._buffers.update(theirs._buffers)


def _blocks(net: nn.Module) -> list[nn.Module]:
    """The members of its ModuleLists, ModuleDicts and Sequentials that have a forward and share no parameter with others; inner
    ones first."""
    owners = collections.Counter(_held(net))
    found = []
    for holder in reversed(list(net.modules())):
        for block in holder.children() if isinstance(holder, (nn.ModuleList, nn.ModuleDict, nn.Sequential)) else ():
            called = not isinstance(block, (nn.ModuleList, nn.ModuleDict))
            if called and all(owners[p] == count for p, count in collections.Counter(_held(block)).items()):
                found.append(block)
    return found


def _held(net: nn.Module) -> list[nn.Parameter]:
    """Its parameters, each as often as a path leads to it."""
    parts = net.named_modules(remove_duplicate=False)
    return [p for _, part in parts for p in part.parameters(recurse=False)]


def _no_view(block: nn.Module, inputs: Any, output: Any) -> Any:
    """A block's output with memory of its own: FSDP's hook on a view is lost where the network then changes that in place."""
    return output.clone() if isinstance(output, Tensor) and output._base is not None else output


def _rows(shape: Sequence[int], world: int) -> int:
    """Of each process but the last ones, as torch.chunk has it."""
    return -(-shape[0] // world)


def _local(value: Any) -> Tensor:
    """This process's rows of a DTensor, in the same memory."""
    return value.detach().to_local()  # type: ignore[no-any-return]


class _Gather:
    """FSDP's all-gather, which waits for the others as the rest of a training does: it names one that is lost."""

    def __init__(self, ranks: Ranks) -> None:
        self.ranks = ranks

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(self, output_tensor: Tensor, input_tensor: Tensor, group: Any, async_op: bool = False) -> None:
        self.ranks.finished(single("all_gather")(output_tensor, input_tensor, group=group, async_op=True))


class _ReduceScatter(_Gather):
    """FSDP's reduce-scatter, likewise."""

    def __init__(self, ranks: Ranks, numbers: int) -> None:
        """numbers   that a group's gradients have together"""
        super().__init__(ranks)
        self.numbers = numbers

    def __call__(  # type: ignore[override]
        self, output_tensor: Tensor, input_tensor: Tensor, group: Any, op: Any, async_op: bool = False
    ) -> None:
        if len(input_tensor) != self.numbers:
            raise ConfigError(
                "shard=True must have a network that uses all of its parameters in each step, got one that left some out: "
                "p.requires_grad_(False) for what it never uses, or leave shard out"
            )
        if input_tensor.is_cuda:
            scatter = single("reduce_scatter")
            self.ranks.finished(scatter(output_tensor, input_tensor, op=op, group=group, async_op=True))
            return
        # gloo's own is this sum too, and does not give up waiting before the group's timeout
        self.ranks.finished(dist.all_reduce(input_tensor, group=group, async_op=True))
        output_tensor.copy_(input_tensor.view(self.ranks.world, -1)[self.ranks.rank])
        if op == dist.ReduceOp.AVG:
            output_tensor /= self.ranks.world
