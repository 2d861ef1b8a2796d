"""Stopping early but cleanly: on signals, and when the launcher is gone."""

import os
import signal
import sys
import threading

from pixart.data.workers import GROUP_SIGNALS

# the exit status after a signal, when the same command can resume: EX_TEMPFAIL of sysexits.h, which tells a scheduler
# to try again
REQUEUE = 75
# variables that torchrun, accelerate launch, srun, mpirun and a study set in the environment of their processes
WATCHED = "PIXART_STUDY"
LAUNCHED = (
    WATCHED,"TORCHELASTIC_RUN_ID", "ACCELERATE_MIXED_PRECISION", "SLURM_PROCID", "OMPI_COMM_WORLD_RANK", "PMI_RANK",
)  # fmt: skip
INITS = ("systemd", "init", "tini", "dumb-init", "docker-init", "launchd")  # these adopt orphans but launch no jobs


class StopSignal:
    """Turns Ctrl-C, SIGTERM, SIGUSR1 and SIGHUP into a flag. Before the first step they end the program at once, by
    KeyboardInterrupt or `SystemExit(REQUEUE)`; a second Ctrl-C ends training at once. Under nohup SIGHUP stays ignored.

    Python handles signals in the main thread only. In any other thread, e.g. of a notebook or a server, no handler is
    installed, and the surrounding program decides what a signal means.
    """

    def __init__(self):
        self.requested, self.training = False, False

    def __enter__(self) -> "StopSignal":
        main = threading.current_thread() is threading.main_thread()
        self._previous = {
            number: signal.signal(number, self._request) for number in GROUP_SIGNALS if main and not _is_nohup(number)
        }
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def hold_children(self) -> None:
        """Call this once data workers have been started. A worker that dies is then noticed where its samples are asked
        for; torch's own handler would raise at any point, e.g. in the middle of a step."""
        if self._previous and signal.SIGCHLD not in self._previous and callable(signal.getsignal(signal.SIGCHLD)):
            self._previous[signal.SIGCHLD] = signal.signal(signal.SIGCHLD, lambda *_: None)

    def keep_holding(self) -> None:
        """After a worker was lost: torch's handler would raise once more, when the loader is freed after training."""
        self._previous.pop(signal.SIGCHLD, None)

    def _request(self, number: int, _frame) -> None:
        if number == signal.SIGINT and (self.requested or not self.training):
            raise KeyboardInterrupt
        if not self.training:
            name = signal.Signals(number).name
            print(f"stopped by {name} before the first step; run the same command to start again", file=sys.stderr)
            raise SystemExit(REQUEUE)
        self.requested = True


def _is_nohup(number: int) -> bool:
    return number == signal.SIGHUP and signal.getsignal(number) is signal.SIG_IGN


class LauncherWatch:
    """Ends a process started by torchrun, accelerate launch, srun, mpirun or a study when its launcher is gone: by
    SIGTERM, and if it still runs after `patience` seconds (e.g. in a call that never returns), at once.

    A launcher killed by SIGKILL cannot notify its processes, but they get another parent, which this watches for.
    """

    def __init__(self, patience: float):
        self.patience = patience
        self._over = threading.Event()

    def __enter__(self) -> "LauncherWatch":
        if any(name in os.environ for name in LAUNCHED):
            threading.Thread(target=self._watch, args=(os.getppid(),), name="launcher", daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self._over.set()

    def _watch(self, launcher: int) -> None:
        if not _was_adopted(launcher):  # else the launcher was gone before the first check
            while os.getppid() == launcher:
                if self._over.wait(1.0):
                    return
        os.kill(os.getpid(), signal.SIGTERM)
        if not self._over.wait(self.patience):
            os._exit(1)


def _was_adopted(parent: int) -> bool:
    import psutil  # accelerate brings it

    try:
        return parent == 1 and psutil.Process(parent).name() in INITS
    except psutil.Error:
        return False
