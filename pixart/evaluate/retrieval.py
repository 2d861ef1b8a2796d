"""Top-1 retrieval: how often a sample's nearest training picture is the one whose caption was given."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from pixart.contact_sheet import contact_sheet
from pixart.data.images import Record, load_image
from pixart.diffusion.sampling import SampleConfig
from pixart.errors import InputError
from pixart.files import write_json
from pixart.inference.pipeline import Pipeline


@dataclass
class Retrieval:
    top1: float
    count: int
    sheet: Path  # every training picture with its sample below; a miss has a red caption

    def __str__(self) -> str:
        return f"top-1 {100 * self.top1:.1f} % of {self.count} captions"


def retrieval(
    pipeline: Pipeline, records: list[Record], folder: Path, config: SampleConfig, *, seed: int = 0, credit: str = ""
) -> Retrieval:
    """Sample the first caption of every record, with seeds from `seed` on; writes `retrieval.png` and `.json`.

    Nearest is by Euclidean distance of 8-bit pixels, among the records' own pictures.
    """
    if len({(r.bucket.height, r.bucket.width) for r in records}) != 1:
        raise InputError("retrieval compares pixels and needs all pictures in one bucket; train on square crops")
    bucket = records[0].bucket
    captions = [record.captions[0] for record in records]
    with tqdm(total=len(captions), desc="sampling", unit="image") as bar:
        samples = pipeline(
            captions, list(range(seed, seed + len(captions))), config, height=bucket.height, width=bucket.width,
            batch_size=64, truncate=True, progress=bar.update,
        )  # fmt: skip
    originals = [Image.fromarray(load_image(record.picture, bucket)) for record in records]
    nearest = nearest_pictures(samples, originals)
    hits = [i == index for i, index in enumerate(nearest)]
    sheet = contact_sheet(
        list(zip(originals, samples, strict=True)),
        captions,
        columns=max(1, round((2.3 * len(records)) ** 0.5)),
        red=[i for i, hit in enumerate(hits) if not hit],
    )
    path = folder / "retrieval.png"
    sheet.info["Comment"] = credit
    sheet.save(path)
    result = Retrieval(sum(hits) / len(hits), len(hits), path)
    missed = {captions[i]: captions[nearest[i]] for i, hit in enumerate(hits) if not hit}
    record = {"top1": result.top1, "count": result.count, "seed": seed, "missed": missed}
    write_json(folder / "retrieval.json", record)
    return result


def nearest_pictures(samples: list[Image.Image], originals: list[Image.Image]) -> list[int]:
    """For each sample the index of the nearest original."""
    a, b = (
        torch.stack([torch.from_numpy(np.array(image)).flatten().double() for image in images])
        for images in (samples, originals)
    )
    return torch.cdist(a, b).argmin(1).tolist()
