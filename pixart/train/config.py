"""Everything a training run is made of; a YAML file under `configs/` holds what differs from these defaults."""

import math
from dataclasses import dataclass, field
from typing import Literal

from pixart.adapters.adapter import AdapterConfig
from pixart.checkpoint.files import ModelCard
from pixart.config import setting
from pixart.data.arrays import Extras
from pixart.data.config import DataConfig
from pixart.data.training_set import DataSpec
from pixart.diffusion.objective import GIVEN, OBJECTIVES, ObjectiveConfig
from pixart.diffusion.sampling import SAMPLERS, SampleConfig, resolve
from pixart.diffusion.schedule import DiffusionConfig, make_schedule
from pixart.encoders.autoencoder import AutoencoderConfig
from pixart.encoders.text import TextConfig
from pixart.errors import InputError
from pixart.features import ExtractConfig
from pixart.model.layers import ROUTING
from pixart.model.pixart import PixArtConfig


@dataclass(frozen=True)
class GroupConfig:
    """Parameters that are optimised otherwise than the rest."""

    names: tuple[str, ...]  # patterns of their names, as for train.freeze
    lr_factor: float = 1.0  # of the learning rate at every step
    weight_decay: float | None = None  # in place of optimizer.weight_decay

    def __post_init__(self):
        if not 0 <= self.lr_factor < math.inf or not 0 <= (self.weight_decay or 0) < math.inf:
            raise InputError(
                f"optimizer.groups: expected lr_factor and weight_decay of 0 or more, got {self.lr_factor} and "
                f"{self.weight_decay}"
            )


@dataclass(frozen=True)
class OptimizerConfig:
    name: str = "adamw"  # torch's fused AdamW, or any optimizer of timm.optim
    lr: float = 2e-5
    # "sqrt" multiplies lr by √(train.batch_size / 256), as the authors' code does; the paper's table gives lr as it is
    auto_lr: Literal["none", "sqrt"] = "none"
    schedule: Literal["constant", "cosine", "linear"] = "constant"
    final_lr: float = 0.0  # what cosine and linear end at, as a share of lr
    warmup: int = 1000  # optimizer steps
    weight_decay: float = 0.03  # on all parameters
    betas: tuple[float, ...] | None = None  # None is the optimizer's own default, here and below
    eps: float | None = None
    options: dict[str, float] = field(default_factory=dict)  # others of the optimizer, by its own names
    groups: tuple[GroupConfig, ...] = ()  # by patterns of names; the first that matches a parameter has it
    clip: float = 1.0  # of the global gradient norm; the authors' is 0.01
    # a step whose gradient norm before clipping is greater is left out
    skip_above: float | None = setting(None, resume="free")

    def __post_init__(self):
        if self.lr <= 0 or self.clip <= 0 or self.warmup < 0:
            raise InputError("optimizer: lr and clip must be positive, warmup not negative")
        if self.skip_above is not None and self.skip_above <= 0:
            raise InputError(f"optimizer.skip_above: got {self.skip_above}, expected a positive number or null")


@dataclass(frozen=True)
class LoopConfig:
    steps: int = setting(resume="free")  # optimizer steps of the run
    batch_size: int  # pictures of an optimizer step, over all processes and accumulation steps
    accumulation: int = setting(1, resume="free")
    # fsdp shards weights, averages and optimizer over the processes
    parallel: Literal["ddp", "fsdp"] = setting("ddp", resume="free")
    # seconds that a process waits for the others before it gives up
    timeout: float = setting(1800.0, resume="free", compare="quiet")
    mixed_precision: Literal["no", "bf16", "fp16"] = "bf16"
    gradient_checkpointing: bool = setting(False, resume="free")
    compile: bool = setting(False, resume="free")
    # on a GPU: kernels that repeat bit for bit, which are slower; a CPU's do anyway
    deterministic: bool = setting(False, resume="free")
    freeze: tuple[str, ...] = ()  # patterns of parameter names that stay as they are, as "blocks.[0-9].*"
    caption_dropout: float = 0.1
    ema: float = 0.9999  # decay per step
    ema_warmup: bool = False  # lower the decay to (1 + step) / (10 + step) at first
    # steps, here and below, and at the end; 0 is never, but a run always saves at its end
    log_every: int = setting(20, resume="free")
    sample_every: int = setting(0, resume="free")
    validate_every: int = setting(0, resume="free")
    # keys of METRICS, as NAME or NAME:ARGUMENT, that a validation has
    metrics: tuple[str, ...] = setting(("loss", "denoising_error"), resume="free")
    save_every: int = setting(1000, resume="free")
    keep: int = setting(3, resume="free", compare="quiet")  # checkpoints to keep
    # of a full disk, say; a run's last save must succeed
    on_save_error: Literal["continue", "stop"] = setting("continue", resume="free")
    trackers: tuple[str, ...] = setting(("tensorboard",), resume="free", compare="quiet")  # of accelerate
    # what mfu is a share of, in TFLOP/s of one device: by its data sheet, or "measure" for what a large product reaches
    peak_tflops: float | Literal["measure"] | None = setting(None, resume="free")

    def __post_init__(self):
        for name in ("steps", "batch_size", "accumulation", "keep", "log_every"):
            if getattr(self, name) < 1:
                raise InputError(f"train.{name}: got {getattr(self, name)}, expected at least 1")
        if twice := [name for name in self.metrics if self.metrics.count(name) > 1]:
            raise InputError(f"train.metrics: '{twice[0]}' stands twice")
        if self.validate_every and not self.metrics:
            raise InputError("train.validate_every is set, but train.metrics is empty; name one, as denoising_error")
        if self.timeout <= 0:
            raise InputError(f"train.timeout: got {self.timeout}, expected seconds above 0")
        if not 0 <= self.ema < 1 or not 0 <= self.caption_dropout <= 1:
            raise InputError("train: ema must be in [0, 1), caption_dropout in [0, 1]")
        if isinstance(self.peak_tflops, float) and not self.peak_tflops > 0:
            raise InputError(f"train.peak_tflops: got {self.peak_tflops}, expected a positive number or measure")


@dataclass(frozen=True)
class EvaluateConfig:
    retrieval: bool = False  # at the end: is the nearest training picture the one whose caption was given?


@dataclass(frozen=True)
class TrainConfig:
    output: str = setting(resume="quiet", compare="quiet")  # the run's folder
    data: DataConfig = setting(compare="images")
    train: LoopConfig
    seed: int = 0
    # go on from the newest good checkpoint in `output`, or demand a new folder
    resume: Literal["auto", "never"] = setting("auto", resume="quiet", compare="quiet")
    # files of one's own that register what the names below mean, see `pixart.extensions`; relative to the config's file
    extensions: tuple[str, ...] = setting((), resume="free")
    # go on with a run although one of them is not what it was
    accept_changed_extensions: bool = setting(False, resume="free")
    # weights a new run starts from: anything `load_model` takes, or a DiT
    init_from: str | None = setting(None, path=True)
    adapter: AdapterConfig | None = None  # train this on top of init_from's network, which stays as it is
    model: PixArtConfig = field(default_factory=PixArtConfig)
    diffusion: DiffusionConfig = setting(factory=DiffusionConfig, compare="loss")
    objective: ObjectiveConfig = setting(factory=ObjectiveConfig, compare="loss")
    vae: AutoencoderConfig = setting(factory=AutoencoderConfig, compare="images")
    text: TextConfig = setting(factory=TextConfig, compare="images")
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    sample: SampleConfig = setting(factory=SampleConfig, resume="free")
    prompts: tuple[str, ...] = setting((), resume="free", compare="quiet")  # of the sample grids
    evaluate: EvaluateConfig = setting(factory=EvaluateConfig, resume="free")
    # how data.features are made of data.folder
    extract: ExtractConfig = setting(factory=ExtractConfig, resume="free")

    def __post_init__(self):
        if self.model.learn_sigma and self.diffusion.schedule == "flow":
            raise InputError(
                "model.learn_sigma must be off with diffusion.schedule flow: a flow has no variance to learn"
            )
        if self.text.length > self.model.caption_length:
            raise InputError(
                f"text.length {self.text.length} is more than model.caption_length {self.model.caption_length}"
            )
        if self.adapter is not None and self.init_from is None:
            raise InputError("adapter: it is trained on top of a network; name that as init_from")
        if self.adapter is not None and (self.train.freeze or self.train.parallel == "fsdp"):
            raise InputError(
                "adapter: leave train.freeze out, since all but the adapter is frozen, and take train.parallel ddp"
            )
        if self.train.sample_every and not self.prompts:
            raise InputError("train.sample_every is set, but there are no prompts to sample")
        if self.train.validate_every and not self.data.holds_out:
            raise InputError(
                "train.validate_every is set, but data.validation holds no image out, and there is no "
                "data.validation_folder"
            )
        if self.evaluate.retrieval and (self.data.features or self.data.mix):
            raise InputError("evaluate.retrieval compares pictures; it cannot be on with data.features")
        if self.sample.sampler in (*SAMPLERS, "auto"):  # else of an extension that is not loaded
            resolve(self.sample, make_schedule(self.diffusion))

    @property
    def data_spec(self) -> DataSpec:
        """What decides the run's samples; looks up routing and objective, which may ask for random numbers."""
        routing = ROUTING[self.model.routing].conditions if self.model.routing else {}
        extras = Extras(
            conditions={**{name: draw for name, draw in routing.items() if draw}, **self.data.conditions},
            targets=self.data.targets,
            # those of an objective that `train` is given are known once it is made
            draws={} if self.objective.name.startswith(GIVEN) else OBJECTIVES[self.objective.name].draws,
        )
        return DataSpec(
            self.data, self.vae, self.text, self.model.patch_size, self.model.caption_channels, self.prompts,
            self.seed, extras,
        )  # fmt: skip

    @property
    def card(self) -> ModelCard:
        return ModelCard(self.model, self.diffusion, self.vae, self.text, self.sample)
