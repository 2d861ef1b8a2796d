"""What a run minimises: a module that draws x_t, calls the network as often as it likes, and returns named terms."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from pixart.diffusion.losses import diffusion_loss
from pixart.diffusion.schedule import DiffusionConfig, make_schedule
from pixart.registry import Registry
from pixart.seeds import Draw

Network = Callable[..., Tensor]  # network(x_t, t, **example.inputs)


@dataclass
class Example:
    """A batch of B images as an objective sees it."""

    x0: Tensor  # (B, C, h, w) scaled latents
    noise: Tensor  # (B, C, h, w) standard normal
    time: Tensor  # (B,) uniform in [0, 1); the schedule makes times of it
    inputs: dict[str, Tensor]  # what the network takes besides x_t and t; captions are dropped already
    null: Tensor  # (L, caption_channels) the null caption
    targets: dict[str, Tensor] = field(default_factory=dict)  # arrays by `data.targets`, (B, …) each
    draws: dict[str, Tensor] = field(default_factory=dict)  # the objective's own random numbers, (B, …) each
    pixels: Tensor | None = None  # (B, 3, H, W) in [-1, 1]; none where a feature store gave the latents


class Objective(nn.Module):
    """The contract of an objective.

    `trained` are modules of its own that are optimised, averaged and saved like the network (a projector, learned
    weights of the loss); `state` those that are saved and sharded but get no gradient (a teacher, a target average).
    Everything else it holds is made anew at every start. Options of its own are keyword arguments of its constructor,
    filled from `objective.options`.
    """

    draws: Mapping[str, Draw] = {}  # random numbers that it needs of every sample

    def __init__(self, config: DiffusionConfig, network: nn.Module):
        """`network` is the one that will be trained, with its weights at the start of the run."""
        super().__init__()
        self.config, self.schedule = config, make_schedule(config)
        self.trained, self.state = nn.ModuleDict(), nn.ModuleDict()

    def forward(self, network: Network, example: Example) -> dict[str, Tensor]:
        """Terms (B,) by name: "loss" is minimised, all are logged."""
        raise NotImplementedError(f"{type(self).__name__} has no forward")

    def after_step(self, network: nn.Module, applied: Tensor) -> None:
        """Called after every optimizer step, without gradients; `applied` is a truth value on the device: whether the
        weights moved. A target average moves here, see `pixart.train.ema.update_ema`."""


OBJECTIVES: Registry[type[Objective]] = Registry("objective.name")
GIVEN = "python:"  # begins the name of one that `train` was given as an object, which no registry knows


@OBJECTIVES.register("denoising")
class Denoising(Objective):
    """The loss of DDPM and its kin, as `DiffusionConfig` says: one call of the network at one time a sample."""

    def forward(self, network: Network, example: Example) -> dict[str, Tensor]:
        t = self.schedule.draw_times(example.time, self.config)
        x_t = self.schedule.add_noise(example.x0, example.noise, t)
        output = network(x_t, t, **example.inputs)
        return diffusion_loss(self.schedule, self.config, output, example.x0, example.noise, t)


class TrainingModule(nn.Module):
    """The network and the objective as one module, which the distributed wrapper goes round: so every gradient is
    reduced, whichever of the two a weight belongs to."""

    def __init__(self, network: nn.Module, objective: Objective):
        super().__init__()
        self.network, self.objective = network, objective

    def forward(self, example: Example) -> dict[str, Tensor]:
        return self.objective(self.network, example)


@dataclass(frozen=True)
class ObjectiveConfig:
    """What a run minimises; sampling does not depend on it."""

    name: str = "denoising"  # a key of OBJECTIVES; of an object that `train` was given, GIVEN and where it is from
    options: dict[str, Any] = field(default_factory=dict)  # keyword arguments of its constructor
