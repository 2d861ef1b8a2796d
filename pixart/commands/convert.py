"""Convert a PixArt: python scripts/convert.py SOURCE TARGET --to ours|official|diffusers|diffusers-pipeline

A text encoder and a VAE that are on this machine alone are copied into ours and diffusers-pipeline; other formats say
their names. What the Hub has is named by its id: --text-encoder owner/name leaves a local copy out.
"""

import argparse
from dataclasses import replace

import torch

from pixart import cli
from pixart.checkpoint.load import load_with_card
from pixart.checkpoint.save import FORMATS, attach_null_caption, save
from pixart.encoders.autoencoder import AutoencoderConfig


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="file, model, run, diffusers folder, or Hub id: owner/name[/file.pth]")
    parser.add_argument("target", help="a new folder; a new .pth file for official")
    parser.add_argument("--to", required=True, choices=FORMATS)
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], help="of the weights; the source's own")
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--ema", dest="ema", action="store_true", default=True, help="averaged weights (the default)")
    kind.add_argument("--raw", dest="ema", action="store_false", help="raw weights of a training checkpoint")
    parser.add_argument("--revision", help="of a Hub repository")
    parser.add_argument("--null-caption", help="file with the y_embedder.y_embedding that a diffusers source lacks")
    parser.add_argument("--vae", help="folder, file or Hub id; the model's own by default")
    parser.add_argument("--text-encoder", help="folder or Hub id; the model's own by default")
    parser.add_argument("--no-parts", action="store_true", help="leave local text encoder and VAE out of ours")
    parser.add_argument("--extension", action="append", default=[], metavar="FILE", help=cli.EXTENSION)
    parser.add_argument("--set", nargs="*", default=[], metavar="key=value", help="what no file tells: num_heads=12")
    a = parser.parse_args()
    model, card = load_with_card(
        a.source, ema=a.ema, dtype=getattr(torch, a.dtype) if a.dtype else None, revision=a.revision,
        overrides=cli.read_settings(a.set), extensions=a.extension,
    )  # fmt: skip
    if a.null_caption:
        card = attach_null_caption(model, card, a.null_caption)
    if a.vae:
        card = replace(card, vae=AutoencoderConfig("kl", a.vae, card.vae.scale))
    if a.text_encoder:
        card = replace(card, text=replace(card.text, model=a.text_encoder))
    notes = save(model, card, a.target, a.to, parts=not a.no_parts)
    print(f"{a.target}: {a.to}, {sum(p.numel() for p in model.parameters()):,} parameters", *notes, sep="\n")
