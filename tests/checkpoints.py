"""Model files as written by others: official .pth, diffusers folders, a Hub cache."""

import json
import shutil
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from pixart.checkpoint.files import ModelCard, save_model
from pixart.checkpoint.keys import NULL_CAPTION, to_diffusers
from pixart.files import write_folder
from pixart.model import PixArt
from toy import tiny_model

HEADS = {"num_heads": 4}  # of the tiny models: no file tells it, 48 being no preset's width


def official(model: PixArt, *, table: bool = True) -> dict[str, Tensor]:
    """A state dict as the authors' code writes it."""
    side = model.config.latent_size // model.config.patch_size
    positions = {"pos_embed": model.positions(side, side)[None]} if table else {}
    return {**positions, **model.state_dict()}


def save_official(path: Path, model: PixArt, **options) -> Path:
    torch.save({"state_dict": official(model, **options)}, path)
    return path


def save_run(run: Path, steps: list[int]) -> Path:
    """A run of ours with whole checkpoints: averaged weights of seed `step`, raw ones of seed 1000 + `step`."""

    def fill(folder: Path, step: int) -> None:
        for kind, model in (("ema", tiny_model(seed=step)), ("model", tiny_model(seed=1000 + step))):
            save_model(folder / kind, model.state_dict(), ModelCard(model.config))

    for step in steps:
        write_folder(run / "checkpoints" / f"step_{step:08d}", partial(fill, step=step))
    return run


def in_diffusers(model: PixArt, **settings):
    """The same network, built by diffusers."""
    import diffusers

    c = model.config
    transformer = diffusers.PixArtTransformer2DModel(**{
        "num_attention_heads": c.num_heads, "attention_head_dim": c.hidden_size // c.num_heads,
        "in_channels": c.in_channels, "out_channels": c.out_channels, "num_layers": c.depth,
        "cross_attention_dim": c.hidden_size, "sample_size": c.latent_size, "patch_size": c.patch_size,
        "caption_channels": c.caption_channels, "interpolation_scale": c.position_scale,
        "use_additional_conditions": c.micro_conditions, **settings,
    })  # fmt: skip
    theirs = to_diffusers(model.state_dict(), c.depth, micro_conditions=c.micro_conditions)
    transformer.load_state_dict(theirs, strict=True)
    return transformer.eval()


def edit_json(path: Path, **changes) -> None:
    """Change keys of a JSON file; None takes one out."""
    settings = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in settings.items() if value is not None}))


def put_in_hub_cache(folder: Path, cache: Path, monkeypatch, revision: str = "main", commit: str = "0" * 40) -> None:
    """Lay a folder down as the Hub repository owner/name in a cache, and go offline."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    repository = cache / "models--owner--name"
    shutil.copytree(folder, repository / "snapshots" / commit)
    (repository / "refs").mkdir(exist_ok=True)
    (repository / "refs" / revision).write_text(commit)


def assert_same_weights(model: PixArt, reference: PixArt, *, null: bool = True) -> None:
    """Bit for bit; without `null`, the null caption must be the zeros that stand for none."""
    found, expected = model.state_dict(), reference.state_dict()
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        if name == NULL_CAPTION and not null:
            assert not found[name].any()
        else:
            assert found[name].dtype == tensor.dtype, name
            assert torch.equal(found[name], tensor), name
