"""What a run will take, before it is started: parameters, FLOPs, memory, space on disk.

Nothing is allocated and nothing is read: neither data nor weights, VAE or text encoder need to be there.
"""

from dataclasses import dataclass, field

import torch
from torch.utils.flop_counter import FlopCounterMode

from pixart.data.buckets import nearest_bucket
from pixart.encoders.vae import AutoencoderKL, VaeConfig
from pixart.errors import InputError
from pixart.model.flops import Shapes, flops_by_part, forward_flops, training_flops
from pixart.seeds import Draw
from pixart.train.config import TrainConfig
from pixart.train.setup import check_shapes
from pixart.train.step_memory import StepMemory, encodes_images, run_buckets, simulate_step


@dataclass(frozen=True)
class Estimate:
    """A run's costs; FLOPs are of one image of the square bucket with a caption of full length."""

    config: TrainConfig
    processes: int
    parameters: int  # of network, adapter and objective
    trained_parameters: int
    parameters_by_part: dict[str, int]
    forward_flops: int
    forward_flops_by_part: dict[str, int]
    training_flops: int  # a forward and a backward pass, as the log's mfu counts them
    encoding_flops: int  # of the VAE, if it encodes images in training; its architecture is taken to be SD's
    recomputed_flops: int  # what gradient checkpointing adds
    memory: StepMemory = field(repr=False)

    @property
    def memory_bytes(self) -> int:
        """Of one process at the peak of a training step, above what it holds before the model is made."""
        return self.memory.total

    @property
    def model_bytes(self) -> int:
        """Of the file that is sampled from: the network, or its adapter."""
        return self.memory.saved["model"]

    @property
    def checkpoint_bytes(self) -> int:
        """Of one training checkpoint on disk: weights, averages, everything else that is saved, optimizer state."""
        return sum(self.memory.saved.values()) + self.memory.optimizer

    @property
    def images(self) -> int:
        """How many images the run sees, repetitions included."""
        return self.config.train.steps * self.config.train.batch_size

    @property
    def run_flops(self) -> int:
        """Of all the run's steps, without what is recomputed."""
        return self.images * self.training_flops


def estimate(config: TrainConfig, processes: int = 1) -> Estimate:
    """The costs of a run on so many processes; takes about three seconds for an XL/2.

    Extensions that the configuration names must have been loaded (`pixart.extensions.load_extensions`). What cannot be
    simulated is said in `Estimate.memory.notes`.

    Raises:
        InputError: the batch cannot be divided among the processes, or the size of the data, the adapter, the optimizer
            or `train.freeze` does not fit the network.
    """
    loop = config.train
    if processes < 1 or loop.batch_size % (loop.accumulation * processes):
        raise InputError(
            f"processes: got {processes}, expected a number that divides train.batch_size {loop.batch_size} with "
            f"train.accumulation {loop.accumulation}"
        )
    check_shapes(config)
    memory = simulate_step(config, processes)
    shape = config.model, *latent_size(config), config.text.length
    drawn = drawn_shapes(config)
    plain = training_flops(*shape, conditions=drawn)
    whole = training_flops(*shape, conditions=drawn, checkpointing=loop.gradient_checkpointing)
    return Estimate(
        config,
        processes,
        memory.parameters,
        memory.trained,
        memory.parameters_by_part,
        forward_flops(*shape, conditions=drawn),
        flops_by_part(*shape, conditions=drawn),
        plain,
        encoding_flops(config),
        whole - plain,
        memory,
    )


def encoding_flops(config: TrainConfig) -> int:
    """FLOPs of the VAE's encoder for one image; 0 if latents are stored or the images themselves are denoised."""
    if not encodes_images(config):
        return 0
    height, width = (side * config.vae.downsample for side in latent_size(config))
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        AutoencoderKL(VaeConfig()).encode(torch.empty(1, 3, height, width))
    return counter.get_total_flops()


def latent_size(config: TrainConfig) -> tuple[int, int]:
    """Height and width of the latents of the bucket nearest to a square."""
    bucket = nearest_bucket(run_buckets(config), 1, 1)
    return bucket.height // config.vae.downsample, bucket.width // config.vae.downsample


def drawn_shapes(config: TrainConfig) -> Shapes:
    """Shapes of what training draws for the network, for one image."""
    height, width = latent_size(config)
    patch = config.model.patch_size
    shapes = {"sample": (), "token": (height // patch * (width // patch),)}
    shapes["latent"] = (config.vae.latent_channels, height, width)
    wanted = config.data_spec.extras.conditions
    return {name: shapes[draw.shape] for name, draw in wanted.items() if isinstance(draw, Draw)}
