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
from runs import make_text_encoder

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
