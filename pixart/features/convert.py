"""The authors' feature folders → a feature store."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from pixart.data.buckets import Bucket
from pixart.data.config import DataConfig
from pixart.encoders.autoencoder import Autoencoder, AutoencoderConfig, load_autoencoder
from pixart.encoders.text import TextConfig
from pixart.errors import InputError
from pixart.features.build import EncodedBatch, Share, finish, write_captions, write_samples
from pixart.features.extraction import ExtractConfig, Result, describe_vae, make_plan
from pixart.features.official import OfficialFeatures
from pixart.features.plan import agree, locked, settle, sort_captions, working
from pixart.features.repair import mend, note_file, unsealed
from pixart.features.store import PROMPTS, UNKNOWN
from pixart.files import write_file


def convert_official(
    source: str | Path,
    data: DataConfig,
    table: list[Bucket],
    vae: AutoencoderConfig,
    text: TextConfig,
    options: ExtractConfig,
    *,
    share: Share | None = None,
    say: Callable[[str], None] = print,
) -> Result:
    """Write this share of the store `data.features` from an official feature folder, as `extract` does from images.

    The autoencoder is needed for its scaling factor, which the official files do not hold. States of equal captions are
    stored once. There are no null states, so the store only suits models with their own null caption (PixArt-α).

    Raises:
        InputError: there are no usable features, or a setting asks for something that they do not have.
    """
    if not data.features:
        raise InputError("data.features: expected the folder of the feature store to write")
    if options.mirrored or text.null != "buffer":
        raise InputError("official features have no mirrored latents (extract.mirrored) and no null states (text.null)")
    folder, share = Path(data.features), share or Share()
    autoencoder = load_autoencoder(vae)
    found = OfficialFeatures(
        source, table, resolution=data.resolution, downsample=autoencoder.downsample, scale=autoencoder.scale
    )
    say(f"{source}: {len(found)} samples, {len(found.problems)} left out")
    with working(folder):
        return _convert(folder, found, autoencoder, data, table, vae, text, options, share, say)


def _convert(
    folder: Path,
    found: OfficialFeatures,
    autoencoder: Autoencoder,
    data: DataConfig,
    table: list[Bucket],
    vae: AutoencoderConfig,
    text: TextConfig,
    options: ExtractConfig,
    share: Share,
    say: Callable[[str], None],
) -> Result:
    first: dict[str, int] = {}
    for i, record in enumerate(found.records):
        first.setdefault(record.captions[0], i)
    places = {record.id: i for i, record in enumerate(found.records)}
    plan = make_plan(table, options, data, text, found.records, sort_captions(found.records))
    plan, layout = settle(folder, plan, found.records, write=True)
    mend(folder, plan, layout, say)
    agree(folder / "vae.json", describe_vae(vae, autoencoder, UNKNOWN), "autoencoder", free=["source"])
    facts = {"model": text.model, "width": found.caption(0).shape[1], "dtype": UNKNOWN, "weights": UNKNOWN}
    agree(folder / "text.json", facts, "text encoder", free=["model"])
    with locked(folder):
        write_file(folder / PROMPTS, lambda partial: save_file({"none": torch.zeros(0)}, partial))
        note_file(folder / PROMPTS, 0, [])

    dtype, latents = getattr(torch, data.text_dtype), getattr(torch, options.latent_dtype)

    def states(texts: Sequence[str]) -> list[Tensor]:
        return [found.caption(first[caption]).to(dtype)[: text.length] for caption in texts]

    def moments(batches: list[list[int]]) -> Iterator[EncodedBatch]:
        for batch in batches:
            both = torch.stack([found.moments(places[layout.records[i].id]) for i in batch])[:, None].to(latents)
            yield EncodedBatch(list(range(len(batch))), both, [])

    with tqdm(desc="captions", unit="caption", disable=None) as bar:
        write_captions(folder, plan, layout.captions, share, states, bar.update)
    with tqdm(desc="latents", unit="image", disable=None) as bar:
        write_samples(folder, plan, layout.records, layout.numbers, share, moments, bar.update)
    return Result(folder, finish(folder, plan, found.problems), unsealed(folder, plan))
