"""The cases that can be measured, by name. All programs of a case do the same work on the same weights and inputs."""

import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from pixart.benchmark.attention import attention_case, cross_case
from pixart.benchmark.beside import beside_case
from pixart.benchmark.lora import lora_case, lora_load_case, lora_sample_case
from pixart.benchmark.measure import Call, Case, Settings
from pixart.benchmark.networks import (
    PIXELS,
    call_diffusers,
    diffusers_or_none,
    native,
    need_diffusers,
    network_in_diffusers,
    network_inputs,
    network_programs,
    random_network,
    random_vae,
    vae_in_diffusers,
)
from pixart.benchmark.page import page_case, page_of_pixels_case
from pixart.benchmark.sampling import lcm_case, pipeline_case, sample_case, text_case
from pixart.benchmark.training import optimizer_case, train_case
from pixart.checkpoint import ModelCard
from pixart.checkpoint.load import load_model
from pixart.checkpoint.locate import locate
from pixart.checkpoint.save import save
from pixart.encoders.autoencoder import AutoencoderConfig
from pixart.model import PixArt


def forward_case(settings: Settings) -> Case:
    model = random_network(settings, native(settings)).eval()
    inputs = network_inputs(model, settings)

    def inference(network: Callable[..., object], _module: nn.Module) -> Call:
        return torch.no_grad()(lambda: network(**inputs))

    return Case("forward", _network_programs(model, settings, inference), images=settings.images)


def backward_case(settings: Settings) -> Case:
    """A forward and backward; the gradients of all weights are computed and then freed."""
    model = random_network(settings, native(settings))
    inputs = network_inputs(model, settings)

    def gradients(network: Callable[..., object], module: nn.Module) -> Call:
        def call() -> None:
            network(**inputs).float().square().mean().backward()
            module.zero_grad(set_to_none=True)

        return call

    return Case("backward", _network_programs(model, settings, gradients), images=settings.images)


def _network_programs(model: PixArt, settings: Settings, use: Callable[..., Call]) -> dict[str, Callable[[], Call]]:
    """Our network and diffusers', eager and compiled; `use(function of our inputs, module)` makes the call to time."""

    def theirs(**options) -> Call:
        network = network_in_diffusers(model, **options)
        return use(lambda **inputs: call_diffusers(network, **inputs), network)

    return network_programs(settings, model, lambda network: use(network, network), theirs)


def decode_case(settings: Settings) -> Case:
    vae = random_vae(settings)
    shape = (settings.images, vae.latent_channels, settings.height // PIXELS, settings.width // PIXELS)
    latents = torch.randn(shape).to(settings.device)

    def theirs() -> Call:
        model = vae_in_diffusers(vae)
        scaled = latents.to(settings.torch_dtype) / vae.scale
        return torch.no_grad()(lambda: model.decode(scaled, return_dict=False)[0])

    return Case("decode", _vae_programs(vae, lambda v: v.decode(latents), theirs), images=settings.images)


def encode_case(settings: Settings) -> Case:
    vae = random_vae(settings)
    pixels = torch.rand(settings.images, 3, settings.height, settings.width).to(settings.device) * 2 - 1

    def theirs() -> Call:
        model = vae_in_diffusers(vae)
        given = pixels.to(settings.torch_dtype)
        return torch.no_grad()(lambda: model.encode(given).latent_dist.mode() * vae.scale)

    return Case("encode", _vae_programs(vae, lambda v: v.encode(pixels), theirs), images=settings.images)


def _vae_programs(vae, use: Callable, theirs: Callable[[], Call]) -> dict[str, Callable[[], Call]]:
    def channels_last() -> Call:
        twin = type(vae)(type(vae.model)(vae.model.config).to(vae.model.quant_conv.weight))
        twin.model.load_state_dict(vae.model.state_dict())
        twin.model.to(memory_format=torch.channels_last)
        return lambda: use(twin)

    programs = {"ours": lambda: lambda: use(vae), "ours-channels-last": channels_last}
    return programs if diffusers_or_none() is None else {**programs, "diffusers": theirs}


def load_case(settings: Settings) -> Case:
    """Loading weights from a file into a network that is ready to run, compared with reading the file's bytes."""
    source, folder = settings.source, None
    if source is None:
        folder = tempfile.TemporaryDirectory()
        source = str(Path(folder.name) / "transformer")
        vae = AutoencoderConfig("kl", "any")
        model = random_network(settings)
        save(model, ModelCard(model=model.config, vae=vae), source, "diffusers")
        del model
    found = locate(source).weights.files
    buffer = bytearray(64 << 20)

    def read() -> None:
        for path in found:
            with open(path, "rb", buffering=0) as file:
                while file.readinto(buffer):
                    pass

    programs = {"ours": lambda: lambda: load_model(source, device=settings.device), "reading the bytes": lambda: read}
    if settings.source is None and diffusers_or_none() is not None:
        network = need_diffusers().PixArtTransformer2DModel
        programs["diffusers"] = lambda: (
            lambda: network.from_pretrained(source, torch_dtype=settings.torch_dtype).to(settings.device)
        )
    size = sum(Path(path).stat().st_size for path in found)
    return Case("load", programs, bytes=size, note="warm file cache", keep=folder)


CASES: dict[str, Callable[[Settings], Case]] = {
    "forward": forward_case,
    "backward": backward_case,
    "attention": attention_case,
    "cross": cross_case,
    "optimizer": optimizer_case,
    "train": train_case,
    "lora": lora_case,
    "lora-sample": lora_sample_case,
    "lora-load": lora_load_case,
    "beside": beside_case,
    "sample": sample_case,
    "lcm": lcm_case,
    "decode": decode_case,
    "encode": encode_case,
    "text": text_case,
    "pipeline": pipeline_case,
    "page": page_case,
    "page-pixels": page_of_pixels_case,
    "load": load_case,
}
