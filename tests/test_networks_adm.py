"""ADM's classifiers and its super-resolution: their sizes, closed forms, and equality with OpenAI's code."""

from __future__ import annotations

import ast
import math

import pytest
import torch
import torch.nn.functional as F
from strangers import close, drawn, modules_of, stand_in
from torch import nn

import fastdiff
import fastdiff.errors as errors
from fastdiff import DDPM, VP, ScoreModel, TimeClassifier, guidance, networks
from fastdiff.networks import adm_classifier, build
from fastdiff.networks.classifiers import POOL, AttentionPool, UNetClassifier

TINY = {"channels": 8, "multipliers": (1, 2), "blocks": 1, "attention": (1,), "head_channels": 4}
VARIANTS = {
    **{pool: {"pool": pool} for pool in POOL},
    "convolutions": {"resample": "conv", "scale_shift": False},
    "two blocks": {"blocks": 2, "resample": "pool", "attention": ()},
    "skips": {"skip_conv": True, "groups": 2},
}
variants = pytest.mark.parametrize("name", VARIANTS)
SHAPES = [(1, 6), (2, 4, 8), (1, 2, 4, 2)]


def small(
    name: str = "attention", shape: tuple[int, ...] = (2, 4, 8), classes: int = 3, **changes: object
) -> UNetClassifier:
    return drawn(UNetClassifier(shape, classes, **{**TINY, **VARIANTS[name], **changes}))


def inputs(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(3, *shape, generator=generator, dtype=dtype), torch.tensor([0.0, 0.5, 0.9], dtype=dtype)


# ---------------------------------------------------------------------------------------------------------- the classifier
def test_the_classifiers_have_the_sizes_of_those_published():
    """Counted in OpenAI's code, of 1000 classes."""
    with torch.device("meta"):
        for size, count in {64: 65_438_568, 128: 42_568_040, 256: 54_096_360, 512: 54_448_360}.items():
            assert sum(p.numel() for p in adm_classifier((3, size, size)).parameters()) == count


@variants
@pytest.mark.parametrize("shape", SHAPES)
def test_every_classifier_works_in_one_to_three_dimensions_and_every_parameter_counts(name, shape):
    net = small(name, shape)
    x, u = inputs(shape)
    out = net(x, u)
    assert out.shape == (3, 3)
    out.square().sum().backward()
    assert [key for key, p in net.named_parameters() if p.grad is None or not p.grad.any()] == []
    assert not torch.allclose(net(x, u + 0.05), out)


@variants
def test_samples_do_not_see_each_other(name):
    net = small(name).double()
    x, u = inputs((2, 4, 8), torch.float64)
    spoilt = x.clone()
    spoilt[1] = math.nan
    torch.testing.assert_close(net(spoilt, u)[[0, 2]], net(x, u)[[0, 2]], rtol=1e-12, atol=1e-12)
    assert net(x[:0], u[:0]).shape == (0, 3)


@variants
def test_recomputed_blocks_have_the_same_gradients(name):
    kept, again = (small(name, recompute=recompute).train() for recompute in (False, True))
    x, u = inputs((2, 4, 8))
    for net in (kept, again):
        net(x, u).square().sum().backward()
    for a, b in zip(kept.parameters(), again.parameters()):
        torch.testing.assert_close(a.grad, b.grad)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_new_one_is_the_first_convolution_its_means_and_a_linear_layer(shape):
    """All that blocks and attention add starts at zero, and equal widths need no convolution beside it."""
    net = UNetClassifier(shape, 3, **{**TINY, "multipliers": (1, 1), "pool": "mean"}).double()
    x, u = inputs(shape, torch.float64)
    pool = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}[len(shape) - 1]
    h = F.group_norm(pool(net.enter(x), 2), net.norm.num_groups, eps=1e-5)
    torch.testing.assert_close(net(x, u), F.linear(F.silu(h).flatten(2).mean(2), net.out.weight, net.out.bias))


def test_attention_that_cannot_tell_places_apart_is_a_mean():
    """Of equal weights: Σ_i v_i / (n + 1) over the mean and n places, which is v of the mean, positions and all."""
    pool = drawn(AttentionPool(6, 8, heads=2)).double()
    pool.qkv.weight.data[:6] = 0
    pool.qkv.bias.data[:6] = 0
    x = torch.randn(3, 6, 2, 4, dtype=torch.float64)
    mean = x.flatten(2).mean(2) + pool.positions.mean(1)
    torch.testing.assert_close(pool(x), F.linear(mean, pool.qkv.weight[12:], pool.qkv.bias[12:]))


def test_the_pool_is_torch_s_attention_from_the_mean():
    pool, theirs = drawn(AttentionPool(6, 8, heads=2)), nn.MultiheadAttention(6, 2, batch_first=True)
    theirs.in_proj_weight.data.copy_(pool.qkv.weight)
    theirs.in_proj_bias.data.copy_(pool.qkv.bias)
    theirs.out_proj.weight.data.copy_(torch.eye(6))
    x = torch.randn(3, 6, 2, 4)
    places = x.flatten(2)
    places = (torch.cat([places.mean(2, keepdim=True), places], 2) + pool.positions).transpose(1, 2)
    with torch.no_grad():
        close(pool(x), theirs(places[:, :1], places, places, need_weights=False)[0][:, 0])


def test_without_positions_the_order_of_places_does_not_matter():
    pool = drawn(AttentionPool(6, 8, heads=3)).double()
    pool.positions.data[:] = pool.positions[:, :1]
    x = torch.randn(3, 6, 8, dtype=torch.float64)
    torch.testing.assert_close(pool(x[:, :, torch.randperm(8)]), pool(x))
    pool.positions.data[:, 3] += 1
    assert not torch.allclose(pool(x.flip(2)), pool(x))


def test_it_learns_the_digits_and_a_saved_one_is_the_same(tmp_path):
    data, model = fastdiff.load_data("digits"), fastdiff.load("digits-vp")
    torch.manual_seed(0)
    net = adm_classifier((1, 8, 8), 10, channels=16, multipliers=(1, 2), blocks=1, head_channels=16, groups=None)
    assert net.config["attention"] == [0]  # at 8
    made = fastdiff.train_classifier(model, data, steps=150, batch_size=64, lr=3e-3, net=net)
    t = torch.full((200,), 0.05)
    x = VP().alpha(t).view(-1, 1, 1, 1) * (data.x[:200] / 8 - 1)
    assert F.cross_entropy(made(x, t), data.labels[:200]) < 0.5 * math.log(10)
    loaded = TimeClassifier.load(made.save(tmp_path / "classifier"))
    assert isinstance(loaded.net, UNetClassifier)
    assert loaded.net.config == net.config
    assert torch.equal(loaded(x, t), made(x, t))
    out = fastdiff.sample(model, steps=4, sampler="ddim", num_samples=2, guidance=guidance.Classifier(loaded, 3))
    assert bool(out.isfinite().all())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"shape": (3, 10, 12)}, "shape must have axes that are multiples of 8 with 4 levels.* or take the WideResNet"),
        ({"shape": (3,)}, "shape must be .* use MLPClassifier for vectors"),
        ({"num_classes": 1}, "num_classes must be an integer >= 2"),
        ({"attention": (4,)}, "attention must hold level indices >= 0 and <= 3"),
        ({"head_channels": 48}, "head_channels must divide"),
        ({"groups": 3}, "groups must divide every level's channels"),
        ({"multipliers": ()}, "multipliers must have at least one entry"),
        ({"pool": "max"}, "pool must be one of"),
        ({"resample": "linear"}, "resample must be one of"),
        ({"time_scale": 0.0}, "time_scale must be"),
        ({"dropout": 1.0}, "dropout must be"),
    ],
)
def test_options_of_a_classifier_that_do_not_fit_are_refused_in_one_sentence(arguments, message):
    with torch.device("meta"), pytest.raises(errors.FastdiffError, match=message):
        UNetClassifier(**{"shape": (3, 32, 32), "num_classes": 10, **arguments})


class Told(nn.Module):
    """Says what time it is told."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1, dtype=torch.bfloat16))

    def forward(self, x: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        self.time = time
        return torch.zeros(len(x), 2)


def test_a_classifier_is_told_the_time_that_it_says():
    t, x = torch.tensor([1.0, 400.0, 1000.0]), torch.zeros(3, 2)
    for name, expected in {
        "index": torch.tensor([0, 399, 999]),  # which bfloat16, the network's dtype, does not hold
        "index/T": torch.tensor([0, 0.399, 0.999]),
        "t": t,
        "level": torch.tensor([0.0, math.nan, 1.0], dtype=torch.bfloat16),
    }.items():
        made = TimeClassifier(Told(), DDPM(), 2, (2,), (-1, 1), time_input=name)
        made(x, t)
        if name == "level":
            made.net.time[1] = math.nan
        torch.testing.assert_close(made.net.time, expected, equal_nan=True)
    with pytest.raises(errors.ConfigError, match="time_input='index' needs a discrete process"):
        TimeClassifier(Told(), VP(), 2, (2,), (-1, 1), time_input="index")
    with pytest.raises(errors.ConfigError, match="time_input must be one of"):
        TimeClassifier(Told(), VP(), 2, (2,), (-1, 1), time_input="steps")


# ------------------------------------------------------------------------------------------------- OpenAI's classifiers
def openai(**more: object):
    return modules_of(
        "openai/guided-diffusion", mpi4py=stand_in("mpi4py", MPI=None), blobfile=stand_in("blobfile"), **more
    )


def theirs_of(**flags: object) -> nn.Module:
    from guided_diffusion.unet import EncoderUNetModel

    options = {
        "image_size": 16, "in_channels": 3, "model_channels": 32, "out_channels": 7, "num_res_blocks": 2,
        "attention_resolutions": (2, 4), "channel_mult": (1, 1, 2), "num_head_channels": 16, "use_scale_shift_norm": True,
        "resblock_updown": True, "pool": "attention",
    }  # fmt: skip
    return drawn(EncoderUNetModel(**{**options, **flags}))


THEIRS = {
    "published": ({}, {}),
    "depth": ({"num_res_blocks": 1, "channel_mult": (1, 2, 2)}, {"classifier_depth": 1}),
    "fractions": ({"channel_mult": (0.5, 1, 2), "model_channels": 64}, {}),
    "mean": ({"pool": "adaptive"}, {"classifier_depth": 2, "classifier_pool": "adaptive"}),
    "spatial": ({"pool": "spatial"}, {"classifier_depth": 2, "classifier_pool": "spatial"}),
    "added": ({"use_scale_shift_norm": False}, {"classifier_use_scale_shift_norm": False}),
    "strided": ({"resblock_updown": False}, {"classifier_resblock_updown": False}),
    "strided mean": ({"resblock_updown": False, "pool": "adaptive"}, {}),
    "pooled": ({"resblock_updown": False, "conv_resample": False}, {"classifier_width": 32}),
}


@pytest.mark.parametrize("name", THEIRS)
def test_a_classifier_of_openai_s_has_its_logits_and_gradients(name, tmp_path):
    flags, facts = THEIRS[name]
    with openai():
        theirs = theirs_of(**flags)
        torch.save(theirs.state_dict(), tmp_path / "model.pt")
        generator = torch.Generator().manual_seed(5)
        x, step, y = torch.randn(2, 3, 16, 16, generator=generator), torch.tensor([3, 900]), torch.tensor([1, 5])
        x.requires_grad_()
        logits = theirs(x, step)
        (slope,) = torch.autograd.grad(logits.log_softmax(1)[[0, 1], y].sum(), x)
    config = {"image_size": 16, "classifier_head_channels": 16, **facts}
    ours = TimeClassifier.load(tmp_path / "model.pt", source="guided-diffusion", config=config)
    found = ours(x, step + 1.0)
    close(found.detach(), logits.detach())
    (ours_slope,) = torch.autograd.grad(found.log_softmax(1)[[0, 1], y].sum(), x)
    close(ours_slope, slope)
    again = TimeClassifier.load(ours.save(tmp_path / "mine"))
    assert again.time_input == "index"
    assert torch.equal(again(x, step + 1.0), found)
    assert not any(p.requires_grad for p in again.parameters())


def their_cond_fn(root, classifier, scale: float):
    """The function of that name within scripts/classifier_sample.py."""
    tree = ast.parse((root / "scripts" / "classifier_sample.py").read_text())
    function = next(node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name == "cond_fn")
    names = {"th": torch, "F": F, "classifier": classifier, "args": stand_in("args", classifier_scale=scale)}
    exec(compile(ast.Module([function], []), "cond_fn", "exec"), names)
    return names["cond_fn"]


@pytest.mark.parametrize(
    "chain",
    [
        {"noise_schedule": "cosine"},
        {"noise_schedule": "linear"},
        {"noise_schedule": "linear", "diffusion_steps": 400, "rescale_timesteps": True},
    ],
)
def test_ddim_guided_by_a_classifier_is_theirs(chain, tmp_path):
    """`ddim_sample_loop` with the cond_fn of their script, from the same noise."""
    options = {
        "image_size": 16, "num_channels": 32, "num_res_blocks": 1, "channel_mult": "1,2", "attention_resolutions": "8",
        "num_heads": 2, "use_scale_shift_norm": True, "timestep_respacing": "ddim5", "learn_sigma": True,
        **chain,
    }  # fmt: skip
    y = torch.tensor([2, 6])
    with openai() as root:
        from guided_diffusion import script_util

        defaults = script_util.model_and_diffusion_defaults()
        net, diffusion = script_util.create_model_and_diffusion(**{**defaults, **options})
        drawn(net)
        classifier = theirs_of()
        torch.save(net.state_dict(), tmp_path / "model.pt")
        torch.save(classifier.state_dict(), tmp_path / "classifier.pt")
        z = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(5))
        cond_fn = their_cond_fn(root, classifier, 2000.0)  # of random weights, whose gradients are small
        of = {"noise": z, "clip_denoised": False, "model_kwargs": {"y": y}, "device": "cpu"}
        with torch.no_grad():
            guided, plain = (
                diffusion.ddim_sample_loop(lambda x, t, y=None: net(x, t), z.shape, cond_fn=function, **of)
                for function in (cond_fn, None)
            )
    facts = {"image_size": 16, **chain}
    model = fastdiff.load(tmp_path / "model.pt", source="guided-diffusion", config={**facts, "num_heads": 2})
    made = TimeClassifier.load(
        tmp_path / "classifier.pt", source="guided-diffusion", config={**facts, "classifier_head_channels": 16}
    )
    ours = fastdiff.sample(
        model,
        x_init=z,
        num_samples=2,
        steps=5,
        sampler="ddim",
        grid="ddim5",
        guidance=guidance.Classifier(made, y, 2000.0),
    )
    close(ours, guided)
    assert (guided - plain).abs().max() > 0.01 * guided.abs().max()


@pytest.mark.parametrize("size", [64, 128, 256, 512])
def test_a_published_classifier_is_known_by_its_name(size, tmp_path):
    """Its script's own network, of the flags of the README, from its shapes to ours."""
    flags = {"image_size": size, "classifier_depth": 4 if size == 64 else 2}
    with openai(), torch.device("meta"):
        from guided_diffusion import script_util

        theirs = script_util.create_classifier(**{**script_util.classifier_defaults(), **flags})
    count = sum(p.numel() for p in theirs.parameters())
    tensors = {name: torch.zeros(1).expand(value.shape) for name, value in theirs.state_dict().items()}
    torch.save(tensors, tmp_path / f"{size}x{size}_classifier.pt")
    made = TimeClassifier.load(tmp_path / f"{size}x{size}_classifier.pt", source="guided-diffusion")
    expected = adm_classifier((3, size, size), time_scale=1.0).config
    assert made.net.config == expected
    assert sum(p.numel() for p in made.parameters()) == count
    assert (made.process, made.data_range) == (DDPM("cosine" if size == 64 else "linear"), (-1, 1))


def test_facts_that_contradict_a_classifier_and_files_of_others_are_refused(tmp_path):
    with openai():
        torch.save(theirs_of().state_dict(), tmp_path / "c.pt")
        torch.save(theirs_of(pool="adaptive").state_dict(), tmp_path / "mean.pt")
        torch.save(theirs_of(pool="spatial_v2").state_dict(), tmp_path / "spatial_v2.pt")
        torch.save({**theirs_of().state_dict(), "more.weight": torch.zeros(2)}, tmp_path / "more.pt")
    whole = (
        "--attention_resolutions 32,16,8 --class_cond True --image_size 16 --num_channels 192 --num_head_channels 64 "
        "--classifier_scale 1.0 --classifier_path c.pt --classifier_head_channels 16"
    )
    assert TimeClassifier.load(tmp_path / "c.pt", source="guided-diffusion", config=whole).num_classes == 7
    for name, config, message in (
        ("c", {}, "config must have 'image_size' for guided-diffusion"),
        ("c", {"image_size": 16, "classifier_depth": 4}, "classifier_depth must be 2 by the file, got 4"),
        ("c", {"image_size": 16, "classifier_width": 64}, "classifier_width must be 32 by the file, got 64"),
        ("c", {"image_size": 32}, r"layers are not those of samples \(3, 32, 32\)"),
        ("c", {"image_size": 2}, r"layers are not those of samples \(3, 2, 2\)"),
        ("c", {"image_size": 16, "noise_schedule": "sqrt"}, "noise_schedule must be one of"),
        ("c", {"image_size": 16, "depth": 2}, "got 'depth'"),
        ("more", {"image_size": 16}, "has 1 tensors .* such as 'more.weight'"),
        ("spatial_v2", {"image_size": 16, "classifier_depth": 2}, r"the file lacks 'out\.2\.weight'"),
        ("mean", {"image_size": 16}, "config must have 'classifier_depth'"),
        ("mean", {"image_size": 16, "classifier_depth": 3}, "layers are not those of samples"),
    ):
        facts = {"classifier_head_channels": 16, **config}
        with pytest.raises(errors.FastdiffError, match=message):
            TimeClassifier.load(tmp_path / f"{name}.pt", source="guided-diffusion", config=facts)
    with pytest.raises(
        errors.CheckpointMismatchError, match=r"no output_blocks, as .* read one by fastdiff\.TimeClassifier"
    ):
        fastdiff.load(tmp_path / "c.pt", source="guided-diffusion", config={"image_size": 16, "num_heads": 1})


def test_options_of_two_kinds_of_classifiers_files_do_not_mix(tmp_path):
    path = tmp_path / "c.pt"
    with pytest.raises(errors.ConfigError, match="sde is of fastdiff's own files"):
        TimeClassifier.load(path, sde=VP(), source="guided-diffusion")
    with pytest.raises(errors.ConfigError, match="config and part are of other libraries' files: say whose"):
        TimeClassifier.load(path, config={"image_size": 16})
    torch.save({}, path)
    with pytest.raises(errors.ConfigError, match="source must be one of 'guided-diffusion'"):
        TimeClassifier.load(path, source="edm")
    with pytest.raises(FileNotFoundError, match="no file at"):
        TimeClassifier.load(tmp_path / "none.pt", source="guided-diffusion")
    torch.save({"linear.weight": torch.zeros(2, 2)}, path)
    with pytest.raises(errors.CheckpointMismatchError, match=r"lacks 'input_blocks\.0\.0\.weight'"):
        TimeClassifier.load(path, source="guided-diffusion", config={"image_size": 16})


# ------------------------------------------------------------------------------------------------------ super-resolution
FIELDS = {
    "unet": {"channels": 8, "blocks": 1, "multipliers": (1, 2)},
    "paper_unet": {"channels": 8, "blocks": 1, "multipliers": (1, 2), "attention": (1,)},
    "linear_attention_unet": {"channels": 8, "multipliers": (1, 2)},
    "mp_unet": {"channels": 8, "multipliers": (1, 2), "blocks": 1, "attention": ()},
    "dit": {"hidden": 8, "layers": 1, "heads": 2, "patch": 2},
}  # fmt: skip


@pytest.mark.parametrize("name", FIELDS)
@pytest.mark.parametrize(("shape", "coarse"), [((2, 8), (3, 4)), ((1, 4, 8), (2, 2, 4)), ((1, 4, 4, 8), (2, 4, 2, 3))])
def test_a_field_of_fewer_places_is_the_interpolated_field(name, shape, coarse):
    fine, net = (
        drawn(build({"name": name, "shape": shape, "cond_shape": sizes, **FIELDS[name]}))
        for sizes in ((coarse[0], *shape[1:]), coarse)
    )
    net.load_state_dict(fine.state_dict())
    x, t = inputs(shape)
    cond = torch.randn(3, *coarse, generator=torch.Generator().manual_seed(2))
    mode = {1: "linear", 2: "bilinear", 3: "trilinear"}[len(shape) - 1]
    assert torch.equal(net(x, t, cond=cond), fine(x, t, cond=F.interpolate(cond, shape[1:], mode=mode)))
    assert not torch.allclose(net(x, t, cond=cond), net(x, t))
    cond[1] = math.nan
    out = net(x, t, cond=cond)
    torch.testing.assert_close(out[1], net(x, t)[1])
    cond[1, :, 1:] = 0.5  # one number that is missing is no missing condition
    assert net(x, t, cond=cond)[1].isnan().any()


def test_two_numbers_become_four_at_quarters_between_them():
    net = networks.PaperUNet((1, 4), channels=8, multipliers=(1,), blocks=1, attention=(), cond_shape=(1, 2))
    net.condition.embed.weight.data.zero_()[:, :, 1] = 1  # the field itself
    low = torch.tensor([[[2.0, 6.0]]])
    assert torch.equal(net.condition(low), torch.tensor([2.0, 3.0, 5.0, 6.0]).expand(1, 8, 4))


def test_a_model_of_low_and_high_resolution_is_trained_and_asked_with_the_low():
    high = fastdiff.load_data("digits").x[:64].float()
    data = fastdiff.Data(high, range=(0, 16), cond=F.avg_pool2d(high, 2))
    net = networks.PaperUNet((1, 8, 8), channels=8, multipliers=(1, 2), blocks=1, cond_shape=(1, 4, 4))
    model = ScoreModel(net, "vp", data_shape=(1, 8, 8))
    fastdiff.train(model, data, steps=3, batch_size=16)
    assert model.cond_shape == (1, 4, 4)
    low = data.cond[:2]
    x = fastdiff.sample(model, steps=3, sampler="ddim", num_samples=2, cond=low)
    assert not torch.allclose(x, fastdiff.sample(model, steps=3, sampler="ddim", num_samples=2, cond=low.flip(3)))
    with pytest.raises(errors.ShapeError, match="cond"):
        fastdiff.sample(model, steps=3, num_samples=2, cond=high[:2])


@pytest.mark.parametrize("flags", [{"class_cond": True, "learn_sigma": True}, {"noise_schedule": "cosine"}])
def test_ddim_of_a_super_resolution_file_is_its_own(flags, tmp_path):
    options = {
        "large_size": 64, "small_size": 16, "num_channels": 32, "num_res_blocks": 1, "attention_resolutions": "8", "num_heads": 2,
        "use_scale_shift_norm": True, "resblock_updown": True, "timestep_respacing": "ddim3", **flags,
    }  # fmt: skip
    with openai():
        from guided_diffusion import script_util

        defaults = script_util.sr_model_and_diffusion_defaults()
        net, diffusion = script_util.sr_create_model_and_diffusion(**{**defaults, **options})
        drawn(net)
        generator = torch.Generator().manual_seed(5)
        z, low, y = (
            torch.randn(2, 3, 64, 64, generator=generator),
            torch.rand(2, 3, 16, 16, generator=generator) * 2 - 1,
            torch.tensor([1, 700]),
        )
        kwargs = {"low_res": low, **({"y": y} if "class_cond" in flags else {})}
        with torch.no_grad():
            once = net(z, torch.tensor([3, 900]), **kwargs)
            theirs = diffusion.ddim_sample_loop(net, z.shape, noise=z, model_kwargs=kwargs, device="cpu")
    torch.save(net.state_dict(), tmp_path / "model.pt")
    say = " ".join(f"--{name} {value}" for name, value in options.items())
    model = fastdiff.load(tmp_path / "model.pt", source="guided-diffusion", config=say)
    assert (model.data_shape, model.cond_shape) == ((3, 64, 64), (3, 16, 16))
    assert model.variance == ("learned_range" if "learn_sigma" in flags else None)
    cond = {"y": y, "cond": low} if "class_cond" in flags else low
    with torch.no_grad():
        close(model(z, torch.tensor([4.0, 901.0]), cond), once[:, :3])
    how = {"x_init": z, "num_samples": 2, "steps": 3, "sampler": "ddim", "grid": "ddim3", "clip": (-1, 1)}
    close(fastdiff.sample(model, cond=cond, **how), theirs)
    again = fastdiff.load(fastdiff.save(model, tmp_path / "mine"))
    assert torch.equal(again(z, torch.tensor([4.0, 901.0]), cond), model(z, torch.tensor([4.0, 901.0]), cond))


@pytest.mark.parametrize(
    ("name", "flags"),
    [
        ("64_256_upsampler", {"large_size": 256, "small_size": 64, "num_heads": 4, "attention_resolutions": "32,16,8"}),
        (
            "128_512_upsampler",
            {"large_size": 512, "small_size": 128, "num_head_channels": 64, "attention_resolutions": "32,16"},
        ),
    ],
)
def test_a_published_upsampler_is_known_by_its_name(name, flags, tmp_path):
    """Their script's own network, of the flags of the README, from its shapes to ours."""
    with openai(), torch.device("meta"):
        from guided_diffusion import script_util

        options = {"class_cond": True, "learn_sigma": True, "num_channels": 192, "resblock_updown": True, **flags}
        defaults = script_util.sr_model_and_diffusion_defaults()
        theirs, _ = script_util.sr_create_model_and_diffusion(**{**defaults, **options})
    tensors = {key: torch.zeros(1).expand(value.shape) for key, value in theirs.state_dict().items()}
    torch.save(tensors, tmp_path / f"{name}.pt")
    model = fastdiff.load(tmp_path / f"{name}.pt", source="guided-diffusion")
    large, low = flags["large_size"], flags["small_size"]
    assert (model.data_shape, model.cond_shape, model.num_classes) == ((3, large, large), (3, low, low), 1000)
    assert (model.process, model.variance) == (DDPM(), "learned_range")
    heads = {part.heads for part in model.net.modules() if isinstance(part, networks.layers.Attention)}
    assert heads == ({4} if "num_heads" in flags else {12})  # of 768 channels
    # those of "no label", and of "no image"
    count = sum(p.numel() for p in theirs.parameters()) + 768 + 192
    assert sum(p.numel() for p in model.parameters()) == count


def test_flags_of_super_resolution_that_do_not_fit_are_refused(tmp_path):
    flags = {
        "model_channels": 32,
        "num_res_blocks": 1,
        "attention_resolutions": (2,),
        "channel_mult": (1, 2),
        "num_heads": 2,
    }
    with openai():
        from guided_diffusion.unet import SuperResModel, UNetModel

        torch.save(SuperResModel(16, 3, out_channels=3, **flags).state_dict(), tmp_path / "sr.pt")
        torch.save(UNetModel(16, 3, out_channels=3, **flags).state_dict(), tmp_path / "plain.pt")
    for name, config, message in (
        ("sr", {"image_size": 16}, "takes 6 channels and gives 3, .* give large_size and small_size"),
        ("sr", {"large_size": 16}, "config must have both large_size and small_size"),
        (
            "sr",
            {"large_size": 16, "small_size": 4, "image_size": 16},
            "config must have both large_size and small_size",
        ),
        ("sr", {"large_size": 16, "small_size": 32}, "cond_shape must be .* of as many places or fewer"),
        ("plain", {"large_size": 16, "small_size": 4}, "takes 3 channels and gives 3, .* else leave them out"),
    ):
        with pytest.raises(errors.FastdiffError, match=message):
            fastdiff.load(tmp_path / f"{name}.pt", source="guided-diffusion", config={"num_heads": 2, **config})
