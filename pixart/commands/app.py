"""A page in the browser: draw, compare models, watch runs.

It listens on this machine only, needs no internet access, and reads no file but those named here. A run is shown with
each of its checkpoints, and its curves and samples in the tab "Training", also while it trains. Each adapter that is
named gets a slider for its strength.

examples:
    pixart app runs/openmoji
    pixart app runs/a runs/b --port 8000
    pixart app MODEL --lora style.safetensors:0.8 --lora runs/subject
    pixart app PixArt-alpha/PixArt-Sigma-XL-2-1024-MS --device cuda --dtype bfloat16 --low-memory
    pixart app MODEL --host 0.0.0.0 --password-file password.txt --max-images 4
"""

import argparse

from pixart import cli

KEEPS_MEMORY = True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("models", nargs="+", metavar="MODEL", help="run or model folder; released model: file, folder or Hub id")
    cli.add_lora(parser, "an adapter that may be put on the models, at first with strength X; may be repeated")
    add("--host", default="127.0.0.1", metavar="NAME", help="address to listen on (default: 127.0.0.1, this machine)")
    add("--port", type=int, default=7860, metavar="N", help="0: any that is free (default: 7860)")
    add("--password-file", metavar="FILE", help="its first line is asked for")
    add("--max-pixels", type=int, default=1 << 22, metavar="N", help="of one image (default: 4194304, 2048 × 2048)")
    add("--max-images", type=int, default=16, metavar="N", help="of one request and model (default: 16)")
    add("--device", action="append", help="one worker each, may be repeated (default: a GPU if there is one)")
    add("--dtype", default="float32", choices=["float32", "bfloat16", "float16"], help="(default: float32)")
    add("--vae", help="another one: folder, file or Hub id")
    add("--text-encoder", help="another one: folder or Hub id")
    add("--low-memory", action="store_true", help="move the text encoder off the GPU when idle; decode in tiles")
    add("--quantize-text", choices=["8bit", "4bit"], help="load the text encoder quantized (CUDA)")
    cli.add_extension(parser)
    cli.add_no_onednn(parser)


def main(arguments: argparse.Namespace) -> None:
    import torch

    from pixart import use_onednn
    from pixart.app.models import Models, Options, Shelf
    from pixart.app.server import Address, read_password, serve
    from pixart.app.settings import Limits
    from pixart.errors import InputError

    a = arguments
    if a.max_pixels < 1 or a.max_images < 1:
        raise InputError(f"got --max-pixels {a.max_pixels} and --max-images {a.max_images}, expected at least 1")
    password = None if a.password_file is None else read_password(a.password_file)
    options = Options(
        dtype=getattr(torch, a.dtype),
        text_encoder=a.text_encoder,
        vae=a.vae,
        low_memory=a.low_memory,
        quantize_text=a.quantize_text,
        extensions=tuple(a.extension),
        prepare=use_onednn if a.onednn else lambda network: None,
    )
    models = Models(a.models, a.lora)
    shelves = [Shelf(models, cli.name_device(device), options) for device in a.device or [None]]
    serve(models, shelves, Address(a.host, a.port, password), Limits(a.max_pixels, a.max_images))
