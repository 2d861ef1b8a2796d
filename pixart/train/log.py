"""What a run tells: metrics.jsonl always, accelerate's trackers, a progress bar; and two small files for who is not
looking: is it alive (`heartbeat.json`), and how did it end (`summary.json`).
"""

import hashlib
import json
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor
from tqdm import tqdm

from pixart.config import dump_yaml
from pixart.diffusion.timestep_bins import quarter_means
from pixart.errors import InputError, missing_extra
from pixart.files import append_rows, read_rows, to_json, write_json, write_text
from pixart.provenance import versions
from pixart.train.config import TrainConfig
from pixart.train.metrics import (
    DECLARED,
    METRICS_FILE,
    headlines,
    last_and_best,
    last_value,
    merge_declarations,
    open_metrics,
    read_metrics,
    write_declarations,
)
from pixart.train.state import Progress
from pixart.train.step import StepResult, read_results
from pixart.train.throughput import measure_peak, memory_gb

HEARTBEAT, SUMMARY = "heartbeat.json", "summary.json"
BEAT = 30  # seconds after which a heartbeat is due between two logging points


class Watch:
    """Collects step results on the device and writes their means every `log_every` steps, in the main process."""

    def __init__(self, accelerator: Accelerator, config: TrainConfig, run: Path, progress: Progress):
        self.accelerator, self.config, self.run, self.progress = accelerator, config, run, progress
        self.peak = config.train.peak_tflops
        self.stopped_by = "a signal"  # of a run that ends early without an error
        self.hours_before, self.loss, self.warned = 0.0, None, set()
        metrics = open_metrics(config)
        self.scores = {score.key for metric in metrics.values() for score in metric.declaration.scores}
        if accelerator.is_main_process:
            _cut_after(run / METRICS_FILE, progress.step)
            self.hours_before = read_gpu_hours(run)
            if (run / SUMMARY).exists():  # of the last start; this one is not over
                (run / SUMMARY).unlink()
            if config.train.validate_every:
                self._try(DECLARED, lambda path: write_declarations(run, metrics))
        if self.peak == "measure":
            dtype = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[config.train.mixed_precision]
            self.peak = measure_peak(accelerator.device, dtype)
            accelerator.print(f"mfu is a share of {self.peak:.4g} TFLOP/s, measured here in {dtype}")
        self.bar = tqdm(
            total=config.train.steps, initial=progress.step, unit="step", desc="training", dynamic_ncols=True,
            disable=not accelerator.is_main_process,
        )  # fmt: skip
        self.began = self.beat_at = time.perf_counter()
        self._restart()
        self._beat()

    def _restart(self) -> None:
        self.results: list[StepResult] = []
        self.flops = 0  # of this process
        self.wait = 0.0
        self.since = time.perf_counter()

    @property
    def gpu_hours(self) -> float:
        """Device-hours of training over all starts, with validation, sampling, saving and steps lost to a kill."""
        return self.hours_before + (time.perf_counter() - self.began) * self.accelerator.num_processes / 3600

    def add(self, result: StepResult, wait: float, flops: int) -> None:
        """A step's result, the seconds that training waited for its data, and FLOPs of this process's networks."""
        self.results.append(result)
        self.flops += flops
        self.wait += wait
        self.bar.update()
        if time.perf_counter() - self.beat_at > BEAT:
            self._beat()

    def pause(self, seconds: float) -> None:
        """Leave `seconds` (of sampling, say) out of the throughput."""
        self.since += seconds

    def log(self, progress: Progress, lr: float, extra: dict[str, float]) -> None:
        """Write the window's means, loss and gradient norm over the steps that were applied, and `extra`.

        All processes call it.
        """
        results = read_results(self.results)
        applied = [result for result in results if result.applied]
        quartered = [kept for kept, result in zip(self.results, results, strict=True) if result.applied]
        seconds = time.perf_counter() - self.since
        tflops, memory, quarters = self._gather(quartered, seconds)
        row = {
            "lr": lr,
            "images_per_second": sum(result.images for result in results) / seconds,
            "data_wait": self.wait / seconds,
            "model_tflops": tflops,
            "memory_gb": memory,
            "skipped": progress.skipped,
            "images": progress.images,
            "seconds": progress.seconds,
            "gpu_hours": self.gpu_hours,
            **extra,
        }
        if self.peak is not None:
            row["mfu"] = tflops / self.peak
        if applied:
            terms = {name: statistics.fmean(r.terms[name] for r in applied) for name in applied[0].terms}
            if taken := terms.keys() & (row.keys() | self.scores):
                raise InputError(f"objective: its term '{min(taken)}' has the name of another metric; rename it")
            row.update(terms)
            self.loss = terms["loss"]
            row["grad_norm"] = statistics.fmean(result.grad_norm for result in applied)
            row.update(quarter_means(quarters, "loss"))
        self.write(progress.step, row)
        self._beat()
        self.bar.set_postfix_str(
            f"loss {row.get('loss', float('nan')):.4g}, {row['images_per_second']:.0f} images/s, "
            f"{tflops:.3g} TFLOP/s, data-wait {row['data_wait']:.0%}"
        )
        self._restart()

    def _gather(self, applied: list[StepResult], seconds: float) -> tuple[float, float, Tensor]:
        """Mean TFLOP/s of a device, the most memory of one, and sums and counts of losses by quarter of the times."""
        device = self.accelerator.device
        quarters = sum((result.quarters for result in applied), torch.zeros(2, 4, device=device))
        own = torch.tensor([self.flops / 1e12, memory_gb(device)], device=device)
        everyones = self.accelerator.gather(torch.cat([own, quarters.flatten()])[None])  # (processes, 10)
        # the main process's seconds: the others wait inside a step while it samples, so theirs include its pause
        return everyones[:, 0].mean().item() / seconds, everyones[:, 1].max().item(), everyones[:, 2:].sum(0).view(2, 4)

    def write(self, step: int, values: dict[str, float]) -> None:
        """One line of metrics.jsonl, and the same to the trackers. What is not finite is said, and null in the file."""
        self.accelerator.log(values, step=step)
        if broken := [f"{name} {value}" for name, value in values.items() if not math.isfinite(value)]:
            self.say(f"step {step}: {', '.join(broken)}; null in {METRICS_FILE}")
        self._try(METRICS_FILE, lambda path: append_rows(path, [{"step": step, **values}]))

    def _beat(self) -> None:
        self.beat_at = time.perf_counter()
        values = {"step": self.progress.step, "steps": self.config.train.steps, "loss": self.loss, "time": time.time(),
                  "gpu_hours": self.gpu_hours}  # fmt: skip
        self._try(HEARTBEAT, lambda path: write_json(path, values, durable=False))

    def _try(self, name: str, write: Callable[[Path], None]) -> None:
        """Write one of the run's small files in the main process; a full disk costs a line, not the run."""
        if not self.accelerator.is_main_process:
            return
        try:
            write(self.run / name)
            self.warned.discard(name)
        except OSError as error:
            if name not in self.warned:
                self.say(f"warning: {self.run / name} could not be written ({error}); training goes on")
            self.warned.add(name)

    def say(self, text: str) -> None:
        if self.accelerator.is_main_process:
            tqdm.write(text)

    def __enter__(self) -> "Watch":
        return self

    def __exit__(self, _type, error: BaseException | None, _traceback) -> None:
        self.bar.close()
        told = self.config.train.peak_tflops
        peak = {"peak_tflops": self.peak, "peak_is": "measured" if told == "measure" else told and "given"}
        summary = summarise(self.config, self.run, self.progress, error, self.stopped_by)
        summary |= {"gpu_hours": self.gpu_hours, **peak}
        self._beat()
        self._try(SUMMARY, lambda path: write_json(path, summary, durable=False))
        self.accelerator.end_training()


def start_trackers(accelerator: Accelerator, config: TrainConfig) -> None:
    try:
        accelerator.init_trackers("tracker")
    except ImportError as error:
        raise InputError(f"train.trackers {list(config.train.trackers)}: {error}") from None


def check_trackers(names: tuple[str, ...]) -> None:
    """Refuse a tracker that accelerate does not know or that is not installed, before any work."""
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS
    from accelerate.utils import is_tensorboard_available

    known = {str(getattr(name, "value", name)) for name in LOGGER_TYPE_TO_CLASS}
    for name in names:
        if name not in known:
            raise InputError(f"train.trackers: there is no '{name}'; accelerate has {', '.join(sorted(known))}")
    if "tensorboard" in names and not is_tensorboard_available():
        raise missing_extra("tensorboard", "train", "the tracker 'tensorboard' (or set train.trackers to [])")


def _cut_after(path: Path, step: int) -> None:
    """Drop the lines past `step`, which a run that was killed after its last checkpoint has left."""
    if path.exists():
        write_text(path, "".join(to_json(row) + "\n" for row in read_rows(path) if row["step"] <= step))


def read_gpu_hours(run: Path) -> float:
    """Device-hours that the heartbeat of this run's last start came to; 0 where there was none.

    The heartbeat knows the steps that a kill has lost, a checkpoint does not.
    """
    path = run / HEARTBEAT
    if not path.exists():
        return 0.0
    try:
        return float(json.loads(path.read_text(encoding="utf-8"))["gpu_hours"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: cannot be read ({error}); remove it to count device-hours from 0") from None


def summarise(
    config: TrainConfig, run: Path, progress: Progress, error: BaseException | None, stopped_by: str = "a signal"
) -> dict:
    """How a run stands or ended, as `summary.json` has it; `error` is what stopped it, else `stopped_by`."""
    finished = error is None and progress.step >= config.train.steps
    why = "finished" if finished else f"stopped by {stopped_by}"
    if error is not None:
        why = f"{type(error).__name__}: {error}".rstrip(": ")
    rows, now = read_metrics(run), {name: metric.declaration for name, metric in open_metrics(config).items()}
    scores = headlines([*now.values(), *(of for name, of in merge_declarations([run]).items() if name not in now)])
    return {
        "finished": finished,
        "why": why,
        "step": progress.step,
        "steps": config.train.steps,
        "images": progress.images,
        "seconds": progress.seconds,
        "loss": last_value(rows, "loss"),
        **{key: value for score in scores for key, value in last_and_best(rows, score).items()},
        "skipped": progress.skipped,
        "unreadable": len(progress.unreadable),
        "config_sha256": hashlib.sha256(dump_yaml(config).encode()).hexdigest(),
        "versions": versions(),
    }
