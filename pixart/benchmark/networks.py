"""Random networks, ours and diffusers', which share their weights in memory."""

from collections.abc import Callable
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor, nn

from pixart.benchmark.measure import Call, Settings
from pixart.checkpoint.keys import to_diffusers
from pixart.cpu import use_onednn
from pixart.encoders.vae import AutoencoderKL, VaeAutoencoder, VaeConfig
from pixart.errors import missing_extra
from pixart.model import PixArt, PixArtConfig

PIXELS = 8  # pixels per latent element, per side
# torch.compile's modes for diffusers' network
MODES = {"diffusers-max-autotune": "max-autotune", "diffusers-reduce-overhead": "reduce-overhead"}


def diffusers_or_none():
    """The package, if it is installed."""
    try:
        import diffusers
    except ImportError:
        return None
    return diffusers


def need_diffusers():
    if (diffusers := diffusers_or_none()) is None:
        raise missing_extra("diffusers", "test", "a comparison with diffusers")
    return diffusers


def randomise(module: nn.Module) -> nn.Module:
    """Fill a module's weights with small random numbers, without zeros, which trained weights do not have either."""
    generator = torch.Generator(next(module.parameters()).device).manual_seed(0)
    with torch.no_grad():
        for tensor in (*module.parameters(), *module.buffers()):
            tensor.normal_(std=0.02, generator=generator)
    return module


def random_network(settings: Settings, config: PixArtConfig | None = None) -> PixArt:
    with torch.device("meta"):
        model = PixArt(config or PixArtConfig.from_preset(settings.preset))
    return randomise(model.to(settings.torch_dtype).to_empty(device=settings.device))


def network_in_diffusers(model: PixArt, *, fused: bool = False, mode: str | None = None) -> nn.Module:
    """diffusers' network with our model's tensors, which are shared, not copied; `fused` merges its projections, which
    copies them. `mode` is torch.compile's.
    """
    diffusers = need_diffusers()
    c, weight = model.config, model.x_embedder.proj.weight
    with torch.device("meta"):
        network = diffusers.PixArtTransformer2DModel(
            num_attention_heads=c.num_heads,
            attention_head_dim=c.hidden_size // c.num_heads,
            in_channels=c.in_channels,
            out_channels=c.out_channels,
            num_layers=c.depth,
            patch_size=c.patch_size,
            cross_attention_dim=c.hidden_size,
            sample_size=c.latent_size,
            caption_channels=c.caption_channels,
            interpolation_scale=c.position_scale,
            use_additional_conditions=c.micro_conditions,
        )
    network.pos_embed = diffusers.models.embeddings.PatchEmbed(  # built here because its position table is in no file
        height=c.latent_size,
        width=c.latent_size,
        patch_size=c.patch_size,
        in_channels=c.in_channels,
        embed_dim=c.hidden_size,
        interpolation_scale=c.position_scale,
    ).to(weight)
    state = to_diffusers(model.state_dict(), c.depth, micro_conditions=c.micro_conditions)
    network.load_state_dict(state, strict=True, assign=True)
    if fused:
        network.fuse_qkv_projections()
    network.requires_grad_(True)
    if mode is not None:
        network.compile(mode=mode, dynamic=False)
    return network


def twin_of(model: PixArt, compiled: Literal["blocks", "graph"] | None = None) -> PixArt:
    """A second model with the same tensors and torch's products; its blocks compiled, or the whole as a CUDA graph. The
    first model is unchanged."""
    with torch.device("meta"):
        twin = PixArt(replace(model.config, caption_length=len(model.y_embedder.y_embedding)))
    twin.load_state_dict(model.state_dict(), strict=True, assign=True)
    if compiled == "blocks":
        twin.compile_blocks(dynamic=False)
    elif compiled == "graph":
        twin.compile(mode="reduce-overhead", dynamic=False, fullgraph=True)
    return twin.train(model.training).requires_grad_(True)


def network_programs(
    settings: Settings, model: PixArt, ours: Callable[[PixArt], Call], theirs: Callable[..., Call]
) -> dict[str, Callable[[], Call]]:
    """Programs of `ours(network)`, with the network as in our commands, and of `theirs(fused, mode)`. Compiled programs
    are included on CUDA; they, and "ours-torch" with torch's own products, also if asked for by name."""
    use_onednn(model)

    def wanted(name: str) -> bool:
        return settings.cuda or name in settings.programs

    programs: dict[str, Callable[[], Call]] = {"ours": lambda: ours(model)}
    if "ours-torch" in settings.programs:
        programs["ours-torch"] = lambda: ours(twin_of(model))
    if wanted("ours-compiled"):
        programs["ours-compiled"] = lambda: ours(twin_of(model, "blocks"))
    if wanted("ours-reduce-overhead"):
        programs["ours-reduce-overhead"] = lambda: ours(twin_of(model, "graph"))
    if diffusers_or_none() is not None:
        programs.update({"diffusers": theirs, "diffusers-fused": lambda: theirs(fused=True)})
        chosen = {name: mode for name, mode in MODES.items() if wanted(name)}
        programs.update({name: lambda mode=mode: theirs(mode=mode) for name, mode in chosen.items()})
    return programs


def network_inputs(model: PixArt, settings: Settings) -> dict[str, Tensor]:
    """A batch of noisy latents with captions of full length."""
    generator = torch.Generator().manual_seed(1)
    batch, c = settings.images, model.config

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(settings.device, settings.torch_dtype)

    inputs = {
        "x": random(batch, c.in_channels, settings.height // PIXELS, settings.width // PIXELS),
        "t": torch.linspace(100, 900, batch, device=settings.device),
        "caption": random(batch, settings.tokens, c.caption_channels),
        "caption_mask": torch.ones(batch, settings.tokens, dtype=torch.bool, device=settings.device),
    }
    if c.micro_conditions:
        size = torch.tensor([settings.height, settings.width], dtype=torch.float32, device=settings.device)
        inputs["size"] = size.expand(batch, 2)
        inputs["aspect_ratio"] = (size[0] / size[1]).expand(batch)
    return inputs


def call_diffusers(network: nn.Module, x, t, caption, caption_mask=None, size=None, aspect_ratio=None) -> Tensor:
    """Call diffusers' network with our arguments."""
    conditions = {"resolution": size, "aspect_ratio": None if aspect_ratio is None else aspect_ratio[:, None]}
    return network(
        x,
        encoder_hidden_states=caption,
        timestep=t,
        encoder_attention_mask=caption_mask,
        added_cond_kwargs=conditions,
        return_dict=False,
    )[0]


def random_vae(settings: Settings) -> VaeAutoencoder:
    """Stable Diffusion's autoencoder with random weights."""
    with torch.device("meta"):
        model = AutoencoderKL(VaeConfig())
    return VaeAutoencoder(randomise(model.to(settings.torch_dtype).to_empty(device=settings.device)))


def vae_in_diffusers(vae: VaeAutoencoder) -> nn.Module:
    c = vae.model.config
    with torch.device("meta"):
        model = need_diffusers().AutoencoderKL(
            block_out_channels=c.block_out_channels,
            layers_per_block=c.layers_per_block,
            norm_num_groups=c.norm_num_groups,
            latent_channels=c.latent_channels,
            scaling_factor=c.scaling_factor,
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
        )
    model.load_state_dict(vae.model.state_dict(), strict=True, assign=True)
    return model.eval().requires_grad_(False)


def native(settings: Settings) -> PixArtConfig:
    """The preset with the measured size as its native size, if that is square: diffusers then uses stored positions."""
    config = PixArtConfig.from_preset(settings.preset)
    if settings.height != settings.width:
        return config
    return replace(config, latent_size=settings.height // PIXELS)
