"""Draw images from prompts.

Each image is written as soon as it is drawn. If the work was interrupted, the same command resumes it: images that the
same model drew with the same settings are not drawn again, and no file is overwritten. Any number of processes share
the work under torchrun, as a Slurm job or array, or with --rank I --ranks N.

examples:
    pixart sample --model runs/openmoji "a red apple" "a dog face"
    pixart sample --model MODEL "a cat --ar 3:4" "a house --hw 768:1024" --count 4 --set steps=30 guidance=6
    pixart sample --model MODEL "a winter evening" --image photo.png --strength 0.5
    pixart sample --model MODEL "a fox in my style" --lora style.safetensors:0.8 --lora runs/subject
    pixart sample --model MODEL "a fox" "a dog" --lora style.safetensors --strengths 0 0.5 1
    torchrun --nproc-per-node 8 -m pixart sample --model MODEL --prompt-file prompts.txt --out drawn
"""

import argparse

from pixart import cli

KEEPS_MEMORY = True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("prompts", nargs="*", metavar="PROMPT", help="may end in --ar H:W (ratio) or --hw H:W (pixels), inside quotes")
    add("--model", required=True, help="run or model folder; released model: file, folder or Hub id")
    add("--prompt-file", metavar="FILE", help="one prompt a line")
    add("--out", default="samples", metavar="FOLDER", help="for the PNGs and the contact sheet (default: samples)")
    add("--count", type=int, default=1, metavar="N", help="images of each prompt (default: 1)")
    add("--seed", type=int, default=0, metavar="N", help="of a prompt's first image, then one more each (default: 0)")
    cli.add_settings(parser, "sampler=ddim steps=50 guidance=3")
    add("--negative", metavar="PROMPT", help="negative prompt")
    add("--null", choices=["buffer", "empty", "empty_own_mask"], help="another null caption than the model's")
    add("--truncate", action="store_true", help="cut prompts that are too long")
    add("--height", type=int, metavar="N", help="pixels (default: the model's native size)")
    add("--width", type=int, metavar="N", help="pixels")
    add("--sizes", default="exact", choices=["exact", "official"], help="official: draw an official size, then crop")
    add("--image", metavar="FILE", help="start from this image instead of noise")
    add("--mask", metavar="FILE", help="of the image's size: white is drawn again, black is kept")
    add("--strength", type=float, metavar="X", help="share of the steps to do (default: 0.6, with a mask 1)")
    cli.add_lora(parser, "add an adapter, with strength X; may be repeated")
    add("--strengths", type=float, nargs="+", metavar="X", help="only a sheet: prompts × these factors of --lora")
    add("--vae", help="another one: folder, file or Hub id")
    add("--text-encoder", help="another one: folder or Hub id")
    add("--revision", help="of a Hub repository")
    add("--raw", action="store_true", help="a run's raw weights instead of the averaged ones")
    add("--device", help="default: a GPU if there is one")
    add("--dtype", default="float32", choices=["float32", "bfloat16", "float16"], help="(default: float32)")
    add("--batch-size", type=int, default=16, metavar="N", help="images at a time; changes no image (default: 16)")
    add("--low-memory", action="store_true", help="move the text encoder off the GPU when idle; decode in tiles")
    add("--quantize-text", choices=["8bit", "4bit"], help="load the text encoder quantized (CUDA)")
    add("--compile", action="store_true", help="compile the network; pays on a GPU")
    cli.add_share(parser)
    cli.add_extension(parser)
    cli.add_no_onednn(parser)


def main(arguments: argparse.Namespace) -> None:
    from pixart import Request, use_onednn
    from pixart.config import override
    from pixart.inference.generate import save_samples
    from pixart.model import PixArtConfig

    a = arguments
    prompts = a.prompts + (cli.read_prompts(a.prompt_file) if a.prompt_file else [])
    rank, ranks = cli.find_rank(a.rank, a.ranks)
    Request("", image=a.image, strength=a.strength, mask=a.mask)  # refuses bad combinations before anything is loaded
    of_network, settings = cli.split_settings(a.set, PixArtConfig.__dataclass_fields__)
    pipeline = _load(a, of_network)
    for words in a.lora:
        source, strength = cli.split_strength(words)
        pipeline.load_lora(source, strength=strength)
    if a.onednn:
        use_onednn(pipeline.model)
    if a.strengths:
        _save_sheet(a, pipeline, prompts, override(pipeline.card.sample, settings))
        return
    save_samples(
        pipeline,
        prompts,
        a.out,
        override(pipeline.card.sample, settings),
        seed=a.seed,
        count=a.count,
        progress=True,
        height=a.height,
        width=a.width,
        sizes=a.sizes,
        negative_prompt=a.negative,
        null=a.null,
        truncate=a.truncate,
        batch_size=a.batch_size,
        image=a.image,
        strength=a.strength,
        mask=a.mask,
        rank=rank,
        ranks=ranks,
        say=print,
    )


def _save_sheet(a: argparse.Namespace, pipeline, prompts: list[str], config) -> None:
    from pathlib import Path

    from pixart.errors import InputError
    from pixart.files import write_png
    from pixart.inference.strengths import strength_sheet

    path = Path(a.out) / "strengths.png"
    if path.exists():
        raise InputError(f"{path} is already there; remove it, or name another folder with --out")
    options = {"height": a.height, "width": a.width, "sizes": a.sizes, "null": a.null, "truncate": a.truncate}
    options |= {"negative_prompts": a.negative, "batch_size": a.batch_size, "config": config}
    sheet = strength_sheet(pipeline, prompts, a.strengths, a.seed, **options)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_png(path, sheet)
    print(path)


def _load(a: argparse.Namespace, of_network: dict):
    import torch

    from pixart import Pipeline

    return Pipeline.from_pretrained(
        a.model,
        text_encoder=a.text_encoder,
        vae=a.vae,
        ema=not a.raw,
        dtype=getattr(torch, a.dtype),
        device=cli.name_device(a.device),
        revision=a.revision,
        overrides=of_network,
        quantize_text=a.quantize_text,
        save_memory=a.low_memory,
        compile=a.compile,
        offload_text=a.low_memory and not a.quantize_text,
        extensions=a.extension,
    )
