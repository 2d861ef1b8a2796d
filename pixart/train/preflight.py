"""Preflight checks: everything that a run reads is looked for before any work, so that a typo shows at once, not after
an hour of encoding."""

import copy
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from pixart.adapters.adapter import adapt
from pixart.checkpoint.files import checkpoints
from pixart.checkpoint.init_from import start_from
from pixart.data.arrays import ARRAYS
from pixart.data.config import DataConfig
from pixart.data.given import needs_text
from pixart.data.prepare import will_be_made
from pixart.data.sources import SOURCES
from pixart.diffusion.objective import GIVEN, OBJECTIVES
from pixart.diffusion.sampling import resolve
from pixart.diffusion.schedule import make_schedule
from pixart.encoders.caption_cleaning import clean_caption
from pixart.encoders.text import TextConfig, load_tokenizer
from pixart.encoders.vae_files import CONFIG, find_weights, read_settings
from pixart.errors import InputError
from pixart.features.official import is_official
from pixart.features.store import read_manifest
from pixart.invocation import command
from pixart.model.pixart import PixArt
from pixart.prompt import check_no_settings
from pixart.quantize import QUANTIZED, check_quantized
from pixart.train.config import TrainConfig
from pixart.train.history import ENCODERS
from pixart.train.optimizer import check_optimizer, freeze


def check_sources(config: TrainConfig, *, given: bool = False) -> None:
    """Look for the images (unless samples are `given`), the text encoder, the VAE and the weights to start from. The
    latter are read completely.

    Raises:
        InputError: something is missing (one line each), or `train.freeze` does not fit the model.
    """
    resolve(config.sample, make_schedule(config.diffusion))
    check_optimizer(config.optimizer)
    for prompt in config.prompts:
        check_no_settings(prompt, "prompts:")
    with torch.device("meta"):
        model = PixArt(config.model)
    for name in () if given else config.data_spec.extras.arrays:
        _ = ARRAYS[name.partition(":")[0]]
    if not given and not config.objective.name.startswith(GIVEN):
        objective, stored = OBJECTIVES[config.objective.name], bool(config.data.features or config.data.mix)
        if lack := objective.missing(config.objective.options, config.data.targets, pixels=not stored):
            raise InputError(lack)
    freeze(model, config.train.freeze)
    looks: dict[str, Callable] = {}
    data = config.data
    if stores := [data.features] * bool(data.features) + [*data.mix]:
        # stores usually hold the prompts' states too, so no text encoder is needed
        looks = {f"features {store}": partial(_look_for_features, store) for store in stores}
        if data.validation_features:
            looks["data.validation_features"] = partial(_look_for_features, data.validation_features)
        elif data.validation_folder:
            raise InputError(
                "data.validation_folder: training from data.features reads no images; make a store of them "
                f"({command('extract')} CONFIG data.every=1 data.folder={data.validation_folder} data.features=STORE) "
                "and give it as data.validation_features"
            )
    elif not given or needs_text(config.data_spec):
        looks["text.model"] = lambda: _look_for_text(config.text)
    if not stores and not given:
        if not data.prepare:
            looks = {"data.folder": partial(_look_for_images, data.folder, data.format), **looks}
        if data.regularization and config.dreambooth is None:
            looks["data.regularization"] = partial(_look_for_images, data.regularization, "auto")
        if data.validation_folder and not will_be_made(data, data.validation_folder):
            looks["data.validation_folder"] = partial(_look_for_held_out, data)
    if config.vae.kind == "kl":
        looks["vae.source"] = lambda: read_settings(find_weights(config.vae.source, None).parent / CONFIG)
    if config.adapter is not None:
        if config.adapter.base_dtype in QUANTIZED:
            check_quantized(config.adapter.base_dtype, "adapter.base_dtype")
        adapt(copy.deepcopy(model), config.adapter)
    # a resumed run no longer needs these weights, except under an adapter
    if config.init_from is not None and (config.adapter is not None or not checkpoints(Path(config.output))):
        looks["init_from"] = lambda: start_from(model, config.init_from, diffusion=config.diffusion)
    missing = []
    for key, look in looks.items():
        try:
            look()
        except InputError as error:
            hint = f"; give another with {key}=" if key in ENCODERS else ""
            missing.append(f"{key}: {error}{hint}")
    if missing:
        several = f"{len(missing)} things are missing or wrong:\n  " if len(missing) > 1 else ""
        raise InputError(several + "\n  ".join(missing))


def _look_for_features(folder: str) -> None:
    if not is_official(folder):
        read_manifest(Path(folder))


def _look_for_images(folder: str, format: str) -> None:
    if format != "auto":
        _ = SOURCES[format]
    if not folder:
        raise InputError(
            "not set; expected a folder of images with captions, or data passed from Python: train(…, data=…)"
        )
    if not Path(folder).exists():
        raise InputError(f"{folder}: no such folder; expected a folder of images with captions")


def _look_for_held_out(config: DataConfig) -> None:
    _look_for_images(config.validation_folder, config.format)
    if os.path.realpath(config.validation_folder) == os.path.realpath(config.folder):
        raise InputError(
            f"{config.validation_folder}: these are the images to train on; give others, or data.validation"
        )


def _look_for_text(config: TextConfig) -> None:
    load_tokenizer(config)
    if config.clean:
        clean_caption("")  # raises if the packages of its extra are missing
