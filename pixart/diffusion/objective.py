"""Training objectives: modules that build x_t, call the network as often as they need, and return named loss terms."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from pixart.diffusion.contrast import contrast
from pixart.diffusion.losses import diffusion_loss
from pixart.diffusion.schedule import DiffusionConfig, make_schedule
from pixart.diffusion.uncertainty import Uncertainty
from pixart.registry import Registry
from pixart.seeds import Draw

Network = Callable[..., Tensor]  # network(x_t, t, **example.inputs)


@dataclass
class Example:
    """A batch of B images as an objective sees it."""

    x0: Tensor  # (B, C, h, w) scaled latents
    noise: Tensor  # (B, C, h, w) standard normal
    time: Tensor  # (B,) uniform in [0, 1); `Schedule.draw_times` maps it to times
    inputs: dict[str, Tensor]  # the network's inputs besides x_t and t; caption dropout has been applied
    null: Tensor  # (L, caption_channels) the null caption
    targets: dict[str, Tensor] = field(default_factory=dict)  # the arrays named in `data.targets`, (B, …) each
    draws: dict[str, Tensor] = field(default_factory=dict)  # the objective's own random numbers, (B, …) each
    pixels: Tensor | None = None  # (B, 3, H, W) in [-1, 1]; None if the latents come from a feature store


class Objective(nn.Module):
    """Base class of training objectives.

    Modules in `trained` are optimised, averaged and saved like the network (a projector, learned loss weights); those
    in `state` are saved and sharded but not optimised (a teacher, a target average). All other attributes are built
    anew whenever a run starts or resumes. Further keyword arguments of a subclass's constructor are filled from
    `objective.options`.
    """

    draws: Mapping[str, Draw] = {}  # the random numbers it needs for every sample, by name

    def __init__(self, config: DiffusionConfig, network: nn.Module):
        """`network` is the network to be trained, with its weights at the start of the run."""
        super().__init__()
        self.config, self.schedule = config, make_schedule(config)
        self.trained, self.state = nn.ModuleDict(), nn.ModuleDict()

    def forward(self, network: Network, example: Example) -> dict[str, Tensor]:
        """Loss terms (B,) by name: "loss" is minimised, all are logged."""
        raise NotImplementedError(f"{type(self).__name__} has no forward")

    @classmethod
    def missing(cls, options: Mapping[str, Any], targets: Collection[str], *, pixels: bool) -> str | None:
        """What an objective with these options needs and the data does not have, as one line; None if nothing.

        A run asks before it loads anything. `targets` are the names in `data.targets`; `pixels` is whether the data are
        images and not a feature store.
        """
        return None

    def after_step(self, network: nn.Module, applied: Tensor) -> None:
        """Called after every optimizer step, under `torch.no_grad`, e.g. to update a target average
        (`pixart.train.ema.update_ema`). `applied` is a boolean tensor on the device: whether the step was applied, not
        skipped because of a non-finite gradient."""


OBJECTIVES: Registry[type[Objective]] = Registry("objective.name")
GIVEN = "python:"  # prefix of the recorded name of an objective that was passed to `train` as an object


@OBJECTIVES.register("denoising")
class Denoising(Objective):
    """The denoising loss that `DiffusionConfig` describes: one time per sample, one call of the network."""

    def __init__(self, config: DiffusionConfig, network: nn.Module):
        super().__init__(config, network)
        if config.weighting == "uncertainty":
            self.trained["uncertainty"] = Uncertainty()

    def forward(self, network: Network, example: Example) -> dict[str, Tensor]:
        x_t, t = self.add_noise(example)
        return self.measure(network(x_t, t, **example.inputs), example, t)

    def add_noise(self, example: Example) -> tuple[Tensor, Tensor]:
        """x_t (B, C, h, w) and its times (B,)."""
        t = self.schedule.draw_times(example.time, self.config)
        return self.schedule.add_noise(example.x0, example.noise, t), t

    def measure(self, output: Tensor, example: Example, t: Tensor) -> dict[str, Tensor]:
        """The terms of the network's output at times t."""
        terms = diffusion_loss(self.schedule, self.config, output, example.x0, example.noise, t)
        if self.config.contrast and self.training:  # a validation does not depend on how images are batched
            terms |= contrast(terms["loss"], output, example.x0, example.noise, self.config.contrast)
        if "uncertainty" in self.trained:
            weighed = self.trained["uncertainty"].weigh(terms["mse"], *self.schedule.alpha_sigma_of(t))
            terms |= weighed | {"loss": weighed["loss"] + terms.get("vlb", 0)}
        return terms


class TrainingModule(nn.Module):
    """The network and the objective as one module for the distributed wrapper, so that the gradients of both are
    reduced."""

    def __init__(self, network: nn.Module, objective: Objective):
        super().__init__()
        self.network, self.objective = network, objective

    def forward(self, example: Example) -> dict[str, Tensor]:
        return self.objective(self.network, example)


@dataclass(frozen=True)
class ObjectiveConfig:
    """The training objective; sampling does not depend on it."""

    name: str = "denoising"  # a key of OBJECTIVES; for an object passed to `train`, GIVEN and its qualified name
    options: dict[str, Any] = field(default_factory=dict)  # keyword arguments of the objective's constructor
