"""What Triton's kernels are launched with, from the second time on, when Triton does not look at it any more.

The kernels are compiled for sm_90, and a driver in the place of CUDA's notes what it is given to start.
"""

from __future__ import annotations

import gc
import importlib.util
import weakref
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from step_cases import table_of

from fastdiff.execution import ops

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton, which is for Linux"),
    pytest.mark.skipif(ops.INTERPRETED, reason="an interpreter compiles nothing"),
]

SHAPE = (4, 3, 8, 8)


@pytest.fixture(scope="module")
def driver():
    """In the place of CUDA's, the same for all tests: Triton keeps it with the kernels."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(Path(__file__).parent.parent / "build" / "triton"))
        patch.syspath_prepend(str(Path(__file__).parent.parent / "benchmarks"))
        import launching
        import triton

        driver = launching.Driver()
        patch.setattr(triton.runtime.driver, "_active", driver)
        yield driver


@pytest.fixture
def gpu(monkeypatch, driver):
    """kernels, driver, starts: what was started; through: the kernels that were launched by way of tiles.launch."""
    import triton

    kernels = ops.kernels()
    tiles, starts, through = kernels.tiles, [], []
    for name, value in {"started": starts.append, "device": -1, "stream": 0}.items():
        monkeypatch.setattr(driver, name, value)
    monkeypatch.setattr(tiles, "_PREPARED", {})
    launch = tiles.launch

    def noting(kernel, grid, like, *args, **meta):
        through.append(kernel.fn.__name__)
        return launch(kernel, grid, like, *args, **meta)

    monkeypatch.setattr(tiles, "launch", noting)
    return SimpleNamespace(
        kernels=kernels, tiles=tiles, driver=driver, starts=starts, through=through, knobs=triton.knobs.runtime
    )


def tensors(seed=0):
    g = torch.Generator().manual_seed(seed)
    names = ("out", "x", "m", "guide", "v", "base", "z", "pushed", "known", "h1", "h2", "h3", "h4")
    t = {name: torch.randn(SHAPE, generator=g) for name in names}
    t |= {"net_input": t["m"].bfloat16(), "mask": t["x"] > 0, "table": table_of(a=0.9, b0=0.1, c=0.3, q=1.0)}
    t |= {"cursor": torch.tensor([2, 0, seed]), "first_bad": torch.full((4,), 9), "measured": torch.ones(4, 2)}
    t |= {name: torch.rand(4, generator=g) for name in ("r", "w", "weight", "h")}
    return t | {"frequencies": torch.rand(64, generator=g), "wide": torch.randn(1, 2, 64, 80, generator=g)}


def step(*names):
    return lambda k, t: k.step(t["out"], t["table"], t["cursor"], 1, t["x"], **{name: t[name] for name in names})


CALLS = {
    "step": step("m", "net_input", "first_bad"),
    "step, everything": lambda k, t: k.step(
        t["out"], t["table"], t["cursor"], None, t["x"], t["m"], [t["h1"], t["h2"]], t["guide"], t["v"], t["base"], t["z"],
        None, t["known"], t["mask"], t["pushed"], t["net_input"], t["first_bad"],
    ),
    # the operands of which it makes no use among the others
    "step, measured": step("measured", "v", "guide", "known", "pushed"),
    "measure_langevin": lambda k, t: k.measure_langevin(
        t["measured"], t["table"], t["cursor"], 1, True, t["x"], t["m"], t["guide"], None, t["out"]
    ),
    "normal": lambda k, t: k.normal(t["out"], t["cursor"], 1),
    "perturb": lambda k, t: k.perturb(t["x"], t["r"], t["w"], t["cursor"], 2),
    "dsm_loss": lambda k, t: k.dsm_loss(t["net_input"], t["x"], t["r"], t["w"], t["weight"], t["cursor"], 2),
    "probe_dot": lambda k, t: k.probe_dot(t["x"], t["cursor"], 3, "normal"),
    "probe_dot, given": lambda k, t: k.probe_dot(t["x"], t["cursor"], 3, "normal", t["net_input"]),
    "rk_error": lambda k, t: k.rk_error(t["x"], [t["m"], t["v"], t["z"]], t["h"], [0.5, 0, 0.5], [0.1, 0, 0], 1e-3, 0.1),
    "group_norm": lambda k, t: k.group_norm(t["x"], 3, None, t["frequencies"][:3], 1e-5),
    "group_norm, blocks": lambda k, t: k.group_norm(t["wide"], 2, t["r"][:2], t["w"][:2].bfloat16(), 1e-5, False),
    "timestep_embedding": lambda k, t: k.timestep_embedding(t["r"], t["frequencies"], 1000.0, 128, "sin_cos"),
}  # fmt: skip


def readable(start, t):
    """The same with names of tensors for their addresses: "new" for one that the operation made."""
    names = {tensor.data_ptr(): name for name, tensor in t.items()}

    def of(value):
        if isinstance(value, torch.Tensor):
            value = value.data_ptr()
        if isinstance(value, tuple):
            return tuple(map(of, value))
        return names.get(value, "new") if isinstance(value, int) and value > 2**32 else value

    return start._replace(arguments=of(start.arguments))


@pytest.mark.parametrize("name", CALLS)
def test_the_second_launch_starts_what_triton_would(gpu, name):
    """On other tensors of the same kind: the same machine code, the same arguments in the same places."""
    first, second = tensors(0), tensors(1)
    CALLS[name](gpu.kernels, first)
    by_triton = [readable(start, first) for start in gpu.starts]
    assert len(by_triton) == len(gpu.through) > 0
    gpu.starts.clear()
    CALLS[name](gpu.kernels, second)
    assert len(gpu.through) == len(by_triton)  # Triton has not seen it
    assert [readable(start, second) for start in gpu.starts] == by_triton
    assert any(f"'{tensor}'" in str(by_triton) for tensor in ("x", "out", "r"))  # where names stand for addresses


def odd(value):
    """The same numbers from an address that is no multiple of 16 on."""
    return torch.cat((value.new_zeros(1), value.flatten()))[1:].view(value.shape)


ANSWERS = {
    "contiguous": lambda m: m,
    "from an odd address": odd,
    "bfloat16": lambda m: m.bfloat16(),
    "channels last": lambda m: m.to(memory_format=torch.channels_last),
    "half of the channels": lambda m: torch.cat((m, m), 1)[:, :3],
    "one number for all": lambda m: m[:1, :1, :1, :1].expand(SHAPE),
}


def test_a_prepared_step_takes_what_networks_answer(gpu):
    """Its launches are those of `step` on the same tensors, whatever the one before was given."""
    t = tensors()
    prepared = gpu.kernels.prepare_step(t["out"], t["table"], 1, t["x"], net_input=t["net_input"])
    for _ in range(3):
        for seed, (name, answer) in enumerate(ANSWERS.items()):
            now = t | {"m": answer(tensors(seed)["m"]), "cursor": torch.tensor([1, 0, seed])}
            gpu.tiles._PREPARED.clear()
            step("m", "net_input")(gpu.kernels, now)
            prepared(now["cursor"], now["m"], None)
            by_triton, ours = (readable(start, now) for start in gpu.starts[-2:])
            assert ours == by_triton, name
    assert len(gpu.through) == (3 + 1) * len(ANSWERS)


def test_a_prepared_step_without_a_network_and_with_a_variance(gpu):
    t = tensors()
    for operands, m, v in (({}, None, None), ({}, t["m"], t["v"]), ({"measured": t["measured"]}, t["m"], t["v"])):
        prepared = gpu.kernels.prepare_step(t["out"], t["table"], 1, t["x"], **operands)
        for _ in range(2):
            prepared(t["cursor"], m, v)
        by_triton, ours = (readable(start, t) for start in gpu.starts[-2:])
        assert ours == by_triton
    assert len(gpu.through) == 3


@pytest.mark.parametrize("operand", [None, "m"])
def test_a_prepared_step_leaves_out_earlier_predictions_that_the_table_has_no_factor_for(gpu, operand):
    t = tensors()
    history, m = [t[f"h{k}"] for k in (1, 2, 3, 4)], t.get(operand)
    prepared = gpu.kernels.prepare_step(t["out"], t["table"], 1, t["x"], history=history)
    for _ in range(2):
        prepared(t["cursor"], m, None)
    by_triton, ours = (readable(start, t) for start in gpu.starts)
    assert ours == by_triton


@pytest.mark.parametrize("operand", ["m", "base", "net_input"])
def test_operands_that_must_be_copied_are_copied_each_time(gpu, operand):
    t = tensors()
    if operand == "m":
        t["m"] = t["m"].permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)[..., :8]
        assert gpu.tiles.view(t["m"], SHAPE, None)[0].copies(t["m"])
    elif operand == "base":
        t["base"] = t["base"][:1].expand(SHAPE)
    else:
        t["net_input"] = t["net_input"].permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)
    prepared = gpu.kernels.prepare_step(t["out"], t["table"], 1, t["x"], base=t["base"], net_input=t["net_input"])
    for _ in range(3):
        prepared(t["cursor"], t["m"], None)
    assert gpu.through == ["step_kernel"] * 3
    assert "new" in str(readable(gpu.starts[-1], t).arguments)


def test_profilers_see_every_launch(gpu):
    t, seen = tensors(), []
    hooks = {gpu.knobs.launch_enter_hook: lambda data: seen.append(("enter", data.get()["name"])),
             gpu.knobs.launch_exit_hook: lambda data: seen.append(("exit", data.get()["name"]))}  # fmt: skip
    for hook, function in hooks.items():
        hook.add(function)
    try:
        for _ in range(2):
            gpu.kernels.normal(t["out"], t["cursor"], 1)
    finally:
        for hook, function in hooks.items():
            hook.remove(function)
    assert gpu.through == ["normal_kernel"]
    assert seen == [("enter", "normal_kernel"), ("exit", "normal_kernel")] * 2


def test_launches_take_the_stream_of_their_moment_and_the_device_of_their_tensors(gpu, monkeypatch):
    t, entered = tensors(), []

    class Device:
        def __init__(self, index):
            self.index = index

        def __enter__(self):
            entered.append(self.index)

        def __exit__(self, *_):
            pass

    monkeypatch.setattr(torch.cuda, "device", Device)
    for stream, device in ((0, -1), (7, -1), (8, 1)):
        gpu.driver.stream, gpu.driver.device = stream, device
        gpu.kernels.normal(t["out"], t["cursor"], 1)
    assert [start.stream for start in gpu.starts] == [0, 7, 8]
    assert entered == [-1]  # the tensors' device, where another was the current one


def test_without_a_compiled_kernel_every_launch_is_tritons(gpu, monkeypatch):
    """As under its interpreter, and for tools that see to the launches themselves."""
    launched = []
    monkeypatch.setattr(gpu.tiles, "launch", lambda kernel, grid, like, *args, **meta: launched.append(meta))
    t = tensors()
    prepared = gpu.kernels.prepare_step(t["out"], t["table"], 1, t["x"])
    for _ in range(3):
        prepared(t["cursor"], t["m"], None)
        gpu.kernels.dsm_loss(t["m"], t["x"], t["r"], t["w"], t["weight"], t["cursor"], 2)
    assert len(launched) == 9
    assert gpu.starts == []
    monkeypatch.setattr(gpu.tiles, "QUADS", 128)  # nothing is kept of what was never launched
    gpu.kernels.normal(torch.zeros(2, 4096), t["cursor"], 1)
    assert launched[-1]["QUADS"] == 128


def test_nothing_is_kept_of_what_a_network_answers(gpu):
    t = tensors()
    prepared = gpu.kernels.prepare_step(t["out"], t["table"], 1, t["x"])
    gone = []
    for _ in range(2):
        m = t["m"].clone()
        prepared(t["cursor"], m, None)
        step("m")(gpu.kernels, t | {"m": m})
        gpu.kernels.dsm_loss(m, t["x"], t["r"], t["w"], t["weight"], t["cursor"], 2)
        gone.append(weakref.ref(m))
        del m
    gpu.starts.clear()
    gc.collect()
    assert [ref() for ref in gone] == [None, None]


def test_few_shapes_are_remembered(gpu, monkeypatch):
    monkeypatch.setattr(gpu.tiles, "MOST_PREPARED", 3)
    for batch in range(1, 9):
        gpu.kernels.normal(torch.zeros(batch, 192), torch.zeros(3, dtype=torch.int64), 1)
        assert len(gpu.tiles._PREPARED) <= 3
