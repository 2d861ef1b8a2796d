"""The text encoder and VAE of a pipeline: fetching them from the Hub, and errors if they are missing or do not fit."""

import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from pixart.checkpoint import ModelCard
from pixart.encoders.text import TextEncoder
from pixart.errors import InputError


def fetch_parts(source: str | Path, revision: str | None, *, text: bool, vae: bool) -> None:
    """Download the text encoder and VAE of a pipeline on the Hub, so that they are found beside its transformer."""
    match = re.fullmatch(r"(\w[\w.-]*/\w[\w.-]*)(/transformer)?", str(source))
    if Path(source).exists() or not match:
        return
    from huggingface_hub import snapshot_download

    patterns = ["vae/config.json", "vae/diffusion_pytorch_model.safetensors"] if vae else []
    patterns += ["text_encoder/*.json", "text_encoder/*.safetensors", "tokenizer/*"] if text else []
    with suppress(OSError, ValueError):  # unreachable and not cached: loading the missing part will say so
        snapshot_download(match[1], revision=revision, allow_patterns=patterns)


@contextmanager
def loading_part(kind: str, option: str, source: str | Path, given: str | Path | None, named: str) -> Iterator[None]:
    """A context for loading a part of a pipeline, whose errors say where it was looked for and how to give another."""
    try:
        yield
    except InputError as error:
        if given is not None:
            places = f"'{given}', as given"
        elif Path(named).exists():  # part of the source
            places = f"'{named}'"
        else:
            places = f"{source} itself, which holds none, and '{named}'"
        flag = "--" + option.replace("_", "-")
        raise InputError(f"no {kind}: looked for {places}: {error}. Give another with {option}= or {flag}") from None


def check_width(text: TextEncoder, card: ModelCard) -> None:
    """Refuse a text encoder whose states have another width than the model's captions."""
    if text.width != card.model.caption_channels:
        raise InputError(
            f"text encoder '{card.text.model}' has states of width {text.width}, but the model takes captions of width "
            f"{card.model.caption_channels}; give the encoder that it was trained with"
        )
