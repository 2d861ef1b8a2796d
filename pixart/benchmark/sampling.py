"""Cases of sampling: the sampling loop, the text encoder, the whole pipeline; against diffusers' pipeline."""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from pixart.benchmark.measure import Call, Case, Settings
from pixart.benchmark.networks import (
    PIXELS,
    native,
    need_diffusers,
    network_in_diffusers,
    network_programs,
    random_network,
    random_vae,
    randomise,
    vae_in_diffusers,
)
from pixart.checkpoint import ModelCard
from pixart.diffusion.sampling import GUIDANCE, SampleConfig
from pixart.encoders.autoencoder import AutoencoderConfig, IdentityAutoencoder
from pixart.encoders.text import TextConfig, TextEncoder
from pixart.inference.latents import sample_latents
from pixart.inference.pipeline import Pipeline
from pixart.model import PRESETS, PixArt

STEPS = 20
WORDS = 30  # words of a prompt; each is one token


def sample_case(settings: Settings) -> Case:
    """Twenty steps of DPM-Solver++ with guidance, from caption states to latents."""
    return _latents("sample", settings, SampleConfig(sampler="dpm_solver", steps=STEPS, guidance=GUIDANCE))


def lcm_case(settings: Settings) -> Case:
    """Four steps of a latent consistency model, which has guidance built into its weights."""
    return _latents("lcm", settings, SampleConfig(sampler="lcm"))


def latents_call(settings: Settings, config: SampleConfig) -> tuple[PixArt, Tensor, Callable[[PixArt], Call]]:
    """A random network, captions, and what makes a call that samples latents of them with a network of that shape."""
    model = random_network(settings, native(settings)).eval()
    model.y_embedder.y_embedding = torch.randn(  # as long as the captions, since diffusers pads both to one length
        settings.tokens, model.config.caption_channels, device=settings.device, dtype=settings.torch_dtype
    )
    card = ModelCard(model=model.config, vae=AutoencoderConfig("kl", "random"))
    captions = torch.randn(settings.images, settings.tokens, model.config.caption_channels)
    captions = captions.to(settings.device, settings.torch_dtype)
    sides = {"height": settings.height // PIXELS, "width": settings.width // PIXELS}

    def call(network: PixArt) -> Call:
        return lambda: sample_latents(network, card, list(captions), None, range(settings.images), config, **sides)

    return model, captions, call


def _latents(name: str, settings: Settings, config: SampleConfig) -> Case:
    model, captions, ours = latents_call(settings, config)

    def theirs(**options) -> Call:
        pipeline = _pipeline_in_diffusers(model, lcm=name == "lcm", **options)
        mask = torch.ones(captions.shape[:2], dtype=torch.long, device=settings.device)
        null = model.y_embedder.y_embedding.expand_as(captions)
        return lambda: pipeline(
            prompt_embeds=captions,
            prompt_attention_mask=mask,
            negative_prompt=None,
            negative_prompt_embeds=null,
            negative_prompt_attention_mask=mask,
            num_inference_steps=4 if name == "lcm" else STEPS,
            guidance_scale=1.0 if name == "lcm" else GUIDANCE,
            height=settings.height,
            width=settings.width,
            use_resolution_binning=False,
            output_type="latent",
        )

    programs = _programs(settings, model, ours, theirs)
    return Case(name, programs, images=settings.images, note=f"{settings.tokens} caption tokens, no padding")


def _programs(
    settings: Settings, model: PixArt, ours: Callable[[PixArt], Call], theirs: Callable[..., Call]
) -> dict[str, Callable[[], Call]]:
    programs, c = network_programs(settings, model, ours, theirs), model.config
    if c.micro_conditions and c.latent_size != PRESETS["alpha-1024"].latent_size:
        # diffusers would not pass the size
        return {name: program for name, program in programs.items() if "diffusers" not in name}
    return programs


def _pipeline_in_diffusers(model: PixArt, *, lcm: bool = False, vae=None, text=None, **network):
    """diffusers' pipeline with our parts; `network` are options of `network_in_diffusers`."""
    diffusers = need_diffusers()
    beta = {"beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear"}
    scheduler = diffusers.LCMScheduler(**beta) if lcm else diffusers.DPMSolverMultistepScheduler(**beta)
    pipeline = diffusers.PixArtAlphaPipeline(
        tokenizer=None if text is None else text.tokenizer,
        text_encoder=None if text is None else text.model,
        vae=vae,
        transformer=network_in_diffusers(model, **network).eval().requires_grad_(False),
        scheduler=scheduler,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def random_text_encoder(settings: Settings) -> TextEncoder:
    """A T5 with random weights, and a tokenizer with the words w0 … w99."""
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    words = {word: i for i, word in enumerate(["<pad>", "</s>", "<unk>", *(f"w{i}" for i in range(100))])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )
    width = settings.text_width
    shape = transformers.T5Config(
        vocab_size=len(words),
        d_model=width,
        d_kv=64,
        num_heads=max(width // 64, 1),
        d_ff=width * 5 // 2,
        num_layers=settings.text_layers,
        feed_forward_proj="gated-gelu",
    )
    model = randomise(transformers.T5EncoderModel(shape).to(settings.device, settings.torch_dtype))
    return TextEncoder(tokenizer, model, TextConfig(model="random", length=120, clean=False))


def make_prompts(settings: Settings) -> list[str]:
    return [" ".join(f"w{(7 * i + j) % 100}" for j in range(WORDS)) for i in range(settings.images)]


def text_case(settings: Settings) -> Case:
    """Text encoding of prompts of thirty words: at their length, and padded to 120 tokens as in diffusers."""
    text, prompts = random_text_encoder(settings), make_prompts(settings)

    def padded() -> tuple[Tensor, Tensor]:
        return text.encode(prompts, padding="max_length")

    note = f"T5 of width {settings.text_width} and {settings.text_layers} layers, {WORDS} words a prompt"
    programs = {"ours": lambda: lambda: text.encode(prompts), "padded to 120": lambda: padded}
    return Case("text", programs, images=settings.images, note=note)


def random_pipeline(settings: Settings, *, pixels: bool = False) -> Pipeline:
    """A pipeline of random weights that draws in twenty guided steps; with `pixels` it has no VAE, and patches as large
    as those of a latent model."""
    text = random_text_encoder(settings)
    config = replace(native(settings), caption_channels=settings.text_width)
    if pixels:
        config = replace(
            config, in_channels=3, latent_size=settings.height, patch_size=PIXELS * config.patch_size, learn_sigma=False
        )
    model = random_network(settings, config).eval()
    card = ModelCard(
        model=config,
        vae=AutoencoderConfig() if pixels else AutoencoderConfig("kl", "random"),
        text=text.config,
        sample=SampleConfig(sampler="dpm_solver", steps=STEPS, guidance=GUIDANCE),
    )
    return Pipeline(model, card, IdentityAutoencoder() if pixels else random_vae(settings), text)


def pipeline_case(settings: Settings) -> Case:
    """From prompts to images: text encoder, twenty guided steps, decoder."""
    parts, prompts = random_pipeline(settings), make_prompts(settings)
    card, vae, text = parts.card, parts.autoencoder, parts.text
    size = {"height": settings.height, "width": settings.width}

    def ours(network: PixArt) -> Call:
        pipeline = Pipeline(network, card, vae, text)
        return lambda: pipeline(prompts, list(range(settings.images)), **size)

    def theirs(**options) -> Call:
        pipeline = _pipeline_in_diffusers(parts.model, vae=vae_in_diffusers(vae), text=text, **options)
        return lambda: pipeline(
            prompts,
            num_inference_steps=STEPS,
            guidance_scale=GUIDANCE,
            use_resolution_binning=False,
            clean_caption=False,
            **size,
        )

    programs = _programs(settings, parts.model, ours, theirs)
    return Case("pipeline", programs, images=settings.images, note=f"{WORDS} words a prompt; diffusers pads to 120")
