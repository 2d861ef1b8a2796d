"""Cases of LoRA: a training step beside one of all weights, sampling with an adapter, and loading one."""

import copy
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from pixart.adapters.adapter import Adapter, AdapterConfig, adapt
from pixart.adapters.apply import Loras
from pixart.adapters.base import mark_base
from pixart.adapters.load import WEIGHTS, load_adapter, save_adapter
from pixart.adapters.lora_files import LoraFile, read_lora
from pixart.benchmark.measure import Call, Case, Settings
from pixart.benchmark.networks import native, random_network, twin_of
from pixart.benchmark.sampling import latents_call
from pixart.checkpoint import ModelCard
from pixart.cpu import use_onednn
from pixart.data.buckets import Bucket
from pixart.data.config import DataConfig
from pixart.diffusion.sampling import GUIDANCE, SampleConfig
from pixart.encoders.autoencoder import AutoencoderConfig, IdentityAutoencoder
from pixart.encoders.text import TextConfig
from pixart.errors import InputError
from pixart.model import PixArt
from pixart.train.assemble import assemble
from pixart.train.config import LoopConfig, TrainConfig
from pixart.train.distributed import Processes
from pixart.train.optimizer import make_optimizer
from pixart.train.parts import make_objective
from pixart.train.random_batch import random_batch
from pixart.train.setup import make_accelerator
from pixart.train.state import TrainState
from pixart.train.step import train_step

LORA = AdapterConfig("lora", {"rank": 16})  # of attention and feed-forward layers
STEPS = 4  # of sampling: an adapter costs the same in each


class NoUpdate(torch.optim.Optimizer):
    """An optimizer that changes nothing and has no state."""

    def __init__(self, parameters):
        super().__init__(parameters, {"lr": 0.0})

    def step(self, closure=None) -> None:
        pass


def lora_case(settings: Settings) -> Case:
    """A training step of a LoRA, of all weights, and of all weights without the optimizer and the averaged copy: what
    a LoRA saves beyond their work is the gradients of the frozen weights, and what it adds is its own layers."""
    if settings.dtype == "float16":
        raise InputError("case lora: expected dtype float32 or bfloat16, got float16")
    config = _config(settings)
    bucket = Bucket(settings.height / settings.width, settings.height, settings.width)
    batch = random_batch(config, bucket=bucket).to(settings.device)

    def step(config: TrainConfig, *, update: bool = True) -> Call:
        accelerator = make_accelerator(config, cpu=not settings.cuda)
        network = random_network(replace(settings, dtype="float32"), config.model)
        objective = make_objective(config.objective, config.diffusion, network, config.seed)
        parts = assemble(config, network, objective.to(settings.device), onednn=not settings.cuda)
        parameters = parts.to_train()
        optimizer = make_optimizer(parameters, config.optimizer) if update else NoUpdate(parameters.values())
        state = TrainState(parts, optimizer, accelerator, Processes(accelerator, config.train.timeout))
        return lambda: train_step(state, [batch], IdentityAutoencoder(), config)

    programs = {
        "ours": lambda: step(replace(config, init_from="random", adapter=LORA)),
        "all weights": lambda: step(config),
        "all weights, no update": lambda: step(replace(config, train=replace(config.train, ema=0)), update=False),
    }
    note = f"rank {LORA.options['rank']}; AdamW, averaged copy, {config.train.mixed_precision}"
    return Case("lora", programs, images=settings.images, steps=3, note=note, dtype=settings.torch_dtype)


def _config(settings: Settings) -> TrainConfig:
    """Training of all weights of the preset's network on latents."""
    model = native(settings)
    return TrainConfig(
        output="unused",
        data=DataConfig(resolution=settings.height),
        text=TextConfig(model="random", length=min(settings.tokens, model.caption_length)),
        vae=AutoencoderConfig("kl", "random"),
        model=model,
        train=LoopConfig(
            steps=1000,
            batch_size=settings.images,
            mixed_precision="bf16" if settings.dtype == "bfloat16" else "no",
            trackers=(),
        ),
    )


def lora_sample_case(settings: Settings) -> Case:
    """Four guided steps without an adapter, with one merged into the weights, and with one beside them."""
    config = SampleConfig(sampler="dpm_solver", steps=STEPS, guidance=GUIDANCE)
    model, _, call = latents_call(settings, config)
    folder = _write_adapter(model)

    def ours() -> Call:
        return call(_ready(twin_of(model)))

    def merged() -> Call:
        network = _ready(copy.deepcopy(model))  # its weights change
        Loras(network).load("lora", read_lora(folder.name))
        return call(network)

    def beside() -> Call:
        network = _ready(twin_of(model))
        load_adapter(_adapt(network), Path(folder.name) / WEIGHTS)
        return call(network)

    programs: dict[str, Callable[[], Call]] = {"ours": ours, "merged": merged, "not merged": beside}
    return Case("lora-sample", programs, images=settings.images, note=_about(), keep=folder)


def lora_load_case(settings: Settings) -> Case:
    """An adapter's way into a loaded network: reading its files, adding it to the weights and taking it out again,
    which restores them; and another strength of a loaded one."""
    model = random_network(settings).eval()
    folder = _write_adapter(model)
    file = read_lora(folder.name)

    def whole() -> Call:
        loras = Loras(model)

        def call() -> None:
            loras.load("lora", read_lora(folder.name))
            loras.unload()

        return call

    def strength() -> Call:
        loras, values = Loras(copy.deepcopy(model)), [0.5]  # of its own, since the adapter stays on
        loras.load("lora", file)

        def call() -> None:
            loras.set_strength("lora", values[0])
            values[0] = 1.5 - values[0]

        return call

    programs = {
        "ours": whole,
        "another strength": strength,
        "reading the files": lambda: lambda: read_lora(folder.name),
    }
    note = f"{_about()}, {len(file.changes)} layers; ours: load and unload"
    return Case("lora-load", programs, bytes=_changed_bytes(model, file), note=note, keep=folder)


def _changed_bytes(model: PixArt, file: LoraFile) -> int:
    """Of the weights that an adapter changes, which are read and written."""
    changed = {place.name for place in file.changes}
    return 2 * sum(p.numel() * p.element_size() for name, p in model.named_parameters() if name in changed)


def _about() -> str:
    return f"rank {LORA.options['rank']} of attention and feed-forward layers"


def _ready(network: PixArt) -> PixArt:
    use_onednn(network.eval())
    return network


def _adapt(network: PixArt) -> Adapter:
    """A LoRA on a network, in its precision and on its device, frozen."""
    return adapt(network, LORA).to(network.x_embedder.proj.weight).eval().requires_grad_(False)


def _write_adapter(model: PixArt) -> tempfile.TemporaryDirectory:
    """A folder with a random LoRA for the network; the network stays as it is."""
    folder = tempfile.TemporaryDirectory()
    adapter = _adapt(twin_of(model))
    generator = torch.Generator(model.x_embedder.proj.weight.device).manual_seed(2)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.normal_(std=0.02, generator=generator)
    card = ModelCard(model=model.config, vae=AutoencoderConfig("kl", "random"))
    save_adapter(Path(folder.name), adapter.state_dict(), LORA, card, "random", mark_base(model))
    return folder
