"""Draw pictures: python scripts/sample.py --model MODEL "prompt" … MODEL is a model folder or a run."""

import argparse

import torch

from pixart import cli
from pixart.config import override
from pixart.pipeline import Pipeline, save_samples


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("prompts", nargs="*", help="one picture each (times --count)")
    parser.add_argument("--model", required=True, help="model folder, or a run: its newest good checkpoint")
    parser.add_argument("--prompt-file", help="file with one prompt a line")
    parser.add_argument("--out", default="samples", help="folder for the PNGs and the contact sheet")
    parser.add_argument("--seed", type=int, default=0, help="of the first picture of a prompt; the next has the next")
    parser.add_argument("--count", type=int, default=1, help="pictures of each prompt")
    parser.add_argument("--raw", action="store_true", help="raw weights of a run, not the averaged ones")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--height", type=int, help="pixels; the model's native size by default")
    parser.add_argument("--width", type=int)
    parser.add_argument("--batch-size", type=int, default=16, help="pictures at a time; changes no picture")
    parser.add_argument("--truncate", action="store_true", help="cut prompts that are too long")
    parser.add_argument("--set", nargs="*", default=[], metavar="key=value", help="as sampler=ddim steps=50 guidance=3")
    a = parser.parse_args()
    prompts = a.prompts + (cli.read_prompts(a.prompt_file) if a.prompt_file else [])
    pipeline = Pipeline.from_pretrained(a.model, ema=not a.raw, dtype=getattr(torch, a.dtype), device=a.device)
    paths = save_samples(
        pipeline, prompts, a.out, override(pipeline.card.sample, a.set), seed=a.seed, count=a.count,
        height=a.height, width=a.width, batch_size=a.batch_size, truncate=a.truncate,
    )  # fmt: skip
    print(f"{len(paths)} picture{'s' * (len(paths) != 1)} and contact_sheet.png in {a.out}")


if __name__ == "__main__":
    cli.run(main)
