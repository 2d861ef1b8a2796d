"""One optimizer step. Nothing here waits for the device: what went wrong is decided on it, and read at the next log."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from pixart.data.samples import Batch
from pixart.diffusion import diffusion_loss
from pixart.diffusion.schedule import Schedule
from pixart.encoders.autoencoder import Autoencoder
from pixart.train.config import TrainConfig
from pixart.train.distributed import clip_gradients, gradient_sync
from pixart.train.ema import ema_decay, update_ema
from pixart.train.optimizer import learning_rate
from pixart.train.state import TrainState
from pixart.train.timestep_bins import sum_by_quarter

OUTCOMES = ("applied", "non-finite", "spike", "unreadable")  # of a step; all but the first leave the state as it was


@dataclass
class StepResult:
    """What a step gave, as numbers on the device; `read_results` brings them over."""

    loss: Tensor  # mean over the global batch
    grad_norm: Tensor  # of all parameters, before clipping
    images: Tensor  # that were read, over all processes
    outcome: Tensor  # index into OUTCOMES
    quarters: Tensor  # (2, 4) sums and counts of this process's losses by quarter of the times


class StepReport(NamedTuple):
    """A `StepResult` as plain numbers."""

    loss: float
    grad_norm: float
    images: int
    outcome: str

    @property
    def applied(self) -> bool:
        return self.outcome == "applied"


def train_step(
    state: TrainState, micro_batches: list[Batch], schedule: Schedule, autoencoder: Autoencoder, config: TrainConfig
) -> StepResult:
    """Gradients of a global batch's mean loss, clipped; then weights and EMA, unless `judge` says otherwise."""
    accelerator, optimizer, progress = state.accelerator, state.optimizer, state.progress
    lr = learning_rate(config.optimizer, progress.step, config.train.steps, config.train.batch_size)
    for group in optimizer.param_groups:
        group["lr"] = lr

    # gradients are averaged over processes: this makes it the mean over all pictures that were read
    images = accelerator.reduce(torch.stack([b.weight.sum() for b in micro_batches]).sum())
    scale = accelerator.num_processes / images.clamp(min=1)
    total, quarters = torch.zeros((), device=accelerator.device), torch.zeros(2, 4, device=accelerator.device)
    for i, batch in enumerate(micro_batches):
        with gradient_sync(state.wrapped, i + 1 == len(micro_batches)):
            with accelerator.autocast():
                losses = batch_losses(state.wrapped, state.model, batch, schedule, autoencoder, config)
            loss = (losses["loss"] * batch.weight).sum() * scale
            accelerator.backward(loss)
        total += loss.detach()
        quarters += sum_by_quarter(losses["loss"], batch.time, batch.weight)
    total = accelerator.reduce(total, reduction="mean")
    if accelerator.scaler is not None:
        accelerator.scaler.unscale_(optimizer)
    grad_norm = clip_gradients(state.model, config.optimizer.clip)

    outcome = judge(total, grad_norm, images, config.optimizer.skip_above)
    apply_update(optimizer, outcome == 0)
    if accelerator.scaler is not None:
        accelerator.scaler.update()  # lowers its scale if it met an infinite gradient
    optimizer.zero_grad(set_to_none=True)
    update_ema(
        state.ema, state.model, ema_decay(config.train.ema, progress.step, warmup=config.train.ema_warmup), outcome == 0
    )
    progress.step += 1
    progress.images += config.train.batch_size
    return StepResult(total, grad_norm, images, outcome, quarters)


def judge(loss: Tensor, grad_norm: Tensor, images: Tensor, skip_above: float | None) -> Tensor:
    """What becomes of a step, as an index into OUTCOMES on the device; the same on every process."""
    outcome = torch.zeros_like(loss)
    if skip_above is not None:
        outcome = torch.where(grad_norm > skip_above, 2.0, outcome)
    outcome = torch.where(torch.isfinite(grad_norm + loss), outcome, 1.0)
    return torch.where(images > 0, outcome, 3.0)


def apply_update(optimizer: torch.optim.Optimizer, applied: Tensor) -> None:
    """One step of the optimizer, or none at all, moments and counters included, where `applied` is false.

    torch's fused optimizers take the decision on the device, by the attribute that its loss scaler uses. Others have no
    such thing (NaN times 0 is NaN, and momentum and decay move weights without a gradient), so with them every step
    waits for the device to know.
    """
    if getattr(optimizer, "_step_supports_amp_scaling", False):
        optimizer.found_inf = 1 - applied.float()
        optimizer.step()
        del optimizer.found_inf
    elif applied:
        optimizer.step()


def read_results(results: list[StepResult]) -> list[StepReport]:
    """Bring results over from the device, all in one go: the one place that waits for it."""
    if not results:
        return []
    rows = torch.stack([torch.stack([r.loss, r.grad_norm, r.images, r.outcome]) for r in results]).tolist()
    return [StepReport(loss, norm, int(images), OUTCOMES[int(outcome)]) for loss, norm, images, outcome in rows]


def batch_losses(
    network, model, batch: Batch, schedule: Schedule, autoencoder: Autoencoder, config: TrainConfig, *, dropout=True
) -> dict[str, Tensor]:
    """Losses (B,) of a batch under its own times and noise; `network` is called, `model` holds the null caption."""
    latents = find_latents(batch, autoencoder)
    t = schedule.draw_times(batch.time, config.diffusion)
    caption = batch.caption
    if dropout and config.train.caption_dropout:
        # as the authors do: the null caption replaces the states and keeps the caption's mask
        null = model.y_embedder.y_embedding[: caption.shape[1]].to(caption.dtype)
        dropped = batch.drop < config.train.caption_dropout
        caption = torch.where(dropped[:, None, None], null, caption)
    x_t = schedule.add_noise(latents, batch.noise, t)
    output = network(x_t, t, caption.to(next(model.parameters()).dtype), **conditions(batch, config))
    return diffusion_loss(schedule, config.diffusion, output, latents, batch.noise, t)


def find_latents(batch: Batch, autoencoder: Autoencoder) -> Tensor:
    """A batch's scaled latents (B, C, h, w), encoded if it has pixels."""
    return autoencoder.encode(batch.pixels, batch.posterior_noise) if batch.latents is None else batch.latents


def conditions(batch: Batch, config: TrainConfig) -> dict[str, Tensor]:
    """What the network takes besides latents, times and captions."""
    micro = {"size": batch.size, "aspect_ratio": batch.aspect_ratio} if config.model.micro_conditions else {}
    return {"caption_mask": batch.caption_mask, **micro}
