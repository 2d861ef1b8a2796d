"""For tests of the page: a served one in a thread, and adapters' files for the tiny model."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import save_file

from pixart.app.models import Models, Options, Shelf
from pixart.app.server import Address, bind, make_app
from pixart.app.settings import Limits


@contextmanager
def served(models: Models, home: Path, limits: Limits, password: str | None = None) -> Iterator[int]:
    """The page at a port of its own, until the end of the block."""
    import uvicorn

    address = Address(port=0, password=password)
    with bind(address) as listener:
        app, pool = make_app(models, [Shelf(models, "cpu", Options())], address, limits, home)
        server = uvicorn.Server(uvicorn.Config(app, log_level="error", access_log=False))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        while not server.started:
            time.sleep(0.02)
        try:
            yield listener.getsockname()[1]
        finally:
            server.should_exit = True
            thread.join(10)
            pool.close()


def make_adapter(path: Path, width: int = 48, seed: int = 5) -> Path:
    """A LoRA file of kohya's names for both blocks' attention; it fits the tiny model, whose width is 48."""
    generator, state = torch.Generator().manual_seed(seed), {}
    for block in range(2):
        name = f"lora_unet_blocks_{block}_attn_proj"
        state[f"{name}.lora_down.weight"] = torch.randn(4, width, generator=generator)
        state[f"{name}.lora_up.weight"] = torch.randn(width, 4, generator=generator)
    path.parent.mkdir(exist_ok=True)
    save_file(state, path)
    return path
