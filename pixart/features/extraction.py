"""Extraction from images and captions: scan, plan, caption states, latents, manifest."""

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

from pixart.config import setting
from pixart.data.arrays import ArrayContext, open_array
from pixart.data.buckets import Bucket
from pixart.data.config import DataConfig
from pixart.data.decoding import UnreadableImage
from pixart.data.images import Record, count_bytes, load_record
from pixart.data.prepare import prepare
from pixart.data.samples import describe_captions, encode_captions
from pixart.data.sources import scan
from pixart.encoders.autoencoder import Autoencoder, AutoencoderConfig, load_autoencoder
from pixart.encoders.fingerprint import autoencoder_fingerprint, fingerprint
from pixart.encoders.text import TextConfig, TextEncoder, encoder_dtype
from pixart.errors import InputError
from pixart.features.build import EncodedBatch, Share, finish, write_captions, write_samples
from pixart.features.plan import HASHES, agree, describe_set, file_names, locked, settle, sort_captions, working
from pixart.features.repair import is_sealed, mend, note_file, read_note, unsealed
from pixart.features.store import PROMPTS
from pixart.files import digest_text, write_file
from pixart.ranges import check_numbers


@dataclass(frozen=True)
class ExtractConfig:
    batch_size: int = setting(16, least=1)  # images of one bucket that the autoencoder encodes at once
    caption_batch: int = setting(64, least=1)  # captions that the text encoder encodes at once
    mirrored: bool = False  # store latents of the mirrored image too, for data.flip
    vae_dtype: Literal["float32", "bfloat16"] = "float32"  # precision of the autoencoder
    latent_dtype: Literal["float32", "bfloat16", "float16"] = "float16"  # precision of the stored latents
    samples_per_file: int = setting(4096, least=1)
    captions_per_file: int = setting(2048, least=1)

    def __post_init__(self):
        check_numbers(self, "extract")


@dataclass(frozen=True)
class Result:
    """The result of one process; `manifest` is None while other shares are unfinished."""

    folder: Path
    manifest: dict | None
    missing: list[str]  # files that other shares have not written yet


def extract(
    data: DataConfig,
    table: list[Bucket],
    vae: AutoencoderConfig,
    text: TextConfig,
    options: ExtractConfig,
    *,
    prompts: Sequence[str] = (),
    share: Share | None = None,
    device: torch.device | str = "cpu",
    say: Callable[[str], None] = print,
) -> Result:
    """Write this share of the feature store `data.features`; after any interruption the same call resumes.

    Args:
        table: the buckets; see `pixart.data.buckets`.
        prompts: texts for sample grids, whose states are stored too, so that training needs no text encoder.

    Raises:
        InputError: bad settings or data, a folder that was started with other settings or data, a full disk.
    """
    if not data.features:
        raise InputError("data.features: expected the folder of the feature store to write")
    if data.random_crop:
        raise InputError("data.random_crop needs the images in training; latents have only the center crop")
    if data.flip and not options.mirrored:
        raise InputError("data.flip is on: set extract.mirrored to store latents of the mirrored images too")
    folder, share, device = Path(data.features), share or Share(), torch.device(device)
    if data.prepare:
        with locked(folder):
            prepare(data)
    with working(folder):
        return _extract(folder, data, table, vae, text, options, prompts, share, device, say)


def _extract(
    folder: Path,
    data: DataConfig,
    table: list[Bucket],
    vae: AutoencoderConfig,
    text: TextConfig,
    options: ExtractConfig,
    prompts: Sequence[str],
    share: Share,
    device: torch.device,
    say: Callable[[str], None],
) -> Result:
    found = scan(data, table)
    say(f"data {data.folder}: {found.describe()}")
    records = found.records[:: data.every]
    first = make_plan(table, options, data, text, records, sort_captions(records))
    plan, layout = settle(folder, first, records, write=False)
    mend(folder, plan, layout, say)
    if not unsealed(folder, plan) and _has_prompts(folder, prompts):
        if not (folder / HASHES).exists():  # started by a version that did not store these
            settle(folder, first, records, write=True)
        return Result(folder, finish(folder, plan, found.problems), [])

    # load all models before the first caption is encoded, and before anything is written that fixes the settings
    autoencoder, encoder = None, None
    names = [name for name in file_names(plan) if name.startswith("samples-")]
    mine = [names[i] for i in share.of(len(names)) if not is_sealed(folder / names[i])]
    if mine:
        autoencoder = load_autoencoder(vae, dtype=getattr(torch, options.vae_dtype))
        encode = ImageEncoder(layout.records, autoencoder, options, device, data.workers, plan.get("arrays", []))
    if _lacks_texts(folder, plan, share, prompts):
        encoder = TextEncoder.load(text, dtype=encoder_dtype(device), device=device)
    plan, layout = settle(folder, first, records, write=True)
    if autoencoder is not None:
        agree(folder / "vae.json", describe_vae(vae, autoencoder, options.vae_dtype), "autoencoder", free=["source"])
    if encoder is not None:
        for line in describe_captions(encoder, [caption for caption in layout.captions if caption is not None]):
            say(line)
        try:
            _encode_texts(folder, plan, text, encoder, layout.captions, prompts, share)
        finally:
            encoder.close()
    if autoencoder is not None:
        autoencoder.to(device)
        total = sum(record is not None for name in mine for record in layout.of(name, plan))
        with tqdm(total=total, desc="latents", unit="image", disable=None) as bar:
            write_samples(folder, plan, layout.records, layout.numbers, share, encode, bar.update)
    return Result(folder, finish(folder, plan, found.problems), unsealed(folder, plan))


def make_plan(
    table: list[Bucket],
    options: ExtractConfig,
    data: DataConfig,
    text: TextConfig,
    records: list[Record],
    captions: list[str],
) -> dict:
    """What the store will hold, as far as this is known before anything is encoded."""
    return {
        "buckets": [[bucket.ratio, bucket.height, bucket.width] for bucket in table],
        "resolution": data.resolution,
        "every": data.every,
        "text_length": text.length,
        "text_clean": text.clean,
        **describe_set(records, captions),
        "mirrored": options.mirrored,
        "latent_dtype": options.latent_dtype,
        "text_dtype": data.text_dtype,
        "batch": options.batch_size,
        "caption_batch": options.caption_batch,
        "samples_per_shard": options.samples_per_file,
        "captions_per_shard": options.captions_per_file,
        **({"arrays": arrays} if (arrays := sorted({*data.conditions.values(), *data.targets.values()})) else {}),
    }


def _lacks_texts(folder: Path, plan: dict, share: Share, prompts: Sequence[str]) -> bool:
    """Whether this share has captions or prompts to encode."""
    names = [name for name in file_names(plan) if name.startswith("captions-")]
    lacking = any(not is_sealed(folder / names[i]) for i in share.of(len(names)))
    return lacking or (share.rank == 0 and not _has_prompts(folder, prompts))


def _encode_texts(
    folder: Path,
    plan: dict,
    text: TextConfig,
    encoder: TextEncoder,
    captions: Sequence[str | None],
    prompts: Sequence[str],
    share: Share,
) -> None:
    """Write the caption files of this share, and the prompts' file."""
    facts, dtype = describe_text(text, encoder), getattr(torch, plan["text_dtype"])
    agree(folder / "text.json", facts, "text encoder", free=["model"])

    def encode(texts: Sequence[str]) -> list[Tensor]:
        states = encode_captions(encoder, texts, dtype=dtype, batch_size=plan["caption_batch"])
        # the weights may be mapped from their file, so that writing to the file changes them here
        if (now := fingerprint(encoder.model)) != facts["weights"]:
            raise _changed(f"text encoder {text.model}", facts["weights"], now)
        return [states[text] for text in texts]

    if share.rank == 0 and not _has_prompts(folder, prompts):
        _write_prompts(folder / PROMPTS, encoder, encode, prompts, dtype)
    with tqdm(total=len(captions) - captions.count(None), desc="captions", unit="caption", disable=None) as bar:
        write_captions(folder, plan, captions, share, encode, bar.update)


def _changed(what: str, before: str, now: str) -> InputError:
    return InputError(
        f"the weights of the {what} have changed since this extraction started (fingerprint {before} then, {now} "
        "now); nothing encoded by the new ones was stored: restore the old ones, or extract into another folder"
    )


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
    return is_sealed(folder / PROMPTS) and note.get("prompts") == digest_text("\n".join(sorted(set(prompts))))


def summarize(result: Result) -> str:
    """The result as a few lines of text."""
    if result.manifest is None:
        return (
            f"{result.folder}: this share is done; {len(result.missing)} files of other shares are missing, "
            f"the first is {result.missing[0]}"
        )
    manifest = result.manifest
    samples, captions, files = (manifest[name] for name in ("samples", "captions", "files"))
    size = sum(file["bytes"] for file in files.values())
    lines = [
        f"{result.folder}: {samples:,} samples, {captions:,} captions, {len(manifest['files'])} files, "
        f"{size / 1e6:,.1f} MB, {size / max(samples, 1):,.0f} bytes per sample"
    ]
    if problems := manifest["problems"]:
        lines.append(f"{len(problems)} left out:")
        lines += [f"  {name}: {reason}" for name, reason in problems[:20]]
        lines += [f"  … and {len(problems) - 20} more, in the manifest"] * (len(problems) > 20)
    return "\n".join(lines)


# --------------------------------------------------------------------------------------------------------------- images


class ImageEncoder:
    """Batches of records → latents and arrays; images are read ahead by workers."""

    def __init__(
        self,
        records: list[Record],
        autoencoder: Autoencoder,
        options: ExtractConfig,
        device: torch.device,
        workers: int,
        arrays: Sequence[str] = (),
    ):
        self.records, self.autoencoder, self.device, self.workers = records, autoencoder, device, workers
        self.weights = autoencoder_fingerprint(autoencoder)
        context = ArrayContext(autoencoder, device)
        self.makers = {name: open_array(name, context) for name in arrays}
        self.mirrored, self.dtype = options.mirrored, getattr(torch, options.latent_dtype)

    def __call__(self, batches: list[list[int]]) -> Iterator[EncodedBatch]:
        loader = DataLoader(
            _Images([[self.records[i] for i in batch] for batch in batches]),
            batch_size=None,
            num_workers=min(self.workers, len(batches)),
            pin_memory=self.device.type == "cuda",
        )
        for batch, (pixels, good, problems, changed) in zip(batches, loader, strict=True):
            if changed:
                raise InputError(
                    f"{changed}: the size of its file has changed since this extraction started; finished work is "
                    "safe: restore the old file, or extract into another folder"
                )
            records = [self.records[batch[place]] for place in good]
            latents, arrays = self.encode(pixels, records)
            if (now := autoencoder_fingerprint(self.autoencoder)) != self.weights:
                raise _changed("autoencoder", self.weights, now)
            yield EncodedBatch(good, latents, problems, arrays)

    @torch.no_grad()
    def encode(self, pixels: Tensor, records: Sequence[Record]) -> tuple[Tensor, dict[str, Tensor]]:
        """uint8 (n, H, W, 3) → mean and standard deviation of the scaled latents (n, V, 2, C, h, w), and arrays
        (n, V, …) by name, all on the CPU.

        Mirrored images are encoded in a separate batch, so that the first variant does not depend on them.
        """
        if not len(pixels):
            return torch.empty(0, dtype=self.dtype), {name: torch.empty(0) for name in self.makers}
        # contiguous, as in training: in channels-last order torch's group norm is less accurate on uniform images
        pixels = pixels.to(self.device, non_blocking=True).permute(0, 3, 1, 2).contiguous().float() / 127.5 - 1
        variants = [pixels, pixels.flip(-1)] if self.mirrored else [pixels]
        moments = [torch.stack(self.autoencoder.moments(variant), 1) for variant in variants]
        arrays = {
            name: torch.stack([make(variant, records, i > 0) for i, variant in enumerate(variants)], 1).cpu()
            for name, make in self.makers.items()
        }
        return torch.stack(moments, 1).to("cpu", self.dtype), arrays


class _Images(Dataset):
    """Batches of records as pixels: uint8 (n, H, W, 3), the positions of the n readable ones, problems of the others,
    and the id of one that has changed, if any."""

    def __init__(self, batches: list[list[Record]]):
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, index: int) -> tuple[Tensor, list[int], list[tuple[str, str]], str]:
        images, good, problems, changed = [], [], [], ""
        for place, record in enumerate(self.batches[index]):
            try:
                images.append(load_record(record))
                good.append(place)
                if record.length and count_bytes(record.picture) != record.length:
                    changed = record.id
            except UnreadableImage as error:
                problems.append((record.id, f"unreadable: {error}"))
        pixels = np.stack(images) if images else np.empty((0, 1, 1, 3), np.uint8)
        return torch.from_numpy(pixels), good, problems, changed


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
