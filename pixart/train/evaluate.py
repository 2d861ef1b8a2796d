"""Scores of drawn images while a run trains: of the averaged weights, drawn by all processes."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from pixart.errors import InputError
from pixart.evaluate.image_metric import ImageMetric, Item, Task, number_prompts, what_to_keep
from pixart.evaluate.run import write_sheets
from pixart.evaluate.score import open_image_metrics
from pixart.inference.latents import decode, sample_latents, to_images
from pixart.train.config import TrainConfig
from pixart.train.setup import Session


@dataclass(frozen=True)
class ImageScores:
    """The metrics of `evaluate.metrics`, opened, with what they are to score."""

    metrics: dict[str, ImageMetric]
    task: Task
    items: list[Item]


def open_scores(session: Session, config: TrainConfig) -> ImageScores | None:
    """Load what scoring needs; None if `train.evaluate_every` is 0. All processes call it.

    Raises:
        InputError: something is missing or does not fit.
    """
    wanted, accelerator = config.evaluate, session.state.accelerator
    if not config.train.evaluate_every:
        return None
    prompts = wanted.read_prompts() or _held_out_captions(session)
    items = number_prompts(prompts)[: wanted.images]
    side = config.model.latent_size * session.autoencoder.downsample
    task = Task(
        items,
        (side, side),
        accelerator.device,
        Path(wanted.reference) if wanted.reference else None,
        wanted.reference_fit,
        wanted.filter,
        session.run / "evaluation" / "references",
        wanted.inception,
        truncate=True,
        say=accelerator.print,
    )
    metrics = open_image_metrics(wanted.metrics, "evaluate.metrics")
    with accelerator.main_process_first():  # whose features of the reference the others read
        for metric in metrics.values():
            metric.open(task)
    return ImageScores(metrics, task, items)


def _held_out_captions(session: Session) -> list[str]:
    records = getattr(session.data.held_out.dataset, "records", [])
    captions = [getattr(record, "captions", ("",))[0] for record in records]
    if not captions:
        raise InputError(
            "train.evaluate_every: there are no prompts; set evaluate.prompts to a file of one prompt a line, or hold "
            "images out (data.validation)"
        )
    return captions


@torch.no_grad()
def score_images(
    scores: ImageScores, session: Session, config: TrainConfig, say: Callable[[str], None] = print
) -> dict[str, float]:
    """Every score with its interval, of images that all processes draw; all call it. Summaries are said, and what
    metrics show is written into the run's folder `evaluation`.

    Seeds are the prompts' numbers, so scores of different steps are of the same noise. A process that has no batch left
    draws the first one again, because a sharded network needs all processes in each forward.
    """
    state, items = session.state, scores.items
    accelerator, processes = state.accelerator, state.processes
    size = max(config.train.batch_size // (config.train.accumulation * processes.count), 1)
    count = processes.count
    makers, wanted = what_to_keep(scores.metrics.values())
    kept: dict[str, list[np.ndarray]] = {name: [] for name in makers}
    shown: dict[int, np.ndarray] = {}
    rounds, broken = -(-len(items) // (size * count)), torch.zeros((), dtype=torch.int64, device=accelerator.device)
    for turn in range(rounds):
        first = (turn * count + processes.rank) * size
        numbers = [number if number < len(items) else 0 for number in range(first, first + size)]
        pixels = _draw(scores, session, config, numbers)
        broken += (~torch.isfinite(pixels)).flatten(1).any(1).sum()
        images = np.stack([np.asarray(image) for image in to_images(pixels.nan_to_num())])
        for name, make in makers.items():
            kept[name].append(make(images, numbers))
        shown |= {
            i: image
            for place, (i, image) in enumerate(zip(numbers, images, strict=True))
            if i in wanted and i == first + place
        }
    if lost := int(accelerator.reduce(broken)):
        say(f"warning: {lost} drawn images are not finite, so there is no score; training continues")
        return {}
    rows = {name: _gather(np.concatenate(parts), len(items), rounds, session) for name, parts in kept.items()}
    images_shown = {i: image for part in processes.gather(shown) for i, image in part.items()}
    found: dict[str, float] = {}
    for metric in scores.metrics.values():
        estimates = metric.estimate(rows)
        for key, estimate in estimates.items():
            found[key] = estimate.value
            if estimate.low is not None:
                found |= {f"{key}_low": estimate.low, f"{key}_high": estimate.high}
        if summary := metric.summary(estimates):
            say(summary)
    if accelerator.is_main_process:
        folder, suffix = session.run / "evaluation", f"_{state.progress.step:07d}"
        for line in write_sheets(scores.metrics, images_shown, rows, folder, suffix):
            say(line)
    return found


def _draw(scores: ImageScores, session: Session, config: TrainConfig, numbers: Sequence[int]) -> torch.Tensor:
    """The pixels (B, 3, H, W) of the images with these numbers, not clipped."""
    captions = [session.data.captions[scores.items[i].prompt] for i in numbers]
    seeds, side = [scores.items[i].seed for i in numbers], config.model.latent_size
    with session.state.accelerator.autocast():
        latents = sample_latents(
            session.state.parts.average,
            config.card,
            captions,
            session.data.null,
            seeds,
            config.sample,
            height=side,
            width=side,
        )
    return decode(session.autoencoder, latents)


def _gather(rows: np.ndarray, count: int, rounds: int, session: Session) -> np.ndarray:
    """The first `count` rows of all processes, in the order of the images."""
    accelerator, ranks = session.state.accelerator, session.state.processes.count
    whole = accelerator.gather(torch.from_numpy(rows).to(accelerator.device)).cpu().numpy()
    batches = whole.reshape(ranks, rounds, len(rows) // rounds, *rows.shape[1:])
    return np.swapaxes(batches, 0, 1).reshape(-1, *rows.shape[1:])[:count]
