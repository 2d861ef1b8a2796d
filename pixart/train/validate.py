"""Looking at a run while it trains: the loss on held-out images, and sample grids."""

import math
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from pixart.contact_sheet import contact_sheet
from pixart.data.samples import collate
from pixart.diffusion.denoising_error import RATIOS, denoising_errors, mean_error
from pixart.errors import InputError
from pixart.inference.latents import decode, sample_latents, to_images
from pixart.train.config import TrainConfig
from pixart.train.distributed import whole_model
from pixart.train.setup import Session
from pixart.train.step import make_example
from pixart.train.timestep_bins import quarter_means, sum_by_quarter


@torch.no_grad()
def validate(session: Session, config: TrainConfig) -> dict[str, float]:
    """The averaged weights on the held-out images under fixed noise: the loss, in all and by quarter of its times, and
    the error of the clean images by ratio of noise to signal (see `denoising_errors`), with their geometric mean."""
    state, held_out, processes = session.state, session.data.held_out, session.state.processes
    device, ema, objective = state.accelerator.device, state.parts.average, state.parts.averaged_objective()
    sums, errors = torch.zeros(2, 4, device=device), torch.zeros(len(RATIOS), device=device)
    terms: dict[str, Tensor] = {}
    size = max(config.train.batch_size // (config.train.accumulation * state.accelerator.num_processes), 1)
    batches = list(held_out.by_bucket(size))
    for first in range(0, len(batches), processes.count):  # a batch for each process; a sharded model needs all of them
        idle = first + processes.rank >= len(batches)
        samples = batches[0 if idle else first + processes.rank]
        # pass -1: times and noise that no training step sees, the same at every validation
        batch = collate([held_out.dataset[-1, i] for i in samples], length=config.text.length)
        batch = batch.to(device)
        if idle:
            batch = replace(batch, weight=torch.zeros_like(batch.weight))
        with state.accelerator.autocast():
            example = make_example(batch, ema, session.autoencoder, config, training=False)
            losses = objective(ema, example)
            network = partial(ema, **example.inputs)
            found = denoising_errors(network, objective.schedule, config.diffusion, example.x0, example.noise)
        sums += sum_by_quarter(losses["loss"], batch.time, batch.weight)
        for name, values in losses.items():
            if name != "loss":
                total = torch.where(batch.weight > 0, values.float(), 0.0).sum()
                terms[name] = terms.get(name, 0) + total
        errors += torch.where(batch.weight > 0, found, 0.0).sum(1)
    sums, errors = state.accelerator.reduce(sums), state.accelerator.reduce(errors)
    total, count = sums.sum(1).tolist()
    count = count or math.nan  # nothing was held out, or none of it could be read
    by_ratio = (errors / count).tolist()
    row = {
        "validation_loss": total / count,
        **quarter_means(sums, "validation_loss"),
        "validation_error": mean_error(by_ratio),
        **{f"validation_error_{ratio:g}": error for ratio, error in zip(RATIOS, by_ratio, strict=True)},
    }
    if taken := [name for name in terms if f"validation_{name}" in row]:
        raise InputError(f"objective: its term '{taken[0]}' has the name of another metric; rename it")
    return row | {f"validation_{name}": state.accelerator.reduce(value).item() / count for name, value in terms.items()}


def draw_samples(session: Session, config: TrainConfig) -> Path | None:
    """Sample the config's prompts from the averaged weights, seed by position, to `samples/` and the trackers.

    All processes call it; the main one draws.
    """
    state, data, accelerator = session.state, session.data, session.state.accelerator
    model = whole_model(state.parts.average, main=accelerator.is_main_process)
    if model is None:
        return None
    captions = [data.captions[prompt] for prompt in config.prompts]
    side = config.model.latent_size
    try:
        with accelerator.autocast():
            latents = sample_latents(
                model, config.card, captions, data.null, range(len(captions)), config.sample, height=side, width=side
            )
        images = to_images(decode(session.autoencoder, latents.to(accelerator.device)))
    except torch.OutOfMemoryError:
        accelerator.print("\nwarning: no memory is left to draw samples in; training goes on without them")
        torch.cuda.empty_cache()
        return None
    sheet = contact_sheet([[image] for image in images], list(config.prompts))
    path = session.run / "samples" / f"step_{state.progress.step:08d}.png"
    path.parent.mkdir(exist_ok=True)
    sheet.save(path)
    for tracker in accelerator.trackers:
        if tracker.name == "tensorboard":
            picture = torch.frombuffer(bytearray(sheet.tobytes()), dtype=torch.uint8).view(sheet.height, sheet.width, 3)
            tracker.writer.add_image("samples", picture, state.progress.step, dataformats="HWC")
    return path
