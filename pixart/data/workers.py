"""Data worker processes: how they handle signals, and how the loss of one is recognised."""

import os
import re
import signal
import threading

# signals that a scheduler, a terminal or `timeout` sends to a whole process group, so that training ends cleanly
GROUP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)


def leave_signals(_worker: int) -> None:
    """Run at the start of a data loader's worker: block the signals sent to the whole group, which only the parent
    handles.

    The parent ends workers that hang by SIGTERM, so a SIGTERM from the parent itself is obeyed.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, GROUP_SIGNALS)
    if hasattr(signal, "sigwaitinfo"):  # missing on macOS, where a hanging worker must be killed by hand
        threading.Thread(target=_obey_parent, args=(os.getppid(),), name="signals", daemon=True).start()


def _obey_parent(parent: int) -> None:
    while signal.sigwaitinfo([signal.SIGTERM]).si_pid != parent:
        pass
    os._exit(0)


def lost_worker(error: Exception) -> bool:
    """Whether an error of a data loader means that a worker was killed from outside, e.g. when memory ran out."""
    return bool(re.search(r"DataLoader worker \(pid", str(error))) or isinstance(error, (ConnectionError, EOFError))
