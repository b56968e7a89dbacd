"""Training in several processes: the batches, losses and weights of one; and what happens where one of them is lost."""

from __future__ import annotations

import functools
import hashlib
import math
import os
import shutil
import signal
import threading
import time

import pytest
import torch
import torch.distributed as dist
from processes import among
from torch.distributed.fsdp import FSDPModule

import fastdiff
from fastdiff.errors import ConfigError, DataError, RankError
from fastdiff.networks import MLP, UNet
from fastdiff.training import run, shards, state, trainer
from fastdiff.training.ranks import Ranks

GIVEN = {"steps": 12, "batch_size": 24, "lr": 1e-2, "warmup": 5, "seed": 3, "progress": False}


def vectors():
    return fastdiff.Data(torch.randn(50, 2, generator=torch.Generator().manual_seed(0)), range=(-5, 5))


def small(seed=0, dtype=torch.float64, **options):
    torch.manual_seed(seed)
    return fastdiff.ScoreModel(MLP((2,), hidden=16, **options).to(dtype), "vp", "edm", data_shape=(2,))


def digest(model):
    sha = hashlib.sha256()
    for name, value in sorted(model.net.state_dict().items()):
        sha.update(name.encode() + value.contiguous().numpy().tobytes())
    return sha.hexdigest()


def trained(model, data, **options):
    done = fastdiff.train(model, data, **{**GIVEN, **options})
    return done.loss.tolist(), done.steps, digest(model), [p.detach().double() for p in model.net.parameters()]


# --- the same training -----------------------------------------------------------------------------------------------


def of_vectors(rank, world, options):
    """Each process begins with other weights: those of the first are taken."""
    return trained(small(rank), vectors(), **options)


def of_pictures(rank, world):
    """Levels, dequantised, mirrored at random, with labels of which some are dropped."""
    torch.manual_seed(rank)
    net = UNet((1, 4, 4), channels=8, blocks=1, num_classes=3).double()
    levels = torch.arange(40 * 16, dtype=torch.uint8).reshape(40, 1, 4, 4) % 16
    data = fastdiff.Data(levels, range=(0, 15), labels=torch.arange(40) % 3)
    model = fastdiff.ScoreModel(net, "vp", "eps", data_shape=(1, 4, 4))
    return trained(model, data, dequantize=True, augment="flip", cond_dropout=0.3, batch_size=16, steps=5)


def compared(function, *arguments):
    one = function(0, 1, *arguments)
    for world in (2, 4):
        found = among(world, function, *arguments)
        for loss, steps, weights, parameters in found:
            assert steps == one[1]
            assert weights == found[0][2]  # bit for bit the same in all processes
            # float64 networks of float32 losses: the order of a sum of 24 numbers changes some 1e-15 of a gradient in a step,
            # which a dozen of Adam's steps magnify; noise of another sample would change the losses by a tenth and more
            torch.testing.assert_close(torch.tensor(loss), torch.tensor(one[0]), rtol=1e-6, atol=0)
            torch.testing.assert_close(parameters, one[3], rtol=1e-9, atol=1e-9)
    return one


@pytest.mark.parametrize(
    "options",
    [
        {"loss": "simple"},
        {"loss": "ssm_vr", "grad_clip": 0.1},
        {"times": "second_moment", "weight": "learned", "accumulate": 3},
        {"times": "importance", "loss": "likelihood", "truncation": "soft"},
    ],
    ids=lambda options: ", ".join(map(str, options.values())),
)
def test_one_batch_one_curve(options):
    """1, 2 and 4 processes, of the same global batch."""
    compared(of_vectors, options)


def test_levels_labels_and_dropped_conditions_keep_their_noise():
    compared(of_pictures)


def of_floats(rank, world):
    return trained(small(0, torch.float32), vectors(), steps=30)


def test_float32_is_the_same_to_rounding_and_a_number_of_processes_to_the_bit():
    one = of_floats(0, 1)
    first, again = among(2, of_floats), among(2, of_floats)
    assert [r[2] for r in first] == [r[2] for r in again] == [first[0][2]] * 2
    # each step rounds a gradient to 2**-24 of it; 30 steps of 1e-2 may add that up, and Adam divides by its root
    torch.testing.assert_close(torch.tensor(first[0][0]), torch.tensor(one[0]), rtol=1e-4, atol=0)


class Averaged(torch.nn.Module):
    """Running statistics, a counter, and a layer of which one process makes no use."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.norm = torch.nn.Linear(3, 8), torch.nn.Linear(8, 2), torch.nn.BatchNorm1d(8)
        self.skipped = torch.nn.Linear(8, 2)
        self.rank = dist.get_rank() if dist.is_initialized() else 0

    def forward(self, x, t):
        h = self.norm(self.a(torch.cat([x, t[:, None]], 1)))
        return self.b(h) + (self.skipped(h) if self.training and self.rank == 0 else 0)


def with_statistics(rank, world, folder):
    torch.manual_seed(0)
    model = fastdiff.ScoreModel(Averaged(), "vp", "eps", data_shape=(2,))
    first = trained(model, vectors(), checkpoint=folder, steps=6)
    torch.manual_seed(1)
    other = fastdiff.ScoreModel(Averaged(), "vp", "eps", data_shape=(2,))
    second = trained(other, vectors(), checkpoint=folder, steps=12)
    torch.manual_seed(0)
    unbroken = fastdiff.ScoreModel(Averaged(), "vp", "eps", data_shape=(2,))
    return first[2], second[2], trained(unbroken, vectors())[2], float(other.net.norm.running_var.min())


def test_running_statistics_and_parameters_that_one_process_does_not_use(tmp_path):
    found = among(2, with_statistics, tmp_path / "run")
    assert found[0] == found[1]
    first, second, unbroken, variance = found[0]
    assert first != second == unbroken
    assert variance != 1  # they ran


class Noisy(torch.nn.Module):
    """Notes what its dropout draws."""

    def __init__(self):
        super().__init__()
        self.layer, self.drawn = torch.nn.Linear(2, 2), []

    def forward(self, x, t):
        self.drawn.append(torch.rand(1).item())
        return self.layer(x)


def dropped(rank, world):
    model = fastdiff.ScoreModel(Noisy(), "vp", "eps", data_shape=(2,))
    fastdiff.train(model, vectors(), **{**GIVEN, "steps": 4})
    return model.net.drawn


def test_dropout_is_of_the_process_and_the_first_has_that_of_one():
    (first, second), alone = among(2, dropped), dropped(0, 1)
    assert first == alone
    assert len({*first, *second}) == 8


def apart(rank, world):
    """Each process trains a model of its own."""
    group = [dist.new_group([r]) for r in range(world)][rank]
    return trained(small(rank), vectors(), group=group)[2]


def test_a_group_of_one_trains_alone():
    assert among(2, apart) == [trained(small(rank), vectors())[2] for rank in range(2)]


# --- decisions are made together -------------------------------------------------------------------------------------


class Bad(torch.nn.Module):
    """Not finite in the second process's third step."""

    def __init__(self, rank):
        super().__init__()
        self.layer, self.rank, self.calls = torch.nn.Linear(2, 2), rank, 0

    def forward(self, x, t):
        self.calls += self.training
        return self.layer(x) * (float("nan") if self.rank == 1 and self.calls == 3 else 1)


def with_a_bad_step(rank, world):
    torch.manual_seed(0)
    model = fastdiff.ScoreModel(Bad(rank), "vp", "eps", data_shape=(2,))
    done = fastdiff.train(model, vectors(), **GIVEN)
    return done.skipped, done.loss.isnan().nonzero().flatten().tolist(), digest(model)


def test_a_step_that_is_not_finite_in_one_process_is_skipped_in_all():
    first, second = among(2, with_a_bad_step)
    assert first == second
    assert first[:2] == (1, [2])


def stopping(rank, world, folder):
    calls = []

    def stop():
        calls.append(None)
        return rank == 1 and len(calls) == 5

    model = small()
    done = fastdiff.train(model, vectors(), checkpoint=folder, stop=stop, **GIVEN)
    saved = fastdiff.training.checkpoint.saved_step(folder / "checkpoint.safetensors")
    again = small(1)
    end = fastdiff.train(again, vectors(), checkpoint=folder, **GIVEN)
    unbroken = small()
    fastdiff.train(unbroken, vectors(), **GIVEN)
    return done.steps, done.stopped, saved, end.steps, end.stopped, digest(again), digest(unbroken)


def test_one_that_stops_stops_all_with_one_checkpoint(tmp_path):
    first, second = among(2, stopping, tmp_path)
    assert first == second
    assert first[:5] == (5, True, 5, 12, False)
    assert first[5] == first[6]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint.safetensors", "metrics.csv"]


def slow(rank, world, folder):
    run.LONGEST = math.inf if rank else 0.0
    steps = []
    check = state.State.check_alike
    state.State.check_alike = lambda self: (steps.append(self.step), check(self))[0]
    fastdiff.train(small(), vectors(), checkpoint=folder, **GIVEN)
    return steps


def test_the_first_process_s_clock_says_when_all_save(tmp_path):
    assert among(2, slow, tmp_path) == [[0, 10, 12], [0, 10, 12]]


def watched(rank, world, folder):
    seen = []
    fastdiff.train(
        small(), vectors(), checkpoint=folder, validation=0.2, evaluate_every=3, patience=1, lr=10.0, ema=0.1,
        callback=lambda step, loss: seen.append(step), evaluate=lambda model, step: seen.append(-step),
        **{name: value for name, value in GIVEN.items() if name not in ("lr", "ema")},
    )  # fmt: skip
    return seen, sorted(path.name for path in folder.iterdir())


def test_the_first_process_is_seen_and_heard_and_all_end_early_together(tmp_path):
    first, second = among(2, watched, tmp_path)
    assert second[0] == []
    assert first[0][0] == -3
    assert first[0][-1] in (6, 9)  # where the loss has not become lower
    assert first[1] == ["best.safetensors", "checkpoint.safetensors", "metrics.csv"]


def only_looked_at(rank, world):
    seen = []
    fastdiff.train(small(), vectors(), evaluate=lambda model, step: seen.append(step), evaluate_every=5, **GIVEN)
    return seen


def test_an_evaluation_without_validation_data_is_the_first_process_s():
    assert among(2, only_looked_at) == [[5, 10], []]


# --- a process that is lost ------------------------------------------------------------------------------------------


def losing(rank, world, how, folder):
    """The last process is lost in its fourth step."""
    calls = []

    def stop():
        calls.append(None)
        if rank == world - 1 and len(calls) == 4:
            how_to[how]()

    began = time.monotonic()
    try:
        fastdiff.train(small(), vectors(), checkpoint=folder, checkpoint_every=2, stop=stop, **GIVEN)
    except RankError as error:
        return str(error), error.ranks, time.monotonic() - began
    return "ended"


def raising():
    raise ValueError("no more data")


how_to = {
    "raises": raising,
    "is killed": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "hangs": lambda: time.sleep(100),
}


@pytest.mark.parametrize(("how", "world"), [("raises", 3), ("is killed", 3), ("hangs", 2)])
def test_a_lost_process_ends_the_run_with_its_name(how, world, tmp_path):
    """One that raises may live on in its program: the others do not wait for the group's timeout."""
    timeout = 4 if how == "hangs" else 100
    results = among(world, losing, how, tmp_path, timeout=timeout, lost=None if how == "raises" else world - 1)
    last = results.pop()
    assert last is None or type(last) is ValueError
    why = "failed: no more data" if how == "raises" else "ended, or hangs"
    for said, ranks, seconds in results:
        assert said.startswith(f"process {world - 1} of {world} {why}, in step 3: start all again")
        assert ranks == (world - 1,)
        assert seconds < 40
    # the last good checkpoint is whole, and goes on in any number of processes
    done = fastdiff.train(small(1), vectors(), checkpoint=tmp_path, **GIVEN)
    assert len(done.loss) == 10
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint.safetensors", "metrics.csv"]


# --- in shards -------------------------------------------------------------------------------------------------------


def in_shards(rank, world, block, function, *arguments):
    """The function with trainings in shards, of which a block of so many numbers is one of its own."""
    shards.BLOCK = block
    whole = fastdiff.train
    fastdiff.train = functools.partial(fastdiff.train, shard=True)
    try:
        return function(rank, world, *arguments)
    finally:
        fastdiff.train = whole


def as_of_shards(found, other, rtol=1e-6, atol=1e-9):
    """Of all processes alike, and as another training's."""
    assert found[0][1:3] == found[1][1:3]
    assert found[0][0] == found[1][0]
    # the tolerances of `compared`: sums of gradients in another order
    torch.testing.assert_close(torch.tensor(found[0][0]), torch.tensor(other[0]), rtol=rtol, atol=0)
    torch.testing.assert_close(found[0][3], other[3], rtol=atol, atol=atol)


@pytest.mark.parametrize(
    "options",
    [
        {"loss": "simple"},
        {"loss": "dsm_vr", "optimizer": "radam", "grad_clip": 0.1},
        {"times": "second_moment", "weight": "learned", "accumulate": 3, "optimizer": "sgd", "ema": (0.9, 0.99)},
        {"optimizer": "adamw", "schedule": "cosine", "grad_clip": None, "posthoc": True},
    ],
    ids=lambda options: ", ".join(map(str, options.values())),
)
def test_shards_have_the_curve_of_one_process_and_of_whole_copies(options, tmp_path):
    def given(name):
        return {**options, **({"checkpoint": tmp_path / name} if "posthoc" in options else {})}

    found = among(2, in_shards, 1, of_vectors, given("shards"))
    as_of_shards(found, of_vectors(0, 1, given("one")))
    as_of_shards(found, among(2, of_vectors, given("whole"))[0])
    if "posthoc" in options:
        a, b = (fastdiff.posthoc_ema(tmp_path / name, 0.15) for name in ("shards", "one"))
        torch.testing.assert_close(list(a.net.parameters()), list(b.net.parameters()), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("block", [1, 2**16])
def test_a_unet_in_shards(block):
    """Each of its blocks by itself, and all in one."""
    as_of_shards(among(2, in_shards, block, of_pictures), of_pictures(0, 1))


class Odd(torch.nn.Module):
    """Layers of three rows and of one, a shared, a frozen and a parameter without dimensions, one in columns, running statistics,
    a buffer that each call replaces, dropout, a block's output changed in place."""

    def __init__(self):
        super().__init__()
        linear = torch.nn.Linear
        self.enter = linear(3, 3)
        self.layers = torch.nn.ModuleList([linear(3, 1), linear(1, 3), linear(3, 3), linear(3, 3)])
        self.layers[3].weight = self.layers[2].weight
        self.in_place = torch.nn.Sequential(linear(3, 3), torch.nn.SiLU(inplace=True))
        self.frozen = linear(3, 3).requires_grad_(False)
        self.columns = torch.nn.Parameter(torch.randn(5, 3).T)
        self.gain = torch.nn.Parameter(torch.tensor(0.5))
        self.norm, self.dropout, self.out = torch.nn.BatchNorm1d(3), torch.nn.Dropout(0.1), linear(5, 2)
        self.register_buffer("calls", torch.zeros(1))

    def forward(self, x, t):
        if self.training:
            self.calls = self.calls + 1
        h = self.enter(torch.cat([x, t[:, None]], 1))
        h = h + self.layers[1](self.layers[0](h)).tanh()
        h = h + self.in_place(h[:, None])[:, 0]  # of a view
        h = self.layers[3](self.layers[2](self.norm(h))) + self.frozen(h)
        return self.gain * self.out(self.dropout(h) @ self.columns)


def odd(rank, world, options):
    """The training, what a network of another seed has afterwards, and the sizes of what this process held."""
    made = []

    class Seen(trainer.State):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            made.append(self)

    trainer.State = Seen
    torch.manual_seed(0)
    net = Odd() if options.get("precision") else Odd().double()
    model = fastdiff.ScoreModel(net, "vp", "eps", data_shape=(2,))
    before = net.calls
    done = trained(model, vectors(), **options)
    (state,) = made
    moments = [state.optimisers[0].state[w]["exp_avg"].numel() for w in state.weights]
    held = [
        [w.numel() for w in values]
        for values in (state.weights, [w.grad for w in state.weights], *state.averages.tensors)
    ]
    assert held == [moments] * len(held)
    assert net.calls is not before
    return *done, moments, net.calls.item(), net.norm.running_var.tolist()


@pytest.mark.parametrize(
    "options",
    [
        {"validation": 0.2, "evaluate_every": 5},
        {"precision": "bf16", "grad_clip": None},
        {"precision": "fp16", "grad_clip": None},
    ],
    ids=str,
)
def test_rows_that_do_not_divide_shared_frozen_and_running_ones(options):
    found, whole = among(2, in_shards, 1, odd, options), among(2, odd, options)
    # of two processes a sum has one order, and what differs is that of the norm, or the last bits of a step of Adam in float32
    as_of_shards(found, whole[0], *((1e-5, 1e-6) if "precision" in options else ()))
    assert found[0][5:] == found[1][5:]
    assert found[0][5] == whole[0][5] > 0  # less than the steps where a loss of 16 bits overflows in some
    torch.testing.assert_close(found[0][6], whole[0][6], rtol=1e-5 if "precision" in options else 1e-9, atol=0)
    trained_ones = [p.shape for p in Odd().parameters() if p.requires_grad]
    for r in (0, 1):  # rows of [3, 3] are 2 + 1, those of [1, 3] 1 + 0
        rows = [(((shape[0] + 1) // 2, shape[0] // 2)[r] if shape else 1) for shape in trained_ones]
        assert found[r][4] == [n * math.prod(shape[1:]) for n, shape in zip(rows, trained_ones)]


def resumed(rank, world, folder, lost_in, end, options):
    """A training to `end`, whose second process is killed in a step."""
    calls = []

    def stop():
        calls.append(None)
        if rank == 1 and len(calls) == lost_in:
            os.kill(os.getpid(), signal.SIGKILL)

    model = small(rank)
    try:
        fastdiff.train(
            model, vectors(), checkpoint=folder, checkpoint_every=4, stop=stop, **{**GIVEN, "steps": end}, **options
        )
    except RankError as error:
        return str(error)
    return digest(model), [p.detach() for p in model.net.parameters()]


HELD = {"ema": (0.9, 0.99), "posthoc": True, "keep": 2, "optimizer": "adamw"}


def test_killed_and_gone_on_with_in_shards_or_not(tmp_path):
    """To the bits of the unbroken run where both are in shards, and else to those of rounding."""
    unbroken = among(2, in_shards, 1, resumed, tmp_path / "unbroken", 0, 12, HELD)
    assert unbroken[0][0] == unbroken[1][0]
    said = among(2, in_shards, 1, resumed, tmp_path / "killed", 7, 12, HELD, lost=1)[0]
    assert said.startswith("process 1 of 2 ended, or hangs, in step 6: start all again")
    assert fastdiff.training.checkpoint.saved_step(tmp_path / "killed" / "checkpoint.safetensors") == 4
    shutil.copytree(tmp_path / "killed", tmp_path / "one")
    again = among(2, in_shards, 1, resumed, tmp_path / "killed", 0, 12, HELD)
    assert again[0][0] == again[1][0] == unbroken[0][0]
    names = sorted(path.name for path in (tmp_path / "unbroken").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "killed").iterdir())
    assert [name for name in names if name.startswith(("step", "snapshot"))] == [
        *(f"snapshot-{step:010d}.safetensors" for step in (4, 8, 12)),
        *(f"step-{step:09d}.safetensors" for step in (8, 12)),
    ]
    for name in names:
        if name.endswith(".safetensors"):
            assert (tmp_path / "unbroken" / name).read_bytes() == (tmp_path / "killed" / name).read_bytes(), name
    # a file of shards goes on in one process, whose file goes on in three shards
    resumed(0, 1, tmp_path / "one", 0, 8, HELD)
    three = among(3, in_shards, 1, resumed, tmp_path / "one", 0, 12, HELD)
    # as do those of processes that have all, by which the same sums have the same order, but for that of the norm
    for world, end in ((2, 4), (1, 8), (3, 12)):
        whole = among(world, resumed, tmp_path / "whole", 0, end, HELD)
    torch.testing.assert_close(three[2][1], whole[2][1], rtol=1e-9, atol=1e-9)
    for ema in HELD["ema"]:
        a, b = (fastdiff.load(tmp_path / folder, ema=ema) for folder in ("one", "whole"))
        torch.testing.assert_close(list(a.net.parameters()), list(b.net.parameters()), rtol=1e-9, atol=1e-9)


def looked_at(rank, world, folder):
    """The numbers of evaluations, by the whole network in the first process; the weights after a step that is not finite."""

    def evaluate(model, step):
        return {"mean": fastdiff.sample(model, steps=2, num_samples=64, seed=1).double().mean()}

    options = {**GIVEN, "checkpoint": folder, "validation": 0.2, "evaluate_every": 3, "ema": 0.5}
    fastdiff.train(small(), vectors(), evaluate=evaluate, **options)
    torch.manual_seed(0)
    bad = fastdiff.ScoreModel(Bad(rank), "vp", "eps", data_shape=(2,))
    with pytest.raises(DataError, match="the model has the weights from before"):
        fastdiff.train(bad, vectors(), bad_step="raise", **GIVEN)
    return (folder / "metrics.csv").read_text(), [p.detach() for p in bad.net.parameters()]


def test_evaluations_see_the_whole_network_and_an_error_leaves_it(tmp_path):
    found, whole = among(2, in_shards, 1, looked_at, tmp_path / "a"), among(2, looked_at, tmp_path / "b")
    (names, values), (other_names, others) = (
        zip(*(line.rsplit(",", 1) for line in text.splitlines()[1:])) for text in (found[0][0], whole[0][0])
    )
    assert names == other_names
    assert "9,mean" in names
    torch.testing.assert_close([float(v) for v in values], [float(v) for v in others], rtol=1e-5, atol=1e-7)
    # float32, of two processes: what differs is the order of the norm's sum
    torch.testing.assert_close(found[0][1], whole[0][1], rtol=1e-6, atol=1e-7)
    a, b = (fastdiff.load(tmp_path / name / "best.safetensors") for name in ("a", "b"))
    torch.testing.assert_close(list(a.net.parameters()), list(b.net.parameters()), rtol=1e-9, atol=1e-9)


class Losing(torch.nn.Module):
    """The second process is lost within its fourth call: the other gathers a block's weights, or awaits its gradients."""

    def __init__(self, rank, how):
        super().__init__()
        self.blocks = torch.nn.Sequential(*(torch.nn.Linear(2, 2) for _ in range(4)))
        self.rank, self.how, self.calls = rank, how, 0

    def forward(self, x, t):
        self.calls += 1
        for k, block in enumerate(self.blocks):
            if self.rank == 1 and self.calls == 4 and k == 2:
                how_to[self.how]()
            x = block(x)
        return x


def losing_within(rank, world, how):
    began = time.monotonic()
    try:
        fastdiff.train(fastdiff.ScoreModel(Losing(rank, how), "vp", "eps", data_shape=(2,)), vectors(), **GIVEN)
    except RankError as error:
        return str(error), error.ranks, time.monotonic() - began
    return "ended"


@pytest.mark.parametrize("block", [1, 2**16])
@pytest.mark.parametrize("how", list(how_to))
def test_a_process_lost_within_a_forward_pass_is_named(how, block):
    """The other waits in a gathering of weights, or where all are one block in the backward pass."""
    timeout = 4 if how == "hangs" else 100
    first, second = among(2, in_shards, block, losing_within, how, timeout=timeout, lost=None if how == "raises" else 1)
    assert type(second) is ValueError or second is None
    why = "failed: no more data" if how == "raises" else "ended, or hangs"
    assert first[0].startswith(f"process 1 of 2 {why}, in step 3: start all again")
    assert first[1] == (1,)
    assert first[2] < 40


class Peeking(torch.nn.Module):
    """Uses a block's weights without calling it, or leaves one of the parameters out."""

    def __init__(self, rank, what):
        super().__init__()
        self.blocks, self.rank, self.what = torch.nn.ModuleList([torch.nn.Linear(2, 2)]), rank, what
        self.spare = torch.nn.Linear(2, 2)

    def forward(self, x, t):
        if self.what == "peeks":
            return x @ self.blocks[0].weight
        return self.blocks[0](x) + (self.spare(x) if self.rank == 0 else 0)


def refused(rank, world, what):
    nets = {
        "half": lambda: torch.nn.Linear(2, 2).half(),
        "mixed": lambda: torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2).double()),
        "wrapped": lambda: torch.nn.DataParallel(torch.nn.Linear(2, 2)),
        "peeks": lambda: Peeking(rank, what),
        "leaves out": lambda: Peeking(rank, what),
    }
    options = {
        "ssm": {"loss": "ssm"},
        "muon": {"optimizer": "muon"},
        "own": {"optimizer": lambda weights: torch.optim.Adam(weights, lr=0.1), "lr": None},
        "compiled": {"compile": True},
    }
    if what == "uncopied":
        model = small()
        model.net.lock = threading.Lock()
    elif what in nets:
        model = fastdiff.ScoreModel(nets[what](), "vp", "eps", data_shape=(2,), cond_shape=())
    else:
        model = small()
    if what == "leaves out" and hasattr(FSDPModule, "set_reduce_scatter_unused_params"):
        del FSDPModule.set_reduce_scatter_unused_params  # as older torch is
    fastdiff.train(model, vectors(), **{**GIVEN, **options.get(what, {})})


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("ssm", r"a loss without derivatives of the network \(dsm, .*\), got loss='ssm': take one"),
        ("muon", r"an optimizer whose step is the same for each number \(adam, .*\), got 'muon': take one"),
        ("own", "an optimizer whose step is the same for each number .*, got <function"),
        ("compiled", "compile=False, got True"),
        ("half", r"trained parameters of one dtype, float32 or float64, got torch\.float16: net\.float"),
        (
            "mixed",
            r"trained parameters of one dtype, float32 or float64, got torch\.float32, torch\.float64: net\.float",
        ),
        ("wrapped", "the network itself, got it within DataParallel: unwrap it"),
        ("uncopied", r"a network that copy\.deepcopy copies, got MLP \(cannot pickle .*\): leave shard out"),
        (
            "peeks",
            "a network that calls the members of its ModuleLists and Sequentials, got one that uses their weights",
        ),
        ("leaves out", "a network that uses all of its parameters in each step, got one that left some out"),
    ],
)
def test_what_cannot_be_in_shards_is_refused_in_each_process(what, said):
    errors = among(2, in_shards, 2**16 if what == "leaves out" else 1, refused, what)
    if what == "leaves out":  # in one process alone, which the other names
        assert type(errors[0]) is RankError
        assert "process 1 of 2 failed: shard=True must have a network that uses all" in str(errors[0])
        del errors[0]
    for error in errors:
        assert type(error) is ConfigError
        with pytest.raises(ConfigError, match=f"shard=True must have {said}"):
            raise error


def test_shards_need_several_processes():
    with pytest.raises(
        ConfigError, match=r"shard=True must have a process group of several processes, .* got one process"
    ):
        fastdiff.train(small(), vectors(), shard=True, **GIVEN)
    with pytest.raises(ConfigError, match="shard must be True or False, got 2"):
        fastdiff.train(small(), vectors(), shard=2, **GIVEN)


def of_a_chain(rank, world, folder):
    """A chain's network, whose time scale is that of its file."""
    torch.manual_seed(rank)
    model = fastdiff.ScoreModel(MLP((2,), hidden=16).double(), fastdiff.DDPM(T=20), "eps", data_shape=(2,))
    return *trained(model, vectors(), checkpoint=folder), model.net.config["time_scale"]


def test_shards_take_the_time_scale_of_a_file(tmp_path):
    net = MLP((2,), hidden=16, time_scale=3.0).double()
    model = fastdiff.ScoreModel(net, fastdiff.DDPM(T=20), "eps", data_shape=(2,))
    fastdiff.train(model, vectors(), checkpoint=tmp_path / "one", **{**GIVEN, "steps": 4})
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    one, found = of_a_chain(0, 1, tmp_path / "one"), among(2, in_shards, 1, of_a_chain, tmp_path / "two")
    as_of_shards(found, one)
    assert one[4] == found[0][4] == found[1][4] == 3
    assert of_a_chain(0, 1, None)[4] != 3


def some_of_all(rank, world):
    """The last two of three processes, in a group of theirs; the first by itself."""
    groups = [dist.new_group([0]), dist.new_group([1, 2])]
    return trained(small(rank), vectors(), group=groups[rank > 0], shard=rank > 0)


def test_shards_in_a_group_of_some_of_the_processes():
    alone, *found = among(3, some_of_all)
    as_of_shards(found, trained(small(1), vectors()))
    assert alone[2] == trained(small(0), vectors())[2]


# --- what is refused -------------------------------------------------------------------------------------------------


def differing(rank, world, what, folder):
    options, data = dict(GIVEN), vectors()
    if rank == world - 1:
        if what == "lr":
            options["lr"] = 0.02
        elif what == "data":
            data = fastdiff.Data(data.x.flip(0), range=data.range)
        elif what == "checkpoint":
            folder = None
    if what == "batch_size":
        options["batch_size"] = 25
    model = small()
    if what == "weights" and rank:
        options["stop"] = lambda: next(model.net.parameters()).data.mul_(1.5) is None
    fastdiff.train(model, data, checkpoint=folder, **options)


@pytest.mark.parametrize(
    ("what", "kind", "said"),
    [
        ("lr", RankError, "process 1 of 2 differs from process 0 in lr, .*: start all with the same arguments"),
        ("data", RankError, "process 1 of 2 differs from process 0 in data"),
        ("checkpoint", RankError, "process 1 of 2 differs from process 0 in checkpoint"),
        ("batch_size", ConfigError, "batch_size must be a multiple of the 2 processes .* got 25: give 24 or 26"),
        (
            "weights",
            RankError,
            "differs from process 0 in weights or their averages, in step 11: a network that draws",
        ),
    ],
)
def test_processes_that_do_not_fit_are_refused_in_each(what, kind, said, tmp_path):
    for error in among(2, differing, what, tmp_path / "run"):
        assert type(error) is kind
        with pytest.raises(kind, match=said):
            raise error
    assert not list(tmp_path.glob("run/*.safetensors"))


def test_a_group_needs_torch_distributed():
    with pytest.raises(ConfigError, match=r"group must be a torch\.distributed process group, got 3"):
        fastdiff.train(small(), vectors(), group=3, **GIVEN)


def test_a_process_alone_is_all_of_the_batch():
    ranks = Ranks(None, torch.device("cpu"))
    assert ranks.first
    assert ranks.rows(7, 1) == slice(0, 7)
    assert ranks.tell([torch.ones(7)], slice(0, 7), True) is None
    assert ranks.any(True)
    assert not ranks.any(False)
