"""Schedules, losses and samplers against the authors' figures."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from pixart.diffusion import DiffusionConfig, diffusion_loss, guide, make_denoise
from pixart.diffusion.losses import variational_bound
from pixart.diffusion.samplers import ddim_step, dpm_solver, iddpm_step, posterior
from pixart.diffusion.schedule import DiscreteSchedule
from pixart.diffusion.timesteps import uniform
from toy import relative, toy_network

GOLDEN = Path(__file__).parent / "golden"
LINEAR = DiscreteSchedule.linear()


@pytest.mark.parametrize("steps", [100, 250, 1000])
def test_tables_are_exact(steps):
    golden = load_file(GOLDEN / "diffusion_tables.safetensors")
    chain = LINEAR.respace(steps)
    assert torch.equal(torch.tensor(chain.timesteps), golden[f"{steps}.timestep_map"])
    names = [key.split(".")[1] for key in golden if key.startswith(f"{steps}.") and "map" not in key]
    assert len(names) == 7
    for name in names:
        assert torch.equal(chain.tables[name], golden[f"{steps}.{name}"]), name


LOSSES = {
    "default": (DiffusionConfig(), 8, LINEAR, "in.t"),
    "r250": (DiffusionConfig(), 8, LINEAR.respace(250), "in.t250"),
    "nosigma": (DiffusionConfig(), 4, LINEAR, "in.t"),
    "fixedlarge": (DiffusionConfig(), 4, LINEAR, "in.t"),
    "snr": (DiffusionConfig(weighting="snr_switch"), 8, LINEAR, "in.t"),
    "xstart": (DiffusionConfig(prediction="x0"), 8, LINEAR, "in.t"),
}


@pytest.mark.parametrize("name", LOSSES)
def test_losses_and_their_gradients_are_the_official_ones(name):
    golden = load_file(GOLDEN / "diffusion_losses.safetensors")
    config, channels, schedule, times = LOSSES[name]
    output = golden["in.model_out"][:, :channels].clone().requires_grad_()
    losses = diffusion_loss(schedule, config, output, golden["in.x0"], golden["in.noise"], golden[times])
    losses["loss"].mean().backward()
    for ours, official in (("loss", "loss"), ("mse", "mse"), ("vlb", "vb")):
        if f"out.{name}.{official}" in golden:
            assert relative(losses[ours], golden[f"out.{name}.{official}"]) <= 1e-6, ours
        else:
            assert ours not in losses
    if f"grad.{name}.model_out" in golden:
        assert relative(output.grad, golden[f"grad.{name}.model_out"]) <= 1e-6


def test_the_bound_alone_with_its_mean_attached_is_the_official_one():
    golden = load_file(GOLDEN / "diffusion_losses.safetensors")
    output, t = golden["in.model_out"].clone().requires_grad_(), golden["in.t"]
    x_t = LINEAR.add_noise(golden["in.x0"], golden["in.noise"], t)
    assert torch.equal(x_t, golden["out.x_t"])
    x0 = LINEAR.x0_from_epsilon(x_t, output[:, :4], t)
    bound = 1000 * variational_bound(LINEAR, x0, output[:, 4:], golden["in.x0"], x_t, t)
    bound.mean().backward()
    assert relative(bound, golden["out.kl.loss"]) <= 1e-6
    assert relative(output.grad, golden["grad.kl.model_out"]) <= 1e-6


@pytest.mark.parametrize("steps", [100, 250, 1000])
@pytest.mark.parametrize("clip", [False, True])
def test_single_steps_are_the_official_ones(steps, clip):
    golden = load_file(GOLDEN / "diffusion_steps.safetensors")
    chain, prefix = LINEAR.respace(steps), f"out.{steps}"
    results: dict[str, list] = {}
    for row, i in enumerate(golden[f"in.{steps}.t"].tolist()):
        x, noise, output = (golden[name][row : row + 1] for name in ("in.x", "in.noise", "in.model_out"))
        denoise = make_denoise(lambda x, t, output=output: output, LINEAR, DiffusionConfig())
        mean, log_variance, _ = posterior(denoise, x, chain, i, clip_x0=clip)
        made = {
            f"{prefix}.pmv.clip{clip:d}.mean": mean,
            f"{prefix}.pmv.clip{clip:d}.log_variance": log_variance,
            f"{prefix}.p_sample.clip{clip:d}": iddpm_step(denoise, x, chain, i, noise, clip_x0=clip)[0],
        }
        for eta in (0, 1):
            made[f"{prefix}.ddim.clip{clip:d}.eta{eta}"] = ddim_step(
                denoise, x, chain, i, noise, eta=eta, clip_x0=clip
            )[0]
        for name, value in made.items():
            results.setdefault(name, []).append(value)
    for name, parts in results.items():
        assert relative(torch.cat(parts), golden[name]) <= 5e-6, name


@pytest.mark.parametrize("ending", ["alpha", "sigma"])
@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("steps", [14, 20])
def test_dpm_solver_is_the_official_one(ending, order, steps):
    golden = load_file(GOLDEN / "dpm_solver.safetensors")
    both = torch.cat([golden["in.c"], golden["in.u"]])
    called = []

    def network(x, t):
        called.append(t[0].item())
        return toy_network(both)(x, t)

    config = DiffusionConfig()
    denoise = guide(
        make_denoise(toy_network(golden["in.c"]), LINEAR, config),
        None,
        LINEAR,
        4.5,
        together=make_denoise(network, LINEAR, config),
    )
    result = dpm_solver(denoise, golden["in.x"], LINEAR, uniform(LINEAR, steps), order=order, ending=ending)
    assert relative(result, golden[f"out.{ending}.multistep.time_uniform.o{order}.s{steps}"]) <= 5e-6
    times = golden["model_t.alpha.s14" if steps == 14 else "model_t.sigma.s20"]
    assert torch.allclose(torch.tensor(called), times, rtol=0, atol=1e-4)
