"""Axes of the objective: off, the loss is the usual one; on, it is what its paper defines."""

import math

import pytest
import torch

from pixart.diffusion.losses import diffusion_loss
from pixart.diffusion.objective import Denoising, Example
from pixart.diffusion.schedule import DiffusionConfig, distribute, make_schedule
from pixart.diffusion.uncertainty import Uncertainty
from pixart.errors import InputError
from pixart.model.initialize import initialize
from pixart.train.parts import Parts
from runs import build, settings
from toy import relative, tiny_inputs, tiny_model

FLOW = {"schedule": "flow", "prediction": "velocity"}


def example(model, count: int = 4) -> Example:
    generator = torch.Generator().manual_seed(1)
    x0, noise = torch.randn(2, count, 4, 8, 8, generator=generator)
    inputs = tiny_inputs(model, batch=count)
    given = {"caption": inputs["caption"], "caption_mask": inputs["caption_mask"]}
    return Example(x0, noise, torch.rand(count, generator=generator), given, model.y_embedder.y_embedding)


def objective(model, **settings) -> Denoising:
    made = Denoising(DiffusionConfig(**settings), model)
    initialize(made.trained, 0)
    return made


# -------------------------------------------------------------------------------------------------------------- times


@pytest.mark.parametrize("prediction", ["epsilon", "v", "x0"])
@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_logit_normal_times_of_every_prediction_have_their_distribution(schedule, prediction):
    config = DiffusionConfig(schedule, prediction, times="logit_normal", logit_mean=0.5, logit_std=1.5)
    uniform = (torch.arange(10_000) + 0.5) / 10_000
    t = make_schedule(config).draw_times(uniform, config)
    assert t.dtype == torch.long and t.min() >= 0 and t.max() <= 999
    logit = torch.logit((t.double() + 0.5) / 1000)
    assert logit.median().item() == pytest.approx(0.5, abs=0.01)
    assert (logit.quantile(0.75) - logit.quantile(0.25)).item() == pytest.approx(1.5 * 2 * 0.67449, abs=0.02)
    extreme = DiffusionConfig(schedule, prediction, times="logit_normal", logit_std=50.0, time_shift=1e9)
    assert make_schedule(config).draw_times(torch.tensor([0.0, 1 - 2**-24]), extreme).tolist() == [0, 999]


@pytest.mark.parametrize("shift", [0.5, 3.0])
def test_a_shift_scales_the_ratio_of_noise_to_signal_of_a_flow(shift):
    config = DiffusionConfig(**FLOW, time_shift=shift)
    uniform = torch.rand(100, generator=torch.Generator().manual_seed(0))
    schedule = make_schedule(config)
    drawn = [schedule.draw_times(uniform, c) for c in (DiffusionConfig(**FLOW), config)]
    ratios = [sigma / alpha for alpha, sigma in map(schedule.alpha_sigma_of, drawn)]
    assert torch.allclose(ratios[1], shift * ratios[0], rtol=1e-3)


def test_times_that_are_not_shaped_are_the_uniform_numbers_bit_for_bit():
    uniform = torch.rand(1000)
    assert distribute(uniform, DiffusionConfig()) is uniform
    for name in ("linear", "flow"):
        config = DiffusionConfig(name, "x0")
        expected = (uniform * 1000).long() if name == "linear" else 1000 * uniform
        assert torch.equal(make_schedule(config).draw_times(uniform, config), expected)


# -------------------------------------------------------------------------------------------------------- uncertainty


def test_uncertainty_at_its_minimum_is_the_log_of_the_expected_loss():
    module = Uncertainty()
    initialize(module, 0)
    alpha, sigma = make_schedule(DiffusionConfig(**FLOW)).alpha_sigma_of(torch.tensor([50.0, 300.0, 700.0, 950.0]))
    expected = torch.tensor([4.0, 1.5, 0.3, 0.05])
    optimizer = torch.optim.LBFGS(module.parameters(), max_iter=100, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        # two losses of each level, whose mean is the expected one
        loss = sum(module.weigh(expected * part, alpha, sigma)["loss"].sum() for part in (0.5, 1.5))
        loss.backward()
        return loss

    optimizer.step(closure)
    assert torch.allclose(module(alpha, sigma), expected.log(), atol=1e-3)
    assert all(torch.isfinite(module(torch.tensor([a]), torch.tensor([1 - a]))).all() for a in (0.0, 1.0))


def test_a_new_uncertainty_leaves_the_loss_and_its_gradient_as_they_are():
    model = tiny_model(learn_sigma=False)
    gradients = []
    for weighting in ("uniform", "uncertainty"):
        model.zero_grad()
        terms = objective(model, **FLOW, weighting=weighting)(model, example(model))
        terms["loss"].mean().backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    assert not terms["uncertainty"].any()


def test_the_learned_variances_bound_is_not_weighed():
    model = tiny_model()
    made = objective(model, weighting="uncertainty")
    made.trained["uncertainty"].weight.data.normal_()
    terms = made(model, example(model))
    u = terms["uncertainty"]
    assert torch.allclose(terms["loss"], (-u).exp() * terms["mse"] + u + terms["vlb"], rtol=1e-5)
    assert u.abs().min() > 0


# ----------------------------------------------------------------------------------------------------------- contrast


def test_contrastive_flow_matching_is_its_formula():
    model, weight = tiny_model(learn_sigma=False), 0.05
    given = example(model)
    terms = objective(model, **FLOW, contrast=weight)(model, given)
    usual = objective(model, **FLOW)(model, given)
    t = given.time * 1000
    x_t = (1 - given.time)[:, None, None, None] * given.x0 + given.time[:, None, None, None] * given.noise
    velocity = model(x_t, t, **given.inputs)
    for i in range(4):
        j = (i - 1) % 4
        own = (velocity[i] - (given.noise[i] - given.x0[i])).square().mean()
        other = (velocity[i] - (given.noise[j] - given.x0[j])).square().mean()
        assert terms["loss"][i].item() == pytest.approx((own - weight * other).item(), rel=1e-4)
        assert usual["loss"][i].item() == pytest.approx(own.item(), rel=1e-4)
        assert terms["contrast"][i].item() == pytest.approx(other.item(), rel=1e-4)


def test_a_validation_has_no_contrast_and_a_single_image_is_refused():
    model = tiny_model(learn_sigma=False)
    made = objective(model, **FLOW, contrast=0.05)
    with pytest.raises(InputError, match="needs two images at least in a micro-batch"):
        made(model, example(model, 1))
    held_out = made.eval()(model, example(model, 1))
    assert torch.equal(held_out["loss"], objective(model, **FLOW)(model, example(model, 1))["loss"])


def test_an_objective_without_axes_is_the_plain_loss_and_has_nothing_to_train():
    model = tiny_model()
    made, given = objective(model), example(model)
    assert not list(made.parameters())
    schedule = make_schedule(DiffusionConfig())
    t = (given.time * 1000).long()
    output = model(schedule.add_noise(given.x0, given.noise, t), t, **given.inputs)
    expected = diffusion_loss(schedule, DiffusionConfig(), output, given.x0, given.noise, t)
    found = made(model, given)
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)


def test_a_contrast_of_one_image_is_refused_before_any_work(tmp_path):
    made = settings(tmp_path / "run", tmp_path, tmp_path)
    with pytest.raises(InputError, match=r"diffusion.contrast needs two images .* train.batch_size 4 with train.accum"):
        build(made, diffusion={**FLOW, "contrast": 0.05}, train__accumulation=4)


def test_parts_of_the_average_weigh_with_the_average():
    model = tiny_model(learn_sigma=False)
    parts = Parts.of(model, objective(model, **FLOW, weighting="uncertainty"))
    parts.averages["uncertainty"].weight.data.fill_(0.1)
    found = parts.averaged_objective()(model, example(model))
    assert found["uncertainty"].abs().max() > 0 and math.isfinite(found["loss"].sum().item())
    assert relative(found["mse"], parts.objective(model, example(model))["mse"]) == 0
