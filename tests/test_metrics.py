"""fastdiff.metrics against closed forms, exact expectations and other implementations; and `fastdiff evaluate` as a process."""

from __future__ import annotations

import itertools
import json
import math
import pickle
import subprocess
import sys

import numpy as np
import pytest
import scipy.linalg
import scipy.stats
import torch
from PIL import Image
from sklearn.model_selection import KFold
from sklearn.neural_network import MLPClassifier
from torch import nn

import fastdiff
from fastdiff import metrics
from fastdiff.cli import commands
from fastdiff.errors import ConfigError, DataError, DTypeError, FastdiffError, ShapeError


def normals(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def with_moments(mean, root, n, seed=0):
    """n rows whose sample mean is `mean` and whose sample covariance is root rootᵀ, to rounding."""
    rows = normals(n, root.shape[1], seed=seed)
    basis = torch.linalg.qr(rows - rows.mean(0)).Q
    return mean + math.sqrt(n - 1) * basis @ root.T


# --- Fréchet ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("b", [(1.0, 4.0, 0.25), (1.0, 0.0, 0.25), (0.0, 0.0, 0.0)])
def test_frechet_of_commuting_covariances_is_the_closed_form(b):
    """|Δμ|² + Σ (√a − √b)², also where variances are 0; a rotation of both changes nothing."""
    a, mean = torch.tensor([2.0, 0.0, 3.0]).double(), torch.tensor([1.0, -2.0, 0.5]).double()
    b = torch.tensor(b).double()
    turn = torch.linalg.qr(normals(3, 3)).Q
    x = with_moments(torch.zeros(3), torch.diag(a.sqrt()), 40, seed=1) @ turn
    y = with_moments(mean, torch.diag(b.sqrt()), 50, seed=2) @ turn
    wanted = float(mean.square().sum() + (a.sqrt() - b.sqrt()).square().sum())
    assert metrics.frechet(x, y) == pytest.approx(wanted, rel=1e-12)
    assert metrics.frechet(x, x[torch.randperm(40)]) == pytest.approx(0, abs=1e-12)


def by_sqrtm(x, y):
    a, b = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    return ((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(a + b - 2 * scipy.linalg.sqrtm(a @ b).real)


def test_frechet_is_that_of_scipys_matrix_root():
    x, y = normals(60, 5) @ normals(5, 5, seed=1), normals(90, 5, seed=2) @ normals(5, 5, seed=3) + 1
    assert metrics.frechet(x, y) == pytest.approx(by_sqrtm(x.numpy(), y.numpy()), rel=1e-10)


def test_frechet_of_fewer_samples_than_numbers_is_exact_and_said():
    """Also where covariances have no roots worth the name: padding with zeros changes no distance."""
    x, y = normals(6, 4), normals(6, 4, seed=1) * 1.5
    turn = torch.linalg.qr(normals(12, 12, seed=2)).Q
    wide = [torch.nn.functional.pad(z, (0, 8)) @ turn for z in (x, y)]
    with pytest.warns(UserWarning, match="singular covariance"):
        found = metrics.frechet(*wide)
    assert found == pytest.approx(metrics.frechet(x, y), rel=1e-12)


# --- kernel -------------------------------------------------------------------------------------------------------------------


def cubic(u, v):
    return (float(np.dot(u, v)) / len(u) + 1) ** 3


def unbiased(x, y):
    n, m = len(x), len(y)
    within = [sum(cubic(z[i], z[j]) for i, j in itertools.permutations(range(len(z)), 2)) for z in (x, y)]
    across = sum(cubic(u, v) for u in x for v in y)
    return within[0] / (n * (n - 1)) + within[1] / (m * (m - 1)) - 2 * across / (n * m)


def test_kernel_is_the_sum_over_pairs_and_its_error_the_jackknife(monkeypatch):
    monkeypatch.setattr("fastdiff.metrics.distances.BLOCK", 30)  # several blocks
    x, y = normals(9, 2).numpy(), normals(11, 2, seed=1).numpy() + 0.5
    found = metrics.kernel(x, y)
    assert found == pytest.approx(unbiased(x, y), rel=1e-12)
    left = [[unbiased(np.delete(x, i, 0), y) for i in range(9)], [unbiased(x, np.delete(y, j, 0)) for j in range(11)]]
    wanted = sum((len(each) - 1) * np.var(each) for each in left)
    assert found.stderr == pytest.approx(math.sqrt(wanted), rel=1e-9)


def test_kernel_has_the_population_value_as_expectation():
    """Over every sample of three that two distributions on {0, 1, 2} can give, by its probability."""
    p, q = np.array([0.2, 0.5, 0.3]), np.array([0.5, 0.25, 0.25])
    k = np.array([[cubic([u], [v]) for v in range(3)] for u in range(3)])
    samples = list(itertools.product(range(3), repeat=3))
    expected = 0.0
    for x in itertools.combinations_with_replacement(range(3), 3):
        for y in itertools.combinations_with_replacement(range(3), 3):
            weight = sum(np.prod(p[list(s)]) for s in samples if sorted(s) == list(x))
            weight *= sum(np.prod(q[list(s)]) for s in samples if sorted(s) == list(y))
            expected += weight * metrics.kernel(np.array(x)[:, None], np.array(y)[:, None])
    assert expected == pytest.approx((p - q) @ k @ (p - q), rel=1e-12)


def test_kernel_of_one_distribution_is_0_on_average_within_its_error():
    found = [metrics.kernel(normals(30, 3, seed=2 * i), normals(40, 3, seed=2 * i + 1)) for i in range(300)]
    spread = np.std(found)
    assert abs(np.mean(found)) < 4 * spread / math.sqrt(300)
    # the jackknife's variance is up to twice the estimate's; its own spread over 300 is some 10 %
    assert 0.9 < np.sqrt(np.mean([each.stderr**2 for each in found])) / spread < 1.6


# --- precision, recall, neighbours --------------------------------------------------------------------------------------------


def line(*numbers):
    return torch.tensor(numbers, dtype=torch.float64)[:, None]


def test_precision_and_recall_of_sets_with_known_answers():
    grid = line(*range(10))
    for scaled in (grid, 0.1 * grid + 1 / 3):  # rims included, also where rounding moves them
        assert metrics.precision_recall(scaled, scaled, k=1) == (1, 1, pytest.approx((8 * 3 + 2 * 2) / 10), 1)
    assert metrics.precision_recall(grid, grid + 1000) == (0, 0, 0, 0)
    # half of the samples upon five of the data, half far away: those five are recalled, and their neighbours by ties
    x = line(0, 1, 2, 3, 4, 30, 31, 32, 33, 34)
    found = metrics.precision_recall(x, grid, k=1)
    assert (found.precision, found.recall, found.coverage) == (0.5, 0.6, 0.6)


def test_precision_and_recall_by_brute_force(monkeypatch):
    monkeypatch.setattr("fastdiff.metrics.distances.BLOCK", 100)
    x, y = normals(30, 3).numpy(), normals(40, 3, seed=1).numpy() * 0.7
    k = 4

    def radii(z):
        return [sorted(np.linalg.norm(z - point, axis=1))[k] for point in z]

    inside = np.array([[np.linalg.norm(u - v) <= r for v, r in zip(y, radii(y))] for u in x])
    recalled = [any(np.linalg.norm(u - v) <= r for u, r in zip(x, radii(x))) for v in y]
    wanted = (inside.any(1).mean(), np.mean(recalled), inside.sum() / (k * len(x)), inside.any(0).mean())
    assert metrics.precision_recall(x, y, k=k) == pytest.approx(wanted, abs=1e-12)


def test_nearest_is_brute_force_and_finds_copies(monkeypatch):
    monkeypatch.setattr("fastdiff.metrics.distances.BLOCK", 100)
    data = normals(50, 6) + 100  # where products alone would leave few digits
    x = torch.cat([data[[3, 41]], data[[7]] + 1e-9, normals(20, 6, seed=1) + 100])
    found = metrics.nearest(x, data)
    apart = (x[:, None] - data).norm(dim=-1)
    near, second = apart.sort(1).values[:, :2].T
    assert torch.equal(found.indices, apart.argmin(1))
    torch.testing.assert_close(found.distances, near, rtol=1e-12, atol=0)
    torch.testing.assert_close(found.ratios, near / second, rtol=1e-12, atol=0)
    assert found.distances[:2].tolist() == found.ratios[:2].tolist() == [0, 0]
    assert metrics.nearest(x[:1], data).indices.tolist() == [3]
    twice = metrics.nearest(data[:4], torch.cat([data, data]))
    assert twice.memorized == 1  # though the second nearest is as near


def test_independent_samples_are_memorized_by_chance_as_often_as_geometry_says():
    """About a point of a Poisson process the ratio r of first to second distance has P(r < 1/3) = 3⁻ᵈ."""
    for d in (1, 2):
        found = metrics.nearest(torch.rand(4000, d).double(), torch.rand(4000, d).double()).memorized
        assert found == pytest.approx(3**-d, abs=4 * math.sqrt(3**-d / 4000))


# --- sliced Wasserstein -------------------------------------------------------------------------------------------------------


def test_sliced_wasserstein_of_a_shift_is_its_length_over_the_root_of_d():
    x, shift = normals(50, 3), torch.tensor([1.0, 2.0, -0.5]).double()
    found = metrics.sliced_wasserstein(x, x[torch.randperm(50)] + shift, projections=2000)
    assert found == pytest.approx(float(shift.norm()) / math.sqrt(3), abs=4 * found.stderr)
    assert metrics.sliced_wasserstein(x, x) == 0
    some = [metrics.sliced_wasserstein(x, x + shift, projections=100, seed=seed) for seed in range(200)]
    assert np.mean([each.stderr for each in some]) == pytest.approx(np.std(some), rel=4 / math.sqrt(400))


def test_wasserstein_along_a_line_is_exact_for_sets_of_unequal_size():
    """The only directions are ±1; the same sets with each point repeated to equal numbers, and scipy's W₁ of two-point sets."""
    x, y = normals(12, 1), normals(9, 1, seed=1) * 2
    together = torch.cat([x.sort(0).values.repeat_interleave(3, 0), y.sort(0).values.repeat_interleave(4, 0)], 1)
    wanted = float((together[:, 0] - together[:, 1]).square().mean().sqrt())
    found = metrics.sliced_wasserstein(x, y, projections=10)
    assert found == pytest.approx(wanted, rel=1e-12)
    assert found.stderr < 1e-12
    a, b = np.array([0.0, 1.0]), np.array([1.0, 1.0, 1.0, 0.0])  # of moves of 0 and 1, W₂² is W₁
    square = metrics.sliced_wasserstein(a[:, None], b[:, None]) ** 2
    assert square == pytest.approx(scipy.stats.wasserstein_distance(a, b), rel=1e-12)


# --- classifiers --------------------------------------------------------------------------------------------------------------


def test_c2st_has_the_settings_of_the_benchmark():
    x, y = normals(60, 2).float(), normals(60, 2, seed=1).float() + 3
    mean, std = x.mean(0), x.std(0)
    both, whose = np.concatenate([((z - mean) / std).numpy() for z in (x, y)]), np.repeat([0, 1], 60)
    scores = []
    for fit, held in KFold(5, shuffle=True, random_state=1).split(both):
        net = MLPClassifier((20, 20), activation="relu", solver="adam", max_iter=10000, random_state=1)
        scores.append(np.mean(net.fit(both[fit], whose[fit]).predict(both[held]) == whose[held]))
    found = metrics.c2st(x, y)
    assert found == pytest.approx(np.mean(scores), abs=1e-12)
    assert found.stderr == pytest.approx(math.sqrt(found * (1 - found) / 120))


@pytest.mark.parametrize("shift", [0.0, 2.0])
def test_c2st_of_shifted_gaussians_is_the_bayes_accuracy(shift):
    """Φ(δ/2) of two Gaussians δ apart; ½ where they are one."""
    x, y = normals(1000, 1).float(), normals(1000, 1, seed=1).float() + shift
    found = metrics.c2st(x, y)
    assert found == pytest.approx(scipy.stats.norm.cdf(shift / 2), abs=4 * found.stderr)


def test_c2st_without_scikit_learn_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.model_selection", None)
    with pytest.raises(ImportError, match=r"pip install 'fastdiff\[metrics\]'"):
        metrics.c2st(normals(9, 2), normals(9, 2))


@pytest.fixture(scope="module")
def digits():
    return fastdiff.load_data("digits")


def test_a_classifier_is_of_its_seed_and_tells_its_classes_apart(digits):
    before = torch.random.get_rng_state()
    with torch.no_grad():  # as a caller may have it
        net = metrics.classifier(digits, steps=100)
    assert torch.equal(before, torch.random.get_rng_state())
    assert net.accuracy > 0.9
    x = digits.x[:50].float()
    assert net(x).shape == (50, 64)
    assert torch.equal(net(x), metrics.classifier(digits, steps=100)(x))
    assert not torch.equal(net(x), metrics.classifier(digits, steps=1, seed=1)(x))
    features = net(digits.x.float())
    assert features.mean(0).abs().max() < 1e-4
    assert ((features.std(0) - 1).abs() < 1e-3).all()


def test_a_classifier_of_vectors_and_as_a_name():
    labels = torch.arange(200) % 2
    x = normals(200, 3).float() * 0.1 + labels[:, None]
    data = fastdiff.Data(x, labels)
    assert metrics.classifier(data, steps=50).accuracy == 1
    assert metrics.frechet(x[:100], data, features="classifier") == metrics.frechet(
        x[:100], x, features=metrics.classifier(data)
    )
    for shape in ((2, 9), (1, 4, 4, 4), (1, 2, 2, 2, 2)):
        signals = fastdiff.Data(normals(40, *shape).float(), labels[:40])
        assert metrics.classifier(signals, steps=1)(signals.x).shape == (40, 64)


# --- features -----------------------------------------------------------------------------------------------------------------


def test_a_network_is_asked_in_batches_in_evaluation_mode_and_left_as_it_was(monkeypatch):
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5), nn.Flatten())
    net[1].running_mean.fill_(0.3)
    x, y = normals(23, 1, 4, 4).float(), normals(31, 1, 4, 4, seed=1).float()
    with torch.no_grad():
        wanted = metrics.frechet(*(net.eval()(z) for z in (x, y)))
    net.train()
    for size in (7, 256):
        monkeypatch.setattr("fastdiff.metrics.features.BATCH", size)
        assert metrics.frechet(x, y, features=net) == pytest.approx(wanted, rel=1e-5)
    assert net.training
    assert all(parameter.requires_grad and parameter.grad is None for parameter in net.parameters())


def test_a_function_of_samples_gives_the_features():
    x, y = normals(20, 2, 3), normals(20, 2, 3, seed=1)
    wanted = metrics.frechet(x.sum(2), y.sum(2))
    assert metrics.frechet(x, y, features=lambda z: z.sum(2)) == wanted
    assert metrics.frechet(x, y, features=lambda z: z.sum(2).numpy()) == wanted


def test_an_extractor_registered_with_torch_fidelity_by_its_name():
    fidelity = pytest.importorskip("torch_fidelity")

    class Mean(fidelity.FeatureExtractorBase):
        def __init__(self, name, features_list, **options):
            super().__init__(name, features_list)

        @staticmethod
        def get_provided_features_list():
            return ("3",)

        @staticmethod
        def get_default_feature_layer_for_metric(metric):
            return "3"

        def forward(self, x):
            return (x.float().mean((2, 3)),)

    if "mean-of-channels" not in fidelity.registry.FEATURE_EXTRACTORS_REGISTRY:
        fidelity.register_feature_extractor("mean-of-channels", Mean)
    x, y = (torch.randint(256, (20, 3, 4, 4), dtype=torch.uint8) for _ in range(2))
    wanted = metrics.frechet(*(z.float().mean((2, 3)) for z in (x, y)))
    assert metrics.frechet(x, y, features="mean-of-channels") == pytest.approx(wanted, rel=1e-6)
    with pytest.raises(ConfigError, match="download"):
        metrics.frechet(x, y, features="inception-v3-compat")
    with pytest.raises(DTypeError, match="uint8"):
        metrics.frechet(x.float(), y.float(), features="mean-of-channels")


# --- inputs -------------------------------------------------------------------------------------------------------------------

TWO = {
    "frechet": metrics.frechet, "kernel": metrics.kernel, "precision_recall": metrics.precision_recall,
    "nearest": metrics.nearest, "sliced_wasserstein": metrics.sliced_wasserstein, "c2st": metrics.c2st,
}  # fmt: skip


@pytest.mark.parametrize("name", [name for name in TWO if name != "c2st"])  # whose folds are of the order
def test_neither_the_order_of_rows_nor_the_container_matters(name):
    x, y = normals(30, 2, 2), normals(40, 2, 2, seed=1)
    order = torch.randperm(30)
    wanted = TWO[name](x, y)
    for u, v in ((x.numpy(), y.numpy()), (x, fastdiff.Data(y)), (x.flatten(1), y.flatten(1)), (x, y.flip(0))):
        found = TWO[name](u, v)
        if name == "nearest":
            torch.testing.assert_close(found.distances, wanted.distances)
        else:
            assert found == pytest.approx(wanted, rel=1e-9)
    found = TWO[name](x[order], y)
    if name == "nearest":
        torch.testing.assert_close(found.distances, wanted.distances[order])
        assert torch.equal(found.indices, wanted.indices[order])
    else:
        assert found == pytest.approx(wanted, rel=1e-9)


X = normals(20, 2).float()
BAD = {
    "of other shapes": (X, normals(20, 3), ShapeError), "one axis": (X[:, 0], X[:, 0], ShapeError),
    "a single sample": (X, X[:1], DataError), "no numbers": (X[:, :0], X[:, :0], DataError),
    "NaN": (torch.where(X > 1, math.nan, X), X, DataError), "infinite": (X, X / 0, DataError),
    "bytes beside floats": ((X * 9).byte(), X, DTypeError), "a list": (X.tolist(), X, DTypeError),
    "complex": (X + 1j, X, DTypeError), "bool": (X > 0, X > 0, DTypeError), "objects": (X.numpy().astype(object), X, DTypeError),
    "meta": (X.to("meta"), X, FastdiffError), "sparse": (X.to_sparse(), X, ShapeError), "None": (None, X, DTypeError),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
@pytest.mark.parametrize("name", TWO)
def test_bad_input_is_one_sentence(name, case):
    x, y, kind = BAD[case]
    if name == "sliced_wasserstein" and case == "a single sample":
        return  # a point has a distance along a line
    with pytest.raises(kind) as caught:
        TWO[name](x, y)
    assert isinstance(caught.value, FastdiffError)
    assert str(caught.value).isprintable()


OPTIONS = [
    (metrics.frechet, {"features": "pixel"}, "pixels"), (metrics.frechet, {"features": "xyzzy"}, "pixels"),
    (metrics.frechet, {"features": 3}, "function"), (metrics.frechet, {"features": "classifier"}, "labels"),
    (metrics.frechet, {"features": lambda x: x[:, 0]}, "[n, d]"), (metrics.frechet, {"features": lambda x: x[:1]}, "[n, d]"),
    (metrics.frechet, {"features": lambda x: x / 0}, "finite"), (metrics.precision_recall, {"k": 20}, "k must be"),
    (metrics.sliced_wasserstein, {"projections": 1}, "projections"), (metrics.c2st, {"folds": 1}, "folds"),
    (metrics.c2st, {"y": X[:10]}, "10 of each"), (metrics.c2st, {"seed": -1}, "seed"),
]  # fmt: skip


@pytest.mark.parametrize(("function", "options", "words"), OPTIONS)
def test_a_bad_option_is_named(function, options, words):
    with pytest.raises(FastdiffError) as caught:
        function(**{"x": X, "y": X, **options})
    assert words in str(caught.value)


def test_other_units_are_said_where_they_can_be_seen(digits):
    model_range = (-1.0, 1.0)
    x = digits.batch(range(300), model_range)
    with pytest.raises(DTypeError, match=r"data\.batch\(range\(len\(data\)\), model\.data_range\)"):
        metrics.frechet(x, digits)
    metrics.frechet(x, digits.batch(range(len(digits)), model_range))  # the way out
    for low, high in ((0, 255), (0, 1), (0, 16)):
        with pytest.warns(UserWarning, match="two units"):
            metrics.frechet(x, digits.batch(range(300), (low, high)))
    metrics.frechet(x * 1.3, x)


def test_an_estimate_is_a_float_that_can_be_kept():
    found = metrics.kernel(X, X)
    kept = pickle.loads(pickle.dumps(found))
    assert (kept, kept.stderr) == (found, found.stderr)
    assert json.loads(json.dumps(found)) == found
    assert "±" in repr(found)


# --- coverage -----------------------------------------------------------------------------------------------------------------


def conjugate(n, draws, width=1.0, d=2, seed=0):
    """θ ~ N(0, 1), x ~ N(θ, ¼): the posterior is N(0.8 x, 0.2); drawn from with `width` times its deviation."""
    theta = normals(n, d, seed=seed)
    x = theta + 0.5 * normals(n, d, seed=seed + 1)
    return theta, 0.8 * x[:, None] + width * math.sqrt(0.2) * normals(n, draws, d, seed=seed + 2)


def test_ranks_are_counted_and_tested_by_pearsons_chi_square():
    theta, draws = conjugate(97, 30)
    found = metrics.sbc_ranks(theta, draws)
    wanted = [[sum(draws[i, :, k] < theta[i, k]) for k in range(2)] for i in range(97)]
    assert found.ranks.tolist() == wanted
    assert (found.draws, found.bins) == (30, 15)
    for k in range(2):
        places = np.arange(31) * 15 // 31
        expected = np.bincount(places) * 97 / 31
        statistic, p = scipy.stats.chisquare(np.bincount(places[found.ranks[:, k]], minlength=15), expected)
        assert found.chi_square[k] == pytest.approx(statistic)
        assert found.p_values[k] == pytest.approx(p)


@pytest.mark.parametrize("n", [10, 23, 100, 400])
@pytest.mark.parametrize("draws", [2, 9, 24, 100])
def test_each_bin_is_expected_five_times(n, draws):
    """As Pearson's test needs; two bins at least, as many as can be, up to twenty."""
    found = metrics.sbc_ranks(*conjugate(n, draws))

    def fewest(bins):
        return np.bincount(np.arange(draws + 1) * bins // (draws + 1), minlength=bins).min() * n / (draws + 1)

    assert found.bins == 2 or fewest(found.bins) >= 5
    assert found.bins == 20 or fewest(found.bins + 1) < 5
    assert torch.isfinite(found.p_values).all()
    assert repr(found).startswith(f"SBC({n} simulations, {draws} draws, {found.bins} bins, p-values 0.")
    assert repr(metrics.tarp(*conjugate(n, draws))).startswith(f"TARP({n} simulations, {draws} draws, p-value ")


def test_ranks_of_the_exact_posterior_are_uniform_and_of_one_too_narrow_are_not():
    """p-values of the exact posterior are themselves about uniform: their mean over 80 within 4/√(12·80) of ½."""
    found = torch.stack([metrics.sbc_ranks(*conjugate(200, 63, seed=10 * i)).p_values for i in range(40)])
    assert abs(float(found.mean()) - 0.5) < 4 / math.sqrt(12 * 80)
    narrow = metrics.sbc_ranks(*conjugate(200, 63, width=0.5))
    assert narrow.p_values.max() < 1e-6
    ends = ((narrow.ranks < 8) | (narrow.ranks > 55)).double().mean()
    assert ends > 0.4  # of a quarter of the ranks


def test_ties_are_broken_evenly():
    found = metrics.sbc_ranks(torch.zeros(2000, 1), torch.zeros(2000, 7, 1))
    counts = torch.bincount(found.ranks[:, 0], minlength=8)
    assert ((counts - 250).abs() < 4 * math.sqrt(250)).all()
    assert torch.equal(found.ranks, metrics.sbc_ranks(torch.zeros(2000, 1), torch.zeros(2000, 7, 1)).ranks)


def test_expected_coverage_of_the_exact_posterior_is_the_credibility():
    """Kolmogorov's bound at a probability of 1e-4; of a posterior too narrow by 2 the curve is an S."""
    exact = metrics.tarp(*conjugate(1000, 99, d=3))
    assert exact.credibility.tolist() == pytest.approx([k / 100 for k in range(101)])
    assert (exact.coverage - exact.credibility).abs().max() < 2.23 / math.sqrt(1000)
    assert exact.p_value > 1e-4
    narrow = metrics.tarp(*conjugate(1000, 99, width=0.5, d=3))
    assert narrow.coverage[90] < 0.8
    assert narrow.coverage[10] > 0.15
    assert narrow.p_value < 1e-6
    assert not torch.equal(exact.ranks, metrics.tarp(*conjugate(1000, 99, d=3), seed=1).ranks)


def test_far_references_on_a_line_give_the_ranks_of_calibration():
    """From a point far below, nearer is smaller."""
    theta, draws = conjugate(50, 40, d=1)
    found = metrics.tarp(theta, draws, references=torch.full((50, 1), -1e4))
    assert torch.equal(found.ranks, metrics.sbc_ranks(theta, draws).ranks[:, 0])
    share = [(found.ranks < k).double().mean().item() for k in range(42)]
    assert found.coverage.tolist() == pytest.approx(share)


def test_the_picture_of_coverage(tmp_path):
    theta, draws = conjugate(60, 20)
    metrics.coverage_plot(tmp_path / "c.png", theta, draws, names=["mass", "radius"])
    with Image.open(tmp_path / "c.png") as picture:
        assert np.asarray(picture.convert("L")).std() > 10
    given = (
        ({"names": ["a"]}, "names"),
        ({"names": "ab"}, "names must be a list"),
        ({"names": 3}, "names must be a list"),
    )
    for options, words in (*given, ({"path": tmp_path / "c.xyz"}, "path")):
        with pytest.raises(ConfigError, match=words):
            metrics.coverage_plot(**{"path": tmp_path / "d.png", "theta": theta, "draws": draws, **options})
    assert [path.name for path in tmp_path.iterdir()] == ["c.png"]


@pytest.mark.parametrize("function", [metrics.sbc_ranks, metrics.tarp])
def test_bad_simulations_are_one_sentence(function):
    theta, draws = conjugate(20, 5)
    for given, words in (
        ((theta, draws[:, 0]), "[n, L, d]"), ((theta[:19], draws), "[n, L, d]"), ((theta[:9], draws[:9]), "at least 10"),
        ((theta / 0, draws), "finite"), ((theta, draws[:, :1]), "draws must be two or more of each"),
        ((theta, draws.transpose(0, 1)), "got [20, 2] and [5, 20, 2]: use draws.transpose(0, 1)"),
        ((theta[:, 0], draws), "theta[:, None]"), ((theta, draws.tolist()), "tensor"),
    ):  # fmt: skip
        with pytest.raises(FastdiffError) as caught:
            function(*given)
        assert words in str(caught.value)
    with pytest.raises(ShapeError, match="references"):
        metrics.tarp(theta, draws, references=theta[:3])


# --- fastdiff evaluate --------------------------------------------------------------------------------------------------------


def evaluate(folder, *words, status=0):
    command = [sys.executable, "-m", "fastdiff", "evaluate", *map(str, words)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == status, done.stderr
    return done


RUN = ("--sampler", "dpmpp_2m", "--steps", "8")


def test_a_models_samples_beside_data_and_data_beside_data(tmp_path, digits):
    done = evaluate(tmp_path, "digits-vp", "--data", "digits", "-n", "200", *RUN, "--out", "r.json", "--plot", "p.png")
    model = fastdiff.load("digits-vp")
    x = fastdiff.sample(model, sampler="dpmpp_2m", steps=8, num_samples=200)
    y, z = (half.batch(range(200), model.data_range) for half in digits.split(0.5))
    report = json.loads((tmp_path / "r.json").read_text())
    assert (report["n"], report["seed"]) == (200, 0)
    for name, wanted in {
        "frechet": metrics.frechet, "kernel": metrics.kernel, "sliced_wasserstein": metrics.sliced_wasserstein,
        "recall": lambda a, b: metrics.precision_recall(a, b).recall,
        "nearest (median)": lambda a, b: float(metrics.nearest(a, b).distances.median()),
    }.items():  # fmt: skip
        for whose, rows in (("samples", x), ("data", z)):
            assert report["metrics"][name][whose]["value"] == pytest.approx(wanted(rows, y), rel=1e-4, abs=1e-9), name
        assert re_row(done.stdout, name)
    assert report["metrics"]["kernel"]["samples"]["stderr"] > 0
    with Image.open(tmp_path / "p.png") as picture:
        assert np.asarray(picture.convert("L")).std() > 10
    assert done.stderr == ""


def re_row(text, name):
    return next((line for line in text.splitlines() if line.startswith(name)), None)


@pytest.fixture
def command(tmp_path, monkeypatch, capsys):
    """`fastdiff evaluate` in this process, within tmp_path: (exit status, what it said)."""
    monkeypatch.chdir(tmp_path)

    def call(*words):
        status = commands.main(["evaluate", *map(str, words)])
        return status, "".join(capsys.readouterr())

    return call


def test_samples_of_a_file_are_those_of_the_model(tmp_path, command):
    x = fastdiff.sample("digits-vp", sampler="dpmpp_2m", steps=8, num_samples=100, seed=4)
    np.save(tmp_path / "x.npy", x.numpy())
    start = ("--data", "digits", "-n", 100, "--seed", 4, "--metrics", "frechet,nearest", "--quantise")
    assert command("digits-vp", *start, *RUN, "--batch-size", 33, "--out", "a.json")[0] == 0
    status, said = command("x.npy", *start)
    assert status == 2
    assert "--samples-range -1 1" in said  # floats do not say what stands for 0 … 16
    assert command("x.npy", *start, "--samples-range", -1, 1, "--out", "b.json")[0] == 0
    a, b = (json.loads((tmp_path / name).read_text())["metrics"] for name in ("a.json", "b.json"))
    assert a["frechet"]["samples"]["value"] == pytest.approx(b["frechet"]["samples"]["value"], rel=1e-4)
    assert a["frechet"]["data"] == b["frechet"]["data"]
    digits = fastdiff.load_data("digits")
    np.save(tmp_path / "levels.npy", digits.quantise(x, (-1, 1)).numpy())
    assert command("levels.npy", *start, "--out", "c.json")[0] == 0
    c = json.loads((tmp_path / "c.json").read_text())["metrics"]  # bytes beside bytes, 8 times as far
    assert c["frechet"]["samples"]["value"] == pytest.approx(64 * b["frechet"]["samples"]["value"], rel=1e-6)
    assert command("x.npy", *start, "--steps", 5)[0] == 2
    assert command("digits-vp", *start, "--samples-range", -1, 1)[0] == 2


def test_vectors_are_compared_in_their_own_units_with_copies_of_the_training_data_found(tmp_path, command):
    rng = np.random.default_rng(0)
    table = (rng.normal(size=(400, 2)) * [1, 30] + [0, 500]).astype(np.float32)
    for name, rows in (("train", table[:200]), ("held", table[200:]), ("copies", table[:100])):
        np.save(tmp_path / f"{name}.npy", rows)
    assert (
        command(
            "copies.npy", "--data", "held.npy", "--range", -500, 1000, "--train", "train.npy", "--out", "r.json",
            "--plot", "p.png",
        )[0]
        == 0
    )  # fmt: skip
    found = json.loads((tmp_path / "r.json").read_text())
    assert found["metrics"]["memorized (share)"]["samples"]["value"] == 1
    assert found["metrics"]["memorized (share)"]["data"]["value"] < 0.3
    assert found["metrics"]["nearest (median)"]["samples"]["value"] == 0
    assert (tmp_path / "p.png").stat().st_size > 5000


def test_a_model_of_classes_is_asked_for_the_labels_of_the_data(tmp_path, command, monkeypatch):
    labels = torch.tensor([0, 1, 1, 1]).repeat(20)
    data = (labels[:, None] * 2 - 1 + 0.1 * normals(80, 2)).float()
    np.savez(tmp_path / "d.npz", x=data.numpy(), y=labels.numpy())
    net = fastdiff.networks.MLP((2,), hidden=8, layers=1, num_classes=2)
    fastdiff.save(
        fastdiff.ScoreModel(net, "vp", "edm", data_shape=(2,), standardize=(0, 1), data_range=(-2, 2)), tmp_path / "m"
    )
    asked = []
    sample = fastdiff.cli.evaluation_report.sample
    monkeypatch.setattr(
        "fastdiff.cli.evaluation_report.sample", lambda *a, **k: asked.append(k["cond"]) or sample(*a, **k)
    )
    status, said = command(
        "m.safetensors", "--data", "d.npz", "--range", -2, 2, "-n", 40, "--steps", 3, "--metrics", "kernel"
    )
    assert status == 0, said
    assert torch.equal(asked[0], fastdiff.load_data("d.npz").split(0.5)[0].labels)
    np.save(tmp_path / "bare.npy", data.numpy())
    status, said = command("m.safetensors", "--data", "bare.npy", "--range", -2, 2, "--steps", 3)
    assert status == 2
    assert "labels" in said


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--metrics", "fid"), "frechet"), (("--metrics", ""), "frechet"), (("--features", "none:made"), "--features"),
        (("--out", "r.txt"), ".json"), (("--plot", "p.txt"), ".png"), (("-n", 3), "at least"),
        (("--features", "xyzzy"), "pixels"), (("--train", "none.npy"), "none.npy"),
    ],
)  # fmt: skip
def test_bad_words_are_refused_before_any_sample_is_drawn(command, monkeypatch, words, told):
    monkeypatch.setattr("fastdiff.cli.evaluation_report.sample", lambda *a, **k: pytest.fail("samples were drawn"))
    status, said = command("digits-vp", "--data", "digits", *words)
    assert status == 2
    assert told in said
