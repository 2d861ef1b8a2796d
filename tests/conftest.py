"""What all tests share: no network, few threads, and one rendered OpenMoji set."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

from pixart.data.openmoji import build_openmoji
from runs import make_text_encoder

torch.set_num_threads(2)
# a slow or busy machine must not fail a property, and a failure must come again
settings.register_profile(
    "pixart", deadline=None, derandomize=True, database=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("pixart")


@pytest.fixture(scope="session")
def emoji_folder(tmp_path_factory) -> Path:
    """The 1,918 OpenMoji at 32 px with their `metadata.jsonl`; read only."""
    return build_openmoji(tmp_path_factory.mktemp("data") / "openmoji", side=32)


@pytest.fixture(scope="session")
def text_encoder(tmp_path_factory) -> Path:
    """A tiny random text encoder; read only."""
    return make_text_encoder(tmp_path_factory.mktemp("text") / "encoder")
