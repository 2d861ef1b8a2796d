"""A run's data from feature stores, checked against its configuration and split into training and held-out samples."""

from dataclasses import replace

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

from pixart.data.buckets import Bucket
from pixart.data.samples import Captions, Drawing, encode_captions
from pixart.data.training_set import Data, DataSpec, Part, choose_held_out, describe_split, hash_ids, load_encoder
from pixart.encoders.autoencoder import Autoencoder
from pixart.encoders.fingerprint import autoencoder_fingerprint, fingerprint
from pixart.errors import InputError
from pixart.features.official import OfficialFeatures, is_official
from pixart.features.samples import FeatureDataset
from pixart.features.store import UNKNOWN, FeatureStore
from pixart.files import digest_text


def load_features(spec: DataSpec, accelerator: Accelerator, autoencoder: Autoencoder) -> Data:
    """Open the stores and split off the held-out samples; the text encoder is loaded only for prompts that the stores
    do not hold."""
    data = spec.data
    repeats = {**({data.features: 1.0} if data.features else {}), **data.mix}
    stores = [open_features(folder, spec, autoencoder) for folder in repeats]
    report = [f"features {folder}: {store.describe()}" for folder, store in zip(repeats, stores, strict=True)]
    held = choose_held_out([store.hashes for store in stores], spec)

    def part(repeats: dict, stores: list, which: list[np.ndarray | None], drawing: Drawing) -> Part:
        numbers = [
            store.bucket_numbers if part is None else store.bucket_numbers[part]
            for store, part in zip(stores, which, strict=True)
        ]
        sets = [(len(part), often) for part, often in zip(numbers, repeats.values(), strict=True)]
        dataset = FeatureDataset(stores, which, drawing, flip=data.flip, posterior_mean=data.posterior == "mean")
        return Part(dataset, np.concatenate(numbers) if len(numbers) > 1 else numbers[0], sets)

    chosen = [np.flatnonzero(~out).astype(np.int32) if out.any() else None for out in held]
    train = part(repeats, stores, chosen, spec.drawing)
    if data.validation_features:
        # data.every applies to training only: all of these are used
        other = open_features(data.validation_features, replace(spec, data=replace(data, every=1)), autoencoder)
        report.append(f"data.validation_features {data.validation_features}: {other.describe()}")
        held_out = part({data.validation_features: 1.0}, [other], [None], spec.held_out_drawing)
        held_hashes = [other.hashes]
    else:
        chosen = [np.flatnonzero(out).astype(np.int32) for out in held]
        held_out = part(repeats, stores, chosen, spec.held_out_drawing)
        held_hashes = [store.hashes[out] for store, out in zip(stores, held, strict=True)]
    report += describe_split(spec, len(train), len(held_out))
    captions, null = prompt_states(spec, accelerator, stores[0])
    prints = hash_ids([store.hashes[~out] for store, out in zip(stores, held, strict=True)]), hash_ids(held_hashes)
    weights = None if stores[0].text_weights == UNKNOWN else stores[0].text_weights
    places = [store.folder for store in stores]
    contents = {"features": digest_text(" ".join(store.content for store in stores))}
    return Data(train, held_out, captions, null, [], *prints, weights, places, "\n".join(report), contents)


def open_features(folder: str, spec: DataSpec, autoencoder: Autoencoder) -> FeatureStore | OfficialFeatures:
    """Open a store, or an official feature folder, and check that it fits the configuration.

    Raises:
        InputError: it does not fit; the message names everything that differs, with both values.
    """
    data, table, wrong = spec.data, spec.table, []
    if is_official(folder):
        store = OfficialFeatures(
            folder, table, resolution=data.resolution, downsample=autoencoder.downsample, scale=autoencoder.scale
        )
        if (width := store.caption(0).shape[1]) != spec.caption_channels:
            wrong.append(f"the width of text states: {width} there, {spec.caption_channels} here")
    else:
        store = FeatureStore(folder)
        wrong += _differences(store, spec, table, autoencoder)
    if missing := sorted({*spec.extras.arrays} - {*store.arrays}):
        wrong.append(f"it has no arrays named {', '.join(missing)} (data.conditions, data.targets)")
    if data.flip and not store.mirrored:
        wrong.append("data.flip is on, but it has no mirrored latents (extract.mirrored)")
    if data.random_crop:
        wrong.append("data.random_crop is on, but latents have one crop only")
    if wrong:
        raise InputError(f"features {folder} do not fit this configuration: {'; '.join(wrong)}")
    return store


def _differences(store: FeatureStore, spec: DataSpec, table: list[Bucket], autoencoder: Autoencoder) -> list[str]:
    manifest, data = store.manifest, spec.data
    vae, text = manifest["vae"], manifest["text"]
    pairs = [
        ("data.resolution", manifest["resolution"], data.resolution),
        ("data.every", manifest["every"], data.every),
        ("the buckets", _sizes(store.buckets), _sizes(table)),
        ("the autoencoder's channels", vae["latent_channels"], spec.vae.latent_channels),
        ("the autoencoder's scaling factor", vae["scale"], autoencoder.scale),
        ("the autoencoder's weights", vae["weights"], autoencoder_fingerprint(autoencoder)),
        ("the width of text states (model.caption_channels)", text["width"], spec.caption_channels),
        ("text.length", manifest["text_length"], spec.text.length),
        ("text.clean", manifest["text_clean"], spec.text.clean),
    ]
    return [f"{name}: {there} there, {here} here" for name, there, here in pairs if there != here]


def _sizes(table: list[Bucket]) -> str:
    sizes = sorted((bucket.height, bucket.width) for bucket in table)
    return f"{len(sizes)}, from {sizes[0][0]}×{sizes[0][1]} to {sizes[-1][0]}×{sizes[-1][1]}"


def prompt_states(
    spec: DataSpec, accelerator: Accelerator, store: FeatureStore | OfficialFeatures
) -> tuple[Captions, Tensor | None]:
    """States of the config's prompts and the null caption, from the store if it has them."""
    states = {prompt: store.prompt(prompt) for prompt in spec.prompts}
    if missing := [prompt for prompt, found in states.items() if found is None]:
        encoder = load_encoder(spec, accelerator)
        here, there = fingerprint(encoder.model), store.text_weights
        if there not in (here, UNKNOWN):
            raise InputError(
                f"features {store.folder} were encoded by another text encoder than {spec.text.model} "
                f"(weights {there} there, {here} here), so prompts that the store does not hold cannot be encoded"
            )
        encoded = encode_captions(encoder, missing, dtype=getattr(torch, spec.data.text_dtype))
        encoder.close()
        states |= {prompt: encoded[prompt] for prompt in missing}
    captions = Captions(list(states.values()), {prompt: i for i, prompt in enumerate(states)})
    if spec.text.null == "buffer":
        return captions, None
    null, tokens = store.null_states()
    return captions, null if spec.text.null == "empty" else null[:tokens]
