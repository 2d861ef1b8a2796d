"""What a source means: a model of ours, a transformer of diffusers, or a file; on disk or on the Hub."""

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pixart.checkpoint.files import CONFIG, WEIGHTS, ModelCard, find_model, read_card
from pixart.checkpoint.weights import Weights, read_index
from pixart.errors import InputError
from pixart.files import read_json

STEM = "diffusion_pytorch_model"
TRANSFORMER_FILES = (
    f"{STEM}.safetensors", f"{STEM}.safetensors.index.json", f"{STEM}.bin", f"{STEM}.bin.index.json",
)  # fmt: skip
PIPELINE = "model_index.json"
SIDE_NULL, SIDE_CARD = "null_caption.safetensors", "pixart.json"  # what diffusers' format has no place for
CLASSES = ("PixArtTransformer2DModel", "Transformer2DModel")  # the second wrote the folders of before 2024-05
SUFFIXES = (".pth", ".pt", ".ckpt", ".bin", ".safetensors", ".index.json")


@dataclass(frozen=True)
class Found:
    """A model's files. `settings` are diffusers' config.json; `home` may hold its text encoder and VAE: our model's own
    folder, or that of diffusers' pipeline around a transformer."""

    name: str  # what was asked for, for errors
    kind: Literal["ours", "foreign"]
    weights: Weights
    card: ModelCard | None = None
    settings: dict | None = None
    home: Path | None = None


def locate(source: str | Path, *, ema: bool = True, revision: str | None = None) -> Found:
    """Find a model.

    Args:
        source: a file; a folder (ours, a run, its checkpoints or one of them, diffusers' transformer or pipeline);
            or on the Hub owner/name, owner/name/subfolder or owner/name/file.pth, from the cache if offline.
        revision: of the Hub repository: a branch, tag or commit.

    Raises:
        InputError: nothing there, or nothing that is a PixArt; says what was there instead.
    """
    path = Path(os.path.expanduser(source))
    try:
        if not path.exists():
            path = _from_hub(str(source), revision)
        elif revision is not None:
            raise InputError(f"{source} is on disk, where there is no revision '{revision}'")
        return _in_file(path, str(source), ema) if path.is_file() else _in_folder(path, str(source), ema)
    except PermissionError as error:
        raise InputError(f"{source}: cannot be read ({error.strerror}: {error.filename})") from None


def _in_file(path: Path, name: str, ema: bool) -> Found:
    beside = path.parent / CONFIG
    settings = read_json(beside) if beside.is_file() else {}
    if path.name == WEIGHTS and "model" in settings:
        return Found(name, "ours", Weights((path,)), card=read_card(path.parent), home=path.parent)
    if settings.get("_class_name") in CLASSES:
        return _transformer(path.parent, name, path, ema)
    files = read_index(path) if path.name.endswith(".index.json") else (path,)
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
        raise InputError(f"{name}: a {', '.join(settings['architectures'] or ['model'])} of transformers, not a PixArt")
    if folder.absolute().name == "checkpoints" and any(folder.glob("step_*")):
        folder = folder.absolute().parent  # the run
    ours = [folder / WEIGHTS, folder / "ema" / WEIGHTS, folder / "model" / WEIGHTS]
    if (folder / "checkpoints").is_dir() or any(path.exists() for path in ours):
        model = find_model(folder, ema=ema)
        return Found(name, "ours", Weights((model / WEIGHTS,)), card=read_card(model), home=model)
    raise InputError(f"no model at {name}: {_what_else(folder)}")


def _transformer(folder: Path, name: str, file: Path | None, ema: bool) -> Found:
    settings = read_json(folder / CONFIG)
    if (kind := settings.get("_class_name")) not in CLASSES:
        hint = "; a VAE is given as vae.source, or --vae" if kind == "AutoencoderKL" else ""
        raise InputError(f"{name}: {folder / CONFIG} is of a {kind}, expected {CLASSES[0]}{hint}")
    file = file or next((folder / f for f in TRANSFORMER_FILES if (folder / f).is_file()), None)
    if file is None:
        raise InputError(f"no model at {name}: {_what_else(folder)}")
    files = read_index(file) if file.name.endswith(".index.json") else (file,)
    side = (folder / SIDE_NULL,) if (folder / SIDE_NULL).is_file() else ()
    card = read_card(folder, SIDE_CARD) if (folder / SIDE_CARD).is_file() else None
    pipeline = folder.parent if (folder.parent / PIPELINE).is_file() else None
    return Found(name, "foreign", Weights((*files, *side), ema), card, settings, pipeline)


def _what_else(folder: Path) -> str:
    """Why a folder is no model, by what is in it."""
    files = sorted(path.name for path in folder.iterdir())
    if not files:
        return "the folder is empty"
    if shards := [file for file in files if "-of-" in file]:
        return f"holds shards ({shards[0]}, …) but no index ({TRANSFORMER_FILES[1]}); fetch it"
    if any(file.endswith(".distcp") for file in files):
        return (
            "a sharded torch.distributed checkpoint; gather it first: "
            "python -m torch.distributed.checkpoint.format_utils dcp_to_torch FOLDER weights.pth"
        )
    if named := [file for file in files if file.endswith(SUFFIXES)]:
        return f"the folder holds {', '.join(named[:6])}; name the file that you mean"
    expected = f"{WEIGHTS} and {CONFIG}, a run's checkpoints, or diffusers' {TRANSFORMER_FILES[0]} and {CONFIG}"
    return f"expected {expected}; found {', '.join(files[:6])}"


def _from_hub(source: str, revision: str | None) -> Path:
    """A Hub repository's file or folder in the local cache, downloaded where the Hub can be reached."""
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
        second = [f"{STEM}.bin", f"{STEM}-*-of-*.bin", f"{STEM}.bin.index.json"]
        for weights in (first, second):  # the older files only where there are no others
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
