"""Shared by all tests: no network, few threads, and one rendered OpenMoji set."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# two threads in all, also for the processes that tests start: with pytest -n 2, one for each of the two
os.environ["OMP_NUM_THREADS"] = str(max(1, 2 // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))))

from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

from pixart.data.openmoji import build_openmoji
from runs import make_pictures, make_text_encoder
from runs import settings as run_settings

torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
# no deadlines, since the machine may be slow; derandomised, so that a failure can be reproduced
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


@pytest.fixture(scope="session")
def pictures(tmp_path_factory) -> Path:
    """A folder of a few images with captions; read only."""
    return make_pictures(tmp_path_factory.mktemp("data") / "pictures")


@pytest.fixture
def base(tmp_path, pictures, text_encoder) -> dict:
    """Settings of a tiny run on `pictures`."""
    return run_settings(tmp_path / "run", pictures, text_encoder)
