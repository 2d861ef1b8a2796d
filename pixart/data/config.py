"""Settings of a run's data."""

from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True)
class DataConfig:
    folder: str  # of the pictures and their captions; see `pixart.data.sources`
    # a feature store: `scripts/extract.py` makes it of `folder`, training then reads it and nothing of `folder`
    features: str | None = None
    mix: dict[str, float] = field(default_factory=dict)  # further stores → how often an epoch shows each, 1 is once
    prepare: Literal["openmoji"] | None = None  # make the folder's content, if it is not there yet
    resolution: int = 256  # side in pixels of the square bucket
    aspect_ratios: bool = False  # all of the table's buckets, not the square one alone
    every: int = 1  # train on every n-th image, in the order of their ids
    validation: float = 0.0  # share of the images held out for the validation loss
    flip: bool = False
    posterior: Literal["sample", "mean"] = "sample"  # what training takes of the autoencoder's posterior
    random_crop: bool = False
    max_crop: float = 0.5  # leave out images that would lose more of their area to the crop
    leftovers: Literal["drop", "fill"] = "drop"  # the last images of a bucket that do not fill a batch
    workers: int = 2  # processes that read images; 0 reads in the training process
    cache: bool = False  # keep decoded images in memory
    text_dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"  # of stored caption states
