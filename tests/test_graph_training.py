"""Training as CUDA graphs, on a device where there is one (mark `gpu`), and on tapes (tests/test_graphs.py)."""

from __future__ import annotations

import contextlib
import functools

import pytest
import torch
from test_training_step import schedulers, two_groups
from torch import nn
from watching import NOT_WHILE_CAPTURING, Tape, on_tape

import fastdiff
from fastdiff.errors import ConfigError, GraphError
from fastdiff.execution import conditions, graphs
from fastdiff.losses.weights import MinSNR
from fastdiff.networks import MLP, MPUNet, UNet
from fastdiff.training import captured, checkpoint, optimisers

STEPS = 20


@pytest.fixture(params=["tape", pytest.param("cuda", marks=pytest.mark.gpu)])
def captures(request, monkeypatch):
    """A list of how many graphs each capture made; `.device` is where."""

    class Captures(list):
        device = torch.device("cpu" if request.param == "tape" else "cuda")

    seen, capture = Captures(), on_tape if request.param == "tape" else graphs.capture

    def counted(warm, bodies, device):
        made = capture(warm, bodies, device)
        seen.append(len(made))
        return made

    monkeypatch.setattr(graphs, "capture", counted)
    if request.param == "tape":
        known = graphs.obstacle
        monkeypatch.setattr(torch.cuda, "device", contextlib.nullcontext)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: getattr(Tape.capturing, "now", False))
        monkeypatch.setattr(graphs, "obstacle", lambda net, device, *rest: known(net, torch.device("cuda"), *rest))
        # as on a device
        monkeypatch.setattr(conditions, "are_seen", lambda value, looks=False: False)
        monkeypatch.setattr(optimisers, "on_cpu_alike", lambda weights: False)
    else:  # by cuDNN the same kernels in both
        monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
        monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    graphs.clear()
    yield seen
    graphs.clear()


def points(n=96, shape=(2,), **more):
    g = torch.Generator().manual_seed(0)
    return fastdiff.Data(torch.randn(n, *shape, generator=g).clamp(-4, 4), range=(-5.0, 5.0), **more)


def pictures(n=48):
    g = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 3, (n,), generator=g)
    return fastdiff.Data(torch.randint(0, 17, (n, 1, 8, 8), generator=g).byte(), range=(0, 16), bins=17, labels=labels)


class Net(nn.Module):
    """Running statistics, dropout, and a label of which there is one sample, whose steps are not finite."""

    num_classes = 3

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(3, 16), nn.BatchNorm1d(16), nn.SiLU(), nn.Dropout(0.2), nn.Linear(16, 2))
        self.register_buffer("factor", torch.tensor([1.0, 0.5, 1e30]))

    def forward(self, x, t, y):
        return self.layers(torch.cat([x, t[:, None]], 1)) * self.factor[y][:, None] ** 2


def labels(n=96, bad=70):
    given = torch.arange(n) % 2
    given[bad] = 2
    return given


def mlp(sde="vp", **options):
    options = {"hidden": 16, "layers": 1, "shape": (2,), **options}
    return MLP(options.pop("shape"), **options), sde


CASES = {
    "MLP": (mlp, points, {"posthoc": True, "ema": (0.99, 0.9)}),
    "U-Net": (
        lambda: (UNet((1, 8, 8), channels=8, blocks=1, attention=(0,), dropout=0.2, num_classes=3), "edm"),
        pictures,
        {"cond_dropout": 0.3, "augment": "flip", "dequantize": True},
    ),
    "weights brought back": (
        lambda: (
            MPUNet(
                (1, 8, 8), channels=8, multipliers=(1, 2), blocks=1, attention=(1,), taps=(1, 3, 3, 1), num_classes=3
            ),
            "edm",
        ),
        pictures,
        {"cond_dropout": 0.3, "dequantize": True},
    ),
    "half weights brought back": (
        lambda: (
            MPUNet((1, 8, 8), channels=8, multipliers=(1,), blocks=1, attention=(), num_classes=3).bfloat16(),
            "edm",
        ),
        pictures,
        {"dequantize": True},
    ),
    "running statistics, a skipped step": (lambda: (Net(), "vp"), lambda: points(labels=labels()), {"batch_size": 12}),
    "conditions": (
        functools.partial(mlp, cond_shape=(3,)),
        lambda: points(cond=torch.randn(96, 3, generator=torch.Generator().manual_seed(1))),
        {"cond_dropout": 0.2, "ema_rule": "score_sde"},
    ),
    "in parts": (mlp, points, {"batch_size": 12, "accumulate": 3, "grad_clip": None}),
    "bfloat16": (mlp, points, {"precision": "bf16"}),
    "half weights": (lambda: (MLP((2,), hidden=16, layers=1).bfloat16(), "vp"), points, {}),
    "chain": (functools.partial(mlp, "ddpm"), points, {"times": "importance", "weight": "g2"}),
    "ladder": (functools.partial(mlp, fastdiff.NCSN((20.0, 5.0, 1.0, 0.2))), points, {"weight": MinSNR(gamma=3)}),
    "learns its times": (functools.partial(mlp, "ve"), points, {"times": "second_moment", "truncation": "soft"}),
    "control variate": (functools.partial(mlp, "ou"), points, {"loss": "dsm_vr"}),
    "exact trace": (mlp, points, {"loss": "ism"}),
    "sliced": (functools.partial(mlp, "subvp"), points, {"loss": "ssm", "probe": "normal"}),
    "AdamW, cosine": (mlp, points, {"optimizer": "adamw", "schedule": "cosine"}),
    "SGD": (mlp, points, {"optimizer": "sgd", "ema_rule": "constant"}),
    "two groups, a scheduler": (
        mlp,
        points,
        {"lr": None, "optimizer": two_groups, "schedule": lambda o: schedulers.StepLR(o, step_size=4, gamma=0.5)},
    ),
}


def train(captures, case, folder, engine, steps=STEPS, **more):
    make, data, options = CASES[case]
    torch.manual_seed(0)
    net, sde = make()
    prediction = "edm" if isinstance(net, (UNet, MPUNet)) else "eps"
    model = fastdiff.ScoreModel(net.to(captures.device), sde, prediction, data_shape=tuple(data().shape))
    options = {"batch_size": 8, "lr": 1e-2, "warmup": 12, "grad_clip": 0.05, **options, **more}
    done = fastdiff.train(model, data(), steps=steps, engine=engine, checkpoint=folder, checkpoint_every=5, **options)
    return done, *checkpoint.read(folder / checkpoint.FILE, "")


def same(a, b):
    """Losses and all that a checkpoint holds, to the bit."""
    (one, header, tensors), (two, others, found) = a, b
    assert torch.equal(one.loss.nan_to_num(), two.loss.nan_to_num())
    assert one.skipped == two.skipped
    assert header == others
    assert tensors.keys() == found.keys()
    return all(torch.equal(tensors[name], found[name]) for name in tensors)


@pytest.mark.filterwarnings("ignore:the loss or its gradient is not finite")
@pytest.mark.parametrize("case", CASES)
def test_weights_averages_and_moments_are_those_of_eager_steps(captures, case, tmp_path):
    eager = train(captures, case, tmp_path / "eager", "eager")
    assert not captures
    ours = train(captures, case, tmp_path / "graph", "graph")
    assert same(ours, eager)
    assert (eager[0].engine, ours[0].engine) == ("eager", "graph")
    assert "replays CUDA graphs" in ours[0].why
    one_call = CASES[case][2].get("optimizer", "adam") in ("adam", "adamw")
    clips = CASES[case][2].get("grad_clip", 0.05) is not None
    assert captures == [1 + (one_call and 1 + clips)]
    assert eager[0].skipped == (2 if "skipped" in case else 0)


@pytest.mark.parametrize("case", ["MLP", "running statistics, a skipped step"])
@pytest.mark.filterwarnings("ignore:the loss or its gradient is not finite")
def test_a_run_that_was_cut_is_the_same_run(captures, case, tmp_path):
    eager = train(captures, case, tmp_path / "eager", "eager")
    train(captures, case, tmp_path / "graph", "graph", steps=9)
    train(captures, case, tmp_path / "graph", "eager", steps=11)
    _, *ours = train(captures, case, tmp_path / "graph", "graph")
    assert len(captures) == 2
    assert same((eager[0], *ours), eager)


def planted(defect, monkeypatch):
    """A step with what a graph would not repeat, or the host would forget to renew."""
    apply, update = optimisers.Fused.apply, captured.CapturedStep._update
    if defect == "the rate of the capture":
        monkeypatch.setattr(optimisers.Fused, "apply", lambda self, lr: apply(self, self.param_groups[0]["lr"]))
    elif defect == "the batch of the capture":
        monkeypatch.setattr(captured, "_tensors", lambda batch: [batch.cursor, batch.drawn.t])
    elif defect == "the noise of the capture":
        monkeypatch.setattr(captured, "_tensors", lambda batch: [batch.x0, batch.drawn.t])
    elif defect == "never clipped":
        monkeypatch.setattr(captured.CapturedStep, "_update", lambda self, factor: update(self, 1.0))
    elif defect == "clipped a little more":
        monkeypatch.setattr(captured.CapturedStep, "_update", lambda self, factor: update(self, 0.999 * factor))


@pytest.mark.parametrize(
    "defect",
    [
        "none", "the rate of the capture", "the batch of the capture", "the noise of the capture", "never clipped",
        "clipped a little more",
    ],
)  # fmt: skip
def test_the_tape_shows_what_is_planted(captures, defect, monkeypatch, tmp_path):
    eager = train(captures, "MLP", tmp_path / "eager", "eager")
    planted(defect, monkeypatch)
    ours = train(captures, "MLP", tmp_path / "graph", "graph")
    assert captures == [3]
    weights, expected = (run[2]["raw.out.weight"] for run in (ours, eager))
    assert torch.equal(weights, expected) == (defect == "none")


def small(captures, net=None, sde="vp"):
    torch.manual_seed(0)
    net = mlp()[0] if net is None else net
    return fastdiff.ScoreModel(net.to(captures.device), sde, data_shape=(2,))


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.net.parameters()])


def both(captures, make, **options):
    """The weights of eager steps and of graphs."""
    options = {"steps": 8, "batch_size": 8, "lr": 1e-2, "warmup": 4, "ema": 0.0, **options}
    models = [small(captures, make()) for _ in range(2)]
    done = [fastdiff.train(m, points(), engine=e, **options) for m, e in zip(models, ("eager", "auto"))]
    return *map(weights, models), done[1]


class Reading(nn.Module):
    """Reads a number on the host, as a capture cannot."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(2, 2)

    def forward(self, x, t):
        return self.linear(x) * (1.0 if float(t[0]) > 0.5 else 0.5)


class Rebinding(Reading):
    def __init__(self):
        super().__init__()
        self.register_buffer("shift", torch.zeros(2))

    def forward(self, x, t):
        self.shift = self.shift + x.detach().mean(0)
        return self.linear(x) + self.shift


@pytest.mark.parametrize(("make", "why"), [(Reading, NOT_WHILE_CAPTURING), (Rebinding, graphs.REBINDS)])
def test_what_cannot_be_captured_trains_eagerly_after_one_warning(captures, make, why):
    with pytest.warns(RuntimeWarning, match="the step cannot be captured as CUDA graphs") as warned:
        eager, auto, done = both(captures, make)
    assert len(warned) == 1
    assert not captures
    assert torch.equal(eager, auto)
    assert (done.engine, done.why) == (
        "eager",
        f"its loop runs eagerly: the step cannot be captured as CUDA graphs ({why})",
    )
    with pytest.raises(GraphError, match=r"cannot be captured as CUDA graphs \(.*\): use engine='auto' or 'eager'"):
        fastdiff.train(small(captures, make()), points(), steps=8, batch_size=8, engine="graph")


@pytest.mark.parametrize(
    ("options", "net", "why"),
    [
        ({"precision": "fp16"}, mlp()[0], "precision='fp16' scales its loss by a number of the host's"),
        ({"compile": True}, mlp()[0], "compile=True makes kernels of its own, whose capture nobody has tried"),
        ({"weight": "learned"}, mlp()[0], "weight='learned' looks up a table on the host"),
        ({"loss": "vlb"}, mlp()[0], "loss='vlb' asks on the host which samples stand at a chain's last step"),
        ({}, mlp()[0].double(), "the reference reads its row's number on the host"),
    ],
)
def test_what_is_not_tried(captures, options, net, why):
    sde = "ddpm" if "loss" in options else "vp"
    if net.out.weight.dtype == torch.float64 and captures.device.type == "cpu":
        pytest.skip("asks the kernels of a device")
    with pytest.raises(ConfigError, match=f"^engine='graph' cannot run here: {why}; use engine='auto' or 'eager'$"):
        fastdiff.train(small(captures, net, sde), points(), steps=3, batch_size=8, engine="graph", **options)


def test_without_a_device_it_trains_eagerly():
    model = fastdiff.ScoreModel(mlp()[0], "vp", data_shape=(2,))
    done = fastdiff.train(model, points(), steps=4, batch_size=8)
    assert (done.engine, done.why.partition("; ")[2]) == (
        "eager",
        "its loop runs eagerly: CUDA graphs need a CUDA device, not cpu",
    )
    with pytest.raises(ConfigError, match="engine='graph' cannot run here: CUDA graphs need a CUDA device, not cpu"):
        fastdiff.train(model, points(), steps=4, batch_size=8, engine="graph")
    with pytest.raises(ConfigError, match="engine must be one of"):
        fastdiff.train(model, points(), steps=4, batch_size=8, engine="graphs")


def test_what_a_callback_changes_is_seen(captures):
    """Frozen layers, another mode; what it leaves as it is is captured once."""

    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.drop, self.last = nn.Linear(2, 8), nn.Dropout(0.5), nn.Linear(8, 2)

        def forward(self, x, t):
            return self.last(self.drop(torch.tanh(self.first(x))))

    models = []

    def callback(step, loss):
        if step == 100:
            models[-1].net.first.requires_grad_(False)
            models[-1].net.drop.eval()

    for engine in ("eager", "graph"):
        models.append(small(captures, Two()))
        fastdiff.train(
            models[-1], points(), steps=220, batch_size=8, warmup=1, callback=callback, engine=engine, ema=0.0
        )
    assert torch.equal(*map(weights, models))
    assert captures == [3, 1]  # the update of some of the weights is not one call


def test_evaluations_and_the_end_leave_everything_in_order(captures, tmp_path):
    seen = []

    def evaluate(model, step):
        seen.append(fastdiff.sample(model, steps=3, num_samples=4).sum().item())

    states = []
    for engine in ("eager", "graph"):
        torch.manual_seed(5)
        model = small(captures)
        torch.manual_seed(5)
        fastdiff.train(
            model, points(), steps=12, batch_size=8, validation=0.2, evaluate=evaluate, evaluate_every=4, engine=engine
        )
        states.append((weights(model), torch.get_rng_state()))
        if engine == "graph":
            assert all(p.grad is None for p in model.net.parameters())
    assert seen[:3] == seen[3:]
    assert all(map(torch.equal, *states))
    assert [n for n in captures if n == 3] == [3]
