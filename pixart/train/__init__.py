"""A training run: its configuration, set-up, loop and log. Nothing that compares runs, and no command, may enter it."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pixart.data.config import DataConfig
    from pixart.data.given import TrainingData, TrainingSample
    from pixart.diffusion.objective import Example, Objective, ObjectiveConfig
    from pixart.train.config import LoopConfig, OptimizerConfig, TrainConfig
    from pixart.train.loop import RunResult, train
    from pixart.train.step import StepResult

_PLACES = {
    "DataConfig": "pixart.data.config",
    "Example": "pixart.diffusion.objective",
    "LoopConfig": "pixart.train.config",
    "Objective": "pixart.diffusion.objective",
    "ObjectiveConfig": "pixart.diffusion.objective",
    "OptimizerConfig": "pixart.train.config",
    "RunResult": "pixart.train.loop",
    "StepResult": "pixart.train.step",
    "TrainConfig": "pixart.train.config",
    "TrainingData": "pixart.data.given",
    "TrainingSample": "pixart.data.given",
    "train": "pixart.train.loop",
}

__all__ = [
    "train",
    "TrainConfig",
    "DataConfig",
    "LoopConfig",
    "OptimizerConfig",
    "ObjectiveConfig",
    "TrainingData",
    "TrainingSample",
    "Objective",
    "Example",
    "StepResult",
    "RunResult",
]


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module 'pixart.train' has no attribute '{name}'")
    return getattr(importlib.import_module(_PLACES[name]), name)


def __dir__() -> list[str]:
    return __all__
