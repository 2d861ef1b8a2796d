"""Leaving early in good order."""

import signal
import threading

# what a script exits with when a signal ended it early and the same command goes on: EX_TEMPFAIL of sysexits.h, which
# tells a scheduler to try again
REQUEUE = 75
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class StopSignal:
    """Turns Ctrl-C, SIGTERM and SIGUSR1 into a flag; Ctrl-C before training, or a second one, ends at once.

    Python handles signals in the main thread alone. In any other, as in a notebook's or a server's, nothing is
    installed: the program around it decides what a signal means.
    """

    def __init__(self):
        self.requested, self.training = False, False

    def __enter__(self) -> "StopSignal":
        main = threading.current_thread() is threading.main_thread()
        self._previous = {number: signal.signal(number, self._request) for number in SIGNALS if main}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _request(self, number: int, _frame) -> None:
        if number == signal.SIGINT and (self.requested or not self.training):
            raise KeyboardInterrupt
        self.requested = True
