"""Everything a training run is made of; a YAML file holds what differs from these defaults."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import ClassVar, Literal

import torch

from pixart.adapters.adapter import AdapterConfig
from pixart.checkpoint.files import ModelCard
from pixart.cli import read_prompts
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
from pixart.evaluate.metrics import own_prompts
from pixart.features import ExtractConfig
from pixart.model.layers import ROUTING
from pixart.model.pixart import PixArtConfig
from pixart.quantize import QUANTIZED
from pixart.ranges import check_numbers
from pixart.train import repa  # noqa: F401  # registers its objective

CLASS_IMAGES = "class_images"  # the folder of a run in which DreamBooth's class images are, if none is named


@dataclass(frozen=True)
class GroupConfig:
    """Parameters with optimizer settings of their own."""

    names: tuple[str, ...]  # patterns of their names, as for train.freeze
    lr_factor: float = setting(1.0, least=0)  # multiplies the learning rate at every step
    weight_decay: float | None = setting(None, least=0)  # in place of optimizer.weight_decay

    def __post_init__(self):
        check_numbers(self, "optimizer.groups")


@dataclass(frozen=True)
class OptimizerConfig:
    # torch's fused AdamW, or any optimizer of timm.optim or, with the extra "optimizers", of pytorch-optimizer: came,
    # prodigy (lr is a factor, usually 1), schedulefreeadamw (which averages the weights itself: set train.ema to 0);
    # bnbadamw8bit, whose state has 8 bits, needs the extra "quantize"
    name: str = "adamw"
    lr: float = setting(2e-5, above=0)
    # "sqrt" multiplies lr by √(train.batch_size / 256), as the authors' code does; the paper's table lists lr unscaled
    auto_lr: Literal["none", "sqrt"] = "none"
    schedule: Literal["constant", "cosine", "linear"] = "constant"
    final_lr: float = setting(0.0, least=0)  # where cosine and linear end, as a fraction of lr
    warmup: int = setting(1000, least=0)  # optimizer steps
    weight_decay: float = setting(0.03, least=0)  # on all parameters
    # None means the optimizer's own default, here and below
    betas: tuple[float, ...] | None = setting(None, least=0, below=1)
    eps: float | None = setting(None, above=0)
    options: dict[str, float] = field(default_factory=dict)  # further options, under the optimizer's own names
    groups: tuple[GroupConfig, ...] = ()  # chosen by name patterns; a parameter is in the first group that matches
    # maximum of the global gradient norm; the authors use 0.01, .inf turns clipping off
    clip: float = setting(1.0, above=0, unbounded=True)
    # a step with a larger gradient norm (before clipping) is skipped
    skip_above: float | None = setting(None, resume="free", above=0)

    def __post_init__(self):
        check_numbers(self, "optimizer")


@dataclass(frozen=True)
class LoopConfig:
    steps: int = setting(resume="free", least=1)  # optimizer steps in total
    batch_size: int = setting(least=1)  # images per optimizer step, over all processes and accumulation steps
    accumulation: int = setting(1, resume="free", least=1)
    # fsdp shards weights, averages and optimizer state over the processes
    parallel: Literal["ddp", "fsdp"] = setting("ddp", resume="free")
    # seconds that a process waits for the others before it gives up
    timeout: float = setting(1800.0, resume="free", compare="quiet", above=0, most=10**9)
    mixed_precision: Literal["no", "bf16", "fp16"] = "bf16"
    gradient_checkpointing: bool = setting(False, resume="free")
    checkpointing_every: int = setting(1, resume="free", least=1)  # of the blocks only every n-th: faster, more memory
    compile: bool = setting(False, resume="free")
    # on a GPU: use kernels whose results repeat bit for bit, which are slower; on a CPU they always do
    deterministic: bool = setting(False, resume="free")
    freeze: tuple[str, ...] = ()  # name patterns of parameters to freeze, e.g. "blocks.[0-9].*"
    caption_dropout: float = setting(0.1, least=0, most=1)
    # decay per step; 0 keeps no average, so that the weights themselves are validated, sampled from and saved
    ema: float = setting(0.9999, least=0, below=1)
    ema_warmup: bool = False  # lower the decay to (1 + step) / (10 + step) at first
    # intervals in steps, here and below; each also happens at the end; 0 means never, but a run always saves at its end
    log_every: int = setting(20, resume="free", least=1)
    sample_every: int = setting(0, resume="free", least=0)
    validate_every: int = setting(0, resume="free", least=0)
    evaluate_every: int = setting(0, resume="free", least=0)  # draw images and score them, see `evaluate`
    # the metrics of a validation: keys of METRICS, as NAME or NAME:ARGUMENT
    metrics: tuple[str, ...] = setting(("loss", "denoising_error"), resume="free")
    save_every: int = setting(1000, resume="free", least=0)
    keep: int = setting(3, resume="free", compare="quiet", least=1)  # checkpoints to keep
    # after a failed save, e.g. on a full disk; the last save of a run must succeed
    on_save_error: Literal["continue", "stop"] = setting("continue", resume="free")
    trackers: tuple[str, ...] = setting(("tensorboard",), resume="free", compare="quiet")  # accelerate's names
    # peak TFLOP/s of one device, for mfu: from its data sheet, or "measure" for what a large matrix product reaches
    peak_tflops: float | Literal["measure"] | None = setting(None, resume="free", above=0)

    @property
    def autocast_dtype(self) -> torch.dtype:
        """In which matrix products are computed."""
        return {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[self.mixed_precision]

    def __post_init__(self):
        check_numbers(self, "train")
        if twice := [name for name in self.metrics if self.metrics.count(name) > 1]:
            raise InputError(f"train.metrics: '{twice[0]}' is listed twice")
        if self.validate_every and not self.metrics:
            raise InputError(
                "train.validate_every is set, but train.metrics is empty; name at least one, e.g. denoising_error"
            )


@dataclass(frozen=True)
class EvaluateConfig:
    # settings of earlier versions: by name, what to do about them
    removed: ClassVar[dict[str, str]] = {
        "retrieval": "learnt images are no longer retrieved; score drawn ones with train.evaluate_every and "
        "evaluate.metrics"
    }
    # of drawn images, at every train.evaluate_every: keys of METRICS, as NAME or NAME:ARGUMENT
    metrics: tuple[str, ...] = ()
    # a file of one prompt a line; without one the prompts of the first metric that has its own, as `compositional`, or
    # the held-out images' captions
    prompts: str | None = setting(None, path=True)
    images: int | None = setting(None, least=1)  # draw so many of them only
    reference: str | None = setting(None, path=True)  # folder of real images, or a .npz of mu and sigma
    reference_fit: Literal["exact", "crop", "stretch"] = "exact"  # for real images of another size
    filter: Literal["clean", "pil", "none"] = "clean"  # to the size that a feature extractor takes
    inception: str | None = setting(None, path=True)  # Inception's weights, by default in torch's cache

    def __post_init__(self):
        check_numbers(self, "evaluate")

    def read_prompts(self) -> list[str]:
        """The prompts of drawn images; none if they are the held-out captions."""
        if self.prompts is not None:
            return read_prompts(self.prompts)
        return own_prompts(self.metrics, self.reference, "evaluate.metrics")


@dataclass(frozen=True)
class DreamBoothConfig:
    """Learning one subject from a few images (arXiv 2208.12242); see `pixart.train.dreambooth`."""

    instance_prompt: str  # the caption of all images of data.folder: a rare word and the class
    class_prompt: str | None = None  # the class alone; null trains without prior preservation
    num_class_images: int = setting(100, least=1)  # those that are missing are drawn by init_from's network
    prior_loss_weight: float = setting(1.0, least=0)  # of the class images' loss

    def __post_init__(self):
        check_numbers(self, "dreambooth")
        for name in ("instance_prompt", "class_prompt"):
            if getattr(self, name) is not None and not getattr(self, name).strip():
                raise InputError(f"dreambooth.{name}: got an empty text; expected a prompt")
        if self.instance_prompt == self.class_prompt:
            raise InputError(
                f"dreambooth: instance_prompt and class_prompt are both '{self.class_prompt}'; the instance's needs a "
                "word more that names the subject, as 'a photo of sks dog' beside 'a photo of a dog'"
            )

    def settle(self, data: DataConfig, output: str) -> DataConfig:
        """The data with these prompts as captions, and with the class images."""
        data = replace(data, caption=self.instance_prompt)
        if self.class_prompt is None:
            return data
        return replace(
            data,
            regularization=data.regularization or str(Path(output) / CLASS_IMAGES),
            regularization_caption=self.class_prompt,
            regularization_weight=self.prior_loss_weight,
        )


@dataclass(frozen=True)
class TrainConfig:
    output: str = setting(resume="quiet", compare="quiet", path="as_written")  # the run's folder
    data: DataConfig = setting(compare="images")
    train: LoopConfig
    seed: int = setting(0, unbounded=True)
    # resume from the newest good checkpoint in `output`, or refuse a folder that holds a run
    resume: Literal["auto", "never"] = setting("auto", resume="quiet", compare="quiet")
    # your own Python files that register names used in the settings below (see `pixart.extensions`); paths are relative
    # to the config file
    extensions: tuple[str, ...] = setting((), resume="free")
    # resume a run although one of these files has changed
    accept_changed_extensions: bool = setting(False, resume="free")
    # weights a new run starts from: anything `load_model` takes, or a DiT
    init_from: str | None = setting(None, path=True)
    adapter: AdapterConfig | None = None  # train this on top of init_from's network, which stays frozen
    dreambooth: DreamBoothConfig | None = setting(None, compare="images")
    model: PixArtConfig = field(default_factory=PixArtConfig)
    diffusion: DiffusionConfig = setting(factory=DiffusionConfig, compare="loss")
    objective: ObjectiveConfig = setting(factory=ObjectiveConfig, compare="loss")
    vae: AutoencoderConfig = setting(factory=AutoencoderConfig, compare="images")
    text: TextConfig = setting(factory=TextConfig, compare="images")
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    sample: SampleConfig = setting(factory=SampleConfig, resume="free")
    prompts: tuple[str, ...] = setting((), resume="free", compare="quiet")  # for the sample grids
    evaluate: EvaluateConfig = setting(factory=EvaluateConfig, resume="free")
    # how data.features is made from data.folder
    extract: ExtractConfig = setting(factory=ExtractConfig, resume="free")

    def __post_init__(self):
        check_numbers(self)
        if self.model.learn_sigma and self.diffusion.schedule == "flow":
            raise InputError(
                "model.learn_sigma must be off with diffusion.schedule flow: a flow has no variance to learn"
            )
        if self.text.length > self.model.caption_length:
            raise InputError(
                f"text.length {self.text.length} is more than model.caption_length {self.model.caption_length}"
            )
        if self.dreambooth is not None:
            self._check_dreambooth()
        if self.adapter is not None and self.init_from is None:
            raise InputError("adapter: it is trained on top of an existing network; name that network as init_from")
        if self.adapter is not None and self.train.freeze:
            raise InputError("adapter: leave train.freeze out; everything but the adapter is frozen anyway")
        if self.adapter is not None and self.adapter.base_dtype == "bfloat16" and self.train.mixed_precision != "bf16":
            raise InputError(
                f"adapter.base_dtype bfloat16 needs train.mixed_precision bf16: got '{self.train.mixed_precision}'"
            )
        if self.adapter is not None and self.adapter.base_dtype in QUANTIZED and self.train.parallel == "fsdp":
            raise InputError(
                f"adapter.base_dtype {self.adapter.base_dtype} does not work with train.parallel fsdp, which shards "
                "floating-point weights; use train.parallel ddp, or base_dtype bfloat16"
            )
        if self.optimizer.name.startswith("schedulefree") and self.train.ema:
            raise InputError(
                f"optimizer.name '{self.optimizer.name}' averages the weights itself, and its average is what is "
                "validated, sampled from and saved: set train.ema to 0"
            )
        if self.diffusion.contrast and self.train.batch_size // self.train.accumulation < 2:
            raise InputError(
                f"diffusion.contrast needs two images at least in a micro-batch: got train.batch_size "
                f"{self.train.batch_size} with train.accumulation {self.train.accumulation}"
            )
        if self.train.sample_every and not self.prompts:
            raise InputError("train.sample_every is set, but there are no prompts to sample")
        if self.train.validate_every and not self.data.holds_out:
            raise InputError(
                "train.validate_every is set, but there are no held-out images; set data.validation or "
                "data.validation_folder"
            )
        if self.train.evaluate_every and not self.evaluate.metrics:
            raise InputError(
                "train.evaluate_every is set, but evaluate.metrics is empty; name at least one, as compositional"
            )
        if self.sample.sampler in (*SAMPLERS, "auto"):  # any other name is an extension's, not loaded yet
            resolve(self.sample, make_schedule(self.diffusion))

    def _check_dreambooth(self) -> None:
        if self.init_from is None:
            raise InputError("dreambooth: it teaches an existing model a subject; name that model as init_from")
        if self.data.features or self.data.mix:
            raise InputError("dreambooth reads the images of data.folder; leave data.features and data.mix out")
        if self.data.captions or self.data.caption is not None:
            raise InputError("dreambooth: the caption is dreambooth.instance_prompt; leave data.caption(s) out")

    @property
    def averaged(self) -> bool:
        """Whether there is an average beside the weights: asked for, a schedule-free optimizer's own, or a sharded
        network's, whose shards FSDP keeps to itself."""
        sharded = self.train.parallel == "fsdp" and self.adapter is None
        return self.train.ema > 0 or self.optimizer.name.startswith("schedulefree") or sharded

    @property
    def data_spec(self) -> DataSpec:
        """Everything that determines the run's samples, with the random numbers that routing and objective ask for."""
        routing = ROUTING[self.model.routing].conditions if self.model.routing else {}
        extras = Extras(
            conditions={**{name: draw for name, draw in routing.items() if draw}, **self.data.conditions},
            targets=self.data.targets,
            # the draws of an objective object passed to `train` are known only once it is made
            draws={} if self.objective.name.startswith(GIVEN) else OBJECTIVES[self.objective.name].draws,
        )
        return DataSpec(
            self.data if self.dreambooth is None else self.dreambooth.settle(self.data, self.output),
            self.vae,
            self.text,
            self.model.patch_size,
            self.model.caption_channels,
            (*self.prompts, *(self.evaluate.read_prompts() if self.train.evaluate_every else ())),
            self.seed,
            extras,
        )

    @property
    def card(self) -> ModelCard:
        return ModelCard(self.model, self.diffusion, self.vae, self.text, self.sample)
