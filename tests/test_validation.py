"""Validation: a number by which runs can be compared that were trained in different ways."""

import pytest
import torch

from pixart.data.samples import collate
from pixart.diffusion import DiffusionConfig, make_schedule
from pixart.diffusion.denoising_error import RATIOS, denoising_errors
from pixart.diffusion.losses import prediction_target
from pixart.train.setup import start
from pixart.train.validate import validate
from runs import build, make_pictures, settings

PAIRS = [("linear", "epsilon"), ("linear", "v"), ("cosine", "x0"), ("cosine", "epsilon"), ("flow", "velocity")]


@pytest.fixture
def base(tmp_path, text_encoder) -> dict:
    return settings(tmp_path / "run", make_pictures(tmp_path / "pictures"), text_encoder)


@pytest.mark.parametrize("schedule", ["linear", "cosine", "flow"])
def test_the_time_of_a_ratio_has_it(schedule):
    schedule = make_schedule(DiffusionConfig(schedule, "x0"))
    for ratio in (*RATIOS, 0.1, 60.0):
        alpha, sigma = schedule.alpha_sigma(schedule.time_of(ratio))
        assert sigma / alpha == pytest.approx(ratio, rel=1e-6)


@pytest.mark.parametrize(("name", "prediction"), PAIRS)
def test_a_denoiser_that_knows_only_the_variance_errs_by_1_whatever_it_predicts(name, prediction):
    config = DiffusionConfig(name, prediction)
    schedule = make_schedule(config)

    def network(x, t):  # for x0 of variance 1: E[x0 | x] = α x / (α² + σ²), E[ε | x] = σ x / (α² + σ²)
        alpha, sigma = schedule.alpha_sigma(t[0].item())
        scaled = x / (alpha**2 + sigma**2)
        return prediction_target(prediction, alpha * scaled, sigma * scaled, alpha, sigma)

    x0, noise = torch.randn(2, 64, 4, 32, 32, generator=torch.Generator().manual_seed(0))
    errors = denoising_errors(network, schedule, config, x0, noise)
    assert errors.shape == (len(RATIOS), 64)
    assert torch.allclose(errors.mean(1), torch.ones(len(RATIOS)), atol=0.02)


def test_runs_of_any_prediction_are_validated_alike(base):
    # a new network says 0: the same clean picture, if it is asked for that, whatever noise it was to be drawn from
    found = {}
    for i, diffusion in enumerate([
        {"schedule": "flow", "prediction": "x0"}, {"schedule": "flow", "prediction": "x0", "times": "logit_normal"},
        {"schedule": "cosine", "prediction": "x0", "weighting": "min_snr"},
    ]):  # fmt: skip
        config = build(base, output=f"{base['output']}{i}", diffusion=diffusion, data__validation=0.4)
        session = start(config)
        found[i] = validate(session, config)
        held_out = session.data.held_out
        batch = collate([held_out.dataset[-1, j] for j in range(len(held_out))], length=config.text.length)
        for ratio in RATIOS:
            expected = (1 + ratio**-2) * batch.pixels.square().mean().item()
            assert found[i][f"validation_error_{ratio:g}"] == pytest.approx(expected, rel=1e-5)
    assert found[0]["validation_error"] == pytest.approx(found[1]["validation_error"], rel=1e-6)
    assert found[0]["validation_error"] == pytest.approx(found[2]["validation_error"], rel=1e-6)
    assert found[0]["validation_loss"] != found[2]["validation_loss"]


def test_a_network_that_says_zero_for_the_velocity_is_validated_by_hand(base):
    config = build(base, diffusion={"schedule": "flow", "prediction": "velocity"}, data__validation=0.4)
    session = start(config)
    found, held_out = validate(session, config), session.data.held_out
    batch = collate([held_out.dataset[-1, j] for j in range(len(held_out))], length=config.text.length)
    for ratio in RATIOS:  # the clean picture is then taken to be x itself
        sigma = ratio / (1 + ratio)
        error = (sigma * (batch.noise - batch.pixels)).square().mean().item()
        assert found[f"validation_error_{ratio:g}"] == pytest.approx((1 + ratio**-2) * error, rel=1e-5)
