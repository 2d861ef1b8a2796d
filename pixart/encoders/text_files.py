"""Checks of an encoder's files, before transformers builds anything from them."""

import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from pixart.arguments import say
from pixart.encoders.tensor_files import find_variant, sniff
from pixart.errors import InputError
from pixart.files import inside, open_file, parse_json, read_json

CONFIG = "config.json"
MOST = 2**24  # maximum of any integer in a config
_COUNTS = re.compile("layer|block|expert|label|depth|adapter")  # settings that are numbers of modules to build


def read_encoder_config(source: str) -> Any:
    """transformers' config of an encoder in a folder, on the Hub or in its cache, after checking that the weights can
    belong to it.

    Raises:
        InputError: one of its files is not a regular file, its config claims more than its weights hold, or it names
            code to run.
        Exception: whatever transformers raises on missing or damaged files.
    """
    import transformers

    folder = _folder(source)
    weights: list[Path] = []
    if folder is not None:
        _check_kinds(folder)
    if folder is not None and (folder / CONFIG).exists():
        settings = read_json(folder / CONFIG, what="the encoder's config")
        weights = _weights(folder)
        tensors = sum(map(_count_tensors, weights)) if weights else MOST
        _check_numbers(settings, folder / CONFIG, tensors)
    config = transformers.AutoConfig.from_pretrained(source, trust_remote_code=False)
    if weights:
        with torch.device("meta"):
            network = transformers.AutoModelForTextEncoding.from_config(config, trust_remote_code=False)
        needed, size = sum(p.numel() for p in network.parameters()), sum(path.stat().st_size for path in weights)
        if needed > 2 * size:
            raise InputError(
                f"{folder / CONFIG}: describes {needed:,} weights, but the files beside it have {size:,} bytes; they "
                "are truncated or belong to another encoder: download them again"
            )
    return config


def _folder(source: str) -> Path | None:
    """The encoder's folder on this machine; None if it is not downloaded yet."""
    if Path(source).is_dir():
        return Path(source)
    from huggingface_hub import try_to_load_from_cache

    try:
        found = try_to_load_from_cache(source, CONFIG)
    except ValueError:  # not a Hub id: transformers will say so
        return None
    return Path(found).parent if isinstance(found, str) else None


def _check_kinds(folder: Path) -> None:
    for path in sorted(folder.iterdir()):
        if path.exists() and not path.is_file() and not path.is_dir():
            raise InputError(f"{path}: a FIFO or device, expected files of an encoder")


def _weights(folder: Path, *, variants: bool = True) -> list[Path]:
    """The weights file, or the shards that an index names; safetensors take precedence, as in transformers. A folder
    with none of these may hold a variant."""
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (folder / name).is_file():
            return [folder / name]
        if (index := folder / f"{name}.index.json").is_file():
            named = read_json(index).get("weight_map")
            try:
                shards = sorted({inside(file, "a shard") for file in named.values()})
            except (AttributeError, ValueError) as error:
                raise InputError(f"{index}: the index of the shards cannot be read ({error})") from None
            return [folder / shard for shard in shards if (folder / shard).is_file()]
    variant = find_variant(folder, ("model", "pytorch_model")) if variants else None
    return [] if variant is None or variant[0].suffix == ".json" else [variant[0]]


def variant_of(source: str) -> str | None:
    """The variant of an encoder's weights ("fp16"), if its folder has no others; what transformers calls it."""
    folder = _folder(source)
    if folder is None or _weights(folder, variants=False):
        return None
    found = find_variant(folder, ("model", "pytorch_model"))
    return None if found is None else found[1]


def _count_tensors(path: Path) -> int:
    """An upper bound of the number of tensors in a file."""
    if (sniff(path) == "safetensors") != (path.suffix == ".safetensors"):
        right = "pytorch_model.bin" if path.suffix == ".safetensors" else "model.safetensors"
        raise InputError(f"{path}: it is not what its suffix says; transformers goes by names: rename it to {right}")
    if path.suffix == ".safetensors":
        with open_file(path) as file:
            length = int.from_bytes(file.read(8), "little")
            try:
                return len(parse_json(file.read(min(length, path.stat().st_size))))
            except (TypeError, ValueError) as error:
                raise InputError(f"{path}: damaged ({error}); download it again") from None
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            return len(archive.infolist())
    return path.stat().st_size // 16


def _check_numbers(settings: dict, path: Path, tensors: int) -> None:
    """Refuse counts larger than the number of tensors, and other integers larger than any encoder has."""
    for name, value in _numbers(settings):
        most = max(tensors, 64) if _COUNTS.search(name) else MOST
        if abs(value) > most:
            raise InputError(f"{path}: {name} is {say(value)}, expected at most {most:,}: its weights do not hold more")
    for name in ("attn_implementation", "_attn_implementation"):
        if "/" in str(settings.get(name, "")):
            raise InputError(f"{path}: {name} names code on the Hub ({say(settings[name])}); remove it")


def _numbers(value: Any, name: str = "") -> Iterator[tuple[str, int]]:
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _numbers(item, f"{name}.{key}" if name else str(key))
    elif isinstance(value, list):
        for item in value:
            yield from _numbers(item, name)
    elif isinstance(value, int) and not isinstance(value, bool):
        yield name, value
