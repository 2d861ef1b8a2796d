"""SA-Solver against the authors' figures; LCM and DMD against diffusers' schedulers on the same noise."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from pixart.diffusion import DiffusionConfig, guide, make_denoise
from pixart.diffusion.distilled import dmd, lcm, lcm_times
from pixart.diffusion.sa_solver import sa_solver
from pixart.diffusion.samplers import draw_noise
from pixart.diffusion.sampling import SampleConfig, resolve, sample
from pixart.diffusion.schedule import DiscreteSchedule, FlowSchedule
from pixart.diffusion.timesteps import uniform
from pixart.errors import InputError
from toy import relative, toy_network

GOLDEN = Path(__file__).parent / "golden"
LINEAR, FLOW = DiscreteSchedule.linear(), FlowSchedule()
CAPTION = torch.tensor([0.5, -1.0, 0.2, 0.8])[None, :, None, None]
START = draw_noise([torch.Generator().manual_seed(seed) for seed in (1, 2)], (4, 8, 8))
BETAS = {"num_train_timesteps": 1000, "beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear"}


def generators() -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in (7, 8)]


def toy_denoise(called: list | None = None):
    def network(x, t):
        if called is not None:
            called.append(t[0].item())
        return toy_network(CAPTION)(x, t)

    return make_denoise(network, LINEAR, DiffusionConfig())


@pytest.mark.parametrize("tau", [0, 1])
@pytest.mark.parametrize("steps", [10, 25])
def test_sa_solver_is_the_official_one(steps, tau):
    golden = load_file(GOLDEN / "sa_solver.safetensors")
    condition, both = golden["in.c"], torch.cat([golden["in.c"], golden["in.u"]])
    single, double = (make_denoise(toy_network(c), LINEAR, DiffusionConfig()) for c in (condition, both))
    denoise = guide(single, None, LINEAR, 4.5, together=double)
    noises = golden[f"noise.s{steps}"][1:]  # the first is drawn and not used
    result = sa_solver(denoise, golden["in.x"], LINEAR, uniform(LINEAR, steps), tau=tau, noises=noises)
    assert relative(result, golden[f"out.s{steps}.eta{tau}"]) <= 5e-6


def test_sa_solver_calls_the_model_once_a_step_and_draws_from_each_pictures_generator():
    called = []
    result = sa_solver(toy_denoise(called), START, LINEAR, uniform(LINEAR, 12), generators())
    assert called == pytest.approx([999 * (1 - i / 12) for i in range(12)])
    alone = sa_solver(toy_denoise(), START[1:], LINEAR, uniform(LINEAR, 12), generators()[1:])
    assert torch.equal(alone, result[1:])
    assert relative(sa_solver(toy_denoise(), START, LINEAR, uniform(LINEAR, 12), tau=0.0), result) > 0.05
    with pytest.raises(InputError, match="needs a generator per image"):
        sa_solver(toy_denoise(), START, LINEAR, uniform(LINEAR, 12))


def test_without_noise_sa_solver_is_of_second_order():
    reference = sa_solver(toy_denoise(), START, LINEAR, uniform(LINEAR, 800), tau=0.0)
    # the schedule's last time, 0, is where σ changes fastest: measured between 50 and 200 steps
    coarse, fine = (
        relative(sa_solver(toy_denoise(), START, LINEAR, uniform(LINEAR, n), tau=0.0), reference) for n in (50, 200)
    )
    assert fine < coarse / 12  # 16 for order 2 exactly, 4 for order 1


@pytest.mark.parametrize("steps", [1, 2, 4, 7, 50])
def test_lcm_is_diffusers_lcm(steps):
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.LCMScheduler(**BETAS, clip_sample=False)
    scheduler.set_timesteps(steps)
    noises, x = generators(), START
    for t in scheduler.timesteps:
        output = toy_network(CAPTION)(x, t.expand(2).float())
        # the scheduler draws a batch from one generator; a list of them makes one per picture
        x = scheduler.step(output, t, x, generator=noises, return_dict=False)[0]
    assert relative(lcm(toy_denoise(), START, LINEAR, lcm_times(LINEAR, steps), generators()), x) <= 5e-6


def test_lcm_times_are_those_of_diffusers_for_every_number_of_steps():
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.LCMScheduler(**BETAS)
    for steps in range(1, 51):
        scheduler.set_timesteps(steps)
        assert lcm_times(LINEAR, steps) == scheduler.timesteps.tolist(), steps
    with pytest.raises(InputError, match="got 51 steps, expected 1 to 50"):
        lcm_times(LINEAR, 51)


def test_dmd_is_the_prediction_of_diffusers_ddpm_scheduler_at_400():
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.DDPMScheduler(**BETAS, clip_sample=False)
    scheduler.set_timesteps(timesteps=[400])
    (t,) = scheduler.timesteps
    output = toy_network(CAPTION)(START, t.expand(2).float())
    expected = scheduler.step(output, t, START, return_dict=True).pred_original_sample
    called = []
    assert relative(dmd(toy_denoise(called), START, LINEAR), expected) <= 1e-6
    assert called == [400.0]


@pytest.mark.parametrize(
    ("config", "schedule", "expected"),
    [
        ({}, LINEAR, ("dpm_solver", 20, 4.5)),
        ({}, FLOW, ("heun", 15, 4.5)),
        ({"sampler": "sa_solver"}, LINEAR, ("sa_solver", 25, 4.5)),
        ({"sampler": "lcm"}, LINEAR, ("lcm", 4, 1.0)),
        ({"sampler": "dmd"}, LINEAR, ("dmd", 1, 1.0)),
        ({"sampler": "lcm", "steps": 2, "guidance": 1.0}, LINEAR, ("lcm", 2, 1.0)),
    ],
)
def test_every_sampler_has_defaults_of_its_own(config, schedule, expected):
    found = resolve(SampleConfig(**config), schedule)
    assert (found.sampler, found.steps, found.guidance) == expected
    assert resolve(found, schedule) == found


@pytest.mark.parametrize(
    ("config", "schedule", "match"),
    [
        ({"sampler": "sa_solver"}, FLOW, "'sa_solver' does not fit this model's schedule, which takes euler or heun"),
        ({"sampler": "lcm"}, FLOW, "'lcm' does not fit"),
        ({"sampler": "dmd"}, FLOW, "'dmd' does not fit"),
        ({"sampler": "lcm", "guidance": 4.5}, LINEAR, "'lcm' is for models with guidance in their weights: got 4.5"),
        ({"sampler": "dmd", "guidance": 2.0}, LINEAR, "set it to 1"),
        ({"tau": 0.5}, LINEAR, "'dpm_solver' has no option 'tau'"),
        ({"sampler": "sa_solver", "eta": 0.5}, LINEAR, "no option 'eta'"),
    ],
)
def test_what_a_sampler_cannot_do_is_refused(config, schedule, match):
    with pytest.raises(InputError, match=match):
        resolve(SampleConfig(**config), schedule)


def test_dmd_has_one_step_and_tau_is_not_negative():
    with pytest.raises(InputError, match="got 2 steps, it has one"):
        sample(toy_denoise(), START, LINEAR, SampleConfig(sampler="dmd", steps=2), generators())
    with pytest.raises(InputError, match=r"sample.tau: got -1.0, expected 0 or more"):
        SampleConfig(tau=-1.0)


@pytest.mark.parametrize(("name", "steps"), [("sa_solver", 5), ("lcm", 5), ("dmd", 1)])
def test_the_new_samplers_run_by_name_and_report_each_step(name, steps):
    seen = []
    config = SampleConfig(sampler=name, steps=steps)
    x = sample(toy_denoise(), START, LINEAR, config, generators(), lambda step, x, x0: seen.append((step, x)) or None)
    assert [step for step, _ in seen] == list(range(steps))
    assert torch.equal(seen[-1][1], x)
    assert torch.isfinite(x).all()
