"""Extraction from pictures and captions: scan, plan, caption states, latents, manifest."""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from pixart.data.arrays import ARRAYS, ArrayContext
from pixart.data.buckets import Bucket
from pixart.data.config import DataConfig
from pixart.data.images import UNREADABLE, Record, load_image
from pixart.data.openmoji import build_openmoji
from pixart.data.samples import encode_captions
from pixart.data.sources import scan
from pixart.encoders.autoencoder import Autoencoder, AutoencoderConfig, load_autoencoder
from pixart.encoders.fingerprint import autoencoder_fingerprint, fingerprint
from pixart.encoders.text import TextConfig, TextEncoder, encoder_dtype
from pixart.errors import InputError
from pixart.features.build import (
    PLAN,
    EncodedBatch,
    Share,
    agree,
    finish,
    is_sealed,
    locked,
    note_file,
    read_note,
    shard_count,
    unsealed,
    write_captions,
    write_samples,
)  # fmt: skip
from pixart.features.store import PROMPTS, caption_file, sample_file
from pixart.files import digest_text, write_file


@dataclass(frozen=True)
class ExtractConfig:
    batch_size: int = 16  # pictures of one bucket that the autoencoder encodes at once
    caption_batch: int = 64  # captions that the text encoder encodes at once
    mirrored: bool = False  # latents of the mirrored picture too, for data.flip
    vae_dtype: Literal["float32", "bfloat16"] = "float32"  # what the autoencoder computes in
    latent_dtype: Literal["float32", "bfloat16", "float16"] = "float16"  # what latents are stored in
    samples_per_file: int = 4096
    captions_per_file: int = 2048

    def __post_init__(self):
        for name in ("batch_size", "caption_batch", "samples_per_file", "captions_per_file"):
            if getattr(self, name) < 1:
                raise InputError(f"extract.{name}: got {getattr(self, name)}, expected at least 1")


@dataclass(frozen=True)
class Result:
    """What one process has done; `manifest` is None while other shares are not."""

    folder: Path
    manifest: dict | None
    missing: list[str]  # files that other shares have still to write


def extract(
    data: DataConfig, table: list[Bucket], vae: AutoencoderConfig, text: TextConfig, options: ExtractConfig, *,
    prompts: Sequence[str] = (), share: Share | None = None, device: torch.device | str = "cpu",
    say: Callable[[str], None] = print,
) -> Result:  # fmt: skip
    """Write this share of the feature store `data.features`; the same call goes on after any interruption.

    Args:
        table: the buckets; see `pixart.data.buckets`.
        prompts: texts whose states are kept too, for sample grids, so that training needs no text encoder.

    Raises:
        InputError: bad settings or data, a folder that was begun with other ones, a full disk.
    """
    if not data.features:
        raise InputError("data.features: expected the folder of the feature store to write")
    if data.random_crop:
        raise InputError("data.random_crop needs the pictures in training; latents have one crop, the middle")
    if data.flip and not options.mirrored:
        raise InputError("data.flip is on: set extract.mirrored to have latents of the mirrored pictures too")
    folder, share, device = Path(data.features), share or Share(), torch.device(device)
    if data.prepare == "openmoji":
        with locked(folder):
            build_openmoji(data.folder)
    found = scan(data, table)
    say(f"data {data.folder}: {found.describe()}")
    records = found.records[:: data.every]
    captions = sorted({c for r in records for c in r.captions}, key=lambda caption: (len(caption), caption))
    plan = make_plan(table, options, data, text, records, captions)
    agree(folder / PLAN, plan, "plan")
    if not unsealed(folder, plan) and _has_prompts(folder, prompts):
        return Result(folder, finish(folder, plan, found.problems), [])

    _encode_texts(folder, plan, text, captions, prompts, share, device)
    numbers = {caption: i for i, caption in enumerate(captions)}
    mine = share.of(shard_count(len(records), plan["samples_per_shard"]))
    if any(not is_sealed(folder / sample_file(i)) for i in mine):
        autoencoder = load_autoencoder(vae, dtype=getattr(torch, options.vae_dtype), device=device)
        agree(folder / "vae.json", describe_vae(vae, autoencoder, options.vae_dtype), "autoencoder", free=["source"])
        encode = ImageEncoder(records, autoencoder, options, device, data.workers, plan.get("arrays", []))
        total = sum(len(records[i * plan["samples_per_shard"] :][: plan["samples_per_shard"]]) for i in mine)
        with tqdm(total=total, desc="latents", unit="image", disable=None) as bar:
            write_samples(folder, plan, records, numbers, share, encode, bar.update)
    return Result(folder, finish(folder, plan, found.problems), unsealed(folder, plan))


def make_plan(
    table: list[Bucket], options: ExtractConfig, data: DataConfig, text: TextConfig, records: list[Record],
    captions: list[str],
) -> dict:  # fmt: skip
    """What the store will hold, as far as it is known before anything is encoded."""
    source = hashlib.blake2b(digest_size=16)
    for record in records:
        line = [record.id, record.captions, record.weights, record.height, record.width]
        source.update(json.dumps(line).encode() + b"\n")
    return {
        "buckets": [[bucket.ratio, bucket.height, bucket.width] for bucket in table],
        "resolution": data.resolution,
        "every": data.every,
        "text_length": text.length,
        "text_clean": text.clean,
        "samples": len(records),
        "captions": len(captions),
        "source": source.hexdigest(),
        "mirrored": options.mirrored,
        "latent_dtype": options.latent_dtype,
        "text_dtype": data.text_dtype,
        "batch": options.batch_size,
        "caption_batch": options.caption_batch,
        "samples_per_shard": options.samples_per_file,
        "captions_per_shard": options.captions_per_file,
        **({"arrays": arrays} if (arrays := sorted({*data.conditions.values(), *data.targets.values()})) else {}),
    }


def _encode_texts(
    folder: Path, plan: dict, text: TextConfig, captions: list[str], prompts: Sequence[str], share: Share, device
) -> None:
    """Caption files of this share, and the prompts' file; the encoder is loaded only if there is something to do."""
    mine = share.of(shard_count(len(captions), plan["captions_per_shard"]))
    for_prompts = share.rank == 0 and not _has_prompts(folder, prompts)
    if not for_prompts and all(is_sealed(folder / caption_file(i)) for i in mine):
        return
    encoder = TextEncoder.load(text, dtype=encoder_dtype(device), device=device)
    try:
        agree(folder / "text.json", describe_text(text, encoder), "text encoder", free=["model"])
        dtype = getattr(torch, plan["text_dtype"])

        def encode(texts: Sequence[str]) -> list[Tensor]:
            states = encode_captions(encoder, texts, dtype=dtype, batch_size=plan["caption_batch"])
            return [states[text] for text in texts]

        if for_prompts:
            _write_prompts(folder / PROMPTS, encoder, encode, prompts, dtype)
        total = sum(len(captions[i * plan["captions_per_shard"] :][: plan["captions_per_shard"]]) for i in mine)
        with tqdm(total=total, desc="captions", unit="caption", disable=None) as bar:
            write_captions(folder, plan, captions, share, encode, bar.update)
    finally:
        encoder.close()


def _write_prompts(path: Path, encoder: TextEncoder, encode, prompts: Sequence[str], dtype: torch.dtype) -> None:
    states, mask = encoder.encode([""], padding="max_length", keep_padding=True)
    tensors = {"null": states[0].to("cpu", dtype), "null_tokens": mask[0].sum().long().cpu()}
    distinct = sorted(set(prompts))
    tensors |= {f"prompt:{prompt}": state for prompt, state in zip(distinct, encode(distinct), strict=True)}
    with locked(path.parent):
        write_file(path, lambda partial: save_file(tensors, partial))
        note_file(path, len(distinct), [], prompts=digest_text("\n".join(distinct)))


def _has_prompts(folder: Path, prompts: Sequence[str]) -> bool:
    note = read_note(folder / PROMPTS)
    return is_sealed(folder / PROMPTS) and note["prompts"] == digest_text("\n".join(sorted(set(prompts))))


def summarize(result: Result) -> str:
    """A few lines for a person."""
    if result.manifest is None:
        return (
            f"{result.folder}: this share is done; {len(result.missing)} files of others are missing, "
            f"the first is {result.missing[0]}"
        )
    manifest = result.manifest
    samples, captions, files = (manifest[name] for name in ("samples", "captions", "files"))
    size = sum(file["bytes"] for file in files.values())
    lines = [
        f"{result.folder}: {samples:,} samples, {captions:,} captions, {len(manifest['files'])} files, "
        f"{size / 1e6:,.1f} MB, {size / max(samples, 1):,.0f} bytes a sample"
    ]
    if problems := manifest["problems"]:
        lines.append(f"{len(problems)} left out:")
        lines += [f"  {name}: {reason}" for name, reason in problems[:20]]
        lines += [f"  … and {len(problems) - 20} more, in the manifest"] * (len(problems) > 20)
    return "\n".join(lines)


# ------------------------------------------------------------------------------------------------------------- pictures


class ImageEncoder:
    """Batches of records → latents and arrays; images are read ahead by workers."""

    def __init__(
        self, records: list[Record], autoencoder: Autoencoder, options: ExtractConfig, device: torch.device,
        workers: int, arrays: Sequence[str] = (),
    ):  # fmt: skip
        self.records, self.autoencoder, self.device, self.workers = records, autoencoder, device, workers
        context = ArrayContext(autoencoder, device)
        self.makers = {name: ARRAYS[name](context) for name in arrays}
        self.mirrored, self.dtype = options.mirrored, getattr(torch, options.latent_dtype)

    def __call__(self, batches: list[list[int]]) -> Iterator[EncodedBatch]:
        loader = DataLoader(
            _Pictures([[self.records[i] for i in batch] for batch in batches]), batch_size=None,
            num_workers=min(self.workers, len(batches)), pin_memory=self.device.type == "cuda",
        )  # fmt: skip
        for batch, (pixels, good, problems) in zip(batches, loader, strict=True):
            records = [self.records[batch[place]] for place in good]
            latents, arrays = self.encode(pixels, records)
            yield EncodedBatch(good, latents, problems, arrays)

    @torch.no_grad()
    def encode(self, pixels: Tensor, records: Sequence[Record]) -> tuple[Tensor, dict[str, Tensor]]:
        """uint8 (n, H, W, 3) → mean and standard deviation of the scaled latents (n, V, 2, C, h, w), and arrays
        (n, V, …) by name, all on the CPU.

        A mirrored image is encoded in a batch of its own, so that the first variant does not depend on it.
        """
        if not len(pixels):
            return torch.empty(0, dtype=self.dtype), {name: torch.empty(0) for name in self.makers}
        # contiguous, as training has them: in channels-last order torch's group norm loses digits on flat images
        pixels = pixels.to(self.device, non_blocking=True).permute(0, 3, 1, 2).contiguous().float() / 127.5 - 1
        variants = [pixels, pixels.flip(-1)] if self.mirrored else [pixels]
        moments = [torch.stack(self.autoencoder.moments(variant), 1) for variant in variants]
        arrays = {
            name: torch.stack([make(variant, records, i > 0) for i, variant in enumerate(variants)], 1).cpu()
            for name, make in self.makers.items()
        }
        return torch.stack(moments, 1).to("cpu", self.dtype), arrays


class _Pictures(Dataset):
    """Batches of records as pixels: uint8 (n, H, W, 3), the places of the n readable ones, problems of the others."""

    def __init__(self, batches: list[list[Record]]):
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, index: int) -> tuple[Tensor, list[int], list[tuple[str, str]]]:
        pictures, good, problems = [], [], []
        for place, record in enumerate(self.batches[index]):
            try:
                pictures.append(load_image(record.picture, record.bucket))
                good.append(place)
            except UNREADABLE as error:
                problems.append((record.id, f"unreadable: {error}"))
        pixels = np.stack(pictures) if pictures else np.empty((0, 1, 1, 3), np.uint8)
        return torch.from_numpy(pixels), good, problems


# --------------------------------------------------------------------------------------------------------------- models


def describe_vae(config: AutoencoderConfig, autoencoder: Autoencoder, dtype: str) -> dict:
    return {
        "kind": config.kind,
        "source": config.source,
        "scale": autoencoder.scale,
        "latent_channels": autoencoder.latent_channels,
        "downsample": autoencoder.downsample,
        "dtype": dtype,
        "weights": autoencoder_fingerprint(autoencoder),
    }


def describe_text(config: TextConfig, encoder: TextEncoder) -> dict:
    return {
        "model": config.model,
        "width": encoder.width,
        "dtype": str(next(encoder.model.parameters()).dtype).removeprefix("torch."),
        "weights": fingerprint(encoder.model),
    }
