"""Looking at a run while it trains: the loss on held-out images, and sample grids."""

import math
from pathlib import Path

import torch

from pixart.data.dataset import collate
from pixart.grid import contact_sheet
from pixart.pipeline import sample_latents, to_images
from pixart.train.config import TrainConfig
from pixart.train.distributed import whole_model
from pixart.train.quarters import quarter_means, sum_by_quarter
from pixart.train.setup import Session
from pixart.train.step import batch_losses


@torch.no_grad()
def validate(session: Session, config: TrainConfig) -> dict[str, float]:
    """Loss of the averaged weights on the held-out images, in all and by quarter of the times, under fixed noise."""
    state, held_out = session.state, session.data.held_out
    sums = torch.zeros(2, 4, device=state.accelerator.device)
    size = max(config.train.batch_size // (config.train.accumulation * state.accelerator.num_processes), 1)
    for samples in held_out.by_bucket(size):
        # pass -1: times and noise that no training step sees, the same at every validation
        batch = collate([held_out.dataset[-1, i] for i in samples], length=config.text.length)
        batch = batch.to(state.accelerator.device)
        with state.accelerator.autocast():
            losses = batch_losses(
                state.ema, state.ema, batch, session.schedule, session.autoencoder, config, dropout=False
            )
        sums += sum_by_quarter(losses["loss"], batch.time, batch.weight)
    total, count = sums.sum(1).tolist()
    loss = total / count if count else math.nan  # nothing was held out, or none of it could be read
    return {"validation_loss": loss, **quarter_means(sums, "validation_loss")}


def draw_samples(session: Session, config: TrainConfig) -> Path | None:
    """Sample the config's prompts from the averaged weights, seed by position, to `samples/` and the trackers.

    All processes call it; the main one draws.
    """
    state, data, accelerator = session.state, session.data, session.state.accelerator
    model = whole_model(state.ema, main=accelerator.is_main_process)
    if model is None:
        return None
    captions = [data.captions[prompt] for prompt in config.prompts]
    side = config.model.latent_size
    latents = sample_latents(
        model, config.card, captions, data.null, range(len(captions)), config.sample, height=side, width=side
    )
    images = to_images(session.autoencoder.decode(latents.to(accelerator.device)))
    sheet = contact_sheet([[image] for image in images], list(config.prompts))
    path = session.run / "samples" / f"step_{state.progress.step:08d}.png"
    path.parent.mkdir(exist_ok=True)
    sheet.save(path)
    for tracker in accelerator.trackers:
        if tracker.name == "tensorboard":
            picture = torch.frombuffer(bytearray(sheet.tobytes()), dtype=torch.uint8).view(sheet.height, sheet.width, 3)
            tracker.writer.add_image("samples", picture, state.progress.step, dataformats="HWC")
    return path
