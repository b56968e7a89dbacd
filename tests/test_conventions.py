"""fastdiff.check: what is said wrongly of a network is named, by networks whose denoiser is exact."""

import dataclasses
import warnings

import pytest
import torch

import fastdiff
from fastdiff import Data, ScoreModel, conventions, processes
from fastdiff.cli.commands import main
from fastdiff.conventions import check
from fastdiff.planning import predictions, schedules

SPREAD = 0.1


def centres(low=-1.0, high=1.0, seed=0):
    """Eight points of 6 numbers within [low, high]."""
    unit = torch.rand(8, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return low + (high - low) * unit


def data(points, count=2048):
    """From the mixture of normals about the points, in its own units."""
    generator = torch.Generator().manual_seed(1)
    which = torch.randint(len(points), (count,), generator=generator)
    width = SPREAD * float(points.max() - points.min()) / 2
    return (
        points[which] + width * torch.randn(count, points.shape[1], generator=generator, dtype=torch.float64)
    ).float()


class Exact(torch.nn.Module):
    """E[x_0 | x_t] of the mixture, as the prediction of a network that takes `levels` (time -> α, σ) and counts by `time`."""

    def __init__(self, points, process, prediction, time_input, whole=False):
        super().__init__()
        self.points, self.process, self.prediction, self.whole = points, process, prediction, whole
        t = torch.linspace(
            max(process.t_noisy, 1e-4), process.T, int(process.T) if process.discrete else 20001
        ).double()
        labels = predictions.network_time(time_input, process, t, process.alpha(t), process.sigma(t))
        order = labels.argsort()
        self.t, self.labels = t[order], labels[order]

    def forward(self, x, label):
        if self.whole and label.is_floating_point():
            raise IndexError("tensors used as indices must be long, int, byte or bool tensors")
        nearest = torch.searchsorted(self.labels, label.double().contiguous()).clamp(1, len(self.t) - 1)
        nearest -= ((label - self.labels[nearest - 1]).abs() < (label - self.labels[nearest]).abs()).long()
        t = self.t[nearest][:, None]
        alpha, sigma = self.process.alpha(t), self.process.sigma(t)
        given = x.double().flatten(1)
        if self.prediction == "edm":
            given = given / predictions.input_scale("edm", self.process, alpha, sigma)
        width = SPREAD * float(self.points.max() - self.points.min()) / 2
        variance = alpha**2 * width**2 + sigma**2
        distance = (given[:, None] - alpha[:, None] * self.points).square().sum(-1)
        share = (-distance / (2 * variance)).softmax(1)
        gain = alpha * width**2 / variance
        x0 = share @ self.points + gain * (given - alpha * (share @ self.points))
        source = predictions.convert(
            (1.0, 0.0), predictions.coordinates(self.prediction, self.process, t, alpha, sigma), alpha, sigma
        )
        return (source[0] * given + source[1] * x0).reshape(x.shape).to(x.dtype)


# what is true of a network -> what was said of it instead
WRONG = {
    "prediction": (("ddpm", "eps", "index"), {"prediction": "score"}),
    "prediction x0": (("vp", "x0", "t"), {"prediction": "eps"}),
    "prediction v": (("ddpm", "v", "index"), {"prediction": "eps"}),
    "prediction of the wrong sign": (("vp", "eps", "t"), {"prediction": "scaled_score"}),
    "prediction velocity": (("rectified_flow", "velocity", "t"), {"prediction": "eps"}),
    "velocity of the wrong sign": (("rectified_flow", "data_velocity", "T-t"), {"prediction": "velocity"}),
    "flow of another time": (("rectified_flow", "velocity", "t"), {"time_input": "T-t"}),
    "flow to the data": (
        ("rectified_flow", "data_velocity", "T-t"),
        {"prediction": "velocity", "time_input": "t"},
    ),
    "flow, said to be an SDE": (
        ("rectified_flow", "velocity", "t"),
        {"prediction": "eps", "sde": processes.get("vp")},
    ),
    "time in a thousand": (("vp", "eps", "t*999"), {"time_input": "t"}),
    "time to a thousand": (("ddpm", "eps", "index/T"), {"time_input": "index"}),
    "time of the noise": (("ve", "score", "sigma"), {"time_input": "t"}),
    "time of its logarithm": (("edm", "x0", "log_sigma"), {"time_input": "t"}),
    "time from the noise": (("vp", "eps", "T-t"), {"time_input": "t"}),
    "range": (("ddpm", "eps", "index"), {"data_range": (0.0, 1.0)}),
    "range of bytes": (("ddpm", "eps", "index"), {"data_range": (0.0, 255.0)}),
    "schedule": ((processes.DDPM("cosine"), "eps", "index"), {"sde": processes.DDPM("linear")}),
    "schedule of 100": ((processes.DDPM("linear", T=100), "eps", "index"), {"sde": processes.DDPM("cosine", T=100)}),
    "schedule whose ends are as they are": (
        (processes.DDPM(schedules.quadratic(100, 1e-4, 0.02)), "eps", "index"),
        {"sde": processes.DDPM(schedules.linear(100, 1e-4, 0.02))},
    ),
    "process": (("subvp", "eps", "t"), {"sde": processes.get("ve")}),
    "two": (("vp", "x0", "t"), {"prediction": "eps", "data_range": (0.0, 1.0)}),
    "two more": (("ddpm", "v", "index"), {"prediction": "eps", "sde": processes.DDPM("cosine")}),
    "preconditioned, of another range": (("edm", "edm", "c_noise"), {"prediction": "v", "data_range": (0.0, 1.0)}),
    "preconditioned": (("edm", "edm", "c_noise"), {"prediction": "x0", "time_input": "t"}),
}


def truth(sde, prediction, time_input):
    return processes.get(sde), prediction, time_input


def described(net, process, prediction, time_input, data_range=(-1.0, 1.0)):
    return ScoreModel(net, process, prediction, time_input, data_shape=(6, 1), data_range=data_range)


def images(x, **options):
    return Data(x[:, :, None].clamp(-1.5, 1.5), range=(-1.5, 1.5), **options)


@pytest.fixture
def silent(recwarn):
    yield
    assert not recwarn.list


@pytest.mark.parametrize("name", WRONG)
def test_what_is_said_wrongly_is_named(name):
    facts, wrong = WRONG[name]
    process, prediction, label = truth(*facts)
    points = centres(-1 / 1.5, 1 / 1.5)  # the data's ±1.5 in data_range ±1
    net = Exact(points, process, prediction, label)
    source = images(data(centres()))
    said = dict(sde=process, prediction=prediction, time_input=label, data_range=(-1.0, 1.0)) | wrong
    with pytest.warns(UserWarning, match="likelier than what was said, of what was tried: "):
        found = check(ScoreModel(net, data_shape=(6, 1), **said), source, num_samples=400)
    right = dict(sde=process, prediction=prediction, time_input=label, data_range=(-1.0, 1.0))
    for key in wrong:
        assert found.changes[key] == right[key]
    assert found.changes.keys() == wrong.keys()
    assert found.error > 1.2 * dict(found.tried)[found.likeliest]
    assert found.tried[0][1] < 1
    assert found.verdict in str(found)


@pytest.mark.parametrize("facts", {str(facts): facts for facts, _ in WRONG.values()}.values(), ids=str)
def test_what_is_said_rightly_stands(facts, silent):
    process, prediction, label = truth(*facts)
    net = Exact(centres(-1 / 1.5, 1 / 1.5), process, prediction, label)
    found = check(described(net, process, prediction, label), images(data(centres())))
    assert found.likeliest is None
    assert found.changes == {}
    assert found.error < 1
    assert found.verdict == "what was said fits, and nothing clearly better"


def test_errors_are_those_of_the_best_linear_denoiser_on_normal_data(silent):
    """On N(μ, s²) the exact denoiser is linear: the ratio is 1, but for the draws."""
    x = 0.3 + 0.5 * torch.randn(4096, 3, 1, generator=torch.Generator().manual_seed(0))

    def exact(x_t, t):
        process = processes.VP()
        alpha, sigma = (f(t.double()).view(-1, 1, 1) for f in (process.alpha, process.sigma))
        x0 = 0.3 + alpha * 0.25 * (x_t.double() - alpha * 0.3) / (alpha**2 * 0.25 + sigma**2)
        return ((x_t - alpha * x0) / sigma).to(x_t.dtype)

    model = ScoreModel(exact, "vp", "eps", data_shape=(3, 1), data_range=(-3.0, 3.0))
    found = check(model, Data(x, range=(-3.0, 3.0)), num_samples=4096)
    assert found.errors == pytest.approx([1.0] * 4, rel=0.05)
    assert found.levels == pytest.approx([0.05, 0.25, 1.0, 5.0], rel=0.05)


def test_a_network_that_takes_whole_steps_alone():
    process = processes.DDPM()
    net = Exact(centres(-1 / 1.5, 1 / 1.5), process, "eps", "index", whole=True)
    with pytest.warns(UserWarning, match="time_input='index'"):
        assert check(described(net, process, "eps", "t"), images(data(centres()))).changes == {"time_input": "index"}


def test_a_network_that_looks_at_one_time_of_a_call(silent):
    """As samplers give it."""
    net = Exact(centres(-1 / 1.5, 1 / 1.5), processes.get("vp"), "eps", "t")
    assert check(described(lambda x, t: net(x, t[:1].expand(len(t))), "vp", "eps", "t"), images(data(centres()))).fits


def test_a_network_that_answers_to_nothing_raises_its_own_error():
    def broken(x, t):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        check(described(broken, "vp", "eps", "t"), images(data(centres())))


def test_an_untrained_network_fits_nothing():
    torch.manual_seed(0)
    with pytest.warns(UserWarning, match="nothing that was tried fits"):
        found = check(described(fastdiff.networks.MLP((6, 1), hidden=64), "vp", "eps", "t"), images(data(centres())))
    assert found.likeliest is None
    assert not found.fits
    assert "nothing that was tried fits" in found.verdict


def test_vectors_stay_in_their_own_units(silent):
    points = centres(-4.0, 4.0)
    net = Exact(points, processes.get("edm"), "x0", "sigma")
    model = ScoreModel(net, "edm", "x0", "sigma", data_shape=(6,))
    found = check(model, data(points))
    assert found.likeliest is None
    assert found.error < 1
    assert found.said.data_range == pytest.approx((float(data(points).min()), float(data(points).max())))


def table():
    """Columns in units of their own, the network's (mean, std), and the same data standardized."""
    x = data(centres()).double()
    moments = torch.tensor([288.0, 1e5, -3, 0, 1, 50]), torch.tensor([8.0, 900, 0.01, 1, 2, 30])
    unit = (x - x.mean(0)) / x.std(0, correction=0)
    return unit * moments[1] + moments[0], moments, (x.mean(0), x.std(0, correction=0))


class Standard(Exact):
    """Exact on the standardized table."""

    def __init__(self, moments):
        super().__init__(centres(), processes.get("vp"), "eps", "t")
        self.points = (self.points - moments[0]) / moments[1]
        self.width = SPREAD / moments[1]

    def forward(self, x, t):
        alpha, sigma = (f(t.double())[:, None] for f in (self.process.alpha, self.process.sigma))
        variance = (alpha * self.width) ** 2 + sigma**2
        away = x.double()[:, None] - alpha[:, None] * self.points
        share = (-(away**2 / variance[:, None]).sum(-1) / 2).softmax(1)
        return (sigma * (share[..., None] * away).sum(1) / variance).to(x.dtype)


@pytest.mark.parametrize("case", ["right", "missing", "wrong", "a range instead"])
def test_units_of_a_table(case):
    """Standardized columns: as the model says, or found where it says nothing, or another thing."""
    x, (mean, std), hidden = table()
    net = Standard(hidden)
    low, high = float(x.min()), float(x.max())
    options = {
        "right": {"standardize": (mean.numpy(), std.numpy())},
        "missing": {},
        "wrong": {"standardize": (0.0, 1000.0)},
        "a range instead": {"data_range": (-1.0, 1.0)},
    }[case]
    model = ScoreModel(net, "vp", "eps", "t", data_shape=(6,), **options)
    source = Data(x, range=(low, high))
    if case == "right":
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            found = check(model, source)
        assert found.fits
        assert found.error < 0.9
        return
    with pytest.warns(UserWarning, match=r"likelier .*: standardize=\(mean, std\) of the data, with"):
        found = check(model, source)
    assert found.changes["standardize"][0] == pytest.approx(mean.tolist(), rel=0.05, abs=0.1)
    assert not found.fits


def test_vectors_as_they_are_where_a_range_was_said():
    points = centres()
    model = ScoreModel(Exact(points, processes.get("vp"), "eps", "t"), "vp", "eps", "t", (6,), (-0.3, 0.3))
    x = data(points)
    with pytest.warns(UserWarning, match="data_range="):
        found = check(model, x)
    assert found.changes["data_range"] in ((float(x.min()), float(x.max())), (-1.0, 1.0))


def test_the_order_of_the_data_and_their_conditions_stay_together():
    """Sorted by class; the condition has an entry for each of the data, of which some are drawn."""
    x = torch.cat([data(centres(), 1000), data(centres() + 0.75, 1000)])
    nets = [Exact(centres(-1 / 1.5, 1 / 1.5) + shift, processes.get("vp"), "eps", "t") for shift in (0, 0.5)]

    def net(x, t, context):
        return torch.where(context[:, :, None] == 0, nets[0](x, t), nets[1](x, t))

    model, context = described(net, "vp", "eps", "t"), torch.arange(2.0).repeat_interleave(1000)[:, None]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert check(model, images(x), num_samples=300, cond=context).error < 0.9
    with pytest.raises(fastdiff.errors.ShapeError, match="cond must have an entry for each of the 2000 data"):
        check(model, images(x), num_samples=300, cond=context[:300])


def test_networks_that_refuse_other_times_and_processes_without_a_hash(silent):
    class Own(processes.Process):
        T = 1.0
        __hash__ = None

        def __eq__(self, other):
            return type(other) is Own

        def alpha(self, t):
            return 1 - t

        def sigma(self, t):
            return 1.0 * t

    exact = Exact(centres(-1 / 1.5, 1 / 1.5), Own(), "eps", "t")

    def net(x, t):
        assert t.is_floating_point()
        return exact(x, t)

    assert check(described(net, Own(), "eps", "t"), images(data(centres())), num_samples=300).fits


@pytest.mark.parametrize("sde", ["ve", "edm"])
@pytest.mark.parametrize("label", ["sigma", "log_sigma", "c_noise"])
def test_one_fault_is_named_alone(sde, label):
    """Not with another process, which is the same to a network that is told the noise."""
    net = Exact(centres(1 / 6, 5 / 6), processes.get(sde), "eps", label)
    model = ScoreModel(net, sde, "eps", label, data_shape=(6, 1))
    with pytest.warns(UserWarning, match="data_range"):
        assert check(model, images(data(centres())), num_samples=400).changes == {"data_range": (0.0, 1.0)}


@pytest.mark.parametrize("sde", ["subvp", "ddpm", "ou"])
def test_a_network_that_was_trained_for_a_moment_is_not_called_another(sde):
    torch.manual_seed(0)
    source = images(data(centres()))
    model = ScoreModel(fastdiff.networks.MLP((6, 1), hidden=64), sde, "eps", data_shape=(6, 1))
    fastdiff.train(model, source, steps=100, progress=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert check(model, source, num_samples=500).likeliest is None


@pytest.mark.parametrize("steps", [1, 2])
def test_short_chains(steps):
    process = processes.DDPM([0.5] * steps)
    net = Exact(centres(-1 / 1.5, 1 / 1.5), process, "eps", "index")
    with pytest.warns(UserWarning, match="lowest noise of 'ddpm', sigma/alpha = 1, is above the data's"):
        found = check(described(net, process, "eps", "index"), images(data(centres())), num_samples=300)
    assert found.fits
    assert len(found.levels) == len(set(found.levels))


@pytest.mark.parametrize("steps", [100, 200])
def test_the_length_of_a_chain_is_named(steps):
    process = processes.DDPM(schedules.linear(steps, 1e-4, 0.02))
    net = Exact(centres(-1 / 1.5, 1 / 1.5), process, "eps", "index")
    with pytest.warns(UserWarning, match=rf"sde=DDPM\(schedules.linear\({steps}, 0.0001, 0.02\)\)"):
        assert check(described(net, "ddpm", "eps", "index"), images(data(centres()))).likeliest.sde == process


def test_labels_of_the_data_reach_a_network_that_takes_them():
    points = centres(-1 / 1.5, 1 / 1.5)

    class Labelled(torch.nn.Module):
        num_classes = 2

        def __init__(self):
            super().__init__()
            self.nets = torch.nn.ModuleList(
                Exact(points + shift, processes.get("vp"), "eps", "t") for shift in (0, 0.5)
            )

        def forward(self, x, t, y):
            return torch.where((y == 0).view(-1, 1, 1), self.nets[0](x, t), self.nets[1](x, t))

    x = torch.cat([data(centres(), 1024), data(centres() + 0.75, 1024)])
    model = described(Labelled(), "vp", "eps", "t")
    source = images(x, labels=torch.arange(2).repeat_interleave(1024))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert check(model, source).error < 1
    with pytest.raises(fastdiff.errors.ConfigError, match="y is missing"):
        check(model, images(x))
    with pytest.warns(UserWarning, match="prediction='eps'"):
        check(described(Labelled(), "vp", "v", "t"), source)


def test_the_state_around_is_left_alone():
    net = torch.nn.Sequential(torch.nn.Dropout(0.5))
    net.forward = lambda x, t: x
    state = torch.get_rng_state()
    check(described(net, "vp", "eps", "t"), images(data(centres())), num_samples=16)
    assert net.training
    assert net[0].training
    assert torch.is_grad_enabled()
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (dict(model=lambda x, t: x), r"model must be a ScoreModel or its path, got function"),
        (dict(data=torch.rand(4, 3)), "data_shape"),
        (dict(data=Data(torch.ones(4, 6, 1), range=(0, 1))), "data must hold two samples or more that differ, got 4"),
        (dict(num_samples=1), "num_samples must be"),
        (dict(seed=-1), "seed must be"),
        (dict(cond=torch.zeros(3)), "cond"),
        (dict(sde="vp"), "sde"),
    ],
)  # fmt: skip
def test_bad_arguments(options, says):
    given = dict(model=described(lambda x, t: x, "vp", "eps", "t"), data=images(data(centres()))) | options
    with pytest.raises((fastdiff.errors.FastdiffError, TypeError), match=says):
        check(**given)


def test_the_command_says_the_same(capsys, tmp_path):
    assert main(["check", "digits-vp", "--data", "digits"]) == 0
    shown = capsys.readouterr().out
    assert "what was said fits, and nothing clearly better" in shown
    assert "what was said" in shown

    model = fastdiff.load("digits-vp")
    wrong = ScoreModel(model.net, model.process, "edm", "c_noise", model.data_shape, (0.0, 1.0))
    fastdiff.save(wrong, tmp_path / "wrong.safetensors")
    assert main(["check", str(tmp_path / "wrong.safetensors"), "--data", "digits", "-n", "16"]) == 1
    assert "likelier than what was said, of what was tried: data_range=(-1.0, 1.0)" in capsys.readouterr().out
    untrained = ScoreModel(fastdiff.networks.UNet((1, 8, 8), channels=8, blocks=1), "vp", "eps", data_shape=(1, 8, 8))
    fastdiff.save(untrained, tmp_path / "untrained.safetensors")
    assert main(["check", str(tmp_path / "untrained.safetensors"), "--data", "digits", "-n", "16"]) == 1
    assert "nothing that was tried fits" in capsys.readouterr().out


def test_one_level_that_is_wrong_is_named():
    process = processes.VP()

    class Faulty(Exact):
        def forward(self, x, label):
            sigma = process.sigma(label.double()).view(-1, 1, 1)
            sign = torch.where((sigma > 0.1) & (sigma < 0.3), -1.0, 1.0)
            return super().forward(x, label) * sign.to(x.dtype)

    net = Faulty(centres(-1 / 1.5, 1 / 1.5), process, "eps", "t")
    with pytest.warns(UserWarning, match=r"at noise ratio 0\.16 what was said has a denoising error of"):
        found = described(net, process, "eps", "t").check(images(data(centres())), num_samples=300)
    assert found.likeliest is None
    assert not found.fits
    assert found.error < 1.5


def test_what_is_the_same_to_a_network_is_not_listed():
    """That is told the noise itself, whose process scales its input by EDM's c_in."""
    net = Exact(centres(-1 / 1.5, 1 / 1.5), processes.EDM(), "edm", "c_noise")
    model = ScoreModel(net, "edm", "edm", data_shape=(6, 1), data_range=(-1.0, 1.0))
    found = model.check(images(data(centres())), num_samples=300)
    same = [other for other, error in found.tried if abs(error / found.error - 1) < 1e-6 and other != found.said]
    assert any(other.sde.name == "ve" for other in same)
    assert "sde='ve'" not in str(found)


def test_a_process_that_does_not_cover_the_data_is_told_of():
    short = processes.VE(0.01, 0.5)
    net = Exact(centres(-1 / 1.5, 1 / 1.5), short, "eps", "t")
    with pytest.warns(UserWarning, match="the prior of 've' does not cover"):
        assert check(described(net, short, "eps", "t"), images(data(centres())), num_samples=300).fits


def test_what_can_be_of_one_process_is_not_asked_of_another():
    """What is remembered is of the process, the prediction and the time."""
    model = described(torch.nn.Identity(), "vp", "eps", "t")
    tried = conventions._Denoising(model, images(data(centres())), 16, 16, 0, None)
    said = conventions.Convention("eps", "t", (-1.0, 1.0), None, model.process)
    found, several = set(), [processes.EDM(), processes.DDPM("linear"), *tried.processes(model.process)]
    for _ in range(2):
        for process in several:
            for prediction in predictions.PREDICTIONS:
                for time_input in ("t", "index", "log_sigma", "c_noise", "t*999", "index/T"):
                    each = dataclasses.replace(said, prediction=prediction, time_input=time_input, sde=process)
                    assert tried.can_be(each) == conventions._can_be(each)
                    found.add(tried.can_be(each))
    assert found == {True, False}
