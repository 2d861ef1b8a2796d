"""Programs of one case, interleaved over several rounds: times, FLOPs, peak memory, and the device's matrix rate."""

import gc
import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from pixart.config import setting
from pixart.cpu import use_onednn
from pixart.errors import InputError

Call = Callable[[], object]
# compiled program → the eager program that does the same work
COMPILED = {
    "ours-compiled": "ours",
    "ours-reduce-overhead": "ours",
    "diffusers-max-autotune": "diffusers",
    "diffusers-reduce-overhead": "diffusers",
    "plain loop-compiled": "plain loop",
}
WARM_UP = 2  # additional calls of a compiled program: a CUDA graph is recorded in the second and used from the third on
SIDES = {"cpu": 4096, "cuda": 8192}  # sides of the square matrices whose product gives the device's peak rate


@dataclass(frozen=True)
class Settings:
    """What is measured, and at which size."""

    preset: str = "alpha-256"
    height: int = 256  # pixels
    width: int = 256
    batch: int | Literal["largest"] | None = None  # None: 2, or the config's in the case "train"
    tokens: int = 120  # caption tokens, without padding
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    device: str = "cpu"
    rounds: int = setting(3, compare="quiet")
    text_width: int = 512  # width of the random T5; XXL's is 4096
    text_layers: int = 8  # layers of the random T5; XXL has 24
    config: str = "pixart:openmoji"  # for the case "train"
    source: str | None = None  # for the case "load", any source of load_model; None: random weights
    programs: tuple[str, ...] = setting((), compare="quiet")  # programs to run; empty: all that the device supports
    memory: bool = setting(True, compare="quiet")  # measure peak memory, in a separate process per program
    keep_memory: bool = setting(True, compare="quiet")  # keep freed memory, as our commands do

    def __post_init__(self):
        if min(self.height, self.width, self.tokens, self.rounds, 1 if self.batch == "largest" else self.images) < 1:
            raise InputError("height, width, batch, tokens and rounds: expected positive numbers")
        if torch.device(self.device).type == "cuda" and not torch.cuda.is_available():
            raise InputError(f"device {self.device}: there is no CUDA device here")
        if self.batch == "largest" and not self.cuda:
            raise InputError("batch largest: expected device cuda; a CPU does not say that its memory is full")

    @property
    def images(self) -> int:
        return 2 if self.batch is None else self.batch

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    @property
    def cuda(self) -> bool:
        return torch.device(self.device).type == "cuda"


@dataclass
class Case:
    """One piece of work; `programs` maps names to functions that make the call to be timed."""

    name: str
    programs: dict[str, Callable[[], Call]]
    images: int = 0  # images per call
    bytes: int = 0  # bytes that a call moves, if it is bound by memory bandwidth
    steps: int = 1  # number of calls after which memory has reached its peak
    note: str = ""
    same_work: dict[str, str] = field(default_factory=dict)  # program that torch cannot count → one of equal FLOPs
    dtype: torch.dtype | None = None  # the dtype of its arithmetic, if not that of the settings
    memory: bool = True  # whether peak memory can be measured in a separate process
    keep: Any = None  # an object that must live as long as the case, e.g. a temporary folder

    def choose(self, names: tuple[str, ...]) -> "Case":
        if unknown := [name for name in names if name not in self.programs]:
            raise InputError(f"case {self.name} has no program {unknown[0]}; there are {', '.join(self.programs)}")
        return replace(self, programs={n: p for n, p in self.programs.items() if not names or n in names})


@dataclass
class Result:
    """Measurements of one program in one case."""

    case: str
    program: str
    seconds: list[float]
    first: float  # seconds of the first call, including compilation
    flops: int  # FLOPs per call
    images: int
    bytes: int
    memory: int | None = None  # peak in bytes: of the process on a CPU, of the allocator on CUDA
    before: int | None = None  # memory of the process in bytes before the program was made
    rates: dict[str, float] = field(default_factory=dict)  # FLOP/s of matrix products in the same rounds
    failed: str = ""  # the reason, if it could not be measured
    note: str = ""
    settings: dict = field(default_factory=dict)
    cpu_seconds: list[float] = field(default_factory=list)  # of all threads of this process, call by call

    @property
    def median(self) -> float:
        return statistics.median(self.seconds) if self.seconds else math.nan


def measure(case: Case, settings: Settings) -> list[Result]:
    """Time a case's programs: after uncounted first calls, one call of each program per round, in every other round
    from last to first, so that a steady change of the machine's load favours none. A program for which the device has
    too little memory is reported as failed; the others are still measured."""
    calls, results, uncounted = {}, {}, COMPILED | case.same_work
    for name, make in case.programs.items():
        result = Result(
            case.name, name, [], math.nan, 0, case.images, case.bytes, note=case.note, settings=asdict(settings)
        )
        results[name] = result
        counter = nullcontext() if name in uncounted else flop_counter()
        try:
            call = make()
            with counter:
                result.first = timed(call, settings)
            for _ in range(WARM_UP if name in COMPILED else 0):
                timed(call, settings)
        except torch.OutOfMemoryError:
            result.failed = "does not fit the device's memory"
            call = None
            free()
            continue
        calls[name] = call
        result.flops = 0 if name in uncounted else counter.get_total_flops()
    for name, counted in uncounted.items():
        if name in results and counted in results:
            results[name].flops = results[counted].flops
    products = matrix_products(settings, case.dtype) if any(result.flops for result in results.values()) else {}
    rates: dict[str, list[float]] = {name: [] for name in products}
    for number in range(settings.rounds):
        for name in list(calls)[:: -1 if number % 2 else 1]:
            before = time.process_time()
            results[name].seconds.append(timed(calls[name], settings))
            results[name].cpu_seconds.append(time.process_time() - before)
        for name, (call, flops) in products.items():
            rates[name].append(flops / timed(call, settings))
    for result in results.values():
        result.rates = {name: statistics.median(found) for name, found in rates.items()}
    return list(results.values())


def timed(call: Call, settings: Settings) -> float:
    """Seconds that a call takes until the device has finished."""
    start = time.perf_counter()
    call()
    if settings.cuda:
        torch.cuda.synchronize(settings.device)
    return time.perf_counter() - start


def count_flops(call: Call) -> int:
    """FLOPs of the matrix products, attention and convolutions that a call performs."""
    with flop_counter() as counter:
        call()
    return counter.get_total_flops()


def flop_counter() -> FlopCounterMode:
    """torch's FLOP counter, extended by oneDNN's product of linear layers (`use_onednn`) and the CPU's attention, which
    torch up to 2.14 does not count."""
    own = {
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward_flops,
    }
    if torch.backends.mkldnn.is_available():
        own[torch.ops.mkldnn._linear_pointwise] = _linear_flops
    return FlopCounterMode(display=False, custom_mapping=own)


def _attention_flops(q: torch.Size, k: torch.Size, v: torch.Size, *_, **__) -> int:
    return sdpa_flop_count(q, k, v)


def _attention_backward_flops(grad: torch.Size, q: torch.Size, k: torch.Size, v: torch.Size, *_, **__) -> int:
    return sdpa_backward_flop_count(grad, q, k, v)


def _linear_flops(x: torch.Size, weight: torch.Size, *_, out_shape: torch.Size, **__) -> int:
    return 2 * x.numel() * weight[0]


def matrix_products(settings: Settings, dtype: torch.dtype | None = None) -> dict[str, tuple[Call, int]]:
    """Products of square matrices in the case's dtype, by each library that our code uses on the device, with FLOPs."""
    side, dtype = SIDES["cuda" if settings.cuda else "cpu"], dtype or settings.torch_dtype
    a = torch.randn(side, side, dtype=dtype, device=settings.device)
    repeat = 10 if settings.cuda else 1

    def by(product: Callable[[], object]) -> tuple[Call, int]:
        return torch.no_grad()(lambda: [product() for _ in range(repeat)][-1]), 2 * side**3 * repeat

    products = {f"torch.mm, {side}³": by(lambda: torch.mm(a, a))}
    if not settings.cuda:
        layer = nn.Linear(side, side, bias=False, dtype=dtype)
        use_onednn(layer)
        products[f"oneDNN, {side}³"] = by(lambda: layer(a))
    for call, _ in products.values():
        timed(call, settings)
    return products


def free() -> None:
    """Free everything that is no longer referenced, including compiled programs and their CUDA graphs."""
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def largest_batch(fits: Callable[[int], bool]) -> int:
    """The largest batch of 1, 2, 3, 4, 6, 8, 12, … images that fits.

    Raises:
        InputError: not even one image fits.
    """
    found, size = 0, 1
    while fits(size):
        found, size = size, 2 * size
    if found == 0:
        raise InputError("batch largest: not even one image fits the device's memory")
    between = found * 3 // 2
    return between if between > found and fits(between) else found


def measure_memory(case: str, program: str, settings: Settings) -> tuple[int | None, int | None]:
    """Peak memory in bytes of one program in a separate process, and the process's memory before it was made."""
    order = json.dumps({"case": case, "program": program, "settings": asdict(settings)})
    command = [sys.executable, "-m", "pixart.benchmark.memory", order]
    root = str(Path(__file__).parents[2])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        reason = (done.stderr.strip() or f"exit code {done.returncode}").splitlines()[-1]
        raise InputError(f"case {case}, program {program}: its memory could not be measured ({reason})")
    peak, before = json.loads(done.stdout.splitlines()[-1])
    return peak, before
