"""What the caller of `train` passes from Python: samples, a network, an objective; checked before any work."""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace

import torch
from torch import nn

from pixart.arguments import say
from pixart.checkpoint.files import compare_shapes
from pixart.data.given import TrainingData, check_settings
from pixart.diffusion.objective import GIVEN, Objective, ObjectiveConfig
from pixart.errors import InputError
from pixart.model.pixart import PixArt, PixArtConfig
from pixart.train.config import TrainConfig

MakeObjective = Callable[[PixArt], Objective]


@dataclass(frozen=True)
class Given:
    """Objects that replace the configuration's; None where the configuration decides."""

    data: TrainingData | None = None
    model: PixArt | None = None
    objective: Objective | MakeObjective | None = None

    @property
    def names(self) -> list[str]:
        return [field.name for field in fields(self) if getattr(self, field.name) is not None]

    def settle(self, config: TrainConfig) -> TrainConfig:
        """The configuration with the given network's config and the given objective's name filled in.

        Raises:
            InputError: the configuration contradicts what is given, or a given object cannot be used for training.
        """
        if self.data is not None:
            _check_data(self.data, config)
        if self.model is not None:
            config = replace(config, model=_check_model(self.model, config))
        if self.objective is not None:
            config = replace(config, objective=_name_objective(self.objective, config))
        elif config.objective.name.startswith(GIVEN):
            raise InputError(
                f"objective.name: {config.objective.name.removeprefix(GIVEN)} was given to train() as an object; give "
                "it again, as train(config, objective=…)"
            )
        return config

    def make_objective(self, network: PixArt) -> Objective:
        """The given objective, for `network`, which will be trained."""
        made = self.objective if isinstance(self.objective, Objective) else self.objective(network)
        if not isinstance(made, Objective):
            raise InputError(f"objective: the function returned {say(made)}, expected an Objective")
        return made


def _check_data(data: TrainingData, config: TrainConfig) -> None:
    if not hasattr(data, "__len__") or not hasattr(data, "__getitem__"):
        raise InputError(f"data: got {say(data)}, expected a map-style data set, with __len__ and __getitem__")
    check_settings(config.data)


def _check_model(model: PixArt, config: TrainConfig) -> PixArtConfig:
    if config.init_from is not None:
        raise InputError(f"init_from is {config.init_from}, but model also gives weights to start from; leave one out")
    own = model.config
    differing = [f.name for f in fields(own) if getattr(own, f.name) != getattr(config.model, f.name)]
    if differing and config.model != PixArtConfig():
        said = "; ".join(f"{name} {getattr(own, name)}, {getattr(config.model, name)}" for name in differing)
        raise InputError(
            f"model: differs from config.model ({said} in the configuration); leave config.model out, or make it equal"
        )
    if other := {parameter.dtype for parameter in model.parameters()} - {torch.float32}:
        kind = str(min(other, key=str)).removeprefix("torch.")
        raise InputError(f"model: has weights in {kind}, expected float32: model.float(); see train.mixed_precision")
    with torch.device("meta"):
        plain = PixArt(own)
    shapes = ({name: tuple(t.shape) for name, t in m.state_dict().items()} for m in (plain, model))
    if difference := compare_shapes(*shapes):
        raise InputError(
            f"model: its weights do not match its config, so its files could not be loaded; {difference}. Register the "
            "variant, see pixart.extensions"
        )
    return own


def _name_objective(objective: Objective | MakeObjective, config: TrainConfig) -> ObjectiveConfig:
    """A name for the given objective that no registry has, so that resuming the run without the object is refused."""
    if isinstance(objective, type):
        name = objective.__name__
        raise InputError(
            f"objective: got the class {name}, expected an instance, or a function of the network that makes it: "
            f"lambda network: {name}(config.diffusion, network)"
        )
    function = getattr(objective, "func", objective)  # unwrap a functools.partial
    origin = type(objective) if isinstance(objective, nn.Module) else function
    name = f"{GIVEN}{origin.__module__}.{getattr(origin, '__qualname__', type(origin).__qualname__)}"
    if config.objective not in (ObjectiveConfig(), ObjectiveConfig(name)):
        raise InputError(
            f"objective: the configuration names '{config.objective.name}', but another was passed from Python; leave "
            "one out"
        )
    return ObjectiveConfig(name)
