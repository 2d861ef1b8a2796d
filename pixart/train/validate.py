"""Validation during training: metrics of the averaged weights, and sample grids."""

from functools import partial
from pathlib import Path

import torch
from accelerate.tracking import GeneralTracker

from pixart.adapters.adapter import adapt
from pixart.contact_sheet import contact_sheet
from pixart.data.samples import collate
from pixart.evaluate.metric import HeldOut, Subject
from pixart.evaluate.metrics import collect
from pixart.files import write_png
from pixart.inference.latents import NonFinite, check_finite, decode, sample_latents, to_images
from pixart.train.config import TrainConfig
from pixart.train.distributed import whole_model
from pixart.train.parts import ADAPTER
from pixart.train.setup import Session
from pixart.train.step import make_example
from pixart.train.trackers import track


@torch.no_grad()
def validate(session: Session, config: TrainConfig) -> dict[str, float]:
    """Compute the metrics of `train.metrics` for the averaged weights on the held-out images, with the same noise at
    every validation. All processes call it."""
    state, held_out, processes = session.state, session.data.held_out, session.state.processes
    accelerator, network = state.accelerator, state.parts.average
    subject = Subject(network, state.parts.averaged_objective(), accelerator.device)
    for metric in session.metrics.values():
        metric.begin(subject)
    shown = [metric for metric in session.metrics.values() if "held_out" in metric.declaration.needs]
    size = max(config.train.batch_size // (config.train.accumulation * accelerator.num_processes), 1)
    batches = list(held_out.by_bucket(size)) if shown else []
    for first in range(0, len(batches), processes.count):  # a batch per process; a sharded model needs them all
        idle = first + processes.rank >= len(batches)
        samples = batches[0 if idle else first + processes.rank]
        # epoch -1: times and noise that no training step uses, the same at every validation
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
    """Sample the config's prompts from the averaged weights into `samples/` and the trackers; the seed of each is its
    position in the list.

    All processes call it; the main one samples.
    """
    state, data, accelerator = session.state, session.data, session.state.accelerator
    model = whole_model(state.parts.average, main=accelerator.is_main_process)
    if model is None:
        return None
    if model is not state.parts.average and config.adapter is not None:  # gathered weights are those of the base
        adapter = adapt(model, config.adapter).eval()
        adapter.load_state_dict(state.parts.averages[ADAPTER].state_dict())
    captions = [data.captions[prompt] for prompt in config.prompts]
    side = config.model.latent_size
    try:
        with accelerator.autocast():
            latents = sample_latents(
                model, config.card, captions, data.null, range(len(captions)), config.sample, height=side, width=side
            )
        names = [f"'{prompt[:60]}'" for prompt in config.prompts]
        check_finite(latents, names, latents.dtype, "latents")
        pixels = decode(session.autoencoder, latents.to(accelerator.device))
        check_finite(pixels, names, pixels.dtype, "pixels")
        images = to_images(pixels)
    except NonFinite as error:
        accelerator.print(f"\nwarning: samples are not drawn: {error}; training continues")
        return None
    except torch.OutOfMemoryError:
        accelerator.print("\nwarning: out of memory while drawing samples; training continues without them")
        torch.cuda.empty_cache()
        return None
    sheet = contact_sheet([[image] for image in images], list(config.prompts))
    path = session.run / "samples" / f"step_{state.progress.step:08d}.png"
    try:
        path.parent.mkdir(exist_ok=True)
        write_png(path, sheet, durable=False)
    except OSError as error:
        accelerator.print(f"\nwarning: {path} could not be written ({error}); training continues")
        return None

    def add_image(tracker: GeneralTracker) -> None:
        if tracker.name == "tensorboard":
            pixels = torch.frombuffer(bytearray(sheet.tobytes()), dtype=torch.uint8).view(sheet.height, sheet.width, 3)
            tracker.writer.add_image("samples", pixels, state.progress.step, dataformats="HWC")

    track(accelerator, add_image, accelerator.print)
    return path
