"""Convert a model into another format.

A text encoder and a VAE that exist on this machine only are copied into the formats ours and diffusers-pipeline; the
other formats store their names. Parts that the Hub has are named by their id: --text-encoder owner/name leaves a local
copy out.

examples:
    pixart convert runs/openmoji openmoji-model --to ours
    pixart convert PixArt-XL-2-512x512.pth pixart-512 --to diffusers-pipeline
    pixart convert my-diffusers-folder model.pth --to official --dtype float16
    pixart convert runs/style style.safetensors --to kohya
    pixart convert MODEL merged --to ours --lora style.safetensors:0.8
"""

import argparse

from pixart import cli

FORMATS = ("ours", "official", "diffusers", "diffusers-pipeline")
LORA_FORMATS = ("peft", "diffusers-lora", "kohya")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("source", help="file, model, run, diffusers folder, or Hub id: owner/name[/file.pth]")
    add("target", help="a new folder; for official a new .pth or .safetensors file, for kohya .safetensors")
    add("--to", required=True, choices=(*FORMATS, *LORA_FORMATS), help="the last three are of adapters (LoRA)")
    cli.add_lora(parser, "merge an adapter into the model, with strength X")
    add("--dtype", choices=["float32", "bfloat16", "float16"], help="of the weights (default: the source's)")
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--ema", dest="ema", action="store_true", default=True, help="averaged weights (the default)")
    kind.add_argument("--raw", dest="ema", action="store_false", help="a training checkpoint's raw weights")
    add("--revision", help="of a Hub repository")
    add("--null-caption", metavar="FILE", help="with the y_embedder.y_embedding that a diffusers source lacks")
    add("--no-null-caption", action="store_true", help="leave it out of an official file")
    add("--vae", help="folder, file or Hub id (default: the model's own)")
    add("--text-encoder", help="folder or Hub id (default: the model's own)")
    add("--no-parts", action="store_true", help="do not copy text encoder and VAE into the format ours")
    cli.add_extension(parser)
    cli.add_settings(parser, "num_heads=12, which no file says")


def main(arguments: argparse.Namespace) -> None:
    from dataclasses import replace

    import torch

    from pixart.adapters.apply import Loras
    from pixart.adapters.load import load_merged
    from pixart.adapters.lora_files import read_lora
    from pixart.checkpoint.save import attach_null_caption, save
    from pixart.encoders.autoencoder import AutoencoderConfig

    a = arguments
    if a.to in LORA_FORMATS:
        _convert_lora(a)
        return
    model, card = load_merged(
        a.source,
        ema=a.ema,
        dtype=getattr(torch, a.dtype) if a.dtype else None,
        revision=a.revision,
        overrides=cli.read_settings(a.set),
        extensions=a.extension,
    )
    loras = Loras(model)  # one, so that the second adapter is compared with the base and not with the first's result
    for words in a.lora:
        source, strength = cli.split_strength(words)
        loras.load(source, read_lora(source), strength)
    if a.null_caption:
        card = attach_null_caption(model, card, a.null_caption)
    if a.vae:
        card = replace(card, vae=AutoencoderConfig("kl", a.vae, card.vae.scale))
    if a.text_encoder:
        card = replace(card, text=replace(card.text, model=a.text_encoder))
    notes = save(model, card, a.target, a.to, parts=not a.no_parts, null_caption=not a.no_null_caption)
    print(f"{a.target}: {a.to}, {sum(p.numel() for p in model.parameters()):,} parameters", *notes, sep="\n")


def _convert_lora(a: argparse.Namespace) -> None:
    from pixart.adapters.lora_files import read_lora, write_lora
    from pixart.errors import InputError

    if a.lora or a.null_caption or a.no_null_caption or a.vae or a.text_encoder or a.dtype:
        raise InputError(f"--to {a.to} writes an adapter alone; it takes no --lora, --dtype, --vae or other parts")
    lora = read_lora(a.source, ema=a.ema)
    write_lora(lora, a.target, a.to)
    print(f"{a.target}: {a.to}, {len(lora.modules)} layers, read as {lora.format}")
