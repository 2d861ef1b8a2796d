"""A run's log: metrics.jsonl, accelerate's trackers and a progress bar, and two small files for monitoring a run from
outside: `heartbeat.json` says that it is alive, `summary.json` how it ended.
"""

import hashlib
import json
import math
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType

import torch
from accelerate import Accelerator
from torch import Tensor
from tqdm import tqdm

from pixart.config import dump_yaml
from pixart.diffusion.timestep_bins import bin_means
from pixart.errors import InputError
from pixart.files import append_rows, cut_rows, read_rows, write_json
from pixart.provenance import versions
from pixart.train.config import TrainConfig
from pixart.train.distributed import Processes
from pixart.train.metrics import (
    DECLARED,
    METRICS_FILE,
    declared_metrics,
    headlines,
    is_number,
    last_and_best,
    last_value,
    merge_declarations,
    read_metrics,
    write_declarations,
)
from pixart.train.state import Progress
from pixart.train.step import StepResult, read_results
from pixart.train.throughput import measure_peak, memory_gb
from pixart.train.trackers import track

HEARTBEAT, SUMMARY = "heartbeat.json", "summary.json"
BEAT = 30  # seconds between heartbeats, if no log comes earlier


class Watch:
    """Collects step results on the device and writes their means every `log_every` steps, in the main process."""

    def __init__(
        self, processes: Processes, accelerator: Accelerator, config: TrainConfig, run: Path, progress: Progress
    ):
        self.processes, self.accelerator = processes, accelerator
        self.config, self.run, self.progress = config, run, progress
        self.peak = config.train.peak_tflops
        self.stopped_by = "a signal"  # why a run ended early without an error
        self.hours_before, self.loss, self.warned = 0.0, None, set()
        self.unwritten: list[dict] = []  # rows of metrics.jsonl that a full disk did not take
        metrics = declared_metrics(config)
        self.scores = {score.key for metric in metrics.values() for score in metric.declaration.scores}
        if accelerator.is_main_process:
            self.hours_before = read_gpu_hours(run, self.say)
            self._try(METRICS_FILE, lambda path: cut_rows(path, progress.step))
            self._try(SUMMARY, lambda path: path.unlink(missing_ok=True))  # the previous start's
            if config.train.validate_every or config.train.evaluate_every:
                self._try(DECLARED, lambda path: write_declarations(run, metrics))
        if self.peak == "measure":
            dtype = config.train.autocast_dtype
            self.peak = measure_peak(accelerator.device, dtype)
            accelerator.print(f"mfu is relative to {self.peak:.4g} TFLOP/s, measured here in {dtype}")
        self.bar = tqdm(
            total=config.train.steps,
            initial=progress.step,
            unit="step",
            desc="training",
            dynamic_ncols=True,
            disable=not accelerator.is_main_process,
        )
        self.began = self.beat_at = time.perf_counter()
        self._restart(progress.unlogged)
        self._beat()

    def _restart(self, unlogged: Mapping = MappingProxyType({})) -> None:
        self.results: list[StepResult] = []
        # the steps since the last row that an earlier start did: the objective's terms where the step was applied, and
        # this process's losses by timestep bin
        self.before = [(dict(terms), norm) for terms, norm in unlogged.get("applied", [])]
        self.quarters_before = self._share(unlogged.get("quarters", []))
        self.flops = 0  # by this process
        self.wait = 0.0
        self.since = time.perf_counter()

    @property
    def gpu_hours(self) -> float:
        """Device-hours of training over all starts, including validation, sampling, saving and steps lost to a kill."""
        return self.hours_before + (time.perf_counter() - self.began) * self.accelerator.num_processes / 3600

    def add(self, result: StepResult, wait: float, flops: int) -> None:
        """Add a step's result, the seconds it waited for data, and the FLOPs of this process's networks."""
        self.results.append(result)
        self.flops += flops
        self.wait += wait
        self.bar.update()
        if time.perf_counter() - self.beat_at > BEAT:
            self._beat()

    def unlogged(self) -> dict:
        """The results since the last row, for a checkpoint: the next row needs them even if a kill comes before it. All
        processes call it."""
        results = read_results(self.results)
        applied = self.before + [(result.terms, result.grad_norm) for result in results if result.applied]
        kept = [kept for kept, result in zip(self.results, results, strict=True) if result.applied]
        return {
            "applied": [[terms, norm] for terms, norm in applied],
            "quarters": self.processes.gather(self._sum_quarters(kept).tolist()),
        }

    def _share(self, quarters: list) -> Tensor:
        """This process's share of the stored sums: its own, or if the number of processes has changed, the total in the
        main process and zeros in the others."""
        count, rank = self.processes.count, self.processes.rank
        values = torch.tensor(quarters, dtype=torch.float32).view(-1, 2, 4)
        if len(values) != count:
            values = torch.cat([values.sum(0, keepdim=True), torch.zeros(count - 1, 2, 4)])
        return values[rank].to(self.accelerator.device)

    def _sum_quarters(self, applied: list[StepResult]) -> Tensor:
        return sum((result.quarters for result in applied), self.quarters_before)

    def pause(self, seconds: float) -> None:
        """Exclude `seconds` (e.g. of sampling) from the throughput."""
        self.since += seconds

    def log(self, progress: Progress, lr: float, extra: dict[str, float]) -> None:
        """Write the means since the last row, of loss and gradient norm over the steps that were applied, and `extra`.

        All processes call it.
        """
        results = read_results(self.results)
        applied = self.before + [(result.terms, result.grad_norm) for result in results if result.applied]
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
            terms = {name: statistics.fmean(t[name] for t, _ in applied if name in t) for name in applied[-1][0]}
            if taken := terms.keys() & (row.keys() | self.scores):
                raise InputError(f"objective: its term '{min(taken)}' has the name of another metric; rename it")
            row.update(terms)
            self.loss = terms["loss"]
            row["grad_norm"] = statistics.fmean(norm for _, norm in applied)
            row.update(bin_means(quarters, "loss"))
        self.write(progress.step, row)
        self._beat()
        self.bar.set_postfix_str(
            f"loss {row.get('loss', float('nan')):.4g}, {row['images_per_second']:.0f} images/s, "
            f"{tflops:.3g} TFLOP/s, data-wait {row['data_wait']:.0%}"
        )
        self._restart()

    def _gather(self, applied: list[StepResult], seconds: float) -> tuple[float, float, Tensor]:
        """Mean TFLOP/s per device, the largest memory of any device, and sums and counts of losses by timestep bin."""
        device = self.accelerator.device
        quarters = self._sum_quarters(applied)
        own = torch.tensor([self.flops / 1e12, memory_gb(device)], device=device)
        everyones = self.accelerator.gather(torch.cat([own, quarters.flatten()])[None])  # (processes, 10)
        # by the main process's clock: while it samples, the others wait inside a step, so theirs includes its pause
        return everyones[:, 0].mean().item() / seconds, everyones[:, 1].max().item(), everyones[:, 2:].sum(0).view(2, 4)

    def write(self, step: int, values: dict[str, float]) -> None:
        """Write a line of metrics.jsonl, and the same to the trackers. Values that are not finite are reported, and are
        null in the file."""
        track(self.accelerator, lambda tracker: tracker.log(values, step=step), self.say)
        if broken := [f"{name} {value}" for name, value in values.items() if not math.isfinite(value)]:
            self.say(f"step {step}: {', '.join(broken)}; null in {METRICS_FILE}")
        self.unwritten.append({"step": step, **values})
        self.flush()

    def flush(self) -> None:
        """Write the rows that there are; those that a full disk does not take wait for the next call."""
        if self.unwritten and self._try(METRICS_FILE, lambda path: append_rows(path, self.unwritten)):
            self.unwritten = []

    def _beat(self) -> None:
        self.beat_at = time.perf_counter()
        values = {
            "step": self.progress.step,
            "steps": self.config.train.steps,
            "loss": self.loss,
            "time": time.time(),
            "gpu_hours": self.gpu_hours,
        }
        self._try(HEARTBEAT, lambda path: write_json(path, values, durable=False))

    def _try(self, name: str, write: Callable[[Path], None]) -> bool:
        """Write one of the run's small files in the main process and return whether it is written; a full disk gives a
        warning and does not end the run."""
        if not self.accelerator.is_main_process:
            return True
        try:
            write(self.run / name)
            self.warned.discard(name)
        except OSError as error:
            if name not in self.warned:
                self.say(f"warning: {self.run / name} could not be written ({error}); training continues")
            self.warned.add(name)
        return name not in self.warned

    def say(self, text: str) -> None:
        if self.accelerator.is_main_process:
            tqdm.write(text)

    def __enter__(self) -> "Watch":
        return self

    def __exit__(self, _type, error: BaseException | None, _traceback) -> None:
        self.bar.close()
        self.flush()
        told = self.config.train.peak_tflops
        peak = {"peak_tflops": self.peak, "peak_is": "measured" if told == "measure" else told and "given"}
        summary = summarise(self.config, self.run, self.progress, error, self.stopped_by)
        summary |= {"gpu_hours": self.gpu_hours, **peak}
        self._beat()
        self._try(SUMMARY, lambda path: write_json(path, summary, durable=False))
        track(self.accelerator, lambda tracker: tracker.finish(), self.say)
        self.accelerator.trackers = []
        self.accelerator.end_training()


def read_gpu_hours(run: Path, say: Callable[[str], None] = print) -> float:
    """Device-hours of all earlier starts of this run, from the heartbeat of the last one; 0 if there is none.

    The heartbeat includes the steps that were lost to a kill, which a checkpoint does not. Since this is only a
    statistic, a damaged heartbeat is reported and replaced by the last row of metrics.jsonl.
    """
    path = run / HEARTBEAT
    if not path.exists():
        return 0.0
    try:
        hours = float(json.loads(path.read_text(encoding="utf-8"))["gpu_hours"])
        if not 0 <= hours < math.inf:
            raise ValueError(f"gpu_hours is {hours}")
    except (OSError, ValueError, KeyError, TypeError, OverflowError) as error:
        rows = [row["gpu_hours"] for row in read_rows(run / METRICS_FILE) if is_number(row.get("gpu_hours"))]
        hours = rows[-1] if rows else 0.0
        say(f"warning: {path}: cannot be read ({error}); device-hours continue from {hours:.4g}")
    return hours


def summarise(
    config: TrainConfig, run: Path, progress: Progress, error: BaseException | None, stopped_by: str = "a signal"
) -> dict:
    """The content of `summary.json`: a run's state and how it ended, by `error` if there was one, else `stopped_by`."""
    finished = error is None and progress.step >= config.train.steps
    why = "finished" if finished else f"stopped by {stopped_by}"
    if error is not None:
        why = f"{type(error).__name__}: {error}".rstrip(": ")
    rows, now = read_metrics(run), {name: metric.declaration for name, metric in declared_metrics(config).items()}
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
