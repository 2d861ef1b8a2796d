"""Finds the files of a source: a model in our format, a diffusers transformer, or a single file; on disk or the Hub."""

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pixart.arguments import say
from pixart.checkpoint.files import CONFIG, WEIGHTS, ModelCard, find_model, read_card
from pixart.checkpoint.foreign import SUFFIXES, what_else
from pixart.checkpoint.weights import Weights, read_index
from pixart.encoders.tensor_files import find_variant
from pixart.errors import InputError
from pixart.files import read_json

STEM = "diffusion_pytorch_model"
TRANSFORMER_FILES = (
    f"{STEM}.safetensors",
    f"{STEM}.safetensors.index.json",
    f"{STEM}.bin",
    f"{STEM}.bin.index.json",
)
PIPELINE = "model_index.json"
SIDE_NULL, SIDE_CARD = "null_caption.safetensors", "pixart.json"  # content that diffusers' format cannot hold
CLASSES = ("PixArtTransformer2DModel", "Transformer2DModel")  # the second in folders written before 2024-05
INDEX = re.compile(r"\.index(\.[\w-]+)?\.json$")  # of shards, perhaps of a variant


@dataclass(frozen=True)
class Found:
    """A model's files. `settings` is diffusers' config.json; `home` is the folder that may contain text encoder and
    VAE: that of a model in our format, or of the diffusers pipeline around a transformer."""

    name: str  # the source as given, for messages
    kind: Literal["ours", "foreign"]
    weights: Weights
    card: ModelCard | None = None
    settings: dict | None = None
    home: Path | None = None


def locate(source: str | Path, *, ema: bool = True, revision: str | None = None) -> Found:
    """Find a model's files.

    Args:
        source: a file; a folder (a model, a run, its checkpoints or one of them, diffusers' transformer or pipeline);
            or on the Hub owner/name, owner/name/subfolder or owner/name/file.pth, from the cache if offline.
        ema: whether to choose the averaged weights if there are averaged and raw ones.
        revision: of the Hub repository: a branch, tag or commit.

    Raises:
        InputError: nothing there, or no model; says what was found instead.
    """
    path = Path(os.path.expanduser(source))
    try:
        if not path.exists():
            path = _from_hub(str(source), revision)
        elif revision is not None:
            raise InputError(f"{source} is on disk, where there is no revision {say(revision)}")
        if not path.is_file() and not path.is_dir():
            raise InputError(f"{source}: a FIFO or device, expected a file or folder of weights")
        return _in_file(path, str(source), ema) if path.is_file() else _in_folder(path, str(source), ema)
    except (PermissionError, NotADirectoryError) as error:
        raise InputError(f"{source}: cannot be read ({error.strerror}: {error.filename})") from None


def _in_file(path: Path, name: str, ema: bool) -> Found:
    beside = path.parent / CONFIG
    settings = read_json(beside) if beside.is_file() else {}
    if path.name == WEIGHTS and "model" in settings:
        return Found(name, "ours", Weights((path,)), card=read_card(path.parent), home=path.parent)
    if settings.get("_class_name") in CLASSES:
        return _transformer(path.parent, name, path, ema)
    files = read_index(path) if INDEX.search(path.name) else (path,)
    return Found(name, "foreign", Weights(files, ema))


def _in_folder(folder: Path, name: str, ema: bool) -> Found:
    if (folder / PIPELINE).is_file() or (folder / "transformer" / CONFIG).is_file():
        if not (folder / "transformer").is_dir():
            kind = read_json(folder / PIPELINE).get("_class_name")
            raise InputError(f"{name}: a pipeline ({kind}) without a transformer folder; PixArt's has one")
        return _transformer(folder / "transformer", name, None, ema)
    settings = read_json(folder / CONFIG) if (folder / CONFIG).is_file() else {}
    if "_class_name" in settings:
        return _transformer(folder, name, None, ema)
    if "architectures" in settings:
        kinds = settings["architectures"] if isinstance(settings["architectures"], list) else []
        raise InputError(f"{name}: a {', '.join(map(str, kinds)) or 'model'} of transformers, not a PixArt")
    if folder.absolute().name == "checkpoints" and any(folder.glob("step_*")):
        folder = folder.absolute().parent  # the run
    ours = [folder / WEIGHTS, folder / "ema" / WEIGHTS, folder / "model" / WEIGHTS]
    alone = ours[0].exists() and not (folder / CONFIG).exists()  # weights that another tool wrote under this name
    if not alone and ((folder / "checkpoints").is_dir() or any(path.exists() for path in ours)):
        model = find_model(folder, ema=ema)
        return Found(name, "ours", Weights((model / WEIGHTS,)), card=read_card(model), home=model)
    raise InputError(f"no model at {name}: {what_else(folder)}")


def _transformer(folder: Path, name: str, file: Path | None, ema: bool) -> Found:
    settings = read_json(folder / CONFIG)
    if settings.get("caption_channels", 0) is None:
        raise InputError(
            f"{name}: its config.json says caption_channels null, by which diffusers builds a transformer without the "
            "projection of captions that every PixArt has; another model, or a damaged config"
        )
    if (kind := settings.get("_class_name")) not in CLASSES:
        hint = "; a VAE is given as vae.source, or --vae" if kind == "AutoencoderKL" else ""
        raise InputError(f"{name}: {folder / CONFIG} is of a {kind}, expected {CLASSES[0]}{hint}")
    file = file or next((folder / f for f in TRANSFORMER_FILES if (folder / f).is_file()), None)
    if file is None and (variant := find_variant(folder, [STEM])) is not None:
        file = variant[0]
    if file is None:
        raise InputError(f"no model at {name}: {what_else(folder)}")
    files = read_index(file) if INDEX.search(file.name) else (file,)
    side = (folder / SIDE_NULL,) if (folder / SIDE_NULL).is_file() else ()
    card = read_card(folder, SIDE_CARD) if (folder / SIDE_CARD).is_file() else None
    pipeline = folder.parent if (folder.parent / PIPELINE).is_file() else None
    return Found(name, "foreign", Weights((*files, *side), ema), card, settings, pipeline)


def _from_hub(source: str, revision: str | None) -> Path:
    """A Hub repository's file or folder in the local cache, downloaded if the Hub can be reached."""
    match = re.fullmatch(r"(\w[\w.-]*/\w[\w.-]*)(?:/(.+))?", source)
    if not match or (source.count("/") == 1 and source.endswith(SUFFIXES)):
        raise InputError(f"no model at {source}: no such file or folder, and not a Hub id (owner/name)")
    repository, inside = match[1], match[2] or ""
    from huggingface_hub import hf_hub_download, snapshot_download

    try:
        if inside.endswith(SUFFIXES):
            return Path(hf_hub_download(repository, inside, revision=revision))
        roots = [f"{inside}/" if inside else "", f"{inside}/transformer/" if inside else "transformer/"]
        beside = ["vae/config.json", "scheduler/scheduler_config.json"]
        if inside:
            beside.append(str(Path(inside).parent / PIPELINE))
        names = [CONFIG, PIPELINE, WEIGHTS, SIDE_NULL, SIDE_CARD]
        first = [f"{STEM}.safetensors", f"{STEM}-*-of-*.safetensors", f"{STEM}.safetensors.index.json"]
        variants = [f"{STEM}.*.safetensors", f"{STEM}.*-*-of-*.safetensors", f"{STEM}.safetensors.index.*.json"]
        second = [f"{STEM}.bin", f"{STEM}-*-of-*.bin", f"{STEM}.bin.index.json"]
        for weights in (first, second, variants):  # .bin files only if there are no safetensors
            patterns = [root + name for root in roots for name in (*names, *weights)] + beside
            folder = Path(snapshot_download(repository, revision=revision, allow_patterns=patterns)) / inside
            held = [folder / place / name for place in ("", "transformer") for name in (*TRANSFORMER_FILES, WEIGHTS)]
            if any(file.is_file() for file in held):
                break
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"no model at {source}: not on disk, and not on the Hub or in its cache: {reason}") from None
    if not folder.is_dir():
        raise InputError(f"no model at {source}: the repository {repository} has no folder '{inside}'")
    return folder
