"""What two sets are compared by: samples as rows of numbers in one unit, or features of them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from .. import checks
from ..data import Data
from ..errors import ConfigError, DataError, DTypeError, ShapeError, choose, nearest, short, warn
from ..execution import tensor_checks
from ..execution.calls import dtype_of
from ..execution.modes import evaluating
from ..execution.noise import permutation

Samples = Data | Tensor | NDArray[Any]
Features = str | Callable[[Tensor], Any]
Rows = Callable[[Tensor], Tensor]  # samples [n, *shape] to features

BATCH = 256  # samples in one call of a feature network
ENOUGH = 100  # numbers of a set that show its range
NAMES = ("pixels", "classifier")
CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
POOLS = {1: F.adaptive_avg_pool1d, 2: F.adaptive_avg_pool2d, 3: F.adaptive_avg_pool3d}


def samples(name: str, x: Any, least: int = 1) -> Tensor:
    """The samples [n, *shape] of a tensor, an array or a Data, n ≥ least: real and finite, of their own dtype and device."""
    if isinstance(x, Data):
        x = x.x
    if isinstance(x, np.ndarray):
        if x.dtype.kind not in "iuf" or x.dtype.itemsize > 8:
            raise DTypeError(f"{name} must hold real numbers, got an array of {x.dtype}: use .astype('float64')")
        x = torch.from_numpy(np.ascontiguousarray(x, x.dtype.newbyteorder("=")))
    if not isinstance(x, Tensor):
        raise DTypeError(f"{name} must be a tensor, an array or a Data, got {short(x)}: use torch.as_tensor")
    tensor_checks.check_device(name, x, x.device)
    x = tensor_checks.numbers(name, x, x.device).detach()
    if x.ndim < 2:
        raise ShapeError(
            f"{name} must be samples [n, *shape], got shape {list(x.shape)}: use {name}[:, None] for numbers"
        )
    if len(x) < least or x.numel() == 0:
        raise DataError(f"{name} must hold at least {least} samples of one number or more, got shape {list(x.shape)}")
    tensor_checks.check_finite(name, x)
    return x  # type: ignore[no-any-return]


def in_one_unit(x: Any, y: Any, least: tuple[int, int], names: tuple[str, str]) -> tuple[Tensor, Tensor]:
    """The samples of both, of one shape and kind, on the first one's device; a warning where their ranges look like two units."""
    a, b = (samples(name, z, fewest) for name, z, fewest in zip(names, (x, y), least))
    both = " and ".join(names)
    if a.shape[1:] != b.shape[1:]:
        raise ShapeError(f"{both} must hold samples of one shape, got {list(a.shape[1:])} and {list(b.shape[1:])}")
    if a.is_floating_point() != b.is_floating_point():
        raise DTypeError(
            f"{both} must be in one unit, got {a.dtype} and {b.dtype}: data.batch(range(len(data)), model.data_range) gives "
            "data in a model's"
        )
    if min(a.numel(), b.numel()) < ENOUGH:
        return a, b.to(a.device)
    (low, high), (least_of, most_of) = _range(a), _range(b)
    apart = max(low - least_of, most_of - high), max(least_of - low, high - most_of)
    if apart[0] > 0.8 * (high - low) or apart[1] > 0.8 * (most_of - least_of):
        warn(
            f"{both} are in two units or far apart: {names[0]} runs from {low:.4g} to {high:.4g}, {names[1]} from {least_of:.4g} "
            f"to {most_of:.4g}; data.batch(range(len(data)), model.data_range) gives data in a model's"
        )
    return a, b.to(a.device)


def _range(x: Tensor) -> tuple[float, float]:
    """Where all but a hundredth of the numbers lie on either side, by up to a million of them."""
    some = x.reshape(-1)[:: max(1, x.numel() // 10**6)].double().cpu().numpy()
    low, high = np.quantile(some, (0.01, 0.99))
    return float(low), float(high)


def compared(
    x: Any, y: Any, features: Features, least: tuple[int, int], names: tuple[str, str] = ("x", "y")
) -> tuple[Tensor, Tensor]:
    """The features [n, d] and [m, d], float64, of sets of at least so many; a classifier is trained on the second."""
    a, b = in_one_unit(x, y, least, names)
    function = rows_of(features, y)
    u, v = (_checked(function(z), len(z)) for z in (a, b))
    if u.shape[1] != v.shape[1]:
        raise ShapeError(f"features must be of one length, got {u.shape[1]} and {v.shape[1]} numbers")
    return u, v


def rows_of(features: Features, data: Any = None) -> Rows:
    """The function of samples that `features` names; refused before any sample is looked at."""
    if isinstance(features, str):
        if features == "pixels":
            return lambda x: x
        if features == "classifier":
            if not isinstance(data, Data):
                raise ConfigError(
                    "features='classifier' is trained on y, which must then be a fastdiff.Data with labels: give one, or "
                    "features=fastdiff.metrics.classifier(data)"
                )
            return rows_of(classifier(data))
        return _registered(features)
    if isinstance(features, nn.Module):
        return lambda x: _in_batches(features, x)
    if not callable(features) or isinstance(features, type):
        raise ConfigError(
            f"features must be a name, a function of samples or a torch.nn.Module, got {short(features)}: 'pixels' for none"
        )
    return features


def _checked(value: Any, count: int) -> Tensor:
    """Features as float64 rows [n, d]."""
    if isinstance(value, np.ndarray):
        value = samples("features", value)
    if not isinstance(value, Tensor) or value.ndim < 2 or len(value) != count:
        raise ShapeError(
            f"features must give [n, d], {count} rows of {count} samples, got {short(value)}: for a number each, [:, None]"
        )
    tensor_checks.check_finite("features", value)
    return value.detach().flatten(1).double()


def _in_batches(net: nn.Module, x: Tensor) -> Tensor:
    """The network's features, in evaluation mode; floats in its own precision, integers as they are."""
    if x.is_floating_point():
        x = x.to(dtype_of(net, torch.float32))
    place = next((tensor.device for tensor in (*net.parameters(), *net.buffers())), x.device)
    found = []
    with evaluating(net), torch.no_grad():
        for piece in x.split(BATCH):
            output = net(piece.to(place))
            if isinstance(output, tuple) and len(output) == 1:  # as torch-fidelity's extractors answer
                output = output[0]
            found.append(_checked(output, len(piece)))
    return torch.cat(found).to(x.device)


def _registered(name: str) -> Rows:
    """The extractor of a name that was registered with torch-fidelity; bytes [n, 1 or 3, H, W] to features."""
    if nearest(name, NAMES):
        choose("features", name, NAMES)
    try:
        from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY as registry
        from torch_fidelity.utils import create_feature_extractor
    except ImportError as error:
        raise ConfigError(
            f"features must be 'pixels', 'classifier', a function, a module, or a name of torch-fidelity's, got {short(name)}, "
            "and torch-fidelity is missing: pip install torch-fidelity"
        ) from error
    if name not in registry:
        choose("features", name, (*NAMES, *registry))
    kind = registry[name]
    if kind.__module__.split(".")[0] == "torch_fidelity":
        raise ConfigError(
            f"features={name!r} would download its weights: give the extractor itself, torch_fidelity.{kind.__name__}({name!r}, "
            "[layer], feature_extractor_weights_path=file)"
        )
    net = create_feature_extractor(name, [kind.get_default_feature_layer_for_metric("fid")], cuda=False, verbose=False)

    def features(x: Tensor) -> Tensor:
        if x.dtype != torch.uint8 or x.ndim != 4 or x.shape[1] not in (1, 3):
            raise DTypeError(
                f"features={name!r} takes bytes [n, 1 or 3, H, W], got {list(x.shape)} of {x.dtype}: give pictures as uint8, "
                "data.quantise(x, model.data_range)"
            )
        return _in_batches(net, x.expand(-1, 3, -1, -1))

    return features


class Classifier(nn.Module):
    """A small classifier: forward gives its last hidden layer [n, 64], standardized by what its data give; `accuracy` is that on
    a held-out tenth of them."""

    mean: Tensor
    std: Tensor
    shift: Tensor
    scale: Tensor

    def __init__(self, shape: tuple[int, ...], classes: int, mean: Tensor, std: Tensor) -> None:
        super().__init__()
        self.register_buffer("mean", mean)
        self.register_buffer("std", std)
        self.register_buffer("shift", torch.zeros(64))
        self.register_buffer("scale", torch.ones(64))
        self.accuracy = math.nan
        axes = len(shape) - 1
        if axes not in CONVOLUTIONS:
            self.pool, size = None, math.prod(shape)
            self.body = nn.Sequential(nn.Linear(size, 64), nn.SiLU())
        else:
            conv, stride = CONVOLUTIONS[axes], 1 if min(shape[1:]) < 16 else 2
            self.pool, size = axes, 64 * 2**axes
            layers = conv(shape[0], 16, 3, stride, 1), conv(16, 32, 3, 2, 1), conv(32, 64, 3, 1, 1)
            self.body = nn.Sequential(*(part for layer in layers for part in (layer, nn.SiLU())))
        self.hidden = nn.Linear(size if self.pool else 64, 64)
        self.head = nn.Linear(64, classes)

    def forward(self, x: Tensor) -> Tensor:
        return (self.last(x) - self.shift) / self.scale

    def last(self, x: Tensor) -> Tensor:
        """The last hidden layer as the head sees it."""
        x = (x - self.mean) / self.std
        x = self.body(x.flatten(1)) if self.pool is None else POOLS[self.pool](self.body(x), 2).flatten(1)
        return F.silu(self.hidden(x))


def classifier(data: Data, *, steps: int = 500, seed: int = 0) -> Classifier:
    """A small network trained to tell the classes of a labelled Data, for `features=`: its last hidden layer, 64 numbers
    of mean 0 and variance 1 on those data.

    A convolutional one for samples with one to three axes beside their channels, else one of two layers; Adam on batches of 128
    with a cosine rate from 2e-3 to 0. It takes samples in the units of `data.x`. Weights and order are of the seed, so that two
    trainings on one machine are the same; no global generator is touched. `.accuracy` is that on a tenth of the data, which it
    was not trained on. Features of it measure what tells those classes apart, and little else.
    Errors: ConfigError (no labels, one class), DataError (fewer than 20 samples).
    """
    if not isinstance(data, Data) or data.labels is None or data.num_classes is None or data.num_classes < 2:
        raise ConfigError(
            f"data must be a fastdiff.Data with labels of two classes or more, got {short(data)}: use 'pixels'"
        )
    steps, seed = checks.integer("steps", steps, 1, 10**6), checks.integer("seed", seed, 0, 2**64 - 1)
    if len(data) < 20:
        raise DataError(f"data must hold at least 20 samples to train a classifier on, got {len(data)}: use 'pixels'")
    x, labels, count = data.x.float(), data.labels, len(data)
    if len(data.shape) == 1:
        mean, std = x.mean(0), x.std(0)
    else:
        mean, std = x.mean(), x.std()
    order = permutation(count, seed=seed, draw=0)
    held, rest = order[: count // 10], order[count // 10 :]
    # where the default device is another, weights and data are still the CPU's
    with torch.random.fork_rng(devices=[]), torch.device("cpu"), torch.enable_grad(), torch.inference_mode(False):
        torch.manual_seed(seed)
        net = Classifier(data.shape, data.num_classes, mean, torch.where(std > 0, std, torch.ones_like(std)))
        adam = torch.optim.Adam(net.parameters(), 2e-3)
        size = min(128, len(rest))
        for step in range(steps):
            epoch, place = divmod(step, len(rest) // size)
            if place == 0:
                shuffled = rest[permutation(len(rest), seed=seed, draw=1 + epoch)]
            index = shuffled[place * size : (place + 1) * size]
            for group in adam.param_groups:
                group["lr"] = 1e-3 * (1 + math.cos(math.pi * step / steps))
            adam.zero_grad()
            F.cross_entropy(net.head(net.last(x[index])), labels[index]).backward()
            adam.step()
    net.requires_grad_(False).eval()
    values = torch.cat([net.last(piece) for piece in x.split(BATCH)])
    net.accuracy = float((net.head(values[held]).argmax(1) == labels[held]).double().mean())
    net.shift, spread = values.mean(0), values.std(0)
    net.scale = torch.where(spread > 0, spread, torch.ones_like(spread))
    return net
