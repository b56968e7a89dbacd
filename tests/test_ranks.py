"""Training in several processes: the batches, losses and weights of one; and what happens where one of them is lost."""

from __future__ import annotations

import hashlib
import os
import signal
import time

import pytest
import torch
import torch.distributed as dist
from processes import among

import fastdiff
from fastdiff.errors import ConfigError, RankError
from fastdiff.networks import MLP, UNet
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
