"""Other libraries' own files, as they write them, loaded by name: the model that comes out says what their code says, and its
samples are those of their samplers from the same noise."""

from __future__ import annotations

import json
import pickle
import re
import warnings

import numpy as np
import pytest
import test_networks_linear_attention_unet as lucidrains
import torch
from strangers import Config, close, drawn, modules_of, package, score_sde_stand_ins, stand_in
from test_networks_papers import diffusers_unet, score_sde_config

import fastdiff
import fastdiff.errors as errors
from fastdiff.cli import main
from fastdiff.training.sources import score_sde
from fastdiff.training.sources.diffusers import betas


def x_and_t(shape=(2, 3, 16, 16)):
    return torch.randn(shape, generator=torch.Generator().manual_seed(5)), torch.tensor([0.3, 0.9])


# ------------------------------------------------------------------------------------------------------- score_sde_pytorch
@pytest.fixture(
    params=["ve/cifar10_ncsnpp_continuous", "vp/cifar10_ddpmpp_continuous", "subvp/cifar10_ddpm_continuous"]
)
def song(request, tmp_path):
    """(a checkpoint as its training writes it, the name of its configuration, the score by its code, its SDE)."""
    with modules_of("yang-song/score_sde_pytorch", **score_sde_stand_ins()) as root:
        import sde_lib
        from models import ddpm, ncsnpp, utils  # noqa: F401
        from models.ema import ExponentialMovingAverage

        config = score_sde_config(root, request.param)
        net = torch.nn.DataParallel(drawn(utils._MODELS[config.model.name](config)))
        ema = ExponentialMovingAverage(net.parameters(), 0.999)
        for value in ema.shadow_params:
            value.mul_(0.9)
        torch.save({"optimizer": {}, "model": net.state_dict(), "ema": ema.state_dict(), "step": 7}, tmp_path / "c.pth")
        ema.copy_to(net.parameters())
        sde = {"ve": lambda: sde_lib.VESDE(0.01, 50, 1000), "vp": sde_lib.VPSDE, "subvp": sde_lib.subVPSDE}
        sde = sde[request.param.partition("/")[0]]()
        yield tmp_path / "c.pth", request.param, utils.get_score_fn(sde, net, train=False, continuous=True), sde


def test_a_checkpoint_of_score_sde_has_its_average_s_score_and_flow(song):
    path, name, score, _ = song
    facts = {**score_sde.published(name), "image_size": 16}
    model = fastdiff.load(path, source="score_sde_pytorch", config=facts)
    x, t = x_and_t()
    with torch.no_grad():
        close(model.score(x, t), score(x, t))
    assert model.data_range == ((0, 1) if name.startswith("ve") else (-1, 1))


def test_the_whole_configuration_of_a_training_says_what_its_file_does_not(song):
    path, name, score, _ = song
    with modules_of("yang-song/score_sde_pytorch", **score_sde_stand_ins()) as root:
        config = {
            key: dict(part) if isinstance(part, dict) else part for key, part in score_sde_config(root, name).items()
        }
    assert {"training", "sampling", "eval", "data", "model", "optim", "seed", "device"} <= set(config)
    model = fastdiff.load(path, source="score_sde_pytorch", config=config)
    x, t = x_and_t()
    with torch.no_grad():
        close(model.score(x, t), score(x, t))
    assert model.data_range == ((0, 1) if name.startswith("ve") else (-1, 1))
    config["model"]["nonlinearity"] = "elu"
    with pytest.raises(errors.ConfigError, match="nonlinearity must be one of 'swish', got 'elu'"):
        fastdiff.load(path, source="score_sde_pytorch", config=config)
    del config["training"]["sde"]
    with pytest.raises(errors.ConfigError, match="config must have 'sde' for score_sde_pytorch"):
        fastdiff.load(path, source="score_sde_pytorch", config=config)


def test_its_own_sampler_s_run_is_ours_from_the_same_noise(song, monkeypatch):
    path, name, score, sde = song
    with modules_of("yang-song/score_sde_pytorch", **score_sde_stand_ins()):
        import sampling

        kind = "reverse_diffusion" if name.startswith("ve") else "euler_maruyama"
        predictor = {
            "reverse_diffusion": sampling.ReverseDiffusionPredictor,
            "euler_maruyama": sampling.EulerMaruyamaPredictor,
        }
        sde = type(sde)(N=10)
        step, drawn_ones, z = predictor[kind](sde, score), [], sde.prior_sampling((2, 3, 16, 16))
        draw, x = torch.randn_like, z
        monkeypatch.setattr(torch, "randn_like", lambda x: drawn_ones.append(draw(x)) or drawn_ones[-1])
        with torch.no_grad():
            for now in torch.linspace(sde.T, 1e-3, sde.N):
                x, mean = step.update_fn(x, now.expand(2))
    facts = {**score_sde.published(name), "image_size": 16}
    model, noise = fastdiff.load(path, source="score_sde_pytorch", config=facts), iter(drawn_ones)
    ours = fastdiff.sample(
        model,
        sampler=kind,
        steps=10,
        t_min=1e-3,
        grid="score_sde",
        x_init=z,
        num_samples=2,
        noise=lambda row: next(noise),
    )
    close(ours, mean, 1e-4)


def test_published_configurations_are_known_by_their_names():
    assert score_sde.published("ve/cifar10_ncsnpp_continuous") == {
        "sde": "vesde", "continuous": True, "image_size": 32, "centered": False,
    }  # fmt: skip
    assert score_sde.published("configs/vp/ddpm/celebahq") == {
        "sde": "vpsde", "continuous": False, "image_size": 256, "centered": True,
    }  # fmt: skip
    assert score_sde.published("ve/ffhq_ncsnpp_continuous")["image_size"] == 1024
    for wrong in ("cifar10", "vp/cifar10_ddpmpp_continous", "vp/celeba_512", "vp/cifar10_ddpmpp_continuous.py"):
        with pytest.raises(errors.ConfigError, match=r"config must be one of .*(did you mean|others)"):
            score_sde.published(wrong)


def test_every_published_configuration_is_read_as_it_says():
    with modules_of("yang-song/score_sde_pytorch", **score_sde_stand_ins()) as root:
        count = 0
        for path in sorted(root.glob("configs/**/*.py")):
            name = str(path.relative_to(root / "configs").with_suffix(""))
            if (
                not re.match("(ve|vp|subvp)/(ddpm/)?(cifar10|celeba|bedroom|church|ffhq)[a-z_0-9]*$", name)
                or "uncond" in name
            ):
                continue
            import importlib.util

            spec = importlib.util.spec_from_file_location("config", path)
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
            config, count = module.get_config(), count + 1
            assert score_sde.published(name) == {
                "sde": config.training.sde, "continuous": config.training.continuous,
                "image_size": config.data.image_size, "centered": config.data.centered,
            }, name  # fmt: skip
        assert count >= 25


# ------------------------------------------------------------------------------------------------------------------- OpenAI
@pytest.mark.parametrize(
    ("flags", "config"),
    [
        ({"learn_sigma": True, "noise_schedule": "cosine"}, {"noise_schedule": "cosine"}),
        ({"rescale_timesteps": True, "diffusion_steps": 400}, {"rescale_timesteps": True, "diffusion_steps": 400}),
        ({"predict_xstart": True}, {"predict_xstart": True}),
    ],
)
def test_ddim_of_a_guided_diffusion_file_is_its_own(flags, config, tmp_path):
    stand_ins = {"mpi4py": stand_in("mpi4py", MPI=None), "blobfile": stand_in("blobfile")}
    options = {
        "image_size": 16, "num_channels": 32, "num_res_blocks": 1, "channel_mult": "1,2", "attention_resolutions": "8",
        "num_heads": 2, "use_scale_shift_norm": True, "timestep_respacing": "ddim10", **flags,
    }  # fmt: skip
    with modules_of("openai/guided-diffusion", **stand_ins):
        from guided_diffusion import script_util

        net, diffusion = script_util.create_model_and_diffusion(
            **{**script_util.model_and_diffusion_defaults(), **options}
        )
        drawn(net)
        z, _ = x_and_t()
        with torch.no_grad():
            theirs = diffusion.ddim_sample_loop(net, z.shape, noise=z, clip_denoised=True, device="cpu")
    torch.save(net.state_dict(), tmp_path / "ema_0.9999_100000.pt")
    model = fastdiff.load(
        tmp_path / "ema_0.9999_100000.pt",
        source="guided-diffusion",
        config={"image_size": 16, "num_heads": 2, "class_cond": False, **config},
    )
    assert model.variance == ("learned_range" if "learn_sigma" in flags else None)
    ours = fastdiff.sample(model, x_init=z, num_samples=2, steps=10, sampler="ddim", grid="ddim10", clip=(-1, 1))
    close(ours, theirs)


# ---------------------------------------------------------------------------------------------------------------------- EDM
@pytest.mark.parametrize("precond", ["edm", "vp", "ve"])
def test_a_pickle_of_edm_is_its_denoiser_and_runs_nothing(precond, tmp_path):
    options = {
        "model_type": "SongUNet",
        "model_channels": 32,
        "channel_mult": [1, 2],
        "num_blocks": 1,
        "attn_resolutions": [8],
    }
    if precond == "ve":
        options |= {
            "embedding_type": "fourier",
            "encoder_type": "residual",
            "channel_mult_noise": 2,
            "resample_filter": [1, 3, 3, 1],
        }
    x, y, sigma = x_and_t()[0] * 3, torch.tensor([1, 3]), torch.tensor([0.5, 20.0])
    with modules_of("NVlabs/edm") as root:
        from training import networks

        net = drawn(getattr(networks, f"{precond.upper()}Precond")(16, 3, label_dim=4, **options))
        (tmp_path / "edm.pkl").write_bytes(pickle.dumps({"ema": net}))
        with torch.no_grad():
            theirs = net(x, sigma, torch.eye(4)[y])
            time = net.sigma_inv(sigma) if precond == "vp" else None
        code = (root / "generate.py").read_text()
        code = code[code.index("def edm_sampler(") : code.index("#----", code.index("def edm_sampler("))]
        names = {"np": np, "torch": torch}
        exec(code, names)
        with torch.no_grad():
            path = names["edm_sampler"](net, x, torch.eye(4)[y], num_steps=18)
    model = fastdiff.load(tmp_path / "edm.pkl", source="edm", config={"precond": precond})
    with torch.no_grad():
        if precond == "edm":
            ours = model.predict("x0", x, sigma, y)
        elif precond == "vp":
            alpha = (1 + sigma**2).rsqrt().view(-1, 1, 1, 1)
            ours = model.predict("x0", alpha * x, torch.as_tensor(time), y)
        else:
            ours = model.predict("x0", x, torch.log(sigma / 0.02) / np.log(100 / 0.02), y)
    close(ours, theirs)
    if precond == "edm":
        out = fastdiff.sample(model, x_init=80 * x, num_samples=2, steps=18, sampler="heun", grid="karras", cond=y)
        close(out, path.float())


# ---------------------------------------------------------------------------------------------------------------- diffusers
@pytest.mark.parametrize(
    "scheduler",
    [
        {},
        {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "prediction_type": "v_prediction",
         "rescale_betas_zero_snr": True},
        {"beta_schedule": "squaredcos_cap_v2", "prediction_type": "sample"},
        {"trained_betas": np.linspace(2e-4, 0.03, 500).tolist(), "num_train_timesteps": 500},
    ],
)  # fmt: skip
def test_ddim_of_a_pipelines_folder_is_its_own(scheduler, tmp_path):
    module = package("diffusers")
    net = diffusers_unet()
    theirs = module.DDIMScheduler(timestep_spacing="trailing", clip_sample=False, **scheduler)
    module.DDIMPipeline(net, theirs).save_pretrained(tmp_path)
    model = fastdiff.load(tmp_path)
    chain = torch.tensor(1 - np.cumprod(1 - np.array(betas(dict(theirs.config)))))
    torch.testing.assert_close(1 - theirs.alphas_cumprod.double(), chain, rtol=1e-5, atol=1e-6)
    theirs.set_timesteps(10)
    z, _ = x_and_t()
    x = z
    with torch.no_grad():
        for t in theirs.timesteps:
            x = theirs.step(net(x, t).sample, t, x, eta=0.0).prev_sample
    ours = fastdiff.sample(model, x_init=z, num_samples=2, steps=10, sampler="ddim", grid="trailing")
    close(ours, x, 1e-4)  # its table of ᾱ is of float32


def test_other_schedulers_give_their_process(tmp_path):
    module = package("diffusers")
    diffusers_unet().save_pretrained(tmp_path)
    with pytest.raises(errors.ConfigError, match=r"has no scheduler_config\.json, which says what the"):
        fastdiff.load(tmp_path)
    for name, process, prediction in (
        ("ScoreSdeVeScheduler", "ve", "scaled_score"),
        ("EDMEulerScheduler", "edm", "edm"),
    ):
        getattr(module, name)().save_pretrained(tmp_path)
        model = fastdiff.load(str(tmp_path))
        assert (model.process.name, model.prediction) == (process, prediction)
    module.FlowMatchEulerDiscreteScheduler(num_train_timesteps=500).save_pretrained(tmp_path)
    with pytest.raises(errors.ConfigError, match="scheduler must be of a chain of betas"):
        fastdiff.load(tmp_path)


def test_a_pipelines_folder_of_a_flow_is_its_own(tmp_path):
    module = package("diffusers")
    net, theirs = diffusers_unet(), module.FlowMatchEulerDiscreteScheduler(shift=3.0)
    module.DDPMPipeline(net, theirs).save_pretrained(tmp_path)
    model = fastdiff.load(tmp_path)
    assert (model.process, model.prediction, model.time_input) == (fastdiff.RectifiedFlow(), "velocity", "t*1000")
    theirs.set_timesteps(10)
    theirs.sigmas[0] = model.process.t_start  # where ours begin, as at 1 nothing is left of the data
    theirs.timesteps[0] = 1000 * theirs.sigmas[0]
    z, _ = x_and_t()
    x = z
    with torch.no_grad():
        for t in theirs.timesteps:
            x = theirs.step(net(x, t).sample, t, x).prev_sample
    ours = fastdiff.sample(model, x_init=z, num_samples=2, sampler="ddim", grid=theirs.sigmas.tolist())
    close(ours, x, 1e-4)  # their times are of float32
    assert fastdiff.load(fastdiff.save(model, tmp_path / "ours")).time_input == "t*1000"


def test_a_pipeline_of_songs_networks_is_its_score(tmp_path):
    module, song = package("diffusers"), {
        "down_block_types": ("SkipDownBlock2D", "AttnSkipDownBlock2D"), "up_block_types": ("AttnSkipUpBlock2D", "SkipUpBlock2D"),
        "block_out_channels": (128, 128), "norm_num_groups": 32, "time_embedding_type": "fourier", "center_input_sample": True,
        "attention_head_dim": None, "mid_block_scale_factor": 2**0.5, "norm_eps": 1e-6, "sample_size": 4,
    }  # fmt: skip
    net = diffusers_unet(**song)
    module.ScoreSdeVePipeline(net, module.ScoreSdeVeScheduler(sigma_max=50.0)).save_pretrained(tmp_path)
    model = fastdiff.load(tmp_path)
    x, t = x_and_t((2, 3, 4, 4))
    sigma = 0.01 * (50 / 0.01) ** t
    with torch.no_grad():
        close(model.score(x, t), net(x, sigma).sample)


# --------------------------------------------------------------------------------------------------------- NCSN and NCSNv2
def ncsn_config(**model):
    named = {"ngf": 8, "num_classes": 6, "sigma_begin": 5.0, "sigma_end": 0.01, "sigma_dist": "geometric", "batch_norm": False,
             "normalization": "InstanceNorm++", "nonlinearity": "elu", "spec_norm": False, **model}  # fmt: skip
    data = {"channels": 3, "image_size": 16, "logit_transform": False, "rescaled": False}
    return Config(model=Config(named), data=Config(data), device="cpu")


def test_a_checkpoint_of_ncsnv2_is_its_averages_score_and_its_langevin_steps_are_ours(tmp_path, monkeypatch):
    with modules_of("ermongroup/ncsnv2"):
        from models import anneal_Langevin_dynamics, ncsnv2
        from models.ema import EMAHelper

        config = ncsn_config()
        net = torch.nn.DataParallel(drawn(ncsnv2.NCSNv2(config)))
        helper = EMAHelper(mu=0.5)
        helper.register(net)
        for value in helper.shadow.values():
            value.mul_(0.9)
        states = [net.state_dict(), {}, 1, 2, helper.state_dict()]
        torch.save(states, tmp_path / "checkpoint.pth")
        helper.ema(net)
        scale, draw, drawn_ones = net.module.sigmas, torch.randn_like, []
        monkeypatch.setattr(torch, "randn_like", lambda x: drawn_ones.append(draw(x)) or drawn_ones[-1])
        start = torch.rand(2, 3, 16, 16)
        with torch.no_grad():
            labels = torch.tensor([1, 4])
            theirs = net(start, labels)
            run = anneal_Langevin_dynamics(
                start.clone(), net, scale.numpy(), n_steps_each=2, step_lr=1e-5, final_only=True, denoise=True
            )[-1]
    model, noise = (
        fastdiff.load(
            tmp_path / "checkpoint.pth", source="ncsn", config={k: dict(config[k]) for k in ("data", "model")}
        ),
        iter(drawn_ones),
    )
    assert (model.process.name, model.prediction, model.data_range) == ("ncsn", "scaled_score", (0, 1))
    with torch.no_grad():
        close(model.score(start, 6.0 - labels), theirs)
    sampler = fastdiff.samplers.AnnealedLangevin(steps_per_level=2, step_size=1e-5)
    ours = fastdiff.sample(model, sampler=sampler, x_init=start, num_samples=2, noise=lambda row: next(noise))
    close(ours, run, 1e-4)


def test_a_checkpoint_of_ncsn_has_the_levels_of_its_configuration(tmp_path):
    with modules_of("ermongroup/ncsn"):
        from models.cond_refinenet_dilated import CondRefineNetDilated

        net = drawn(CondRefineNetDilated(ncsn_config()))
        torch.save([torch.nn.DataParallel(net).state_dict(), {}], tmp_path / "checkpoint.pth")
        x, labels = torch.rand(2, 3, 16, 16), torch.tensor([1, 4])
        with torch.no_grad():
            theirs = net(x, labels)
    model = fastdiff.load(tmp_path / "checkpoint.pth", source="ncsn", config={"image_size": 16, "sigma_begin": 5.0})
    assert model.process.sigmas[0] == 5.0
    with torch.no_grad():
        close(model.score(x, 6.0 - labels), theirs)


# ---------------------------------------------------------------------------------------------- denoising-diffusion-pytorch
@pytest.mark.parametrize("objective", ["pred_noise", "pred_x0", "pred_v"])
def test_ddim_of_a_file_of_denoising_diffusion_pytorch_is_its_own(objective, tmp_path):
    module = lucidrains.package()
    net = drawn(module.Unet(dim=8, dim_mults=(1, 2)))
    diffusion = module.GaussianDiffusion(net, image_size=16, timesteps=200, sampling_timesteps=10, objective=objective)
    torch.save({"model": diffusion.state_dict(), "step": 3}, tmp_path / "model-1.pt")
    model = fastdiff.load(tmp_path / "model-1.pt", source="denoising-diffusion-pytorch", config={"image_size": 16})
    x, t = x_and_t()[0], torch.tensor([20.0, 150.0])
    with torch.no_grad():
        theirs = diffusion.model_predictions(x, t.long() - 1)
        close(model.predict("x0", x, t), theirs.pred_x_start, 1e-4)
        close(model.predict("eps", x, t), theirs.pred_noise, 1e-4)


# ---------------------------------------------------------------------------------------------------------------------- DiT
def test_a_pipelines_folder_of_a_transformer_is_its_own(tmp_path):
    module = package("diffusers")
    options = {"sample_size": 8, "patch_size": 2, "in_channels": 4, "out_channels": 8, "num_layers": 2,
               "num_attention_heads": 2, "attention_head_dim": 16, "num_embeds_ada_norm": 5}  # fmt: skip
    net = drawn(module.DiTTransformer2DModel(**options))
    for block in net.transformer_blocks:  # which share it in DiT, and have copies there
        block.norm1.emb.load_state_dict(net.transformer_blocks[0].norm1.emb.state_dict())
    (tmp_path / "transformer").mkdir()
    net.save_pretrained(tmp_path / "transformer")
    module.DDIMScheduler().save_pretrained(tmp_path / "scheduler")
    (tmp_path / "model_index.json").write_text("{}")
    model = fastdiff.load(tmp_path)
    assert model.variance == "learned_range"
    x, y = torch.randn(2, 4, 8, 8), torch.tensor([1, 4])
    with torch.no_grad():
        theirs = net(x, timestep=torch.tensor([8, 8]), class_labels=y).sample[:, :4]
        close(model.predict("eps", x, torch.tensor([9.0, 9.0]), y), theirs)


# ---------------------------------------------------------------------------------------------------- commands and mistakes
def test_the_command_writes_a_file_of_fastdiffs_and_says_what_it_set(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    module = package("diffusers")
    module.DDPMPipeline(diffusers_unet(), module.DDPMScheduler()).save_pretrained("pipe")
    assert main(["import", "pipe", "--out", "mine.safetensors"]) == 0
    shown = capsys.readouterr().out
    for line in ("PaperUNet", "DDPM(", "prediction  'eps'", "time_input  'fractional_index'", "data_range  (-1.0, 1.0)",
                 "fastdiff check mine.safetensors --data DATA"):  # fmt: skip
        assert line in shown
    mine, theirs = fastdiff.load("mine.safetensors"), fastdiff.load("pipe")
    x, _ = x_and_t()
    t = torch.tensor([3.0, 800.0])
    assert torch.equal(mine(x, t), theirs(x, t))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--from", "score_sde"], "source must be one of .* got 'score_sde' (did you mean 'score_sde_pytorch'?)"),
        (
            ["--from", "guided-diffusion"],
            "config must have 'image_size', or 'large_size' and 'small_size' of super-resolution, which the file",
        ),
        (["--from", "edm"], "the file lacks enc or dec"),
        (["--from", "edm", "--config", "{}", "--part", "nets"], "part must be the beginning of names"),
        (
            ["--from", "edm", "--config", "none"],
            "config must be a dict, or the name of a published file such as 'edm-cifar10",
        ),
        (["--from", "diffusers"], "must be a folder of diffusers"),
        (
            ["--from", "denoising-diffusion-pytorch"],
            "tensors must be denoising-diffusion-pytorch's GaussianDiffusion's",
        ),
        (["--config", "x.json"], "config and part are of other libraries' files: say whose"),
    ],
)
def test_what_does_not_fit_is_said_in_one_line(arguments, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"ema": {"linear.weight": torch.zeros(2, 2)}}, "file.pt")
    assert main(["import", "file.pt", *arguments]) == 2
    shown = capsys.readouterr().err
    assert shown.count("\n") == 1
    assert re.search(re.escape(message).replace(r"\.\*", ".*").replace(r"\ \.", " ."), shown), shown
    assert not (tmp_path / "model.safetensors").exists()


def test_tensors_that_nothing_takes_and_that_are_missing_are_named(tmp_path):
    net = diffusers_unet()
    net.save_pretrained(tmp_path)
    config = {"prediction_type": "epsilon", "beta_schedule": "linear"}
    fastdiff.load(tmp_path, config=config)
    from safetensors.torch import load_file, save_file

    path = tmp_path / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    save_file({**tensors, "more.weight": torch.zeros(2)}, path)
    with pytest.raises(errors.CheckpointMismatchError, match=r"has 1 tensors .* such as 'more.weight'"):
        fastdiff.load(tmp_path, config=config)
    save_file({name: value for name, value in tensors.items() if name != "conv_out.weight"}, path)
    with pytest.raises(errors.CheckpointMismatchError, match=r"the file lacks 'conv_out.weight'"):
        fastdiff.load(tmp_path, config=config)
    save_file({**tensors, "mid_block.resnets.0.conv1.weight": torch.zeros(48, 48, 1, 1)}, path)
    with pytest.raises(errors.CheckpointMismatchError, match="must have the shape"):
        fastdiff.load(tmp_path, config=config)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(errors.CheckpointError, match="is no JSON file that can be read"):
        fastdiff.load(tmp_path, source="diffusers", config=config)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        (
            "vp/cifar10_ddpmpp_continuous",
            {"sde": "vesde"},
            "sde='vesde' with continuous=True must be of a network that is told",
        ),
        ("ve/cifar10_ncsnpp_continuous", {"sde": "vpsde"}, "Say 'vesde' and continuous=True"),
        ("ve/cifar10_ncsnpp_continuous", {"continuous": False}, "this file's is told ln σ, by Fourier features"),
        ("vp/cifar10_ddpmpp_continuous", {"scale_by_sigma": True}, "scale_by_sigma must be False for vpsde"),
        (
            "vp/cifar10_ddpmpp_continuous",
            {"continuous": "perhaps"},
            "config's continuous must be of type True or False",
        ),
        (
            "vp/cifar10_ddpmpp_continuous",
            {"image_size": 16.0},
            "config's image_size must be of type Sequence or int, got 16.0",
        ),
        ("vp/cifar10_ddpmpp_continuous", {"image_size": "16"}, "config's image_size must be of type Sequence or int"),
        ("vp/cifar10_ddpmpp_continuous", {"num_scales": "10"}, "config's num_scales must be of type int, got '10'"),
    ],
)
def test_what_contradicts_a_file_of_score_sde_is_refused(name, changes, message, tmp_path):
    with modules_of("yang-song/score_sde_pytorch", **score_sde_stand_ins()) as root:
        from models import ncsnpp  # noqa: F401
        from models import utils as theirs

        config = score_sde_config(root, name)
        net = drawn(theirs._MODELS[config.model.name](config))
    torch.save({"model": {f"module.{k}": v for k, v in net.state_dict().items()}}, tmp_path / "c.pth")
    facts = {**score_sde.published(name), "image_size": 16}
    with pytest.warns(UserWarning, match="has no averages of the weights"):
        fastdiff.load(tmp_path / "c.pth", source="score_sde_pytorch", config={**facts, "continuous": "yes"})
    with warnings.catch_warnings(action="ignore"), pytest.raises(errors.ConfigError, match=re.escape(message)):
        fastdiff.load(tmp_path / "c.pth", source="score_sde_pytorch", config={**facts, **changes})


def test_flags_that_contradict_a_file_are_refused_and_others_of_a_script_are_passed_over(tmp_path):
    flags = {
        "image_size": 16, "in_channels": 3, "model_channels": 32, "out_channels": 6, "num_res_blocks": 1,
        "attention_resolutions": (2,), "channel_mult": (1, 2), "num_heads": 2,
    }  # fmt: skip
    with modules_of("openai/guided-diffusion"):
        from guided_diffusion.unet import UNetModel

        torch.save(UNetModel(**flags).state_dict(), tmp_path / "lsun_cat.pt")
    path, say = (
        tmp_path / "lsun_cat.pt",
        "--image_size=16 --num_heads 2 --num_head_channels -1 --lr 1e-4 --learn_sigma yes",
    )
    model = fastdiff.load(path, source="guided-diffusion", config=say)
    assert model.variance == "learned_range"
    for wrong, message in (
        ("--num_channels 64", "num_channels must be 32 by the file, got 64"),
        ("--class_cond True", "class_cond must be False by the file"),
        ("--predict_xstart perhaps", "config's predict_xstart must be of type True or False"),
        ("--num_heads '", "config must be flags as a shell reads them"),
    ):
        with pytest.raises(errors.ConfigError, match=message):
            fastdiff.load(path, source="guided-diffusion", config=f"{say} {wrong}")
    path.rename(tmp_path / "mine.pt")
    with pytest.raises(errors.ConfigError, match="config must have 'num_heads' or 'num_head_channels'"):
        fastdiff.load(tmp_path / "mine.pt", source="guided-diffusion", config={"image_size": 16})


@pytest.mark.parametrize(
    ("source", "config", "message"),
    [
        (
            "score_sde_pytorch",
            {"training": {"n_iters": 1}, "model": {"fir": True}},
            "must have 'sde' for score_sde_pytorch",
        ),
        (
            "score_sde_pytorch",
            {"training": {"sde": "vpsde"}, "seed": 1},
            "must have 'image_size' for score_sde_pytorch",
        ),
        (
            "score_sde_pytorch",
            {"training": {"sde": "ve"}, "data": {"image_size": 8}},
            "sde must be one of 'vesde', .* got 've'",
        ),
        ("score_sde_pytorch", {"model": 3, "sde": "vesde"}, "config's model must be a dict, .* got 3: give vars"),
        ("score_sde_pytorch", {"model": {}, "continous": True}, r"got 'continous' \(did you mean 'continuous'\?"),
        (
            "score_sde_pytorch",
            {"training": {"sde": "vesde"}, "sde": "ve", "image_size": 8},
            "sde must be one of .* got 've'",
        ),
        ("ncsn", {"data": {"channels": 3}, "runner": "AnnealRunner"}, "must have 'image_size' for ncsn"),
        ("edm", {"model": {"precond": "vp"}}, "config's names for edm must be .* got 'model'"),
    ],
)
def test_what_a_whole_configuration_lacks_is_named(source, config, message, tmp_path):
    (tmp_path / "a.pth").touch()
    with pytest.raises(errors.ConfigError, match=message):
        fastdiff.load(tmp_path / "a.pth", source=source, config=config)


def test_a_scheduler_that_says_otherwise_is_not_overridden(tmp_path):
    module = package("diffusers")
    module.DDPMPipeline(diffusers_unet(), module.DDPMScheduler()).save_pretrained(tmp_path)
    with pytest.raises(errors.ConfigError, match="prediction_type must be 'epsilon', as its scheduler_config"):
        fastdiff.load(tmp_path, config={"prediction_type": "v_prediction"})


def test_options_of_two_kinds_of_files_do_not_mix(tmp_path):
    for options in ({"ema": 0.9}, {"sde": fastdiff.VP()}, {"net": torch.nn.Linear(1, 1)}):
        with pytest.raises(errors.ConfigError, match="is of fastdiff's own files"):
            fastdiff.load(tmp_path / "x", source="edm", **options)
    with pytest.raises(FileNotFoundError, match="no file at"):
        fastdiff.load(tmp_path / "x", source="edm")
    torch.save({"ema": torch.zeros(1)}, tmp_path / "x")
    with pytest.raises(
        errors.ConfigError, match="config must be a dict, the path of a JSON file, flags or a published name"
    ):
        fastdiff.load(tmp_path / "x", source="edm", config=3)
    (tmp_path / "facts.json").write_text(json.dumps({"precond": "vp", "sigma_dat": 1}))
    with pytest.raises(errors.ConfigError, match=r"got 'sigma_dat' .did you mean 'sigma_data'"):
        fastdiff.load(tmp_path / "x", source="edm", config=str(tmp_path / "facts.json"))
    with pytest.raises(errors.ConfigError, match="config must be flags, each with its value"):
        fastdiff.load(tmp_path / "x", source="edm", config="--precond")
