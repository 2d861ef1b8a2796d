"""Draw pictures: python scripts/sample.py --model MODEL "a cat" "a dog --ar 3:4" "a house --hw 768:1024" …"""

import argparse

import torch

from pixart import Pipeline, cli, use_onednn
from pixart.config import override
from pixart.inference.generate import save_samples
from pixart.model import PixArtConfig


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("prompts", nargs="*", help="one picture each (times --count); may end in --ar h:w or --hw h:w")
    parser.add_argument("--model", required=True, help="run or model folder; released model: file, folder or Hub id")
    for name, what in (("--prompt-file", "one prompt a line"), ("--negative", "negative prompt"), ("--vae", "another"),
                       ("--text-encoder", "another"), ("--revision", "of a Hub id")):  # fmt: skip
        parser.add_argument(name, help=what)
    parser.add_argument("--null", choices=["buffer", "empty", "empty_own_mask"], help="another null caption")
    parser.add_argument("--out", default="samples", help="folder for the PNGs and the contact sheet")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--quantize-text", choices=["8bit", "4bit"], help="hold the text encoder so (CUDA)")
    for name, default, what in (
        ("--seed", 0, "of a prompt's first picture; the next has the next"), ("--count", 1, "pictures of each prompt"),
        ("--height", None, "pixels"), ("--width", None, "by default the model's native size"),
        ("--batch-size", 16, "pictures at a time; changes no picture")):  # fmt: skip
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
    told, settings = cli.split_settings(a.set, PixArtConfig.__dataclass_fields__)
    pipeline = Pipeline.from_pretrained(
        a.model, text_encoder=a.text_encoder, vae=a.vae, ema=not a.raw, dtype=getattr(torch, a.dtype), device=a.device,
        revision=a.revision, overrides=told, quantize_text=a.quantize_text, save_memory=a.low_memory, compile=a.compile,
        offload_text=a.low_memory and not a.quantize_text, extensions=a.extension)  # fmt: skip
    if a.onednn:
        use_onednn(pipeline.model)
    paths = save_samples(
        pipeline, prompts, a.out, override(pipeline.card.sample, settings), seed=a.seed, count=a.count, progress=True,
        height=a.height, width=a.width, sizes=a.sizes, negative_prompt=a.negative, null=a.null, truncate=a.truncate,
        batch_size=a.batch_size)  # fmt: skip
    print(f"{len(paths)} picture{'s' * (len(paths) != 1)} and contact_sheet.png in {a.out}")
