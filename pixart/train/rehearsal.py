"""A few real training steps of a run on random data, in a process of their own: peak memory and seconds.

The network has random weights, whatever `init_from` says, so that nothing needs to be there but the configuration.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import nn

from pixart.config import dump_yaml, load_config
from pixart.cpu import give_memory_back, hold_only_what_is_used, use_onednn
from pixart.device import resident
from pixart.encoders.autoencoder import Autoencoder, IdentityAutoencoder
from pixart.encoders.vae import AutoencoderKL, VaeAutoencoder, VaeConfig
from pixart.errors import InputError
from pixart.extensions import load_extensions
from pixart.train.assemble import assemble, place
from pixart.train.config import TrainConfig
from pixart.train.distributed import Processes
from pixart.train.optimizer import make_optimizer
from pixart.train.parts import make_objective
from pixart.train.setup import make_accelerator, make_network
from pixart.train.state import TrainState
from pixart.train.step import train_step
from pixart.train.step_memory import encodes_images, largest_batch
from pixart.train.throughput import measure_peak


@dataclass(frozen=True)
class Rehearsal:
    """What was measured in one process."""

    memory: int  # bytes at the peak, above those before the model was made
    seconds: float  # of a step, the median of those after the first
    steps: int
    peak: float  # FLOP/s of a large matrix product in the type of the run's


def rehearse(config: TrainConfig, *, device: str | None = None, steps: int = 4) -> Rehearsal:
    """Take some steps in a new process, by default on a GPU if there is one, else on the CPU.

    Raises:
        InputError: there is no such device, or the process ended with an error, e.g. for lack of memory.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device != "cpu" and not torch.cuda.is_available():
        raise InputError(f"device {device}: there is no CUDA device here; measure on cpu")
    if steps < 2:
        raise InputError(f"steps: got {steps}, expected at least 2, since the first is not timed")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "config.yaml"
        path.write_text(dump_yaml(config), encoding="utf-8")
        order = json.dumps({"config": str(path), "device": device, "steps": steps})
        root = str(Path(__file__).parents[2])
        known = filter(None, [os.environ.get("PYTHONPATH")])
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([root, *known])}
        done = subprocess.run(
            [sys.executable, "-m", "pixart.train.rehearsal", order], capture_output=True, text=True, env=environment
        )
    if done.returncode:
        reason = (done.stderr.strip() or f"exit code {done.returncode}").splitlines()[-1]
        raise InputError(f"the steps could not be measured ({reason})")
    return Rehearsal(**json.loads(done.stdout.splitlines()[-1]))


def take_steps(config: TrainConfig, *, device: str, steps: int) -> Rehearsal:
    """The steps themselves, in this process."""
    hold_only_what_is_used()
    config = replace(config, train=replace(config.train, trackers=(), parallel="ddp"))
    accelerator = make_accelerator(config, cpu=device == "cpu")
    processes = Processes(accelerator, config.train.timeout)
    _warm_up(config, accelerator, processes)
    rate = measure_peak(accelerator.device, config.train.autocast_dtype) * 1e12
    with suppress(OSError):  # exists only on Linux
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = resident("VmRSS") or 0
    take = _open(config, accelerator, processes)
    seconds = []
    for _ in range(steps):
        begun = time.perf_counter()
        take()
        seconds.append(time.perf_counter() - begun)
    cuda = accelerator.device.type == "cuda"
    peak = torch.cuda.max_memory_allocated(accelerator.device) if cuda else (resident("VmHWM") or 0) - before
    return Rehearsal(peak, statistics.median(seconds[1:]), steps, rate)


def _warm_up(config: TrainConfig, accelerator: Accelerator, processes: Processes) -> None:
    """Load what a process's first step loads and then keeps: modules, libraries, threads, and the buffers in which the
    libraries sort matrices for a product."""
    loop = replace(config.train, batch_size=2, accumulation=1, freeze=())
    model = replace(config.model, hidden_size=48, num_heads=4, depth=1, kv_compression=None, kv_blocks=(), routing=None)
    optimizer = replace(config.optimizer, groups=())
    data = replace(config.data, features=config.data.features or "none")  # without a VAE
    tiny = replace(config, data=data, model=model, adapter=None, train=loop, optimizer=optimizer)
    _open(tiny, accelerator, processes)()
    measure_peak(accelerator.device, torch.float32)
    layer = nn.Linear(1024, 1024, device=accelerator.device)
    use_onednn(layer)
    for context in (nullcontext, accelerator.autocast):
        with context():
            layer(torch.randn(2, 1024, 1024, device=accelerator.device, requires_grad=True)).sum().backward()
    del layer
    give_memory_back()


def _open(config: TrainConfig, accelerator: Accelerator, processes: Processes) -> Callable[[], float]:
    """A run at step 0 with random weights → a function that takes a step and waits for it."""
    device = accelerator.device
    torch.manual_seed(0)
    network = place(make_network(config.model), config, device)
    objective = make_objective(config.objective, config.diffusion, network, config.seed).to(device)
    parts = assemble(config, network, objective, onednn=device.type == "cpu")
    state = TrainState(parts, make_optimizer(parts.to_train(), config.optimizer), accelerator, processes)
    count = config.train.batch_size // config.train.accumulation
    batches = [largest_batch(config, count).to(device) for _ in range(config.train.accumulation)]
    autoencoder: Autoencoder = IdentityAutoencoder()
    if encodes_images(config):
        autoencoder = VaeAutoencoder(AutoencoderKL(VaeConfig()).to(device))
    return lambda: train_step(state, batches, autoencoder, config).loss.item()


def main(order: str) -> None:
    asked = json.loads(order)
    config = load_config(TrainConfig, asked["config"])
    load_extensions(config.extensions)
    print(json.dumps(asdict(take_steps(config, device=asked["device"], steps=asked["steps"]))))


if __name__ == "__main__":
    main(sys.argv[1])
