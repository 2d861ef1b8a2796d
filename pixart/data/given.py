"""Samples passed to `train` from Python, in place of a folder of images or a feature store."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol, TypedDict

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor
from torch.utils.data import Dataset

from pixart.arguments import say
from pixart.config import differences
from pixart.data.batches import Key
from pixart.data.buckets import Bucket
from pixart.data.config import DataConfig
from pixart.data.samples import Captions, Drawing, Draws, encode_captions
from pixart.data.training_set import Data, DataSpec, Part, choose_held_out, describe_split, hash_ids, load_encoder
from pixart.encoders.fingerprint import fingerprint
from pixart.encoders.text import encode_null
from pixart.errors import InputError, did_you_mean
from pixart.seeds import derive_seed

Array = Tensor | np.ndarray
# settings that also apply to samples passed from Python; all others say how a folder or a store is read
SETTINGS = {
    "resolution",
    "validation",
    "split_seed",
    "draws",
    "conditions",
    "targets",
    "posterior",
    "leftovers",
    "workers",
    "text_dtype",
}


class TrainingSample(TypedDict, total=False):
    """A sample. Either `latents` or `pixels`, and `caption`, are required.

    Other random entries, if missing, are drawn from (seed, epoch, id, name), so that they are reproducible and
    independent of everything else.
    """

    latents: Array  # (C, h, w) scaled, as `Autoencoder.encode` returns them, C = model.in_channels
    pixels: Array  # (3, H, W) floating, in [-1, 1]; the autoencoder of the config encodes them at each step
    caption: Array  # (L, caption_channels) states of its tokens without padding, L from 1 to text.length
    id: str  # used to draw random numbers and in messages; by default the index as text
    noise: Array  # (C, h, w) what is added to the latents; by default standard normal
    posterior_noise: Array  # (C, h, w) with pixels: noise for the autoencoder's posterior; zeros give its mean
    time: float  # in [0, 1), which the schedule turns into a timestep; by default uniform
    drop: float  # in [0, 1); below train.caption_dropout the null caption is used; by default uniform
    size: tuple[float, float]  # the original image's height and width in pixels, for micro-conditions; default: as is
    aspect_ratio: float  # height / width, for micro-conditions; default: as is
    weight: float  # weight of its loss in the batch; by default 1
    problem: str | None  # why it could not be read; its loss then has weight 0, and the log names it
    conditions: Mapping[str, Array]  # further keywords of the network; random ones are drawn if missing
    targets: Mapping[str, Array]  # arrays for the objective
    draws: Mapping[str, Array]  # random numbers for the objective; drawn if missing


class TrainingData(Protocol):
    """A map-style data set of `TrainingSample`s: a list, or any torch data set that has a length.

    Optional attributes:
        ids: the id of every sample, known without reading it. A resumed run compares all of them with those before;
            without `ids`, it compares the number of samples and the ids of the first, middle and last one.
        buckets: a number for every sample; a batch holds samples of one number, which must have the same shape.
        by_epoch: if True, keys are (epoch, index), for reproducible augmentation; epoch is -1 in validation.
    """

    def __len__(self) -> int: ...

    def __getitem__(self, key: Any, /) -> Any: ...


def check_settings(config: DataConfig) -> None:
    """Refuse settings that say how a folder or a store is read if samples are passed from Python."""
    if other := sorted(differences(config).keys() - SETTINGS):
        names = ", ".join(f"data.{name}" for name in other)
        raise InputError(f"{names}: only for reading a folder or a store, but train was given data; leave one out")


def load_given(spec: DataSpec, given: TrainingData, accelerator: Accelerator) -> Data:
    """A run's data from samples passed from Python; the text encoder is loaded only for prompts and null captions.

    Raises:
        InputError: there are no samples, they do not fit the configuration, or the number of ids or buckets differs
            from that of samples.
    """
    count = len(given)
    if not count:
        raise InputError("data: got 0 samples, expected at least one")
    if spec.data.shuffle_captions:
        raise InputError(
            "data.shuffle_captions exchanges the captions of data.folder; pass samples with others instead"
        )
    source = Source(given, spec)
    ids = _find_ids(source, count)
    buckets = np.zeros(count, np.int64) if source.buckets is None else np.asarray(source.buckets)
    if len(buckets) != count:
        raise InputError(f"data.buckets: got {len(buckets)}, expected one for each of {count} samples")
    hashes = np.array([derive_seed(name) for name in ids], dtype=np.int64)
    (held,) = choose_held_out([hashes], spec)

    def part(chosen: np.ndarray, drawing: Drawing) -> Part:
        return Part(GivenDataset(source, chosen, drawing), buckets[chosen], [(len(chosen), 1.0)])

    train, held_out = part(np.flatnonzero(~held), spec.drawing), part(np.flatnonzero(held), spec.held_out_drawing)
    captions, null, weights = Captions([], {}), None, None
    if needs_text(spec):
        encoder = load_encoder(spec, accelerator)
        captions = encode_captions(encoder, list(spec.prompts), dtype=getattr(torch, spec.data.text_dtype))
        null, weights = encode_null(encoder), fingerprint(encoder.model)
        encoder.close()
    report = [f"data: {count} samples passed from Python", *describe_split(spec, len(train), len(held_out))]
    prints = hash_ids([hashes[~held]]), hash_ids([hashes[held]])
    return Data(train, held_out, captions, null, [], *prints, weights, [], "\n".join(report))


def needs_text(spec: DataSpec) -> bool:
    """Whether samples passed from Python need a text encoder, too: for sampling prompts, or for a null caption."""
    return bool(spec.prompts) or spec.text.null != "buffer"


def _find_ids(source: "Source", count: int) -> list[str]:
    """Every sample's id, as far as known. A few samples are read, so that malformed ones show before any work."""
    if source.ids is not None:
        if len(source.ids) != count:
            raise InputError(f"data.ids: got {len(source.ids)}, expected one for each of {count} samples")
        name, times = Counter(source.ids).most_common(1)[0]
        if times > 1:
            raise InputError(f"data.ids: '{name}' is there {times} times; every sample needs its own id")
    some = {number: source.look(number) for number in sorted({0, count // 2, count - 1})}
    return [some.get(number, str(number)) for number in range(count)] if source.ids is None else list(source.ids)


@dataclass(frozen=True)
class Shown:
    """What `Drawing.common` needs to know of a sample."""

    id: str
    height: int
    width: int
    bucket: Bucket


class Source:
    """The data set passed from Python, read with every entry checked."""

    def __init__(self, given: TrainingData, spec: DataSpec):
        self.given, self.spec = given, spec
        self.by_epoch = bool(getattr(given, "by_epoch", False))
        self.ids, self.buckets = getattr(given, "ids", None), getattr(given, "buckets", None)

    def read(self, epoch: int, number: int) -> tuple[dict[str, Any], str]:
        """A sample as given, with its arrays as tensors, and its id.

        Raises:
            InputError: an entry is missing, unknown, or not what `TrainingSample` says.
        """
        where = f"data[{number}]"
        found = self.given[epoch, number] if self.by_epoch else self.given[number]
        if not isinstance(found, Mapping):
            raise InputError(f"{where}: got {say(found)}, expected a dict with caption and latents or pixels")
        known = TrainingSample.__annotations__
        if unknown := sorted(found.keys() - known.keys()):
            hint = did_you_mean(unknown[0], known)
            raise InputError(f"{where}: unknown entry '{unknown[0]}'{hint} (there are {', '.join(known)})")
        if ("latents" in found) == ("pixels" in found):
            raise InputError(f"{where}: expected one of latents and pixels, got {', '.join(found)}")
        sample = {name: _tensor(value) for name, value in found.items()}
        self._check_image(sample, where)
        self._check_caption(sample.get("caption"), where)
        for name in ("time", "drop"):
            if name in sample and not 0 <= float(sample[name]) < 1:
                raise InputError(f"{where}.{name}: got {say(sample[name])}, expected a number in [0, 1)")
        wide = [entry for entry in ("latents", "pixels", "noise", "posterior_noise") if entry in sample]
        sample |= {entry: sample[entry].float() for entry in wide}
        told = None if self.ids is None else self.ids[number]
        name = sample.get("id", str(number) if told is None else told)
        if not isinstance(name, str) or name != (told or name):
            raise InputError(f"{where}.id: got {say(name)}, expected a text{f', {told!r} as in ids' if told else ''}")
        return sample, name

    def look(self, number: int) -> str:
        """Read a sample and check its values, too → its id."""
        sample, name = self.read(0, number)
        if "pixels" in sample and sample["pixels"].abs().max() > 1.01:
            most = sample["pixels"].abs().max().item()
            raise InputError(f"data[{number}].pixels: values up to {most:g}, expected them in [-1, 1]")
        return name

    def latent(self, sample: Mapping[str, Any]) -> tuple[int, int, int]:
        """The shape of a sample's latents."""
        if "latents" in sample:
            return tuple(sample["latents"].shape)
        height, width = (side // self.spec.vae.downsample for side in sample["pixels"].shape[1:])
        return self.spec.vae.latent_channels, height, width

    def _check_image(self, sample: Mapping[str, Any], where: str) -> None:
        name = "latents" if "latents" in sample else "pixels"
        image, spec = sample[name], self.spec
        channels = spec.vae.latent_channels if name == "latents" else 3
        multiple = spec.patch_size * (1 if name == "latents" else spec.vae.downsample)
        if not isinstance(image, Tensor) or not image.is_floating_point():
            what = str(image.dtype).removeprefix("torch.") if isinstance(image, Tensor) else say(image)
            raise InputError(f"{where}.{name}: got {what}, expected a floating tensor ({channels}, h, w)")
        if image.ndim != 3 or image.shape[0] != channels:
            raise InputError(f"{where}.{name}: got shape {tuple(image.shape)}, expected ({channels}, h, w)")
        if image.shape[1] % multiple or image.shape[2] % multiple or not image.numel():
            raise InputError(
                f"{where}.{name}: got shape {tuple(image.shape)}, expected sides that are multiples of {multiple}"
            )
        for noise in ("noise", "posterior_noise"):
            shape = tuple(getattr(sample.get(noise), "shape", ()))
            if noise in sample and shape != self.latent(sample):
                raise InputError(f"{where}.{noise}: got shape {shape}, expected {self.latent(sample)}")

    def _check_caption(self, caption: Any, where: str) -> None:
        width, length = self.spec.caption_channels, self.spec.text.length
        if not isinstance(caption, Tensor) or not caption.is_floating_point():
            what = "none" if caption is None else f"a {type(caption).__name__}"
            raise InputError(f"{where}.caption: got {what}, expected text states (L, {width}), see TextEncoder.encode")
        if caption.ndim != 2 or caption.shape[1] != width:
            raise InputError(f"{where}.caption: got shape {tuple(caption.shape)}, expected (L, {width})")
        if not 1 <= len(caption) <= length:
            what = f"{len(caption)} tokens, more than text.length {length}" if len(caption) else "it has no tokens"
            raise InputError(f"{where}.caption: {what}")


class GivenDataset(Dataset):
    """Samples passed from Python, with missing random numbers drawn, by (epoch, index) keys; see `Batch`."""

    def __init__(self, source: Source, chosen: np.ndarray, drawing: Drawing):
        """`chosen` are the indices of the samples to use; `drawing` draws their random numbers."""
        self.source, self.chosen, self.drawing = source, chosen, drawing

    def __len__(self) -> int:
        return len(self.chosen)

    def __getitem__(self, key: Key) -> dict:
        epoch, number = key[0], int(self.chosen[key[1]])
        sample, name = self.source.read(epoch, number)
        latent = self.source.latent(sample)
        height, width = (sample["latents"] if "latents" in sample else sample["pixels"]).shape[1:]
        if "latents" in sample:
            height, width = (side * self.source.spec.vae.downsample for side in (height, width))
        draws = self.drawing(epoch, name, latent)
        shown = Shown(name, height, width, Bucket(height / width, height, width))
        arrays = self._arrays(sample, f"data[{number}]")
        made = self.drawing.common(draws, shown, arrays, sample.get("problem"))
        if "pixels" in sample:
            made["posterior_noise"] = self._posterior(draws, latent)
        for group in ("conditions", "targets", "draws"):
            made[group] = {**made[group], **{key: _tensor(value) for key, value in sample.get(group, {}).items()}}
        return made | {
            entry: value for entry, value in sample.items() if entry not in ("conditions", "targets", "draws")
        }

    def _posterior(self, draws: Draws, latent: tuple[int, int, int]) -> Tensor:
        if self.source.spec.data.posterior == "mean":
            return torch.zeros(latent)
        return draws.normal("posterior_noise", *latent)

    def _arrays(self, sample: Mapping[str, Any], where: str) -> dict[str, Tensor]:
        """The arrays that the configuration names; the sample must have them under their keys."""
        extras, found = self.drawing.extras, {}
        for group, wanted in (("conditions", extras.conditions), ("targets", extras.targets)):
            for key, what in wanted.items():
                if not isinstance(what, str):
                    continue
                if key not in sample.get(group, {}):
                    raise InputError(f"{where}.{group}: has no '{key}', which data.{group} of the configuration names")
                found[what] = sample[group][key]
        return found


def _tensor(value: Any) -> Any:
    return torch.from_numpy(value) if isinstance(value, np.ndarray) else value
