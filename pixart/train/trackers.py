"""Accelerate's trackers: one that is not installed is refused before any work; one that fails later gives a warning and
does not end the run."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import accelerate.utils
from accelerate import Accelerator
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker

from pixart.errors import InputError, did_you_mean, missing_extra
from pixart.train.config import TrainConfig

# the package that a tracker needs, if its name differs
PACKAGES = {"comet_ml": "comet-ml"}


def check_trackers(names: tuple[str, ...]) -> None:
    """Refuse a tracker that accelerate does not know or that is not installed, before any work."""
    known = {str(getattr(name, "value", name)) for name in LOGGER_TYPE_TO_CLASS}
    for name in names:
        if name not in known:
            raise InputError(
                f"train.trackers: there is no '{name}'{did_you_mean(name, known)} (accelerate has "
                f"{', '.join(sorted(known))})"
            )
        available = getattr(accelerate.utils, f"is_{name}_available", None)
        if available is None or available():  # a tracker that another program registered has no such function
            continue
        if name == "tensorboard":
            raise missing_extra("tensorboard", "train", "train.trackers: 'tensorboard' (or set it to [])")
        package = PACKAGES.get(name, name)
        raise InputError(
            f"train.trackers: '{name}' needs the package '{package}': pip install {package}; or leave it out"
        )


def start_trackers(accelerator: Accelerator, config: TrainConfig, step: int) -> None:
    """Start the trackers of `train.trackers` in a run resumed after `step`. TensorBoard hides what it has of later
    steps, which were lost to a kill."""
    options = {"tensorboard": {"purge_step": step + 1}} if step else {}
    try:
        accelerator.init_trackers("tracker", init_kwargs=options)
    except Exception as error:
        raise InputError(
            f"train.trackers {list(config.train.trackers)}: cannot be started ({type(error).__name__}: {error})"
        ) from error


def track(accelerator: Accelerator, log: Callable[[GeneralTracker], None], say: Callable[[str], None]) -> None:
    """Call `log` with each tracker; one that fails is reported once and left out until the next start."""
    for tracker in list(accelerator.trackers):
        try:
            log(tracker)
        except Exception as error:  # a full disk, a service that does not respond: each tracker has its own type
            accelerator.trackers.remove(tracker)
            say(
                f"warning: tracker {tracker.name}: {type(error).__name__}: {error}; training continues without it "
                "until its next start; metrics.jsonl has all numbers"
            )


@contextmanager
def quiet_writers() -> Iterator[None]:
    """A context that hides errors in TensorBoard's writer thread, since its next call raises them again: each is
    reported once."""
    before = threading.excepthook

    def hook(arguments: threading.ExceptHookArgs) -> None:
        if type(arguments.thread).__name__ != "_AsyncWriterThread":
            before(arguments)

    threading.excepthook = hook
    try:
        yield
    finally:
        threading.excepthook = before
