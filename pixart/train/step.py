"""One optimizer step."""

from dataclasses import dataclass

import torch
from torch import Tensor

from pixart.data.dataset import Batch
from pixart.diffusion import diffusion_loss
from pixart.diffusion.schedule import Schedule
from pixart.model.autoencoder import Autoencoder
from pixart.train.config import TrainConfig
from pixart.train.ema import ema_decay, update_ema
from pixart.train.optimizer import learning_rate
from pixart.train.quarters import sum_by_quarter
from pixart.train.state import TrainState


@dataclass
class StepResult:
    loss: Tensor  # mean over the global batch, on the device
    grad_norm: Tensor  # before clipping
    applied: bool
    images: int  # that were read, over all processes
    quarters: Tensor  # (2, 4) sums and counts of this process's losses by quarter of the times


def train_step(
    state: TrainState, micro_batches: list[Batch], schedule: Schedule, autoencoder: Autoencoder, config: TrainConfig
) -> StepResult:
    """Gradients of a global batch's mean loss, clipped; then weights and EMA, unless something is not finite."""
    accelerator, optimizer, progress = state.accelerator, state.optimizer, state.progress
    lr = learning_rate(config.optimizer, progress.step, config.train.steps, config.train.batch_size)
    for group in optimizer.param_groups:
        group["lr"] = lr

    micro_batches = [batch.to(accelerator.device) for batch in micro_batches]
    # gradients are averaged over processes: this makes it the mean over all pictures that were read
    images = accelerator.reduce(torch.stack([b.weight.sum() for b in micro_batches]).sum())
    scale = accelerator.num_processes / images.clamp(min=1)
    total, quarters = torch.zeros((), device=accelerator.device), torch.zeros(2, 4, device=accelerator.device)
    for i, batch in enumerate(micro_batches):
        last = i + 1 == len(micro_batches)
        with accelerator.autocast():
            losses = batch_losses(state.wrapped, state.model, batch, schedule, autoencoder, config)
        loss = (losses["loss"] * batch.weight).sum() * scale
        if last:
            accelerator.backward(loss)
        else:
            with accelerator.no_sync(state.wrapped):
                accelerator.backward(loss)
        total += loss.detach()
        quarters += sum_by_quarter(losses["loss"], batch.time, batch.weight)
    total = accelerator.reduce(total, reduction="mean")
    grad_norm = accelerator.clip_grad_norm_(state.model.parameters(), config.optimizer.clip)

    applied = bool(torch.isfinite(grad_norm + total))
    if applied or accelerator.scaler is not None:
        optimizer.step()  # with fp16 the scaler looks at the gradients itself, skips and lowers its scale
    optimizer.zero_grad(set_to_none=True)
    if applied:
        decay = ema_decay(config.train.ema, progress.step, warmup=config.train.ema_warmup)
        update_ema(state.ema, state.model, decay)
    progress.step += 1
    progress.skipped += not applied
    progress.skipped_in_row = 0 if applied else progress.skipped_in_row + 1
    progress.images += config.train.batch_size
    return StepResult(total, grad_norm, applied, int(images), quarters)


def batch_losses(
    network, model, batch: Batch, schedule: Schedule, autoencoder: Autoencoder, config: TrainConfig, *, dropout=True
) -> dict[str, Tensor]:
    """Losses (B,) of a batch under its own times and noise; `network` is called, `model` holds the null caption."""
    latents = autoencoder.encode(batch.pixels, batch.posterior_noise)
    t = schedule.draw_times(batch.time, config.diffusion)
    caption = batch.caption
    if dropout and config.train.caption_dropout:
        # as the authors do: the null caption replaces the states and keeps the caption's mask
        null = model.y_embedder.y_embedding[: caption.shape[1]].to(caption.dtype)
        dropped = batch.drop < config.train.caption_dropout
        caption = torch.where(dropped[:, None, None], null, caption)
    micro = {"size": batch.size, "aspect_ratio": batch.aspect_ratio} if config.model.micro_conditions else {}
    dtype = next(model.parameters()).dtype
    x_t = schedule.add_noise(latents, batch.noise, t)
    output = network(x_t, t, caption.to(dtype), batch.caption_mask, **micro)
    return diffusion_loss(schedule, config.diffusion, output, latents, batch.noise, t)
