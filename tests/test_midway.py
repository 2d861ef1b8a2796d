"""Solvers take times: they start anywhere, visit the given times, and keep what a mask protects."""

import math

import pytest
import torch

from pixart.diffusion.guidance import guide, make_denoise
from pixart.diffusion.samplers import draw_noise
from pixart.diffusion.sampling import SampleConfig, resolve, sample, visited_times
from pixart.diffusion.schedule import DiffusionConfig, make_schedule
from pixart.diffusion.timesteps import karras, last_steps, trailing
from pixart.errors import InputError
from pixart.inference.latents import Start, begin
from toy import relative, toy_network

LINEAR, FLOW = (make_schedule(DiffusionConfig(name, p)) for name, p in (("linear", "epsilon"), ("flow", "velocity")))
SHAPE = (2, 4, 6, 6)
NO_HISTORY = {"ddim": {"eta": 0.5}, "iddpm": {}, "lcm": {}, "euler": {"shift": 2.0}, "heun": {}}


def denoiser(flow: bool):
    if flow:  # between two Gaussians: the velocity is a linear function of x
        return make_denoise(lambda x, t: 0.3 * x - 0.1, FLOW, DiffusionConfig("flow", "velocity"))
    return make_denoise(toy_network(torch.full((2, 1, 1, 1), 0.7)), LINEAR, DiffusionConfig())


def noise(seed: int = 0) -> torch.Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed))


def generators() -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in (1, 2)]


def settled(name: str, **options) -> tuple:
    schedule = FLOW if name in ("euler", "heun") else LINEAR
    return schedule, resolve(SampleConfig(sampler=name, **options), schedule)


@pytest.mark.parametrize("name", NO_HISTORY)
def test_a_solver_without_history_goes_on_from_midway_as_if_it_had_run_whole(name):
    schedule, config = settled(name, steps=8, **NO_HISTORY[name])
    denoise, states = denoiser(schedule is FLOW), []
    draws = generators()

    def note(step: int, x: torch.Tensor, x0: torch.Tensor) -> None:
        states.append((x, [g.get_state() for g in draws]))

    whole = sample(denoise, noise(), schedule, config, draws, note)
    x, after = states[4]
    later = generators()
    for generator, state in zip(later, after, strict=True):
        generator.set_state(state)
    found = sample(denoise, x, schedule, config, later, times=visited_times(config, schedule)[5:])
    assert relative(found, whole) <= 1e-6


@pytest.mark.parametrize("options", [{"sampler": "dpm_solver"}, {"sampler": "sa_solver", "tau": 0.0}])
def test_a_solver_with_history_converges_from_midway_to_the_same_end(options):
    denoise, errors = denoiser(False), []
    alpha, sigma = LINEAR.alpha_sigma(500.0)
    start = alpha * 0.5 + sigma * noise()

    def end(steps: int) -> torch.Tensor:
        config = resolve(SampleConfig(**options, times=tuple(500 * (1 - i / steps) for i in range(steps))), LINEAR)
        return sample(denoise, start, LINEAR, config, generators())

    reference = end(1000)
    errors = [relative(end(steps), reference) for steps in (10, 40, 160)]
    assert errors[2] < errors[1] / 3 < errors[0] / 9


@pytest.mark.parametrize("name", ["dpm_solver", "sa_solver", *NO_HISTORY])
def test_in_painting_is_the_loop_by_hand(name):
    schedule, config = settled(name, steps=10, **NO_HISTORY.get(name, {}))
    denoise, clean, first = denoiser(schedule is FLOW), noise(7), noise(3)
    mask = torch.zeros(2, 1, 6, 6)
    mask[:, :, 2:, :4] = 1
    mask[1, :, 0, 0] = 0.5
    seen = []

    def note(step: int, x: torch.Tensor, x0: torch.Tensor) -> None:
        seen.append(x)

    start = Start(clean, 0.64, mask)
    x, times, keep = begin(start, first, schedule, config, note)
    found = sample(denoise, x, schedule, config, generators(), keep, times=times)

    every = visited_times(config, schedule)
    assert times == every[4:]
    a, s = schedule.alpha_sigma(every[4])
    assert torch.equal(x, a * clean + s * first)
    for i, state in enumerate(seen):  # what is kept has the noise of the next time, always the same
        a, s = schedule.alpha_sigma(times[i + 1]) if i + 1 < len(times) else (1.0, 0.0)
        kept = a * clean + s * first
        assert torch.equal(torch.where(mask == 0, state, 0.0), torch.where(mask == 0, kept, 0.0)), i
    assert torch.equal(torch.where(mask == 0, found, clean), clean)

    def by_hand(step: int, x: torch.Tensor, x0: torch.Tensor) -> torch.Tensor:
        a, s = schedule.alpha_sigma(times[step + 1]) if step + 1 < len(times) else (1.0, 0.0)
        return (1 - mask) * (a * clean + s * first) + mask * x

    expected = sample(denoise, x, schedule, config, generators(), by_hand, times=times)
    assert relative(found, expected) <= 1e-6


@pytest.mark.parametrize("name", ["dpm_solver", "ddim", "iddpm", "sa_solver", "lcm", "euler", "heun"])
def test_strength_one_without_a_mask_begins_with_the_noise_alone(name):
    schedule, config = settled(name, steps=6)
    first = noise(3)
    x, times, callback = begin(Start(noise(7), 1.0), first, schedule, config, None)
    assert x is first and times == visited_times(config, schedule) and callback is None


@pytest.mark.parametrize(("steps", "strength", "done"), [(20, 0.33, 6), (50, 0.58, 28), (25, 0.56, 14), (4, 0.25, 1)])
def test_the_steps_of_a_strength_are_the_last_of_all(steps, strength, done):
    times = [float(t) for t in range(steps, 0, -1)]
    assert last_steps(times, strength) == times[steps - done :]


def test_the_image_is_as_much_noised_as_the_first_time_says():
    schedule, config = settled("dpm_solver", steps=10)
    clean, first = torch.full(SHAPE, 2.0), draw_noise(generators(), SHAPE[1:])
    x, times, _ = begin(Start(clean, 0.5), first, schedule, config, None)
    assert times[0] == pytest.approx(999 * 0.5)
    alpha, sigma = schedule.alpha_sigma(times[0])
    assert math.isclose(alpha**2 + sigma**2, 1.0, rel_tol=1e-9)
    assert torch.equal(x, alpha * clean + sigma * first)


# ------------------------------------------------------------------------------------------------------------ spacings


@pytest.mark.parametrize("steps", [4, 20, 33])
def test_trailing_times_are_diffusers(steps):
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.DDIMScheduler(timestep_spacing="trailing")
    scheduler.set_timesteps(steps)
    assert trailing(LINEAR, steps) == scheduler.timesteps.tolist()


def test_karras_times_are_even_in_the_seventh_root_of_the_ratio():
    times = karras(LINEAR, 12)
    ratios = [sigma / alpha for alpha, sigma in map(LINEAR.alpha_sigma, [*times, 0.0])]
    roots = torch.tensor(ratios, dtype=torch.float64) ** (1 / 7)
    assert torch.allclose(roots.diff(), roots.diff().mean().expand(12), rtol=1e-6)
    assert times[0] == 999 and times == sorted(times, reverse=True)


@pytest.mark.parametrize("name", ["dpm_solver", "sa_solver", "ddim", "iddpm"])
@pytest.mark.parametrize("spacing", ["trailing", "karras"])
def test_other_spacings_end_near_the_solution_of_many_steps(name, spacing):
    options = {"tau": 0.0} if name == "sa_solver" else {}
    denoise = denoiser(False)

    def end(**more) -> torch.Tensor:
        _, config = settled(name, **options, **more)
        return sample(denoise, noise(), LINEAR, config, generators())

    assert torch.isfinite(end(steps=12, spacing=spacing)).all()
    if name != "iddpm":
        assert relative(end(steps=60, spacing=spacing), end(steps=500)) <= 0.06


def test_a_given_list_of_times_is_visited():
    called = []

    def denoise(x, t):
        called.append(t)
        return denoiser(False)(x, t)

    for name, times in (("dpm_solver", (900.0, 512.5, 20.0)), ("ddim", (999.0, 300.0, 7.0)), ("dmd", (599.0,))):
        called.clear()
        _, config = settled(name, times=times)
        sample(denoise, noise(), LINEAR, config, generators())
        assert called == list(times)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"sampler": "dpm_solver", "times": (500.0, 600.0)}, "times: they must fall, got 500 before 600"),
        (
            {"sampler": "dpm_solver", "times": (1200.0, 600.0)},
            "sample.times.0.: got 1200.0, expected a number from 0 to 1000",
        ),
        ({"sampler": "dpm_solver", "times": (999.0, 0.0)}, "expected 999 to above 0"),
        ({"sampler": "ddim", "times": (500.5, 100.0)}, "takes whole times, got 500.5"),
        ({"sampler": "dpm_solver", "times": (500.0,), "steps": 3}, "leave sample.steps and sample.spacing out"),
        ({"sampler": "dpm_solver", "spacing": "karas"}, "there is no 'karas'; did you mean 'karras'"),
        (
            {"sampler": "lcm", "spacing": "karras"},
            "'lcm' cannot take sample.spacing 'karras'; it takes none",
        ),
        ({"sampler": "ddim", "spacing": "karras", "steps": 900}, "visits a whole time twice"),
    ],
)
def test_times_that_a_solver_cannot_take_are_refused(options, match):
    with pytest.raises(InputError, match=match):
        resolve(SampleConfig(**options), LINEAR)


@pytest.mark.parametrize(
    ("name", "strength", "match"),
    [
        ("dmd", 0.5, "'dmd' does one step from noise and cannot start from an image"),
        ("ddim", 0.0, "strength: got 0.0, expected above 0, up to 1"),
        ("ddim", 1.1, "strength: got 1.1"),
        ("ddim", 0.01, "strength 0.01 of 50 steps leaves none; raise strength or steps"),
    ],
)
def test_impossible_starts_are_refused(name, strength, match):
    schedule, config = settled(name)
    with pytest.raises(InputError, match=match):
        begin(Start(noise(), strength), noise(), schedule, config, None)


def test_guidance_takes_any_two_denoisers():
    strong, weak = denoiser(False), make_denoise(toy_network(torch.zeros(2, 1, 1, 1)), LINEAR, DiffusionConfig())
    x = noise()
    found = guide(strong, weak, LINEAR, 2.5)(x, 600.0)
    a, b = strong(x, 600.0), weak(x, 600.0)
    assert relative(found.eps, b.eps + 2.5 * (a.eps - b.eps)) <= 1e-6
    assert torch.equal(guide(strong, weak, LINEAR, 1.0)(x, 600.0).x0, a.x0)
    with pytest.raises(InputError, match="neither a second denoiser"):
        guide(strong, None, LINEAR, 2.0)
