"""Looking at a run while it trains: metrics of the averaged weights, and sample grids."""

from functools import partial
from pathlib import Path

import torch

from pixart.contact_sheet import contact_sheet
from pixart.data.samples import collate
from pixart.evaluate.metric import HeldOut, Subject
from pixart.evaluate.metrics import collect
from pixart.inference.latents import decode, sample_latents, to_images
from pixart.train.config import TrainConfig
from pixart.train.distributed import whole_model
from pixart.train.setup import Session
from pixart.train.step import make_example


@torch.no_grad()
def validate(session: Session, config: TrainConfig) -> dict[str, float]:
    """What the metrics of `train.metrics` say of the averaged weights on the held-out images, under noise that is the
    same at every validation. All processes call it."""
    state, held_out, processes = session.state, session.data.held_out, session.state.processes
    accelerator, network = state.accelerator, state.parts.average
    subject = Subject(network, state.parts.averaged_objective(), accelerator.device)
    for metric in session.metrics.values():
        metric.begin(subject)
    shown = [metric for metric in session.metrics.values() if "held_out" in metric.declaration.needs]
    size = max(config.train.batch_size // (config.train.accumulation * accelerator.num_processes), 1)
    batches = list(held_out.by_bucket(size)) if shown else []
    for first in range(0, len(batches), processes.count):  # a batch for each process; a sharded model needs all of them
        idle = first + processes.rank >= len(batches)
        samples = batches[0 if idle else first + processes.rank]
        # pass -1: times and noise that no training step sees, the same at every validation
        batch = collate([held_out.dataset[-1, i] for i in samples], length=config.text.length)
        batch = batch.to(accelerator.device)
        weight = torch.zeros_like(batch.weight) if idle else batch.weight
        with accelerator.autocast():
            example = make_example(batch, network, session.autoencoder, config, training=False)
            held = HeldOut(example, weight, partial(network, **example.inputs))
            for metric in shown:
                metric.add(held)
    return collect(session.metrics, accelerator)


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
