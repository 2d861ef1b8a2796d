"""One training step against its definition: the network's inputs, the mean over which the loss is taken, the update."""

import math
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import pixart.train.step as step_module
from pixart.data.samples import Batch
from pixart.diffusion.objective import Denoising
from pixart.encoders.autoencoder import IdentityAutoencoder
from pixart.errors import InputError
from pixart.train.config import OptimizerConfig
from pixart.train.health import Window
from pixart.train.optimizer import make_optimizer
from pixart.train.parts import Parts
from pixart.train.state import Progress, TrainState
from pixart.train.step import OUTCOMES, StepResult, make_example, read_results, train_step
from runs import build, settings
from toy import TINY, tiny_model

PIXELS = {"in_channels": 3, "learn_sigma": False}


class Ranks:
    """An accelerator of `count` processes that all have the same batch."""

    device = torch.device("cpu")

    def __init__(self, count: int = 1, scaler: torch.amp.GradScaler | None = None):
        self.num_processes, self.scaler = count, scaler

    def autocast(self):
        return nullcontext()

    def backward(self, loss: torch.Tensor) -> None:
        (loss if self.scaler is None else self.scaler.scale(loss)).backward()

    def reduce(self, tensor: torch.Tensor, reduction: str = "sum") -> torch.Tensor:
        return tensor * self.num_processes if reduction == "sum" else tensor


@pytest.fixture
def base(tmp_path) -> dict:
    config = settings(tmp_path, tmp_path, tmp_path)
    config["model"] = {**TINY, **PIXELS}
    config["optimizer"] = {"lr": 1.0, "warmup": 0, "weight_decay": 0.0, "clip": 1e9}
    return config


def make_batch(count: int = 4, *, seed: int = 0, length: int = 7) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    return Batch(
        pixels=torch.randn(count, 3, 8, 8, generator=generator),
        latents=None,
        noise=torch.randn(count, 3, 8, 8, generator=generator),
        posterior_noise=torch.zeros(count, 3, 8, 8),
        time=torch.rand(count, generator=generator),
        caption=torch.randn(count, length, 16, generator=generator),
        caption_mask=torch.arange(length) < torch.arange(1, count + 1)[:, None],
        drop=torch.rand(count, generator=generator),
        size=torch.rand(count, 2, generator=generator) * 500 + 100,
        aspect_ratio=torch.rand(count, generator=generator) + 0.5,
        weight=torch.ones(count),
        ids=[str(i) for i in range(count)],
        problems=[],
    )


def make_state(config, accelerator: Ranks | None = None) -> TrainState:
    """Random weights, averages of others, and plain gradient descent."""
    network = tiny_model(**PIXELS)
    parts = Parts.of(network, Denoising(config.diffusion, network))
    parts.average.load_state_dict(tiny_model(seed=1, **PIXELS).state_dict())
    optimizer = torch.optim.SGD(network.parameters(), lr=math.nan)
    return TrainState(parts, optimizer, accelerator or Ranks(), SimpleNamespace(count=1))  # `Ranks` reduces, not DDP


def take_step(state: TrainState, batches: list[Batch], config):
    (report,) = read_results([train_step(state, batches, IdentityAutoencoder(), config)])
    return report


def weights(model) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def gradient_of_mean(state: TrainState, batches: list[Batch], config) -> tuple[torch.Tensor, torch.Tensor]:
    """The mean loss over the images that were read, and its gradient, without any of the step's own sums."""
    network, losses, read = state.parts.network, [], []
    for batch in batches:
        example = make_example(batch, network, IdentityAutoencoder(), config)
        losses.append(state.parts.objective(network, example)["loss"])
        read.append(batch.weight.bool())
    mean = torch.cat(losses)[torch.cat(read)].mean()
    gradients = torch.autograd.grad(mean, list(network.parameters()), allow_unused=True, materialize_grads=True)
    return mean.detach(), torch.cat([gradient.flatten() for gradient in gradients])


def test_the_weight_of_an_images_loss_multiplies_its_gradient(base):
    config, batch = build(base, train__caption_dropout=0.0), make_batch()
    batch.loss_weight = torch.tensor([1.0, 1.0, 0.25, 0.0])
    state = make_state(config)
    before, network = weights(state.parts.network), state.parts.network
    losses = state.parts.objective(network, make_example(batch, network, IdentityAutoencoder(), config))["loss"]
    expected = (losses[0] + losses[1] + 0.25 * losses[2]) / 4
    gradients = torch.autograd.grad(expected, list(network.parameters()), allow_unused=True, materialize_grads=True)
    gradient = torch.cat([each.flatten() for each in gradients])
    report = take_step(state, [batch], config)
    assert report.loss == pytest.approx(expected.item(), rel=1e-6)
    torch.testing.assert_close(before - weights(network), gradient, rtol=1e-4, atol=1e-6)


# ------------------------------------------------------------------------------------------- what the network is given


class Spy:
    """A network that notes what it is given."""

    def __call__(self, x, t, caption, **given):
        self.x, self.t, self.caption, self.given = x, t, caption, given
        return torch.zeros_like(x)


def ask(config, batch: Batch, **options) -> tuple[Spy, torch.nn.Module]:
    spy, model = Spy(), tiny_model(**PIXELS, micro_conditions=config.model.micro_conditions)
    Denoising(config.diffusion, model)(spy, make_example(batch, model, IdentityAutoencoder(), config, **options))
    return spy, model


def test_dropped_captions_become_the_null_caption_under_the_captions_own_mask(base):
    config, batch = build(base, train__caption_dropout=0.3), make_batch()
    batch.drop = torch.tensor([0.0, 0.29, 0.3, 0.99])
    mask = batch.caption_mask.clone()
    spy, model = ask(config, batch)
    null = model.y_embedder.y_embedding[:7]
    assert torch.equal(spy.caption, torch.stack([null, null, batch.caption[2], batch.caption[3]]))
    assert torch.equal(spy.given["caption_mask"], mask)
    spy, _ = ask(config, batch, training=False)
    assert torch.equal(spy.caption, batch.caption)


def test_captions_are_dropped_at_the_rate_that_is_set(base):
    batch = make_batch(4000)
    for rate in (0.0, 0.1, 1.0):
        spy, _ = ask(build(base, train__caption_dropout=rate), batch)
        dropped = (spy.caption != batch.caption).flatten(1).any(1).float().mean().item()
        assert abs(dropped - rate) <= 5 * (rate * (1 - rate) / 4000) ** 0.5


@pytest.mark.parametrize("diffusion", [{"schedule": "flow", "prediction": "x0"}, {"schedule": "linear"}])
def test_the_network_is_given_the_noised_image_its_time_and_its_own_conditions(base, diffusion):
    config, batch = build(base, diffusion=diffusion, model__micro_conditions=True), make_batch()
    batch.time = torch.tensor([0.0, 0.2504, 0.5, 0.9999])
    spy, _ = ask(config, batch)
    if diffusion["schedule"] == "flow":
        alpha, sigma, times = 1 - batch.time, batch.time, [0.0, 250.4, 500.0, 999.9]
    else:
        bar = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64).neg().add(1).cumprod(0)[[0, 250, 500, 999]]
        alpha, sigma, times = bar.sqrt(), (1 - bar).sqrt(), [0, 250, 500, 999]
    expected = alpha.view(4, 1, 1, 1) * batch.pixels + sigma.view(4, 1, 1, 1) * batch.noise
    assert torch.allclose(spy.x.double(), expected.double(), atol=1e-6)
    assert spy.t.tolist() == pytest.approx(times)
    assert torch.equal(spy.given["size"], batch.size) and torch.equal(spy.given["aspect_ratio"], batch.aspect_ratio)


# ----------------------------------------------------------------------------------------------- the mean and its step


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_a_step_descends_the_mean_loss_over_the_images_that_were_read_by_all_processes(base, processes):
    # equal processes: the mean over all of them is each one's own, and so is the mean of their gradients
    config = build(base, train__accumulation=2, train__caption_dropout=0.5)
    state, batches = make_state(config, Ranks(processes)), [make_batch(seed=1), make_batch(seed=2)]
    batches[0].weight[1], batches[1].weight[:2] = 0.0, 0.0
    before = weights(state.parts.network)
    mean, gradient = gradient_of_mean(state, batches, config)
    report = take_step(state, batches, config)
    assert report.images == 5 * processes
    assert report.loss == pytest.approx(mean.item(), rel=1e-5)
    assert report.grad_norm == pytest.approx(gradient.norm().item(), rel=1e-4)
    assert torch.allclose(
        before - weights(state.parts.network), gradient, rtol=1e-3, atol=1e-6 * gradient.abs().max().item()
    )


def test_processes_share_their_gradients_at_the_last_micro_batch_alone(base, monkeypatch):
    shared = []
    monkeypatch.setattr(step_module, "gradient_sync", lambda _, sync: shared.append(sync) or nullcontext())
    config = build(base, train__accumulation=3)
    take_step(make_state(config), [make_batch(seed=seed) for seed in range(3)], config)
    assert shared == [False, False, True]


def test_a_clipped_step_has_the_length_of_the_limit_and_a_short_one_is_left_alone(base):
    norms = {}
    for limit in (1e-3, 1e9):
        config = build(base, optimizer__clip=limit)
        state = make_state(config)
        before = weights(state.parts.network)
        report = take_step(state, [make_batch()], config)
        norms[limit] = (before - weights(state.parts.network)).norm().item(), report.grad_norm
    assert norms[1e-3][0] == pytest.approx(1e-3, rel=1e-3)
    assert norms[1e9][0] == pytest.approx(norms[1e9][1], rel=1e-3)
    assert norms[1e-3][1] == pytest.approx(norms[1e9][1], rel=1e-6), "the norm that is told is that before clipping"


def test_a_scaled_loss_takes_the_same_step(base):
    found = []
    for scaler in (None, torch.amp.GradScaler("cpu", init_scale=1024.0)):
        config = build(base, optimizer__lr=1e-3, optimizer__clip=0.1)
        state = make_state(config, Ranks(scaler=scaler))
        state.optimizer = make_optimizer(dict(state.parts.named_parameters()), config.optimizer)
        reports = [take_step(state, [make_batch(seed=seed)], config) for seed in (1, 2)]
        found.append((weights(state.parts.network), reports))
    assert torch.allclose(found[0][0], found[1][0], atol=1e-6)
    for plain, scaled in zip(found[0][1], found[1][1], strict=True):
        assert scaled.loss == pytest.approx(plain.loss, rel=1e-5)
        assert scaled.grad_norm == pytest.approx(plain.grad_norm, rel=1e-4)


@pytest.mark.parametrize("step", [0, 1, 6])
def test_step_n_has_the_learning_rate_and_the_average_the_decay_of_step_n(base, step):
    config = build(base, optimizer__lr=0.5, optimizer__warmup=4, train__ema_warmup=True, train__ema=0.4)
    state, batch = make_state(config), make_batch()
    state.progress.step = step
    before, average = weights(state.parts.network), weights(state.parts.average)
    _, gradient = gradient_of_mean(state, [batch], config)
    take_step(state, [batch], config)
    after = weights(state.parts.network)
    rate, decay = {0: 0.5 / 4, 1: 1.0 / 4, 6: 0.5}[step], {0: 0.1, 1: 2 / 11, 6: 0.4}[step]
    assert (before - after).norm().item() == pytest.approx(rate * gradient.norm().item(), rel=1e-4)
    expected = decay * average + (1 - decay) * after  # of the weights that the step has left
    assert torch.allclose(weights(state.parts.average), expected, atol=1e-6)
    assert (state.progress.step, state.progress.images) == (step + 1, config.train.batch_size)


def test_a_spike_is_a_gradient_norm_above_the_limit_whatever_the_loss(base):
    config = build(base)
    norm = take_step(make_state(config), [make_batch()], config).grad_norm
    for limit, outcome in ((norm * 0.99, "spike"), (norm * 1.01, "applied")):
        config = build(base, optimizer__skip_above=limit)
        assert take_step(make_state(config), [make_batch()], config).outcome == outcome


def test_weight_decay_shrinks_weights_by_the_learning_rate_times_its_own():
    for name in ("adamw", "lion"):
        parameter = torch.nn.Parameter(torch.full((3, 3), 2.0))
        optimizer = make_optimizer({"weight": parameter}, OptimizerConfig(name=name, lr=0.1, weight_decay=0.3))
        parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        assert torch.allclose(parameter, torch.full((3, 3), 2.0 * (1 - 0.1 * 0.3))), name


# ---------------------------------------------------------------------------------------------- the steps of a window


def result(outcome: str, loss: float = 1.0, images: int = 8) -> StepResult:
    numbers = (torch.tensor(float(value)) for value in (loss, images, OUTCOMES.index(outcome)))
    return StepResult({"loss": torch.tensor(loss)}, *numbers, torch.zeros(2, 4))


def test_ten_steps_in_a_row_end_a_run_and_one_that_is_applied_begins_anew(base):
    alone = SimpleNamespace(gather=lambda mine: [mine], rank=1)
    window, progress = Window(Path(base["output"]), build(base), alone), Progress()
    outcomes = ["spike", "non-finite"] * 4 + ["spike", "applied"] + ["non-finite"] * 9
    for step, outcome in enumerate(outcomes, 1):
        window.add(step, result(outcome), [], [])
    window.read(progress, lambda _: None)
    assert (progress.skipped, progress.spikes, progress.skipped_in_row) == (18, 5, 9)
    window.add(20, result("unreadable"), [], [])  # no sign of a diverging network, nor of a sound one
    window.read(progress, lambda _: None)
    window.add(21, result("spike"), [], [])
    with pytest.raises(InputError, match=r"10 steps in a row were above optimizer\.skip_above, the last at step 21"):
        window.read(progress, lambda _: None)
