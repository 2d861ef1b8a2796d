"""Draw images: python scripts/sample.py --model MODEL "a cat" "a dog --ar 3:4" "a house --hw 768:1024" …

Each is written as it is drawn. The same command goes on after a kill: what is there, by the same model and settings, is
not drawn again, and nothing is written over. Any number of processes may share the work: by torchrun, as a Slurm job or
array, or by --rank I --ranks N.
"""

import argparse

import torch

from pixart import Pipeline, Request, cli, use_onednn
from pixart.config import override
from pixart.inference.generate import save_samples
from pixart.model import PixArtConfig


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prompts", nargs="*", help="one image each (times --count); may end in --ar h:w or --hw h:w")
    parser.add_argument("--model", required=True, help="run or model folder; released model: file, folder or Hub id")
    for name, what in (("--prompt-file", "one prompt a line"), ("--negative", "negative prompt"), ("--vae", "another"),
                       ("--text-encoder", "another"), ("--revision", "of a Hub id"),
                       ("--image", "to start from in place of noise"),
                       ("--mask", "as large as the image: drawn anew where it is white, else kept")):  # fmt: skip
        parser.add_argument(name, help=what)
    parser.add_argument(
        "--strength", type=float, help="share of the steps that are done; by default 0.6, with a mask 1"
    )
    parser.add_argument("--null", choices=["buffer", "empty", "empty_own_mask"], help="another null caption")
    parser.add_argument("--out", default="samples", help="folder for the PNGs and the contact sheet")
    parser.add_argument("--device", default=str(cli.find_device()))
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--quantize-text", choices=["8bit", "4bit"], help="hold the text encoder so (CUDA)")
    for name, default, what in (
        ("--seed", 0, "of a prompt's first image; the next has the next"), ("--count", 1, "images of each prompt"),
        ("--height", None, "pixels"), ("--width", None, "by default the model's native size"),
        ("--batch-size", 16, "images at a time; changes no image"),
        ("--rank", None, "this process's share, from 0; by default from its environment"),
        ("--ranks", None, "number of processes")):  # fmt: skip
        parser.add_argument(name, type=int, default=default, help=what)
    parser.add_argument("--sizes", default="exact", choices=["exact", "official"], help="official: resize and crop")
    parser.add_argument("--extension", action="append", default=[], metavar="FILE", help=cli.EXTENSION)
    parser.add_argument("--set", nargs="*", default=[], metavar="key=value", help="as sampler=ddim steps=50 guidance=3")
    for name, what in (("--raw", "a run's raw weights"), ("--truncate", "cut prompts too long"), ("--low-memory",
                       "text encoder off the GPU, VAE in tiles"), ("--compile", "pays on a GPU")):  # fmt: skip
        parser.add_argument(name, action="store_true", help=what)
    parser.add_argument("--no-onednn", dest="onednn", action="store_false", help=cli.NO_ONEDNN)
    a = parser.parse_args()
    prompts = a.prompts + (cli.read_prompts(a.prompt_file) if a.prompt_file else [])
    rank, ranks = cli.find_rank(a.rank, a.ranks)
    Request("", image=a.image, strength=a.strength, mask=a.mask)  # refuses what cannot be before anything is loaded
    told, settings = cli.split_settings(a.set, PixArtConfig.__dataclass_fields__)
    pipeline = Pipeline.from_pretrained(
        a.model, text_encoder=a.text_encoder, vae=a.vae, ema=not a.raw, dtype=getattr(torch, a.dtype), device=a.device,
        revision=a.revision, overrides=told, quantize_text=a.quantize_text, save_memory=a.low_memory, compile=a.compile,
        offload_text=a.low_memory and not a.quantize_text, extensions=a.extension)  # fmt: skip
    if a.onednn:
        use_onednn(pipeline.model)
    save_samples(
        pipeline, prompts, a.out, override(pipeline.card.sample, settings), seed=a.seed, count=a.count, progress=True,
        height=a.height, width=a.width, sizes=a.sizes, negative_prompt=a.negative, null=a.null, truncate=a.truncate,
        batch_size=a.batch_size, image=a.image, strength=a.strength, mask=a.mask, rank=rank, ranks=ranks,
        say=print)  # fmt: skip
