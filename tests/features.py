"""Small feature stores, made quickly from a few images by the identity or a tiny VAE."""

from pathlib import Path

import torch

from pixart.features import Result, Share, extract
from runs import build


def make_store(base: dict, folder: Path, share: Share | None = None, **changes) -> Result:
    """`base` as `runs.settings` has it → the store of its pictures at `folder`."""
    config = build(base, data__features=str(folder), **changes)
    return extract(
        config.data, config.data_spec.table, config.vae, config.text, config.extract, prompts=config.prompts,
        share=share, say=lambda _: None,
    )  # fmt: skip


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a store by its name, manifest and all."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file() and path.name[0] != "."}


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a, b)
