"""Makes a written model independent of this machine: its text encoder and VAE are named by public ids, or copied."""

import os
import re
import shutil
from dataclasses import replace
from pathlib import Path

from pixart.checkpoint.cards import T5, TEXT, VAE
from pixart.checkpoint.files import CONFIG, ModelCard
from pixart.checkpoint.locate import STEM
from pixart.encoders.text import TextConfig, TextEncoder
from pixart.encoders.vae import VaeConfig
from pixart.encoders.vae_files import find_weights, read_settings
from pixart.errors import InputError

_CACHED = re.compile(r"models--([^/\\]+)[/\\]snapshots[/\\][^/\\]+(?:[/\\](.+))?$")
_WORDS, _OPTIONS = {TEXT: "text encoder", VAE: "VAE"}, {TEXT: "--text-encoder", VAE: "--vae"}


def local_parts(card: ModelCard) -> dict[str, str]:
    """The parts that exist only on this machine: folder name in a pipeline → the card's name of the part."""
    parts = {TEXT: card.text.model} | ({VAE: card.vae.source} if card.vae.kind == "kl" else {})
    return {part: name for part, name in parts.items() if _public(name, part) is None}


def portable(card: ModelCard, *, copied: bool = False) -> ModelCard:
    """A card without paths of this machine.

    A part in the Hub's cache is named by its Hub id. A part that exists only here is named ./NAME, which cannot be a
    Hub id: NAME is the name of its folder, or if it is `copied` beside the model, that of the copy.
    """
    names = {part: f"./{part if copied else Path(name).name}" for part, name in local_parts(card).items()}
    text = names.get(TEXT) or _public(card.text.model, TEXT)
    card = replace(card, text=replace(card.text, model=text))
    if card.vae.kind == "kl":
        card = replace(card, vae=replace(card.vae, source=names.get(VAE) or _public(card.vae.source, VAE)))
    return card


def describe_parts(parts: dict[str, str], *, copied: bool) -> list[str]:
    """What was done with `local_parts`, in lines of text."""
    if not parts:
        return []
    if copied:
        return ["with its " + " and its ".join(f"{_WORDS[part]} ({name})" for part, name in parts.items())]
    names = " and ".join(f"./{Path(name).name}" for name in parts.values())
    options = " and ".join(_OPTIONS[part] for part in parts)
    return [f"its card names {names}: give them with {options} when sampling"]


def check_parts(parts: dict[str, str]) -> None:
    """Refuse to copy parts that do not exist."""
    for part, name in parts.items():
        if not os.path.exists(name):
            raise InputError(
                f"the model's card names the {_WORDS[part]} {name}, which is not here: give it, or a Hub id, with "
                f"{_OPTIONS[part]}, or leave what is on one machine alone out of a model of ours with --no-parts"
            )


def copy_text(config: TextConfig, encoder: Path, tokenizer: Path) -> None:
    """Write a text encoder, in the dtype of its files, and its tokenizer into two folders, which may be the same."""
    try:
        text = TextEncoder.load(config, dtype="auto")
    except InputError as error:
        raise InputError(f"{error}; give one with --text-encoder") from None
    text.tokenizer.save_pretrained(tokenizer)
    text.model.save_pretrained(encoder)


def copy_vae(source: str, scale: float | None, folder: Path) -> None:
    """Copy a VAE's config and weights.

    Raises:
        InputError: nothing there, or its scaling factor is not `scale`.
    """
    weights = find_weights(source, None)
    own = VaeConfig.from_diffusers(read_settings(weights.parent / CONFIG)).scaling_factor
    if scale is not None and abs(own / scale - 1) > 1e-6:
        raise InputError(f"{weights}: scaling factor {own}, the model's latents have {scale}: another VAE")
    folder.mkdir()
    shutil.copyfile(weights.parent / CONFIG, folder / CONFIG)
    shutil.copyfile(weights, folder / f"{STEM}{weights.suffix}")


def _public(name: str, part: str) -> str | None:
    """The name by which other machines find a part: a Hub id or pip:PACKAGE; None for a path on this machine."""
    if not (os.path.exists(name) or os.path.isabs(name) or name.startswith(("./", "../"))):
        return name
    if not (match := _CACHED.search(os.path.abspath(name))):
        return None
    repository, inside = match[1].replace("--", "/", 1), match[2]
    if part == VAE or inside is None:
        return f"{repository}/{inside}" if inside else repository
    return T5 if repository.startswith("PixArt-alpha/") else None  # transformers reads no encoder in a subfolder
