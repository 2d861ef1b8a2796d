"""What an image file says it was drawn with, and which files of a folder say what."""

import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from pixart.config import to_dict
from pixart.data.images import UNREADABLE
from pixart.diffusion.sampling import SampleConfig
from pixart.encoders.fingerprint import autoencoder_fingerprint, fingerprint
from pixart.files import digest_text, to_json, write_file
from pixart.inference.latents import Size
from pixart.inference.pipeline import Pipeline
from pixart.inference.request import Request, strength_of
from pixart.inference.start import Source

Record = dict[str, str]  # a PNG's text chunks


def common_record(pipeline: Pipeline, config: SampleConfig, null: str | None) -> Record:
    """What images of one model and one set of settings have in common; `config` is resolved.

    `model` is the fingerprint of the network's weights, `parts` a digest of all else that is not a setting: the text
    encoder, the autoencoder, what the model's card says of them, and the precision.
    """
    record = {"sampler": config.sampler, "steps": config.steps, "guidance": config.guidance}
    for field in fields(SampleConfig):
        value = getattr(config, field.name)
        if field.name not in record and value != field.default:
            record[field.name] = value
    if null is not None:
        record["null"] = null
    card, parameter = pipeline.card, next(pipeline.model.parameters())
    names = {"text": replace(card.text, model=""), "vae": replace(card.vae, source="any" if card.vae.source else "")}
    parts = {name: to_dict(names.get(name, getattr(card, name))) for name in ("model", "diffusion", "text", "vae")}
    parts["text_encoder"] = None if pipeline.text is None else fingerprint(pipeline.text.model)
    parts["autoencoder"] = autoencoder_fingerprint(pipeline.autoencoder)
    parts["dtype"] = str(parameter.dtype)
    record |= {"model": fingerprint(pipeline.model), "parts": digest_text(to_json(parts))}
    return {name: str(value) for name, value in record.items()}


def image_record(request: Request, sizes: tuple[Size, Size], source: Source | None, common: Record) -> Record:
    """The record of one image: its request, then what it has in common with others."""
    record = {"prompt": request.prompt, "seed": request.seed, "negative_prompt": request.negative}
    made, size = (f"{height}x{width}" for height, width in sizes)
    record |= {"size": size, "generated": made if made != size else None}
    if source is not None:
        record |= {"image": source.digest, "mask": source.mask_digest, "strength": float(strength_of(request))}
    return {name: str(value) for name, value in record.items() if value is not None} | common


class Folder:
    """The PNGs of a folder by what they say they hold, and names for new ones. Nothing is ever written over."""

    def __init__(self, path: Path):
        self.path = path
        self._with: defaultdict[frozenset, list[Path]] = defaultdict(list)
        for file in sorted(path.glob("*.png")):
            self._with[frozenset(read_record(file).items())].append(file)

    def find(self, wanted: Sequence[tuple[str, Record]]) -> list[Path | None]:
        """The file of each stem and record, no file twice: one of that name first, else any that says the same."""
        free = {key: list(files) for key, files in self._with.items()}
        keys = [frozenset(record.items()) for _, record in wanted]
        found: list[Path | None] = [None] * len(wanted)
        for by_name in (True, False):
            for i, (stem, _) in enumerate(wanted):
                if found[i] is None:
                    files = free.get(keys[i], [])
                    if by_name:
                        files = [file for file in files if re.fullmatch(rf"{re.escape(stem)}(_\d+)?", file.stem)]
                    if files:
                        found[i] = files[0]
                        free[keys[i]].remove(files[0])
        return found

    def write(self, stem: str, image: Image.Image, record: Record) -> Path:
        """An image under its stem, or if that is taken with a number behind it; whole or not at all."""
        info = PngInfo()
        for key, value in record.items():
            info.add_itxt(key, value)
        path, number = self.path / f"{stem}.png", 1
        while path.exists():
            number += 1
            path = self.path / f"{stem}_{number}.png"
        write_file(path, lambda partial: image.save(partial, format="PNG", pnginfo=info), durable=False)
        return path


def read_record(path: Path) -> Record:
    """The text chunks that stand before a PNG's pixels, which are not read; none if it is no image."""
    try:
        with Image.open(path) as image:
            return {key: str(value) for key, value in image.info.items() if isinstance(value, str)}
    except UNREADABLE:
        return {}
