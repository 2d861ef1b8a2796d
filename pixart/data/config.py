"""Settings of a run's data."""

from dataclasses import dataclass, field
from typing import Literal

from pixart.config import setting
from pixart.data.decoding import MAX_PIXELS
from pixart.errors import InputError
from pixart.ranges import check_numbers


@dataclass(frozen=True)
class DataConfig:
    # a folder, or one file: a .json list, a .tar shard, a .parquet, one .txt of a SAM partition; "" if `train` is
    # called with data
    folder: str = setting("", path=True, resume="free")
    # a feature store: `pixart extract` makes it from `folder`; training then reads only the store
    features: str | None = setting(None, path=True, resume="free")
    # further stores → how often an epoch shows each of them (1 is once)
    mix: dict[str, float] = setting(factory=dict, path=True, above=0)
    format: str = "auto"  # a key of SOURCES; auto recognises the format by its files
    # caption field, or path of a .jsonl written by `pixart caption` → its relative weight; empty means the first of
    # text, caption, captions, prompt that exists
    captions: dict[str, float] = setting(factory=dict, least=0)
    caption: str | None = None  # one caption for all images of `folder`, whose own captions are not read
    # further images that keep the model as it is, shown as often as those of `folder`: their source, one caption for
    # all of them in place of their own, and the weight of their loss; with `dreambooth` the folder of class images
    regularization: str | None = setting(None, path=True, resume="free")
    regularization_caption: str | None = None
    regularization_weight: float = setting(1.0, least=0)
    # give every training image the captions of another one: a control, which a comparison of runs must find to be worse
    shuffle_captions: bool = setting(False, compare="listed")
    conditions: dict[str, str] = field(default_factory=dict)  # keyword of the network → array, see `pixart.data.arrays`
    targets: dict[str, str] = field(default_factory=dict)  # name for the objective → array
    # how samples draw their random numbers: each by its name, or all in order from one generator, where each depends on
    # what else is drawn. null is by_name, except in a run that is older than this setting, which stays in_order
    draws: Literal["by_name", "in_order"] | None = None
    # folder to which the paths of an official list are relative; null follows the official rule
    images: str | None = setting(None, path=True)
    # create the folder's content if it does not exist yet
    prepare: Literal["openmoji", "openmoji_all", "compositional", "tones", "subject"] | None = None
    resolution: int = setting(256, least=1)  # side in pixels of the square bucket
    aspect_ratios: bool = False  # use all buckets of the table, not only the square one
    # your own table instead: (height, width) in pixels
    buckets: tuple[tuple[int, int], ...] = setting((), least=1)
    every: int = setting(1, least=1)  # train on every n-th image, in the order of their ids
    # share of the images held out for validation; unless it is 0, at least one image
    validation: float = setting(0.0, least=0, below=1)
    # separate held-out images instead: a source like `folder`, and with `features` a store made from it
    validation_folder: str | None = setting(None, path=True, resume="free")
    validation_features: str | None = setting(None, path=True, resume="free")
    # seed for choosing the held-out share and for the times and noise of validation, independent of `seed`. null is 0,
    # except in a run that is older than this setting, which keeps its `seed`
    split_seed: int | None = setting(None, unbounded=True)
    flip: bool = False
    posterior: Literal["sample", "mean"] = "sample"  # sample the autoencoder's posterior, or take its mean
    random_crop: bool = False
    # leave out images with more pixels; decoding takes at least 3 bytes per pixel
    max_pixels: int = setting(MAX_PIXELS, least=1, resume="free")
    max_crop: float = setting(0.5, least=0, most=1)  # leave out images that would lose more of their area to the crop
    leftovers: Literal["drop", "fill"] = "drop"  # for a bucket's last images, which do not fill a batch
    # processes that read images; 0 means in the training process
    workers: int = setting(2, resume="quiet", compare="quiet", least=0, most=1024)
    cache: bool = setting(False, resume="quiet", compare="quiet")  # keep decoded images in memory
    text_dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"  # of stored caption states

    def __post_init__(self):
        check_numbers(self, "data")
        if self.captions and not any(self.captions.values()):
            raise InputError("data.captions: all weights are 0, so no caption would ever be taken")
        if self.caption is not None and self.captions:
            raise InputError("data.caption is the caption of all images; leave data.captions out")
        if self.shuffle_captions and (self.features or self.mix or self.caption is not None):
            raise InputError(
                "data.shuffle_captions exchanges the captions of the images of data.folder; leave data.features, "
                "data.mix and data.caption out"
            )
        for name in ("caption", "regularization_caption"):
            if getattr(self, name) is not None and not getattr(self, name).strip():
                raise InputError(f"data.{name}: got an empty text; expected a caption")
        stores = self.features or self.mix
        if stores and self.regularization:
            raise InputError(
                "data.regularization is a folder of images, and data.features reads none; give a store of them as "
                "data.mix, or train from data.folder"
            )
        if self.validation and (other := self.validation_folder or self.validation_features):
            raise InputError(
                f"data.validation holds out a share of the images, but {other} is to be held out, too; leave one of "
                "the two out"
            )
        if self.validation_features and not (self.features or self.mix):
            raise InputError(
                "data.validation_features is read only with data.features; with data.folder give data.validation_folder"
            )
        if self.buckets and self.aspect_ratios:
            raise InputError("data.buckets replaces the table; leave data.aspect_ratios out")

    @property
    def holds_out(self) -> bool:
        """Whether there is anything to validate on."""
        return bool(self.validation or self.validation_folder or self.validation_features)
