"""Cases of training: a whole step of a small model, and the optimizer step of a large one."""

import copy
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn

from pixart.benchmark.measure import Call, Case, Settings
from pixart.benchmark.networks import call_diffusers, diffusers_or_none, network_in_diffusers, random_network
from pixart.checkpoint.save import unknown_to_diffusers
from pixart.config import load_config
from pixart.data.samples import Batch
from pixart.diffusion import diffusion_loss
from pixart.diffusion.schedule import make_schedule
from pixart.encoders.autoencoder import IdentityAutoencoder
from pixart.errors import InputError
from pixart.train.config import OptimizerConfig, TrainConfig
from pixart.train.distributed import Processes
from pixart.train.ema import make_ema, update_ema
from pixart.train.optimizer import make_optimizer
from pixart.train.random_batch import random_batch
from pixart.train.setup import build_state, make_accelerator
from pixart.train.step import train_step

DECAY = 0.999
AUTOTUNE = "max-autotune-no-cudagraphs"  # torch.compile's mode for the plain loop


def optimizer_case(settings: Settings) -> Case:
    """AdamW and weight averaging, for given gradients; bound by memory bandwidth, therefore counted in bytes."""
    model = random_network(settings)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter) * 1e-3
    config = OptimizerConfig()

    def ours() -> Call:
        optimizer, ema = make_optimizer(dict(model.named_parameters()), config), make_ema(model)
        applied = torch.tensor(True, device=settings.device)

        def call() -> None:
            optimizer.step()
            update_ema(ema, model, DECAY, applied)

        return call

    def plain() -> Call:
        optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr, weight_decay=config.weight_decay)
        ema = copy.deepcopy(model).requires_grad_(False)

        def call() -> None:
            optimizer.step()
            plain_ema(ema, model)

        return call

    values = sum(parameter.numel() for parameter in model.parameters())
    # reads weight, gradient and two moments, writes all but the gradient; reads weight and average, writes the average
    moved = values * (7 + 2) * settings.torch_dtype.itemsize + values * 2 * 4
    if settings.torch_dtype == torch.float32:
        moved = values * 10 * 4
    return Case("optimizer", {"ours": ours, "plain loop": plain}, bytes=moved, steps=2, note=_weights(model))


@torch.no_grad()
def plain_ema(ema: nn.Module, model: nn.Module) -> None:
    """Weight averaging as in most training scripts."""
    for average, value in zip(ema.parameters(), model.parameters(), strict=True):
        average.mul_(DECAY).add_(value, alpha=1 - DECAY)


def train_case(settings: Settings) -> Case:
    """A whole training step of `config`, without reading the data: from latents, or from pixels for a model of pixels.

    The plain loop is diffusers' network of the same size in the same precision, with the same losses, torch's default
    AdamW (or the config's optimizer, if it is another), clipping and an averaged copy.
    """
    config = load_config(TrainConfig, settings.config)
    batch_size = config.train.batch_size if settings.batch is None else settings.images
    loop = replace(config.train, trackers=(), batch_size=batch_size, accumulation=1, parallel="ddp")
    config = replace(config, output="unused", init_from=None, train=loop)
    if loop.mixed_precision == "fp16":
        raise InputError(f"case train, {settings.config}: expected train.mixed_precision bf16 or no, got fp16")
    batch = random_batch(config).to(settings.device)

    def ours(compiled: bool = False, onednn: bool = True) -> Call:
        chosen = replace(config, train=replace(config.train, compile=compiled))
        accelerator = make_accelerator(chosen, cpu=not settings.cuda)
        processes = Processes(accelerator, chosen.train.timeout)
        state = build_state(chosen, accelerator, processes, None, fresh=True, onednn=onednn)
        return lambda: train_step(state, [batch], IdentityAutoencoder(), chosen)

    programs: dict[str, Callable[[], Call]] = {"ours": ours}
    if "ours-torch" in settings.programs:
        programs["ours-torch"] = lambda: ours(onednn=False)
    if settings.cuda or "ours-compiled" in settings.programs:
        programs["ours-compiled"] = lambda: ours(compiled=True)
    if diffusers_or_none() is not None and not unknown_to_diffusers(config.model):
        programs["plain loop"] = lambda: plain_step(config, batch, settings)
        if settings.cuda or "plain loop-compiled" in settings.programs:
            programs["plain loop-compiled"] = lambda: plain_step(config, batch, settings, mode=AUTOTUNE)
    note = f"{settings.config}: {config.optimizer.name}, batch {batch_size}, {loop.mixed_precision}"
    dtype = torch.bfloat16 if loop.mixed_precision == "bf16" else torch.float32
    return Case("train", programs, images=batch_size, steps=3, note=note, dtype=dtype)


def plain_step(config: TrainConfig, batch: Batch, settings: Settings, *, mode: str | None = None) -> Call:
    """A plain training step around diffusers' network; `mode` is torch.compile's."""
    network = network_in_diffusers(random_network(replace(settings, dtype="float32"), config.model), mode=mode)
    if config.train.gradient_checkpointing:
        network.enable_gradient_checkpointing()
    ema = copy.deepcopy(network).requires_grad_(False)
    schedule, optimizer = make_schedule(config.diffusion), plain_optimizer(network, config)
    clean = batch.pixels if batch.latents is None else batch.latents
    micro = {"size": batch.size, "aspect_ratio": batch.aspect_ratio} if config.model.micro_conditions else {}
    kind = torch.device(settings.device).type

    def call() -> Tensor:
        t = schedule.draw_times(batch.time, config.diffusion)
        x = schedule.add_noise(clean, batch.noise, t)
        with torch.autocast(kind, torch.bfloat16, enabled=config.train.mixed_precision == "bf16"):
            output = call_diffusers(network, x, t, batch.caption, batch.caption_mask, **micro)
            losses = diffusion_loss(schedule, config.diffusion, output, clean, batch.noise, t)
        loss = losses["loss"].mean()
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), config.optimizer.clip)
        optimizer.step()
        optimizer.zero_grad()
        plain_ema(ema, network)
        return loss.detach()

    return call


def plain_optimizer(network: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    if config.optimizer.name == "adamw":
        return torch.optim.AdamW(network.parameters(), lr=config.optimizer.lr)
    return make_optimizer(dict(network.named_parameters()), config.optimizer)


def _weights(model: nn.Module) -> str:
    return f"{sum(parameter.numel() for parameter in model.parameters()) / 1e6:.0f} M weights"
