"""Memory of a training step by kind, simulated without data: the run's own network, objective and optimizer take it."""

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from pixart.data.buckets import Bucket, bucket_table, own_buckets
from pixart.data.samples import Batch
from pixart.diffusion.objective import Denoising
from pixart.encoders.autoencoder import Autoencoder, IdentityAutoencoder
from pixart.encoders.vae import AutoencoderKL, VaeAutoencoder, VaeConfig
from pixart.errors import InputError
from pixart.model.flops import part_of
from pixart.model.memory import CASTS, MemoryTracker, empty, without_data
from pixart.model.pixart import PixArt
from pixart.quantize import quantized_weights
from pixart.train.assemble import assemble, place
from pixart.train.config import OptimizerConfig, TrainConfig
from pixart.train.distributed import clip_gradients
from pixart.train.ema import update_ema
from pixart.train.optimizer import make_optimizer
from pixart.train.parts import make_objective
from pixart.train.random_batch import random_batch
from pixart.train.state import module_places
from pixart.train.step import make_example

# kinds of memory; the first four are there all the time and are what FSDP shards
WEIGHTS, AVERAGE, STATE, GRADIENTS = "weights", "average", "optimizer state", "gradients"
SHARDED = (WEIGHTS, AVERAGE, STATE, GRADIENTS)
GATHERED, AUTOENCODER, BATCH = "gathered weights", "autoencoder", "batch"
ACTIVATIONS, TEMPORARY = "activations", "temporary"
KINDS = (*SHARDED, GATHERED, CASTS, ACTIVATIONS, TEMPORARY, BATCH, AUTOENCODER)


@dataclass(frozen=True)
class StepMemory:
    """What one process of a run holds, in bytes."""

    at_peak: dict[str, int]  # by kind, at the moment of a step with the most
    activations: int  # kept at the end of the forward pass of one micro-batch, autocast copies left out
    optimizer: int  # of the whole optimizer state, as a checkpoint holds it
    trained: int  # number of trained parameters
    parameters: int  # number of all parameters of network, adapter and objective
    parameters_by_part: dict[str, int]  # by the kinds of `pixart.model.flops.PARTS`, adapter and objective
    saved: dict[str, int]  # bytes of every file of weights in a checkpoint
    notes: tuple[str, ...] = ()  # what could not be simulated

    @property
    def total(self) -> int:
        return sum(self.at_peak.values())


def simulate_step(config: TrainConfig, processes: int = 1) -> StepMemory:
    """Simulate a step of the largest bucket with captions of full length, on tensors of the CPU without data.

    Attention is counted as flash attention keeps it: queries, keys, values, output and one number per query. With
    `train.parallel` fsdp, the step of one process is simulated, and its permanent memory divided by their number.

    Raises:
        InputError: the adapter, the optimizer or `train.freeze` does not fit the network.
    """
    with torch.device("meta"):
        network = PixArt(config.model)
        vae = AutoencoderKL(VaeConfig()) if encodes_images(config) else None
    with without_data():
        encoder = IdentityAutoencoder() if vae is None else VaeAutoencoder(empty(vae))
        return _Simulation(config, place(empty(network), config), encoder, processes).run()


class _Simulation:
    """A step of one process, on tensors without data."""

    def __init__(self, config: TrainConfig, network: PixArt, autoencoder: Autoencoder, processes: int):
        self.config, self.autoencoder, self.processes = config, autoencoder, processes
        self.tracker, self.notes = MemoryTracker(), []
        try:
            objective = make_objective(config.objective, config.diffusion, network, config.seed)
        except InputError as error:  # e.g. a vision model that is not here
            objective = Denoising(config.diffusion, network)
            self.notes.append(f"objective {config.objective.name} is counted as denoising: {error}")
        self.parts = assemble(config, network, objective, simulated=True)
        count = max(1, config.train.batch_size // config.train.accumulation // processes)
        self.batch = largest_batch(config, count)
        self.trained = self.parts.to_train()

    def run(self) -> StepMemory:
        self._hold_what_exists()
        with self.tracker:
            kept = self._find_gradients()
            first = dict(self.tracker.at_peak)
            self.tracker.restart_peak()
            state = self._update()
        first[STATE] = state
        by_part = self._count_by_part()
        peaks = [self._divide(peak) for peak in (first, self.tracker.at_peak)]
        return StepMemory(
            {kind: peak.get(kind, 0) for peak in [max(peaks, key=lambda p: sum(p.values()))] for kind in KINDS},
            kept,
            state,
            sum(p.numel() for p in self.trained.values()),
            by_part.total(),
            dict(by_part),
            {place: count_bytes(module.state_dict().values()) for place, module in module_places(self.parts).items()},
            tuple(self.notes),
        )

    def _count_by_part(self) -> Counter[str]:
        own, found = {id(p): part_of(name) for name, p in self.parts.network.named_parameters()}, Counter()
        for name, parameter in self.parts.training.named_parameters():
            found[own.get(id(parameter), name.partition(".")[0])] += parameter.numel()
        for name, count in quantized_weights(self.parts.network):
            found[part_of(name)] += count
        return found

    def _hold_what_exists(self) -> None:
        hold, parts = self.tracker.hold, self.parts
        for module in (parts.average, *parts.averages.values()):
            hold(tensors(module), AVERAGE)
        hold(tensors(parts.training), WEIGHTS, weights=True)
        if isinstance(self.autoencoder, VaeAutoencoder):
            hold(tensors(self.autoencoder.model), AUTOENCODER)
        self.batch._map(lambda tensor: hold([tensor], BATCH))
        # accumulation keeps gradients while the next micro-batch is computed, DDP keeps them in its buckets
        if self.config.train.accumulation > 1 or (self.processes > 1 and self.config.train.parallel == "ddp"):
            for parameter in self.trained.values():
                parameter.grad = torch.zeros_like(parameter)
                hold([parameter.grad], GRADIENTS)

    def _find_gradients(self) -> int:
        """A forward and a backward pass → bytes kept between them."""
        tracker, batch, dtype = self.tracker, self.batch, self.config.train.autocast_dtype
        autocast = partial(torch.autocast, "cpu", dtype, enabled=dtype != torch.float32)
        for parameter in self.trained.values():
            parameter.register_post_accumulate_grad_hook(lambda p: tracker.hold([p.grad], GRADIENTS))
        with autocast():
            example = make_example(batch, self.parts.network, self.autoencoder, self.config)
        with autocast():
            try:
                terms = self.parts.training(example)
            except Exception as error:  # an objective of the user's may do anything
                self.notes.append(
                    f"objective {self.config.objective.name} is counted as denoising: {type(error).__name__}: {error}"
                )
                tracker.restart_peak()
                terms = Denoising(self.config.diffusion, self.parts.network)(self.parts.network, example)
        loss = terms["loss"].sum()
        kept, tracker.now = tracker.live[ACTIVATIONS], TEMPORARY
        loss.backward()
        return kept

    def _update(self) -> int:
        """Clipping, the optimizer's step and the averages → bytes of the optimizer state."""
        tracker, config = self.tracker, self.config
        clip_gradients(self.trained.values(), config.optimizer.clip)
        if config.optimizer.name == "adamw":
            optimizer = make_optimizer(self.trained, config.optimizer)
            optimizer.step()
            state = state_tensors(optimizer)
            tracker.hold(state, STATE)
            size = count_bytes(state)
        else:
            size, working = one_of_each_shape(self.trained.values(), config.optimizer)
            tracker.at_peak |= {STATE: size, TEMPORARY: tracker.at_peak.get(TEMPORARY, 0) + working}
        applied = torch.ones((), dtype=torch.bool)
        for name, module in self.parts.averaged():
            update_ema(self.parts.averages[name], module, config.train.ema, applied)
        return size

    def _divide(self, peak: dict[str, int]) -> dict[str, int]:
        """The memory of one of several processes that share weights, gradients, averages and optimizer state."""
        if self.config.train.parallel != "fsdp":
            return peak
        network = self.parts.network
        inside = [count_bytes(block.parameters()) for block in network.blocks]
        outside = count_bytes(network.parameters()) - sum(inside)
        shared = {kind: -(-size // self.processes) if kind in SHARDED else size for kind, size in peak.items()}
        # whole while they are used: the layers outside of blocks, one block and the next, and one block's gradients
        return shared | {GATHERED: outside + 3 * max(inside)}


def one_of_each_shape(parameters: Iterable[Tensor], config: OptimizerConfig) -> tuple[int, int]:
    """An optimizer's state in bytes, and what it needs beside state and gradients while it updates one parameter.

    It takes a step with one parameter of every shape, really if it looks at values, which tensors without data lack.
    """
    shapes = Counter(tuple(parameter.shape) for parameter in parameters)
    alone, total, most = replace(config, groups=()), 0, 0
    for shape, count in shapes.items():
        with _disable_current_modes():
            try:
                with without_data():
                    state, working = _step_alone(shape, alone)
            except Exception:  # of any kind; if the optimizer itself is at fault, the real step says so
                state, working = _step_alone(shape, alone)
        total, most = total + count * state, max(most, working)
    return total, most


def _step_alone(shape: tuple[int, ...], config: OptimizerConfig) -> tuple[int, int]:
    parameter = nn.Parameter(torch.full(shape, 1e-2))
    parameter.grad = torch.full(shape, 1e-3)
    optimizer = make_optimizer({"weight": parameter}, config)
    with MemoryTracker() as tracker:
        optimizer.step()
    state = count_bytes(state_tensors(optimizer))
    return state, max(tracker.peak - state, 0)


def state_tensors(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [value for values in optimizer.state.values() for value in values.values() if isinstance(value, Tensor)]


def tensors(module: nn.Module) -> Iterator[Tensor]:
    yield from module.parameters()
    yield from module.buffers()


def count_bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def encodes_images(config: TrainConfig) -> bool:
    """Whether a VAE encodes the images of every step; its architecture is taken to be SD's."""
    return config.vae.kind == "kl" and not (config.data.features or config.data.mix)


def largest_batch(config: TrainConfig, count: int) -> Batch:
    """A batch of the bucket with the most tokens, as the training process gets it."""
    largest = max(run_buckets(config), key=lambda bucket: bucket.height * bucket.width)
    return random_batch(config, count, largest, from_pixels=encodes_images(config) or None)


def run_buckets(config: TrainConfig) -> list[Bucket]:
    """The image sizes that a run's data are sorted into."""
    data, multiple = config.data, config.model.patch_size * config.vae.downsample
    if data.buckets:
        return own_buckets(data.buckets, multiple)
    return bucket_table(data.resolution, multiple, square=not data.aspect_ratios)
