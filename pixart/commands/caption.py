"""Caption pictures: python scripts/caption.py DATA … --output captions.jsonl. The same command goes on after a kill.

Under torchrun or in a Slurm array each process takes its share; data.captions then takes the file by its name.
"""

import argparse
import os

import torch

from pixart import cli
from pixart.data.captioner import CaptionConfig, write_captions
from pixart.data.config import DataConfig
from pixart.data.sources import SOURCES


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", nargs="+", help="as data.folder: folder, tar shards, table, official list, SAM layout")
    parser.add_argument("--format", default="auto", choices=("auto", *SOURCES), help="of the data")
    parser.add_argument("--images", help="where the paths of an official list start")
    parser.add_argument("--output", required=True, help="a .jsonl file")
    parser.add_argument("--model", default=CaptionConfig.model, help="folder or Hub id: any image-text-to-text model")
    parser.add_argument("--prompt", default=CaptionConfig.prompt)
    parser.add_argument("--field", default=CaptionConfig.field, help="name of the captions")
    parser.add_argument("--max-new-tokens", type=int, default=CaptionConfig.max_new_tokens)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], help="bfloat16 on a GPU")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rank", type=int, help="of this process, from 0 on; torchrun's or Slurm's by default")
    parser.add_argument("--ranks", type=int, help="how many processes there are")
    a = parser.parse_args()
    rank, ranks = cli.find_rank(a.rank, a.ranks)
    device = f"cuda:{os.environ['LOCAL_RANK']}" if a.device == "cuda" and "LOCAL_RANK" in os.environ else a.device
    dtype = getattr(torch, a.dtype or ("float32" if a.device == "cpu" else "bfloat16"))
    config = CaptionConfig(a.model, a.prompt, a.max_new_tokens, a.field)
    sources = [DataConfig(folder, format=a.format, images=a.images) for folder in a.data]
    report = write_captions(
        sources, a.output, config, rank=rank, ranks=ranks, batch_size=a.batch_size, dtype=dtype, device=device
    )
    print(report.describe())
