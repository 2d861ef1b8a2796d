"""What a run tells: metrics.jsonl always, accelerate's trackers, a progress bar, and the loss on held-out images."""

import json
import statistics
import time
from pathlib import Path

from accelerate import Accelerator
from tqdm import tqdm

from pixart.errors import InputError, missing_extra
from pixart.train.config import TrainConfig
from pixart.train.state import Progress
from pixart.train.step import StepResult, read_results


class Watch:
    """Collects step results on the device and writes their means every `log_every` steps, in the main process."""

    def __init__(self, accelerator: Accelerator, config: TrainConfig, run: Path, progress: Progress):
        self.accelerator, self.config = accelerator, config
        self.path = run / "metrics.jsonl"
        if accelerator.is_main_process:
            _cut_after(self.path, progress.step)
        self.bar = tqdm(
            total=config.train.steps, initial=progress.step, unit="step", desc="training", dynamic_ncols=True,
            disable=not accelerator.is_main_process,
        )  # fmt: skip
        self._restart()

    def _restart(self) -> None:
        self.results: list[StepResult] = []
        self.wait = 0.0
        self.since = time.perf_counter()

    def add(self, result: StepResult, wait: float) -> None:
        """A step's result, and the seconds that training waited for its data."""
        self.results.append(result)
        self.wait += wait
        self.bar.update()

    def pause(self, seconds: float) -> None:
        """Leave `seconds` (of sampling, say) out of the throughput."""
        self.since += seconds

    def log(self, progress: Progress, lr: float, extra: dict[str, float]) -> None:
        """Write the window's means, loss and gradient norm over the steps that were applied, and `extra`."""
        results = read_results(self.results)
        applied = [result for result in results if result.applied]
        seconds = time.perf_counter() - self.since
        row = {
            "lr": lr,
            "images_per_second": sum(result.images for result in results) / seconds,
            "data_wait": self.wait / seconds,
            "skipped": progress.skipped,
            "images": progress.images,
            "seconds": progress.seconds,
            **extra,
        }
        if applied:
            row["loss"] = statistics.fmean(result.loss for result in applied)
            row["grad_norm"] = statistics.fmean(result.grad_norm for result in applied)
        self.write(progress.step, row)
        self.bar.set_postfix_str(
            f"loss {row.get('loss', float('nan')):.4g}, {row['images_per_second']:.0f} images/s, "
            f"data-wait {row['data_wait']:.0%}"
        )
        self._restart()

    def write(self, step: int, values: dict[str, float]) -> None:
        """One line of metrics.jsonl, and the same to the trackers."""
        self.accelerator.log(values, step=step)
        if self.accelerator.is_main_process:
            try:
                with open(self.path, "a", encoding="utf-8") as file:
                    file.write(json.dumps({"step": step, **values}) + "\n")
            except OSError as error:  # a full disk; the state, not this, decides whether training goes on
                self.say(f"warning: {self.path}: cannot be written ({error})")

    def say(self, text: str) -> None:
        if self.accelerator.is_main_process:
            tqdm.write(text)

    def __enter__(self) -> "Watch":
        return self

    def __exit__(self, *_) -> None:
        self.bar.close()
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
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line)
        except (ValueError, KeyError):  # the kill tore the last line
            continue
    path.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
