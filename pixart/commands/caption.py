"""Caption images with an image-text-to-text model.

Under torchrun or in a Slurm array each process writes its share to a file of its own; `data.captions` takes all of them
by the name that --output gives. If the work was interrupted, the same command resumes it.

examples:
    pixart caption photos --output captions.jsonl
    pixart caption shards --format webdataset --output captions.jsonl --model llava-1.5-7b-hf --batch-size 32
    torchrun --nproc-per-node 8 -m pixart caption photos --output captions.jsonl
"""

import argparse

from pixart import cli

FORMATS = ("auto", "folder", "webdataset", "datasets", "official", "sam")
KEEPS_MEMORY = True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("data", nargs="+", help="as data.folder: folder, tar shards, table, official list, SAM layout")
    add("--format", default="auto", choices=FORMATS, help="of the data (default: auto)")
    add("--images", metavar="FOLDER", help="to which the paths of an official list are relative")
    add("--output", required=True, metavar="FILE", help="a .jsonl file")
    add("--model", help="folder or Hub id of an image-text-to-text model (default: LLaVA-1.5 7B)")
    add("--prompt", help="the instruction (default: the paper's)")
    add("--field", help="name of the captions (default: llava)")
    add("--max-new-tokens", type=int, metavar="N", help="of a caption (default: 256)")
    add("--batch-size", type=int, default=8, metavar="N", help="images at a time (default: 8)")
    add("--dtype", choices=["float32", "bfloat16", "float16"], help="default: bfloat16 on a GPU, float32 on a CPU")
    add("--device", help="default: a GPU if there is one")
    cli.add_share(parser)


def main(arguments: argparse.Namespace) -> None:
    import torch

    from pixart.data.captioner import CaptionConfig, write_captions
    from pixart.data.config import DataConfig

    a = arguments
    rank, ranks = cli.find_rank(a.rank, a.ranks)
    device = cli.name_device(a.device)
    given = {name: getattr(a, name) for name in ("model", "prompt", "max_new_tokens", "field")}
    report = write_captions(
        [DataConfig(folder, format=a.format, images=a.images) for folder in a.data],
        a.output,
        CaptionConfig(**{name: value for name, value in given.items() if value is not None}),
        rank=rank,
        ranks=ranks,
        batch_size=a.batch_size,
        dtype=getattr(torch, a.dtype or ("float32" if device == "cpu" else "bfloat16")),
        device=device,
    )
    print(report.describe())
