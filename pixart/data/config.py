"""Settings of a run's data."""

import math
from dataclasses import dataclass, field
from typing import Literal

from pixart.config import setting
from pixart.errors import InputError


@dataclass(frozen=True)
class DataConfig:
    # or one file: a .json list, a .tar shard, a .parquet, one .txt of a SAM partition; "" where `train` is given data
    folder: str = setting("", path=True, resume="free")
    # a feature store: `scripts/extract.py` makes it of `folder`, training then reads it and nothing of `folder`
    features: str | None = setting(None, path=True, resume="free")
    # further stores → how often an epoch shows each, 1 is once
    mix: dict[str, float] = setting(factory=dict, path=True)
    format: str = "auto"  # a key of SOURCES; auto goes by the files that are there
    # caption field, or path of a .jsonl of scripts/caption.py → how often it is taken; empty is the first of text,
    # caption, captions, prompt that there is
    captions: dict[str, float] = field(default_factory=dict)
    conditions: dict[str, str] = field(default_factory=dict)  # keyword of the network → array, see `pixart.data.arrays`
    targets: dict[str, str] = field(default_factory=dict)  # name for the objective → array
    # how samples draw their random numbers: each by its name, or all in one order, which depends on what else is drawn.
    # null is by_name, but in a run begun before this setting in_order, as it began
    draws: Literal["by_name", "in_order"] | None = None
    # where the paths of an official list start; by the official rule if it is not told
    images: str | None = setting(None, path=True)
    prepare: Literal["openmoji"] | None = None  # make the folder's content, if it is not there yet
    resolution: int = 256  # side in pixels of the square bucket
    aspect_ratios: bool = False  # all of the table's buckets, not the square one alone
    buckets: tuple[tuple[int, int], ...] = ()  # a table of one's own instead: (height, width) in pixels
    every: int = 1  # train on every n-th image, in the order of their ids
    validation: float = 0.0  # share of the images held out for validation; at least one image, unless it is 0
    # held-out images of their own instead: a source as `folder` is, and with `features` the store that was made of it
    validation_folder: str | None = setting(None, path=True, resume="free")
    validation_features: str | None = setting(None, path=True, resume="free")
    # what the held-out share, and the times and noise of validation, are drawn from, whatever `seed` is. null is 0, but
    # in a run begun before this setting its `seed`, which decided it then
    split_seed: int | None = None
    flip: bool = False
    posterior: Literal["sample", "mean"] = "sample"  # what training takes of the autoencoder's posterior
    random_crop: bool = False
    max_crop: float = 0.5  # leave out images that would lose more of their area to the crop
    leftovers: Literal["drop", "fill"] = "drop"  # the last images of a bucket that do not fill a batch
    # processes that read images; 0 reads in the training process
    workers: int = setting(2, resume="quiet", compare="quiet")
    cache: bool = setting(False, resume="quiet", compare="quiet")  # keep decoded images in memory
    text_dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"  # of stored caption states

    def __post_init__(self):
        if bad := [name for name, weight in self.captions.items() if not 0 <= weight < math.inf]:
            raise InputError(f"data.captions: {bad[0]} has the weight {self.captions[bad[0]]}, expected 0 or more")
        if self.captions and not any(self.captions.values()):
            raise InputError("data.captions: all weights are 0, so no caption would ever be taken")
        if not 0 <= self.validation < 1:
            raise InputError(f"data.validation: got {self.validation}, expected a share from 0 to below 1")
        if self.validation and (other := self.validation_folder or self.validation_features):
            raise InputError(
                f"data.validation holds out a share of the images, and {other} is to be held out too; leave one of the "
                "two out"
            )
        if self.validation_features and not (self.features or self.mix):
            raise InputError(
                "data.validation_features is read only with data.features; with data.folder give data.validation_folder"
            )
        if self.buckets and self.aspect_ratios:
            raise InputError("data.buckets is a table of its own; leave data.aspect_ratios out")

    @property
    def holds_out(self) -> bool:
        """Whether there is anything to validate on."""
        return bool(self.validation or self.validation_folder or self.validation_features)
