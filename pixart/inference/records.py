"""Records in image files of what they were drawn with, and finding a folder's files by their records."""

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path

from PIL import Image

from pixart.config import to_dict
from pixart.data.decoding import UnreadableImage, open_image
from pixart.diffusion.sampling import SampleConfig
from pixart.encoders.fingerprint import autoencoder_fingerprint, fingerprint
from pixart.files import digest_text, to_json, write_png
from pixart.inference.latents import Size
from pixart.inference.pipeline import Pipeline
from pixart.inference.request import Request, strength_of
from pixart.inference.start import Source

Record = dict[str, str]  # a PNG's text chunks


def common_record(pipeline: Pipeline, config: SampleConfig, null: str | None) -> Record:
    """The part of the record that is the same for all images of one model and one set of settings; `config` must be
    resolved.

    `model` is the fingerprint of the network's weights; `parts` is a digest of everything else that is not a setting:
    the text encoder, the autoencoder, their entries in the model's card, and the precision.
    """
    record = {"sampler": config.sampler, "steps": config.steps, "guidance": config.guidance}
    for field in fields(SampleConfig):
        value = getattr(config, field.name)
        if field.name not in record and value != field.default:
            record[field.name] = value
    if null is not None:
        record["null"] = null
    if pipeline.loras.loaded:
        record["lora"] = write_loras({name: each.strength for name, each in pipeline.loras.loaded.items()})
    card, parameter = pipeline.card, next(pipeline.model.parameters())
    names = {"text": replace(card.text, model=""), "vae": replace(card.vae, source="any" if card.vae.source else "")}
    parts = {name: to_dict(names.get(name, getattr(card, name))) for name in ("model", "diffusion", "text", "vae")}
    parts["text_encoder"] = None if pipeline.text is None else fingerprint(pipeline.text.model)
    parts["autoencoder"] = autoencoder_fingerprint(pipeline.autoencoder)
    parts["dtype"] = str(parameter.dtype)
    record |= {"model": fingerprint(pipeline.model), "parts": digest_text(to_json(parts))}
    return {name: str(value) for name, value in record.items()}


def image_record(request: Request, sizes: tuple[Size, Size], source: Source | None, common: Record) -> Record:
    """The record of one image: its request, then the common part."""
    record = {"prompt": request.prompt, "seed": request.seed, "negative_prompt": request.negative}
    made, size = (f"{height}x{width}" for height, width in sizes)
    record |= {"size": size, "generated": made if made != size else None}
    if source is not None:
        record |= {"image": source.digest, "mask": source.mask_digest, "strength": float(strength_of(request))}
    return {name: str(value) for name, value in record.items() if value is not None} | common


def write_loras(strengths: Mapping[str, float]) -> str:
    """Adapters and their strengths as a record's `lora`, exactly: "style:0.8, subject:1"."""
    return ", ".join(f"{name}:{repr(float(strength)).removesuffix('.0')}" for name, strength in strengths.items())


def read_loras(text: str) -> dict[str, float]:
    """The inverse of `write_loras`; names may contain commas and colons.

    Raises:
        ValueError: it is not of that form.
    """
    found = re.findall(r"(.+?):(-?[\d.]+(?:e[-+]?\d+)?)(?:, |$)", text)
    if write_loras(strengths := {name: float(number) for name, number in found}) != text:
        raise ValueError(f"lora '{text[:80]}'")
    return strengths


class Folder:
    """The PNGs of a folder by their records, and names for new ones. No file is ever overwritten."""

    def __init__(self, path: Path):
        self.path = path
        self._with: defaultdict[frozenset, list[Path]] = defaultdict(list)
        for file in sorted(path.glob("*.png")):
            self._with[frozenset(read_record(file).items())].append(file)

    def find(self, wanted: Sequence[tuple[str, Record]]) -> list[Path | None]:
        """The file for each stem and record, no file twice: preferably one of that name, else any with this record."""
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
        """Write an image under its stem, with a number appended if that is taken; completely or not at all."""
        path, number = self.path / f"{stem}.png", 1
        while path.exists():
            number += 1
            path = self.path / f"{stem}_{number}.png"
        write_png(path, image, record, durable=False)
        return path


def read_record(path: Path) -> Record:
    """The text chunks before a PNG's pixels, which are not read; empty if the file is not an image."""
    try:
        with open_image(path) as image:
            return {key: str(value) for key, value in image.info.items() if isinstance(value, str)}
    except UnreadableImage:
        return {}
