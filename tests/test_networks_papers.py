"""The U-Nets of the papers: their sizes, what holds by construction, and equality with their authors' code."""

from __future__ import annotations

import importlib.util
import json
import math

import pytest
import torch
from strangers import close, drawn, modules_of, package, score_sde_stand_ins, stand_in
from torch import nn

import fastdiff
import fastdiff.errors as errors
from fastdiff.networks import PaperUNet, adm, build, ddpm, ddpmpp, describe, ncsnpp
from fastdiff.networks.paper_unet import Interpolated, Resample, Strided
from fastdiff.training.sources import diffusers, edm, openai, score_sde

# every option at least once
VARIANTS = {
    "ddpm": {},
    "fir": {"resample": "block", "taps": (1, 3, 3, 1), "rescale": True, "attention_up": "last", "time_embedding": "fourier"},
    "residual in": {"progressive_in": "residual", "taps": (1, 3, 3, 1)},
    "residual in and out": {"progressive_in": "residual", "progressive_out": "residual", "rescale": True},
    "skip": {"progressive_in": "skip", "progressive_out": "skip", "taps": (1, 3, 3, 1), "resample": "block"},
    "beside": {"progressive_in": "skip", "combine": "cat"},
    "filtered": {"taps": (1, 3, 3, 1), "progressive_out": "residual"},
    "adm": {"scale_shift": True, "resample": "block", "skip_conv": False, "head_channels": 4, "time_embedding": "cos_sin"},
    "padded": {"resample": "padded_conv", "heads": 2, "attention": ()},
    "pool": {"resample": "pool", "attention_middle": False, "groups": 2, "eps": 1e-5, "centered": False},
    "fractions": {"multipliers": (0.5, 1.5), "channels": 16},
}  # fmt: skip
variants = pytest.mark.parametrize("name", VARIANTS)


def small(name: str, shape: tuple[int, ...] = (2, 4, 8), **changes: object) -> PaperUNet:
    return drawn(PaperUNet(shape, **{"channels": 8, "multipliers": (1, 2), "blocks": 1, **VARIANTS[name], **changes}))


def inputs(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> tuple:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(3, *shape, generator=generator, dtype=dtype), torch.tensor([0.0, 0.5, 0.9], dtype=dtype)


def test_the_sizes_are_the_papers():
    """Ho et al. 2020: 35.7 million. Song et al. 2021's code and OpenAI's, counted: the same, but for a row of "no label"."""
    with torch.device("meta"):
        nets = {
            35_746_307: ddpm((3, 32, 32)),
            61_804_419: ddpmpp((3, 32, 32)),
            106_632_579: ddpmpp((3, 32, 32), blocks=8),
            62_758_787: ncsnpp((3, 32, 32)),
            107_586_947: ncsnpp((3, 32, 32), blocks=8),
            295_904_454 + 768: adm((3, 64, 64), num_classes=1000),
        }
    for count, net in nets.items():
        assert sum(p.numel() for p in net.parameters()) == count


@variants
@pytest.mark.parametrize("shape", [(1, 6), (2, 4, 8), (1, 2, 4, 2)])
def test_every_variant_works_in_one_to_three_dimensions_and_every_parameter_counts(name, shape):
    net = small(name, shape, num_classes=2)
    x, t = inputs(shape)
    out = net(x, t, torch.arange(3))
    assert out.shape == x.shape
    out.square().sum().backward()
    assert [key for key, p in net.named_parameters() if p.grad is None or not p.grad.any()] == []


@variants
def test_samples_do_not_see_each_other(name):
    net = small(name, num_classes=2).double()
    x, t = inputs((2, 4, 8), torch.float64)
    out = net(x, t)
    spoilt = x.clone()
    spoilt[1] = math.nan
    torch.testing.assert_close(net(spoilt, t)[[0, 2]], out[[0, 2]], rtol=1e-12, atol=1e-12)
    assert net(x[:0], t[:0]).shape == (0, 2, 4, 8)


@variants
@pytest.mark.parametrize(
    "more", [{}, {"num_classes": 2}, {"num_classes": 2, "labels_first": True}, {"cond_shape": (3,)}]
)
def test_features_made_once_give_what_a_call_gives(name, more):
    net = small(name, **more)
    x, t = inputs((2, 4, 8))
    y = torch.tensor([0, 1, 2]) if "num_classes" in more else None
    cond = torch.randn(3, 3) if "cond_shape" in more else None
    features = net.time_features(t)
    torch.testing.assert_close(net(x, t, y, features, cond), net(x, t, y, cond=cond))
    same = net(x, t[1].expand(3), y, cond=cond)
    torch.testing.assert_close(net(x, t, y, features[1:2], cond), same, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(net(x, t, y, cond=cond), same)


@variants
def test_a_saved_variant_is_the_same_when_loaded(name, tmp_path):
    net = small(name, num_classes=3, cond_shape=(1, 4, 8), out_channels=4)
    again = build(json.loads(json.dumps(describe(net))))
    assert describe(again) == describe(net)
    model = fastdiff.ScoreModel(net, "vp", data_shape=(2, 4, 8), variance="learned")
    loaded = fastdiff.load(fastdiff.save(model, tmp_path / "m"))
    x, t = inputs((2, 4, 8))
    call = {"y": torch.arange(3), "cond": torch.randn(3, 1, 4, 8)}
    assert torch.equal(loaded.net(x, t, **call), net(x, t, **call))


def test_recomputed_blocks_have_the_same_gradients():
    kept, again = (small("adm", recompute=recompute, dropout=0.1).train() for recompute in (False, True))
    x, t = inputs((2, 4, 8))
    for net in (kept, again):
        torch.manual_seed(0)
        net(x, t).square().sum().backward()
    for a, b in zip(kept.parameters(), again.parameters()):
        torch.testing.assert_close(a.grad, b.grad)


def test_a_network_without_time_sees_none():
    net = small("ddpm", time=False)
    x, t = inputs((2, 4, 8))
    assert torch.equal(net(x, t), net(x, t + 5))
    assert torch.equal(net(x, t, features=net.time_features(t)), net(x, t))


def test_of_uncentred_data_the_network_sees_twice_x_less_one():
    net, plain = (small("ddpm", centered=centered) for centered in (False, True))
    plain.load_state_dict(net.state_dict())
    x, t = inputs((2, 4, 8))
    assert torch.equal(net(x, t), plain(2 * x - 1, t))


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("taps", [(1, 1), (1, 3, 3, 1)])
def test_a_constant_stays_one_when_resampled(rank, taps):
    """But for the edges, where the longer filter meets zeros."""
    down, up = Resample(rank, taps, "down"), Resample(rank, taps, "up")
    x = torch.full((2, 3, *(8,) * rank), 1.5, dtype=torch.float64)
    inside = (..., *(slice(1, -1),) * rank)
    torch.testing.assert_close(down(x)[inside], torch.full_like(down(x), 1.5)[inside])
    torch.testing.assert_close(up(x)[inside], torch.full_like(up(x), 1.5)[inside])
    torch.testing.assert_close(up(down(x))[(..., *(slice(3, -3),) * rank)], x[(..., *(slice(3, -3),) * rank)])


@pytest.mark.parametrize("rank", [1, 2])
def test_the_long_filter_halves_a_line_to_a_line_and_is_its_own_adjoint(rank):
    """Down of x_i = i is 2 i + 1/2 inside; up is 2^rank times the transpose of down."""
    down, up = Resample(rank, (1, 3, 3, 1), "down"), Resample(rank, (1, 3, 3, 1), "up")
    x = torch.arange(8, dtype=torch.float64).expand(1, 1, *(8,) * rank)
    torch.testing.assert_close(
        down(x)[(..., *(slice(1, -1),) * rank)][..., :2].flatten()[:2], torch.tensor([2.5, 4.5]).double()
    )
    a, b = torch.randn(1, 2, *(8,) * rank).double(), torch.randn(1, 2, *(4,) * rank).double()
    torch.testing.assert_close((down(a) * b).sum() * 2**rank, (a * up(b)).sum())


@pytest.mark.parametrize("taps", [(1, 1), (1, 3, 3, 1)])
def test_strided_and_interpolated_layers_are_their_filters_and_a_convolution(taps):
    torch.manual_seed(0)
    x = torch.randn(1, 2, 12, 12).double()
    strided, interpolated = Strided(2, taps, 2, 3).double(), Interpolated(2, taps, 2, 3).double()
    inside = (..., slice(2, -2), slice(2, -2))
    f = Resample(2, taps, "up")
    expected = nn.functional.conv2d(f(x), interpolated.conv.weight, interpolated.conv.bias, padding=1)
    torch.testing.assert_close(interpolated(x)[inside], expected[inside])
    assert strided(x).shape == (1, 3, 6, 6)
    if taps == (1, 1):
        expected = nn.functional.conv2d(x, strided.conv.weight, strided.conv.bias, stride=2)
        torch.testing.assert_close(strided(x)[..., :5, :5], expected)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"shape": (3, 12, 12)}, "shape must have axes that are multiples of 8 with 4 levels, got \\(3, 12, 12\\)"),
        ({"attention": (4,)}, "attention must hold level indices >= 0 and <= 3"),
        ({"taps": (1, 2, 1)}, "taps must be two or four numbers"),
        ({"groups": 3}, "groups must divide every level's channels, got 3 and 128"),
        ({"head_channels": 48}, "head_channels must divide"),
        ({"heads": 3}, "heads must divide"),
        ({"multipliers": ()}, "multipliers must have at least one entry"),
        ({"multipliers": 2}, "multipliers must be a tuple"),
        ({"time": False, "num_classes": 3}, "time must be True"),
        ({"time": False, "cond_shape": (3,)}, "time must be True"),
        ({"resample": "linear"}, "resample must be one of"),
        ({"cond_shape": (1, 8, 64)}, "cond_shape must be .* of as many places or fewer, got"),
        ({"cond_shape": (1, 8)}, "cond_shape must be .* a field beside the sample"),
    ],
)
def test_options_that_do_not_fit_are_refused_in_one_sentence(arguments, message):
    with torch.device("meta"), pytest.raises(errors.FastdiffError, match=message):
        PaperUNet(**{"shape": (3, 32, 32), **arguments})


# ------------------------------------------------------------------------------- the authors' own code, on the same weights
SONG = ["ve/cifar10_ncsnpp_continuous", "ve/celebahq_256_ncsnpp_continuous", "ve/cifar10_ncsnpp", "ve/cifar10_ddpm",
        "vp/cifar10_ddpmpp_continuous", "vp/ddpm/cifar10", "subvp/cifar10_ncsnpp_continuous"]  # fmt: skip


def score_sde_config(root, name, **changes):
    spec = importlib.util.spec_from_file_location("config", root / "configs" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = module.get_config()
    config.model.update({"nf": 32, "num_res_blocks": 1, "ch_mult": (1, 2, 2), "attn_resolutions": (8,), **changes})
    config.data.image_size = 16
    return config


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        *((name, {}) for name in SONG),
        ("ve/cifar10_ncsnpp_continuous", {"fir": False}),
        ("ve/cifar10_ncsnpp_continuous", {"progressive_input": "input_skip", "progressive_combine": "cat"}),
        ("vp/cifar10_ddpmpp_continuous", {"skip_rescale": False, "attn_resolutions": ()}),
    ],
)
def test_score_sde_networks_are_theirs(name, changes):
    with modules_of("yang-song/score_sde_pytorch", **score_sde_stand_ins()) as root:
        from models import ddpm, ncsnpp, utils  # noqa: F401

        config = score_sde_config(root, name, **changes)
        theirs = drawn(utils._MODELS[config.model.name](config))
        facts = {key: changes[key] for key in ("skip_rescale",) if key in changes}
        ours = score_sde.network(theirs.state_dict(), (3, 16, 16), centered=config.data.centered, **facts).eval()
        x, fourier = (
            torch.rand(2, 3, 16, 16),
            config.model.name == "ncsnpp" and config.model.embedding_type == "fourier",
        )
        t = torch.tensor([0.5, 20.0]) if fourier else torch.tensor([7, 500])
        with torch.no_grad():
            a, b = theirs(x, t), ours(x, t.log() if fourier else t)
        divided = (t if fourier else theirs.sigmas[t]).view(-1, 1, 1, 1) if config.model.scale_by_sigma else 1
        close(b / divided, a)


OPENAI = {
    "adm": {"num_head_channels": 16, "use_scale_shift_norm": True, "resblock_updown": True, "num_classes": 7},
    "new order": {"num_heads": 2, "use_new_attention_order": True, "use_scale_shift_norm": True},
    "improved": {"num_heads": 4},
    "pooled": {"num_heads": 2, "conv_resample": False, "attention_resolutions": (1,)},
    "512": {"num_head_channels": 16, "channel_mult": (0.5, 1, 2), "model_channels": 64, "resblock_updown": True},
    "signal": {"num_heads": 2, "dims": 1},
}


@pytest.mark.parametrize("name", OPENAI)
def test_openai_networks_are_theirs(name):
    flags = {
        "image_size": 16, "in_channels": 3, "model_channels": 32, "out_channels": 6, "num_res_blocks": 1,
        "attention_resolutions": (2, 4), "channel_mult": (1, 2, 3), **OPENAI[name],
    }  # fmt: skip
    with modules_of("openai/guided-diffusion"):
        from guided_diffusion.unet import UNetModel

        theirs = drawn(UNetModel(**flags))
    shape = (3, *(16,) * flags.get("dims", 2))
    facts = {key: flags[key] for key in ("num_heads", "num_head_channels", "use_new_attention_order") if key in flags}
    ours = openai.network(theirs.state_dict(), shape, **facts).eval()
    x, t, y = torch.randn(2, *shape), torch.tensor([3, 900]), torch.tensor([1, 5])
    labels = (y,) if "num_classes" in flags else ()
    with torch.no_grad():
        close(ours(x, t, *labels), theirs(x, t, *labels))


def test_improved_diffusion_networks_are_theirs():
    with modules_of("openai/improved-diffusion", mpi4py=stand_in("mpi4py", MPI=None)):
        from improved_diffusion.unet import UNetModel

        theirs = drawn(UNetModel(3, 32, 6, 1, (2,), channel_mult=(1, 2), num_classes=4, num_heads=2))
    ours = openai.network(theirs.state_dict(), (3, 8, 8), num_heads=2).eval()
    x, t, y = torch.randn(2, 3, 8, 8), torch.tensor([3, 900]), torch.tensor([1, 3])
    with torch.no_grad():
        close(ours(x, t, y), theirs(x, t, y))


EDM = {
    "ddpm++": ("SongUNet", {"augment_dim": 9}, 0.0),
    "ncsn++": ("SongUNet", {"label_dim": 4, "embedding_type": "fourier", "encoder_type": "residual", "channel_mult_noise": 2,
                            "resample_filter": [1, 3, 3, 1]}, -math.log(2)),
    "skips": ("SongUNet", {"encoder_type": "skip", "decoder_type": "skip"}, 0.0),
    "adm": ("DhariwalUNet", {"label_dim": 5, "model_channels": 64}, 0.0),
}  # fmt: skip


@pytest.mark.parametrize("name", EDM)
def test_edm_networks_are_theirs(name):
    kind, options, shift = EDM[name]
    options = {"model_channels": 32, "num_blocks": 1, "channel_mult": [1, 2, 2], "attn_resolutions": [8], **options}
    with modules_of("NVlabs/edm"):
        from training import networks

        theirs = drawn(getattr(networks, kind)(16, 3, 3, **options))
        ours = edm.network(theirs.state_dict(), shift=shift).eval()
        x, t, y = torch.randn(2, 3, 16, 16), torch.tensor([-0.7, 1.1]), torch.tensor([1, 3])
        one_hot = torch.eye(options["label_dim"])[y] if "label_dim" in options else None
        with torch.no_grad():
            close(ours(x, t, None if one_hot is None else y), theirs(x, t + shift, one_hot))
            if one_hot is not None:  # no label
                close(ours(x, t), theirs(x, t + shift, 0 * one_hot))


DIFFUSERS = {
    "default": {},
    "google": {"downsample_padding": 0, "flip_sin_to_cos": False, "freq_shift": 1, "attention_head_dim": None},
    "sine first": {"flip_sin_to_cos": False},
    "cosine first": {"freq_shift": 1},
    "consistency": {
        "down_block_types": ("ResnetDownsampleBlock2D", "AttnDownBlock2D"), "downsample_type": "resnet",
        "up_block_types": ("AttnUpBlock2D", "ResnetUpsampleBlock2D"), "upsample_type": "resnet",
        "resnet_time_scale_shift": "scale_shift",
        "attn_norm_num_groups": 8, "num_class_embeds": 5, "out_channels": 6,
    },
    "no attention below": {"add_attention": False, "sample_size": (8, 16)},
    "ncsn++": {
        "down_block_types": ("SkipDownBlock2D", "AttnSkipDownBlock2D"), "up_block_types": ("AttnSkipUpBlock2D", "SkipUpBlock2D"),
        "block_out_channels": (128, 128), "norm_num_groups": 32, "time_embedding_type": "fourier", "center_input_sample": True,
        "attention_head_dim": None, "mid_block_scale_factor": math.sqrt(2), "norm_eps": 1e-6, "sample_size": 4,
    },
}  # fmt: skip


def diffusers_unet(**changes: object) -> nn.Module:
    options = {
        "sample_size": 16, "block_out_channels": (32, 48), "layers_per_block": 1, "norm_num_groups": 8,
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D"), **changes,
    }  # fmt: skip
    return drawn(package("diffusers").UNet2DModel(**options))


@pytest.mark.parametrize("name", DIFFUSERS)
def test_diffusers_networks_are_theirs(name):
    theirs = diffusers_unet(**DIFFUSERS[name])
    ours = diffusers.network(theirs.state_dict(), dict(theirs.config)).eval()
    fourier = theirs.config.time_embedding_type == "fourier"
    x, t = torch.randn(2, *ours.shape), torch.tensor([0.7, 20.0]) if fourier else torch.tensor([3, 700])
    y = torch.tensor([1, 4]) if ours.num_classes else None
    with torch.no_grad():
        out = ours(x, t.log() if fourier else t, y)
        close(out / t.view(-1, 1, 1, 1) if fourier else out, theirs(x, t, class_labels=y).sample)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"act_fn": "mish"}, "act_fn='mish' of the file's config.json is not known here"),
        ({"down_block_types": ("DownBlock2D", "KDownBlock2D")}, "down_block_types="),
        ({"resnet_time_scale_shift": "scale_shift"}, "attn_norm_num_groups=None"),
        ({"mid_block_scale_factor": 2}, "mid_block_scale_factor=2"),
        ({"down_block_types": ("ResnetDownsampleBlock2D", "DownBlock2D")}, "resamples by convolutions at some levels"),
    ],
)
def test_variants_of_diffusers_that_are_not_known_are_refused_by_name(changes, message):
    plain = {"down_block_types": ("DownBlock2D", "DownBlock2D"), "up_block_types": ("UpBlock2D", "UpBlock2D")}
    config = {"sample_size": 8, "block_out_channels": (32, 64), **plain, **changes}
    with pytest.raises(errors.CheckpointMismatchError, match=message):
        diffusers.network({"conv_in.weight": torch.zeros(1)}, config)
