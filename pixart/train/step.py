"""One optimizer step. Nothing here waits for the device: whether a step is applied is decided on the device, and read
at the next log."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from pixart.data.samples import Batch
from pixart.diffusion.objective import Example
from pixart.diffusion.timestep_bins import sum_by_bin
from pixart.encoders.autoencoder import Autoencoder
from pixart.model.pixart import PixArt
from pixart.train.config import TrainConfig
from pixart.train.distributed import average_gradients, clip_gradients, gradient_sync, is_sharded
from pixart.train.ema import ema_decay, update_ema
from pixart.train.more_optimizers import is_schedule_free, take_average
from pixart.train.optimizer import learning_rate
from pixart.train.state import TrainState

OUTCOMES = ("applied", "non-finite", "spike", "unreadable")  # of a step; all but the first leave the state unchanged


@dataclass
class StepResult:
    """The results of a step, as numbers on the device; `read_results` copies them to the CPU."""

    terms: dict[str, Tensor]  # the objective's terms, means over the global batch; "loss" is what was minimised
    grad_norm: Tensor  # of all parameters, before clipping
    images: Tensor  # number of images read, over all processes
    outcome: Tensor  # index into OUTCOMES
    quarters: Tensor  # (2, 4) sums and counts of this process's losses by timestep bin

    @property
    def loss(self) -> Tensor:
        return self.terms["loss"]


class StepReport(NamedTuple):
    """A `StepResult` as plain numbers."""

    terms: dict[str, float]
    grad_norm: float
    images: int
    outcome: str

    @property
    def loss(self) -> float:
        return self.terms["loss"]

    @property
    def applied(self) -> bool:
        return self.outcome == "applied"


def train_step(
    state: TrainState, micro_batches: list[Batch], autoencoder: Autoencoder, config: TrainConfig
) -> StepResult:
    """Compute and clip the gradients of the global batch's mean loss, then update weights and averages, unless `judge`
    says that the step is skipped."""
    accelerator, optimizer, progress, parts = state.accelerator, state.optimizer, state.progress, state.parts
    lr = learning_rate(config.optimizer, progress.step, config.train.steps, config.train.batch_size)
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_factor", 1.0)

    # gradients are averaged over processes; this factor turns that into the mean over all images that were read
    images = accelerator.reduce(torch.stack([b.weight.sum() for b in micro_batches]).sum())
    scale = accelerator.num_processes / images.clamp(min=1)
    totals: dict[str, Tensor] = {}
    quarters = torch.zeros(2, 4, device=accelerator.device)
    for i, batch in enumerate(micro_batches):
        with accelerator.autocast():
            example = make_example(batch, parts.network, autoencoder, config)
        wrapped = state.wrap(example)
        with gradient_sync(wrapped, i + 1 == len(micro_batches)):
            with accelerator.autocast(), state.calls.counting():
                terms = wrapped(example)
            sums = {name: (term * batch.weight).sum() * scale for name, term in terms.items()}
            if batch.loss_weight is not None:  # of regularization images
                sums["loss"] = (terms["loss"] * batch.weight * batch.loss_weight).sum() * scale
            accelerator.backward(sums["loss"])
        totals = {name: totals.get(name, 0) + value.detach() for name, value in sums.items()}
        quarters += sum_by_bin(terms["loss"], batch.time, batch.weight)
    if is_sharded(parts.network):
        average_gradients(parts.to_train().values())
    # one reduction for all terms
    reduced = accelerator.reduce(torch.stack(list(totals.values())), reduction="mean")
    totals = dict(zip(totals, reduced, strict=True))
    if accelerator.scaler is not None:
        accelerator.scaler.unscale_(optimizer)
    grad_norm = clip_gradients([parameter for _, parameter in parts.named_parameters()], config.optimizer.clip)

    outcome = judge(totals["loss"], grad_norm, images, config.optimizer.skip_above)
    apply_update(optimizer, outcome == 0)
    if accelerator.scaler is not None:
        accelerator.scaler.update()  # lowers its scale after an infinite gradient
    optimizer.zero_grad(set_to_none=True)
    decay = ema_decay(config.train.ema, progress.step, warmup=config.train.ema_warmup)
    for name, module in parts.averaged():
        if is_schedule_free(optimizer):
            take_average(parts.averages[name], module, optimizer)
        else:
            update_ema(parts.averages[name], module, decay, outcome == 0)
    with torch.no_grad():
        parts.objective.after_step(parts.network, outcome == 0)
    progress.step += 1
    progress.images += config.train.batch_size
    return StepResult(totals, grad_norm, images, outcome, quarters)


def judge(loss: Tensor, grad_norm: Tensor, images: Tensor, skip_above: float | None) -> Tensor:
    """The outcome of a step, as an index into OUTCOMES on the device; the same on every process."""
    outcome = torch.zeros_like(loss)
    if skip_above is not None:
        outcome = torch.where(grad_norm > skip_above, 2.0, outcome)
    outcome = torch.where(torch.isfinite(grad_norm + loss), outcome, 1.0)
    return torch.where(images > 0, outcome, 3.0)


def apply_update(optimizer: torch.optim.Optimizer, applied: Tensor) -> None:
    """One step of the optimizer; where `applied` is false, nothing changes, neither weights nor optimizer state.

    torch's fused optimizers decide this on the device, through the attribute that torch's loss scaler uses. Other
    optimizers have no such switch, and zeroing their gradients is not enough (NaN times 0 is NaN, and momentum and
    weight decay move weights without a gradient), so with them every step waits for the device.
    """
    if getattr(optimizer, "_step_supports_amp_scaling", False):
        optimizer.found_inf = 1 - applied.float()
        optimizer.step()
        del optimizer.found_inf
    elif applied:
        optimizer.step()


def read_results(results: list[StepResult]) -> list[StepReport]:
    """Copy results from the device, all at once. This is the only function here that waits for the device."""
    if not results:
        return []
    rows = torch.stack([torch.stack([r.grad_norm, r.images, r.outcome, *r.terms.values()]) for r in results]).tolist()
    return [
        StepReport(dict(zip(result.terms, terms, strict=True)), norm, int(images), OUTCOMES[int(outcome)])
        for result, (norm, images, outcome, *terms) in zip(results, rows, strict=True)
    ]


def make_example(
    batch: Batch, network: PixArt, autoencoder: Autoencoder, config: TrainConfig, *, training: bool = True
) -> Example:
    """A batch as the objective takes it: images encoded, captions dropped; `network` holds the null caption.

    Without `training`, i.e. for validation, no caption is dropped, and randomly drawn conditions are left out.
    """
    null = network.y_embedder.y_embedding
    caption, given = batch.caption, conditions(batch, config)
    if not training:
        given = {name: value for name, value in given.items() if network.conditions.get(name) is None}
    elif config.train.caption_dropout:
        # as in the authors' code, the null caption replaces the states but the caption's own mask is kept
        dropped = batch.drop < config.train.caption_dropout
        caption = torch.where(dropped[:, None, None], null[: caption.shape[1]].to(caption.dtype), caption)
    return Example(
        x0=find_latents(batch, autoencoder),
        noise=batch.noise,
        time=batch.time,
        inputs={"caption": caption.to(next(network.parameters()).dtype), **given},
        null=null,
        targets=batch.targets,
        draws=batch.draws,
        pixels=batch.pixels,
    )


def find_latents(batch: Batch, autoencoder: Autoencoder) -> Tensor:
    """A batch's scaled latents (B, C, h, w), encoded now if the batch holds pixels."""
    return autoencoder.encode(batch.pixels, batch.posterior_noise) if batch.latents is None else batch.latents


def conditions(batch: Batch, config: TrainConfig) -> dict[str, Tensor]:
    """The network's inputs besides latents, times and captions."""
    micro = {"size": batch.size, "aspect_ratio": batch.aspect_ratio} if config.model.micro_conditions else {}
    return {"caption_mask": batch.caption_mask, **micro, **batch.conditions}
