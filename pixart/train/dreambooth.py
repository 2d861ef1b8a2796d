"""DreamBooth's prior preservation (arXiv 2208.12242, section 3.3): images of the class, drawn before training.

They are drawn by the network that training starts from, and are trained on beside the subject's images, so that the
class stays what it was.
"""

import json
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from PIL import Image

from pixart.checkpoint.init_from import start_from
from pixart.config import differences
from pixart.data.images import IMAGE_SUFFIXES
from pixart.encoders.autoencoder import Autoencoder
from pixart.encoders.fingerprint import fingerprint
from pixart.encoders.text import TextEncoder, encoder_dtype
from pixart.errors import InputError
from pixart.files import digest_text, write_png
from pixart.inference.pipeline import Pipeline
from pixart.inference.request import Request
from pixart.model.pixart import PixArt
from pixart.train.config import TrainConfig

PREFIX, RECORD = "class-", "pixart class image"  # of names; of the text in a PNG


def draw_class_images(
    config: TrainConfig, accelerator: Accelerator, autoencoder: Autoencoder, *, fresh: bool = True
) -> None:
    """Draw the class images that `data.regularization` lacks; every process draws its share.

    Image i is drawn with seed i. All images that the folder holds already count, one's own too. Each that is drawn says
    in its PNG what drew it, so that images of another network or size are not taken for this one's. A run that is not
    `fresh` and has all its images does not read `init_from`, which it no longer needs.

    Raises:
        InputError: the folder has images that were drawn of another class prompt, by another network, or otherwise.
    """
    booth, folder = config.dreambooth, Path(config.data_spec.data.regularization)
    mark = PREFIX + digest_text(booth.class_prompt)[:8]
    found = [path for path in folder.glob("**/*") if path.suffix.lower() in IMAGE_SUFFIXES]
    drawn = {path.name for path in found if path.name.startswith(PREFIX)}
    if other := sorted(name for name in drawn if not name.startswith(mark)):
        raise InputError(
            f"{folder}: {other[0]} was drawn of another prompt than dreambooth.class_prompt '{booth.class_prompt}'; "
            "name another folder as data.regularization, or remove these images"
        )
    numbers = range(max(booth.num_class_images - (len(found) - len(drawn)), 0))
    missing = [i for i in numbers if f"{mark}-{i:05d}.png" not in drawn]
    base = cache(partial(_base, config))  # loaded once, and only if it is needed
    weights = (lambda: fingerprint(base())) if fresh or missing else None
    _check_drawn([path for path in found if path.name.startswith(PREFIX)], config, weights)
    accelerator.wait_for_everyone()  # all have looked before the first is written
    if not missing:
        return
    accelerator.print(f"drawing {len(missing)} class images '{booth.class_prompt}' into {folder}")
    folder.mkdir(parents=True, exist_ok=True)
    if mine := missing[accelerator.process_index :: accelerator.num_processes]:
        _draw(config, base(), mine, folder, mark, accelerator, autoencoder)
    accelerator.wait_for_everyone()


def _check_drawn(paths: list[Path], config: TrainConfig, weights: Callable[[], str] | None) -> None:
    """Check what the drawn images of a folder say of themselves; those of earlier versions say nothing. The network is
    known by its `weights`, if they are to be compared: another name for them is none, and other weights under the same
    name are another network."""
    now = describe(config)
    for path in paths:
        with Image.open(path) as image:
            text = getattr(image, "text", {}).get(RECORD)
        if text is None:
            continue
        then = json.loads(text)
        if weights is not None and "weights" not in now:
            now["weights"] = weights()
        changed = [
            f"{key} {then[key]} → {value}" for key, value in now.items() if key != "init_from" and then[key] != value
        ]
        if changed:
            raise InputError(
                f"{path}: this class image was drawn by {then['init_from']} with other settings "
                f"({', '.join(changed)}); name another folder as data.regularization, or remove these images, which "
                "are then drawn anew"
            )


def describe(config: TrainConfig) -> dict[str, Any]:
    """What a class image depends on besides the prompt, its seed and the network's weights."""
    return {
        "init_from": config.init_from,
        "size": config.data.resolution,
        "sample": json.loads(json.dumps(differences(config.sample))),
    }


def _base(config: TrainConfig) -> PixArt:
    """The network that training starts from."""
    network = PixArt(config.model)
    start_from(network, config.init_from, diffusion=config.diffusion)
    return network


@torch.no_grad()
def _draw(
    config: TrainConfig,
    network: PixArt,
    seeds: list[int],
    folder: Path,
    mark: str,
    accelerator: Accelerator,
    autoencoder: Autoencoder,
) -> None:
    device = accelerator.device
    record = json.dumps({**describe(config), "weights": fingerprint(network)})
    network.to(device, config.train.autocast_dtype if device.type == "cuda" else torch.float32)
    text = TextEncoder.load(config.text, dtype=encoder_dtype(device), device=device)
    pipeline = Pipeline(network.eval().requires_grad_(False), config.card, autoencoder, text)
    side = config.data.resolution
    requests = (Request(config.dreambooth.class_prompt, seed, height=side, width=side) for seed in seeds)
    for seed, drawn in zip(seeds, pipeline.stream(requests, config.sample, batch_size=4), strict=True):
        write_png(folder / f"{mark}-{seed:05d}.png", drawn.image, {RECORD: record})
    text.close()
