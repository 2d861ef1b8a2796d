"""Claims about GPUs, tested if there is one: the numbers of the CPU, no synchronisation, exact resume, all samplers."""

import copy
import shutil
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from chaos import tensors
from pixart.checkpoint import ModelCard
from pixart.checkpoint.files import checkpoints, newest_checkpoint
from pixart.diffusion.sampling import SampleConfig
from pixart.diffusion.schedule import DiffusionConfig
from pixart.encoders.autoencoder import AutoencoderConfig, IdentityAutoencoder
from pixart.inference.latents import sample_latents
from pixart.model import PRESETS, PixArt
from pixart.train.distributed import Processes
from pixart.train.loop import train
from pixart.train.random_batch import random_batch
from pixart.train.setup import build_state, make_accelerator
from pixart.train.step import read_results, train_step
from runs import ROOT, build, settings
from toy import relative, tiny_inputs, tiny_model

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
STORE = ROOT / "tests" / "fixtures" / "store"
FLOW = ("euler", "heun")


@contextmanager
def no_waiting():
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def base(tmp_path: Path, **changes) -> dict:
    config = settings(tmp_path / "run", tmp_path / "none", "none")
    config["data"] |= {"features": str(STORE)}
    config["model"] |= {"hidden_size": 48, "depth": 2, "num_heads": 4}
    config["train"] |= {"batch_size": 2, "deterministic": True}
    return {**config, **changes}


@pytest.mark.parametrize(
    "variant",
    [{}, {"micro_conditions": True}, {"qk_norm": True, "kv_compression": "conv", "kv_blocks": (1,)}],
)
def test_outputs_and_gradients_are_the_cpus(variant):
    model = tiny_model(**variant)
    twin = copy.deepcopy(model).cuda()
    inputs = tiny_inputs(model)
    output, other = model(**inputs), twin(**{name: value.cuda() for name, value in inputs.items()})
    assert relative(other.cpu(), output) <= 2e-6
    output.square().mean().backward()
    other.square().mean().backward()
    for (name, one), two in zip(model.named_parameters(), twin.parameters(), strict=True):
        # those of keys' biases are 0 in exact arithmetic
        if not name.endswith(("qkv.bias", "kv_linear.bias", "k_norm.bias")):
            assert relative(two.grad.cpu(), one.grad) <= 2e-5, name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_errs_by_its_own_rounding(dtype):
    model = tiny_model(depth=4).cuda()
    inputs = {name: value.cuda() for name, value in tiny_inputs(model).items()}
    with torch.no_grad():
        exact = model(**inputs)
        half = {k: v if k in ("t", "caption_mask") else v.to(dtype) for k, v in inputs.items()}
        assert relative(model.to(dtype)(**half).float(), exact) <= (0.02 if dtype == torch.bfloat16 else 0.003)


@pytest.mark.parametrize("sampler", ["dpm_solver", "iddpm", "ddim", "sa_solver", "lcm", "euler", "heun"])
def test_every_sampler_ends_where_it_does_on_the_cpu_and_never_waits(sampler):
    model = tiny_model(learn_sigma=sampler not in FLOW).eval()
    diffusion = DiffusionConfig("flow", "velocity") if sampler in FLOW else DiffusionConfig()
    card = ModelCard(model=model.config, vae=AutoencoderConfig("kl", "none"), diffusion=diffusion)
    captions = [torch.randn(n, 16, generator=torch.Generator().manual_seed(n)) for n in (5, 3)]
    config = SampleConfig(sampler=sampler, steps=6)

    def draw(network: PixArt, callback=None) -> torch.Tensor:
        return sample_latents(network, card, captions, None, [1, 2], config, height=8, width=8, callback=callback)

    expected, network = draw(model), copy.deepcopy(model).cuda()
    draw(network)  # tables of the schedule reach the device once
    with ExitStack() as stack:  # captions are copied before the first step; from then on nothing waits

        def after_step(step: int, *_: torch.Tensor) -> None:
            if step == 0:
                stack.enter_context(no_waiting())

        found = draw(network, after_step)
    assert relative(found.cpu(), expected) <= 1e-4


@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("schedule", ["flow", "linear"])
def test_a_training_step_never_waits_for_the_device(tmp_path, precision, schedule):
    learned = schedule == "linear"
    config = build(
        base(tmp_path),
        train__mixed_precision=precision,
        train__deterministic=False,
        model__learn_sigma=learned,
        diffusion={"schedule": schedule, "prediction": "epsilon" if learned else "x0"},
    )
    accelerator = make_accelerator(config)
    state = build_state(config, accelerator, Processes(accelerator, 60), None, fresh=True)
    batch = random_batch(config).to("cuda")
    train_step(state, [batch], IdentityAutoencoder(), config)  # the optimizer's state is made here, once
    with no_waiting():
        results = [train_step(state, [batch], IdentityAutoencoder(), config) for _ in range(3)]
    assert all(report.applied for report in read_results(results))


def test_fp16_finds_its_scale_and_learns(tmp_path):
    config = build(base(tmp_path), train__mixed_precision="fp16", train__deterministic=False)
    accelerator = make_accelerator(config)
    state = build_state(config, accelerator, Processes(accelerator, 60), None, fresh=True)
    batch = random_batch(config).to("cuda")
    reports = read_results([train_step(state, [batch], IdentityAutoencoder(), config) for _ in range(40)])
    assert reports[-1].applied and sum(report.applied for report in reports) >= 30
    assert reports[-1].loss < reports[0].loss


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_a_run_goes_on_bit_for_bit_and_ends_near_the_cpus(tmp_path, parallel):
    steps = {"train__steps": 6, "train__save_every": 3, "train__keep": 9, "train__parallel": parallel}
    whole = train(build(base(tmp_path), **steps)).run
    again = tmp_path / "again"
    shutil.copytree(whole, again)
    shutil.rmtree(checkpoints(again)[-1])
    train(build(base(tmp_path), **steps, output=str(again)))
    first, second = (tensors(newest_checkpoint(run, print)) for run in (whole, again))
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.slow
def test_compiled_blocks_and_one_cuda_graph_give_the_same_numbers():
    model = PixArt(replace(PRESETS["S/2"], depth=2)).cuda().eval().requires_grad_(False)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.02)
    c = model.config
    x, t = torch.randn(2, 4, 32, 32, device="cuda"), torch.tensor([999.0, 500.0], device="cuda")
    caption, mask = torch.randn(2, 120, c.caption_channels, device="cuda"), torch.ones(2, 120, device="cuda")
    with torch.no_grad():
        expected = model(x, t, caption, mask)
        compiled = copy.deepcopy(model)
        compiled.compile_blocks()
        assert relative(compiled(x, t, caption, mask), expected) <= 1e-4
        graphed = torch.compile(copy.deepcopy(model), mode="reduce-overhead")
        for _ in range(3):
            found = graphed(x, t, caption, mask).clone()
        assert relative(found, expected) <= 1e-4
