"""Closed forms and properties of schedules, losses, guidance and samplers."""

import math

import pytest
import torch

from pixart.diffusion import DiffusionConfig, diffusion_loss, guide, make_denoise, make_schedule
from pixart.diffusion.losses import loss_weight, prediction_target, to_x0
from pixart.diffusion.samplers import ddim, dpm_solver, draw_noise, euler, heun, iddpm
from pixart.diffusion.sampling import SampleConfig, resolve, sample
from pixart.diffusion.schedule import DiscreteSchedule, FlowSchedule
from pixart.diffusion.timesteps import chain_times, uniform
from pixart.errors import InputError
from toy import relative, toy_network

LINEAR, COSINE, FLOW = DiscreteSchedule.linear(), DiscreteSchedule.cosine(), FlowSchedule()
PREDICTIONS = [
    (LINEAR, "epsilon"), (LINEAR, "v"), (LINEAR, "velocity"), (COSINE, "x0"),
    (FLOW, "velocity"), (FLOW, "v"), (FLOW, "x0"),
]  # fmt: skip
SHAPE = (4, 3, 6, 6)


def draw(seed: int = 0, shape=SHAPE) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def times_for(schedule) -> torch.Tensor:
    return torch.tensor([100, 300, 500, 900]) if schedule is not FLOW else torch.tensor([100.0, 300.5, 500.0, 900.0])


def test_the_cosine_schedule_follows_its_formula():
    def bar(t):
        return math.cos((t / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2

    for t in (0, 10, 500, 900):
        assert COSINE.tables["alphas_cumprod"][t].item() == pytest.approx(bar(t + 1) / bar(0), rel=1e-9)
    assert COSINE.tables["betas"].max() == 0.999


def test_coefficients_at_whole_times_are_the_tables_and_between_them_log_linear():
    for t in (0, 1, 499, 999):
        alpha, sigma = LINEAR.alpha_sigma(float(t))
        assert alpha == pytest.approx(LINEAR.tables["alpha"][t].item(), rel=1e-12)
        assert sigma == pytest.approx(LINEAR.tables["sigma"][t].item(), rel=1e-9)
    middle = LINEAR.alpha_sigma(10.5)[0]
    assert middle == pytest.approx(math.sqrt(LINEAR.alpha_sigma(10.0)[0] * LINEAR.alpha_sigma(11.0)[0]), rel=1e-12)


@pytest.mark.parametrize(("schedule", "prediction"), PREDICTIONS)
def test_a_perfect_output_has_no_loss_and_gives_back_the_image(schedule, prediction):
    x0, noise, t = draw(0), draw(1), times_for(schedule)
    config = DiffusionConfig("flow" if schedule is FLOW else "linear", prediction)
    alpha, sigma = schedule.alpha_sigma_of(t)
    target = prediction_target(prediction, x0, noise, alpha, sigma)
    assert diffusion_loss(schedule, config, target, x0, noise, t)["loss"].abs().max() == 0
    x_t = schedule.add_noise(x0, noise, t)
    assert relative(to_x0(config, x_t, target, alpha, sigma), x0) <= 2e-5  # ε amplifies rounding by σ/α
    for row in range(4):  # and so does a denoiser, with ε beside it
        network = lambda x, t, row=row: target[row : row + 1]  # noqa: E731
        result = make_denoise(network, schedule, config)(x_t[row : row + 1], float(t[row]))
        assert relative(result.x0, x0[row : row + 1]) <= 2e-5
        assert relative(result.eps, noise[row : row + 1]) <= 2e-5


@pytest.mark.parametrize(("schedule", "prediction"), PREDICTIONS)
def test_min_snr_and_velocity_weights_measure_one_error_whatever_is_predicted(schedule, prediction):
    x0, noise, t = draw(0), draw(1), times_for(schedule)
    alpha, sigma = schedule.alpha_sigma_of(t)
    x_t, error = schedule.add_noise(x0, noise, t), draw(2)
    config = DiffusionConfig("flow" if schedule is FLOW else "linear", prediction)
    # an output whose x0 errs by `error`, found from the linearity of to_x0
    clean = prediction_target(prediction, x0, noise, alpha, sigma)
    slope = to_x0(config, x_t, clean + 1, alpha, sigma) - to_x0(config, x_t, clean, alpha, sigma)
    output = clean + error / slope
    snr = (alpha / sigma)[:, 0, 0, 0] ** 2
    per_image = error.square().flatten(1).mean(1)
    kind = "flow" if schedule is FLOW else "linear"
    for weighting, gamma, weight in (
        ("min_snr", 5.0, snr.clamp(max=5)),
        ("min_snr", 0.5, snr.clamp(max=0.5)),
        ("velocity", 5.0, 1 / sigma[:, 0, 0, 0] ** 2),
    ):
        config = DiffusionConfig(kind, prediction, weighting=weighting, min_snr_gamma=gamma)
        loss = diffusion_loss(schedule, config, output, x0, noise, t)["loss"]
        assert torch.allclose(loss, weight * per_image, rtol=2e-4)


def test_min_snr_is_the_papers_for_epsilon():
    # arXiv 2303.09556, equation 8: min(SNR, γ) / SNR on the error of ε
    config = DiffusionConfig(weighting="min_snr", min_snr_gamma=5.0)
    t = torch.tensor([0, 50, 400, 999])
    alpha, sigma = LINEAR.alpha_sigma_of(t)
    snr = (alpha / sigma) ** 2
    assert torch.allclose(loss_weight(config, t, alpha, sigma), snr.clamp(max=5) / snr, rtol=1e-5)


def test_training_times_have_the_distribution_they_are_said_to_have():
    uniform = (torch.arange(10_000) + 0.5) / 10_000
    t = LINEAR.draw_times(uniform, DiffusionConfig())
    assert torch.equal(t.bincount(minlength=1000), torch.full((1000,), 10))
    assert LINEAR.draw_times(torch.tensor([1 - 2**-24]), DiffusionConfig()).item() == 999
    flow = DiffusionConfig("flow", "velocity", times="logit_normal", logit_mean=0.5, logit_std=1.5)
    t = FLOW.draw_times(uniform.double(), flow).double() / 1000
    logit = torch.log(t / (1 - t))
    assert logit.mean().item() == pytest.approx(0.5, abs=0.01)
    assert logit.std().item() == pytest.approx(1.5, abs=0.01)
    ends = FLOW.draw_times(torch.tensor([0.0, 1 - 2**-24]), flow)
    assert torch.isfinite(ends).all()
    assert (ends >= 0).all() and (ends <= 1000).all()


@pytest.mark.parametrize("kind", ["linear", "cosine", "flow", "logit_normal"])
def test_a_larger_uniform_number_is_a_noisier_time(kind):
    flow = kind in ("flow", "logit_normal")
    config = DiffusionConfig(
        "flow" if flow else kind,
        "velocity" if flow else "epsilon",
        logit_mean=0.5,
        logit_std=1.5,
        times="logit_normal" if kind == "logit_normal" else "uniform",
    )
    schedule, uniform = make_schedule(config), torch.tensor([0.001, 0.1, 0.25, 0.5, 0.75, 0.9, 0.999])
    t = schedule.draw_times(uniform, config)
    sigma = schedule.alpha_sigma_of(t)[1].flatten()
    assert (t.diff() > 0).all() and (sigma.diff() > 0).all()
    if kind == "logit_normal":  # quartiles of the standard normal are ±0.6745
        logits = torch.logit(t[2:5].double() / 1000)
        assert logits.tolist() == pytest.approx([0.5 - 1.5 * 0.67449, 0.5, 0.5 + 1.5 * 0.67449], abs=1e-4)
    else:
        assert t.tolist() == pytest.approx([1000 * u for u in uniform.tolist()], abs=1 if not flow else 1e-3)


def toy_denoise(c: float = 0.5):
    return make_denoise(toy_network(torch.full((1, 1, 1, 1), c)), LINEAR, DiffusionConfig())


def gaussian_flow(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """Velocity of the flow between N(0.5, 0.5²) and standard noise: a closed form, smooth at both ends."""
    tau = (t / 1000)[:, None, None, None]
    variance = (1 - tau) ** 2 * 0.25 + tau**2
    x0 = 0.5 + (1 - tau) * 0.25 / variance * (x - (1 - tau) * 0.5)
    eps = tau / variance * (x - (1 - tau) * 0.5)
    return eps - x0


@pytest.mark.parametrize(("solver", "order"), [(euler, 1), (heun, 2)])
def test_flow_solvers_converge_with_their_order_to_the_exact_end(solver, order, monkeypatch):
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    config = DiffusionConfig("flow", "velocity")
    denoise = make_denoise(gaussian_flow, FLOW, config)
    x = draw(3).double()
    exact = 0.5 + 0.5 * x  # the flow's map between the two Gaussians
    errors = [(solver(denoise, x, FLOW, uniform(FLOW, n)) - exact).norm().item() for n in (40, 80)]
    assert math.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.15)


def test_dpm_solver_converges_with_its_order(monkeypatch):
    # Two things would hide the order: the chain's log α is piecewise linear, so a smooth process stands in for it; and
    # the first and last steps are of lower order, so the prediction is made to vary in the middle only.
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)

    class Smooth(DiscreteSchedule):
        def alpha_sigma(self, t):
            tau = 0.05 + 0.9 * t / 999
            return math.cos(tau * math.pi / 2), math.sin(tau * math.pi / 2)

    schedule = Smooth(LINEAR.tables["betas"].numpy())

    def network(x, t):
        return math.sin(math.pi * t[0].item() / 999) ** 8 * (1 + 0.3 * torch.tanh(x))

    denoise = make_denoise(network, schedule, DiffusionConfig(prediction="x0"))
    x = draw(3).double()
    errors = {}
    for order in (1, 2, 3):

        def solve(steps: int, order: int = order) -> torch.Tensor:
            return dpm_solver(denoise, x, schedule, uniform(schedule, steps), order=order)

        reference = solve(2560)
        errors[order] = [(solve(n) - reference).norm() for n in (40, 320, 640)]
    for order, expected in ((1, 1), (2, 2), (3, 2)):  # see dpm_solver's docstring about the third
        assert math.log2(errors[order][1] / errors[order][2]) == pytest.approx(expected, abs=0.25), order
    assert errors[3][0] < errors[2][0] / 5 < errors[1][0] / 15


@torch.no_grad()
def test_ddim_and_ddpm_agree_with_the_gaussian_they_sample():
    # a network that knows the data are N(0.5, 0.3²): samples must have that mean and spread
    def network(x, t):
        alpha, sigma = LINEAR.alpha_sigma_of(t.long())
        return sigma * (x - alpha * 0.5) / (alpha**2 * 0.09 + sigma**2)

    denoise = make_denoise(network, LINEAR, DiffusionConfig())
    generators = [torch.Generator().manual_seed(i) for i in range(64)]
    for name, run in {
        "ddim": lambda x: ddim(denoise, x, LINEAR, chain_times(LINEAR, 100)),
        "ddim, eta 1": lambda x: ddim(denoise, x, LINEAR, chain_times(LINEAR, 250), generators, eta=1.0),
        "iddpm": lambda x: iddpm(denoise, x, LINEAR, chain_times(LINEAR, 1000), generators),
        "dpm_solver": lambda x: dpm_solver(denoise, x, LINEAR, uniform(LINEAR, 50)),
    }.items():
        result = run(draw(5, (64, 3, 16, 16)))
        assert result.mean().item() == pytest.approx(0.5, abs=0.02), name
        assert result.std().item() == pytest.approx(0.3, rel=0.05), name


def test_the_alpha_ending_lowers_the_order_below_ten_steps_alone():
    x, denoise = draw(3), toy_denoise()
    for steps in (3, 9, 10, 11, 20):
        alpha, sigma = (
            dpm_solver(denoise, x, LINEAR, uniform(LINEAR, steps), ending=ending) for ending in ("alpha", "sigma")
        )
        assert torch.equal(alpha, sigma) == (steps < 10), steps


def test_guidance_follows_its_formula_and_spares_the_network_where_it_is_off():
    calls = []

    def network(value):
        def run(x, t):
            calls.append(len(x))
            value_of_row = torch.tensor(value)[:, None, None, None]
            return torch.cat([x * value_of_row, torch.ones_like(x) * value_of_row / 8], 1)

        return run

    x = draw(0, (1, 3, 4, 4))
    conditional = make_denoise(network([2.0]), LINEAR, DiffusionConfig())
    both = make_denoise(network([2.0, 1.0]), LINEAR, DiffusionConfig())
    result = guide(conditional, None, LINEAR, 4.5, together=both)(x, 500.0)
    assert relative(result.eps, x * (1 + 4.5 * (2 - 1))) <= 1e-6
    alpha, sigma = LINEAR.alpha_sigma(500.0)
    assert relative(result.x0, (x - sigma * result.eps) / alpha) <= 1e-6
    assert torch.equal(result.variance, torch.full_like(x, 0.25)), "the caption's variance, not a mixture"
    assert calls == [2]
    guide(conditional, None, LINEAR, 1.0, together=both)(x, 500.0)
    interval = guide(conditional, None, LINEAR, 4.5, together=both, interval=(200.0, 700.0))
    for t in (100.0, 200.0, 700.0, 701.0):
        interval(x, t)
    assert calls == [2, 1, 1, 2, 2, 1]


def test_rescaled_guidance_restores_the_contrast():
    x = draw(0)
    conditional = make_denoise(lambda x, t: x * 0.9, LINEAR, DiffusionConfig())
    # the guided image's channels differ in contrast: it is the whole image's that comes back
    tint = torch.tensor([0.1, 0.5, 0.8])[:, None, None]
    both = make_denoise(lambda x, t: torch.cat([x[:4] * 0.9, x[4:] * tint + 0.1]), LINEAR, DiffusionConfig())
    plain = conditional(x, 500.0)
    for rescale in (0.0, 0.7, 1.0):
        result = guide(conditional, None, LINEAR, 4.5, together=both, rescale=rescale)(x, 500.0)
        guided = guide(conditional, None, LINEAR, 4.5, together=both)(x, 500.0)
        spread = [v.x0.std(dim=(1, 2, 3)) for v in (plain, guided, result)]
        assert torch.allclose(spread[2], rescale * spread[0] + (1 - rescale) * spread[1], rtol=1e-5)
        alpha, sigma = LINEAR.alpha_sigma(500.0)
        assert relative(alpha * result.x0 + sigma * result.eps, x) <= 1e-5, "x_t stays α·x0 + σ·ε"


def test_noise_belongs_to_its_generator_not_to_its_batch():
    rows = draw_noise([torch.Generator().manual_seed(i) for i in (3, 4, 5)], (2, 2))
    assert torch.equal(rows[1:2], draw_noise([torch.Generator().manual_seed(4)], (2, 2)))


def test_flow_times_go_from_noise_to_picture_and_shift_towards_noise():
    assert uniform(FLOW, 4) == [1000, 750, 500, 250]
    shifted = [*uniform(FLOW, 4, shift=3.0), 0.0]
    assert shifted[0] == 1000 and shifted[-1] == 0
    assert shifted[2] == pytest.approx(1000 * 3 * 0.5 / (1 + 2 * 0.5))


@pytest.mark.parametrize("name", ["dpm_solver", "iddpm", "ddim", "euler", "heun"])
def test_every_sampler_runs_by_name_and_reports_each_step(name):
    flow = name in ("euler", "heun")
    diffusion = DiffusionConfig("flow", "velocity") if flow else DiffusionConfig()
    schedule = make_schedule(diffusion)
    seen = []
    result = sample(
        make_denoise(lambda x, t: x * 0.5, schedule, diffusion),
        draw(0),
        schedule,
        SampleConfig(sampler=name, steps=5),
        [torch.Generator() for _ in range(4)],
        lambda step, x, x0: seen.append((step, x.shape, x0.shape)),
    )
    assert torch.isfinite(result).all()
    assert seen == [(i, SHAPE, SHAPE) for i in range(5)]


@pytest.mark.parametrize(
    ("config", "flow", "match"),
    [
        ({"sampler": "dpm_solver"}, True, "euler or heun"),
        ({"sampler": "euler"}, False, "dpm_solver or iddpm or ddim"),
        ({"eta": 0.5}, False, "no option 'eta'"),
        ({"shift": 3.0}, False, "no option 'shift'"),
        ({"ending": "alpha"}, True, "no option 'ending'"),
        ({"sampler": "dpm"}, False, "sampler: there is no 'dpm'.*there are dpm_solver, iddpm"),
        ({"steps": 1}, False, "'dpm_solver': got 1 steps, expected at least 2, its order; or set order to 1 too"),
        ({"steps": 2, "order": 3}, False, "got 2 steps, expected at least 3, its order"),
        ({"sampler": "ddim", "steps": 1}, False, "sampler 'ddim': got 1 steps, expected 2 to 1000"),
        ({"sampler": "iddpm", "steps": 1001}, False, "sampler 'iddpm': got 1001 steps, expected 2 to 1000"),
        ({"sampler": "lcm", "steps": 51}, False, "sampler 'lcm': got 51 steps, expected 1 to 50"),
        ({"sampler": "dmd", "steps": 2}, False, "sampler 'dmd': got 2 steps, it has one"),
    ],
)
def test_a_sampler_that_does_not_fit_is_refused(config, flow, match):
    with pytest.raises(InputError, match=match):
        resolve(SampleConfig(**config), FLOW if flow else LINEAR)


@pytest.mark.parametrize(("name", "steps"), [
    ("dpm_solver", 2), ("iddpm", 2), ("ddim", 1000), ("sa_solver", 1), ("lcm", 50), ("dmd", 1), ("euler", 1),
    ("heun", 1),
])  # fmt: skip
def test_samplers_accept_everything_that_resolve_accepts(name, steps):
    flow = name in ("euler", "heun")
    diffusion = DiffusionConfig("flow", "velocity") if flow else DiffusionConfig()
    schedule = make_schedule(diffusion)
    config = resolve(SampleConfig(sampler=name, steps=steps), schedule)
    denoise = make_denoise(lambda x, t: x * 0.5, schedule, diffusion)
    assert torch.isfinite(sample(denoise, draw(0), schedule, config, [torch.Generator() for _ in range(4)])).all()


@pytest.mark.parametrize(
    "make",
    [
        lambda: DiffusionConfig("flow", "epsilon"),
        lambda: DiffusionConfig(weighting="certainty"),
        lambda: DiffusionConfig("linear", "velocity", contrast=0.05),
        lambda: DiffusionConfig("flow", "x0", contrast=0.05),
        lambda: DiffusionConfig("flow", "velocity", contrast=0.05, weighting="min_snr"),
        lambda: DiffusionConfig(prediction="v", weighting="snr_switch"),
        lambda: SampleConfig(steps=0),
        lambda: SampleConfig(rescale=2.0),
        lambda: LINEAR.respace(1),
        lambda: LINEAR.respace(1001),
        lambda: ddim(toy_denoise(), draw(0), LINEAR, chain_times(LINEAR, 10), eta=1.0),
        lambda: make_denoise(lambda x, t: x[:, :2], LINEAR, DiffusionConfig())(draw(0), 5.0),
        lambda: diffusion_loss(
            FLOW, DiffusionConfig("flow", "velocity"), draw(0, (4, 6, 6, 6)), draw(0), draw(1), torch.ones(4)
        ),
        lambda: diffusion_loss(
            LINEAR, DiffusionConfig(), draw(0, (4, 5, 6, 6)), draw(0), draw(1), torch.ones(4).long()
        ),
    ],
)
def test_meaningless_settings_are_refused(make):
    with pytest.raises(InputError):
        make()
