"""Being asked to stop: signals, and the time limit of a queue."""

import multiprocessing
import os
import signal
import threading
import time
from types import FrameType

import psutil

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
RESERVE = 1.5  # how much longer than the longest step and checkpoint so far the last ones may take
LEAST_SECONDS = 120  # the first checkpoint, of which nothing is known, must fit, too


class Interruption:
    """Notices, between `__enter__` and `__exit__`, that this process should stop.

    SIGTERM and SIGUSR1 are noted instead of ending the process. `minutes`: the time the queue allows since this process
    began; the run should stop while a step and a checkpoint, `RESERVE` times as long as the longest so far and at least
    `LEAST_SECONDS`, still fit into it.
    """

    def __init__(self, minutes: float | None = None):
        self.deadline = None if minutes is None else psutil.Process().create_time() + 60 * minutes
        self.signal: signal.Signals | None = None
        self.longest_step = self.longest_save = 0.0
        self._checked: float | None = None
        self._before: dict[signal.Signals, object] = {}

    def check(self) -> str:
        """Once a step: why the run should stop, or "". A step is what lies between two checks: data and saving too."""
        now, before, self._checked = time.time(), self._checked, time.time()
        self.longest_step = max(self.longest_step, now - (before or now))
        if self.signal is not None:
            return self.signal.name
        if self.deadline is None:
            return ""
        needed = max(LEAST_SECONDS, RESERVE * (self.longest_step + self.longest_save))
        return "save_before_walltime" if now + needed >= self.deadline else ""

    def __enter__(self) -> "Interruption":
        if threading.current_thread() is threading.main_thread():  # Python allows handlers there only
            self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.signal = signal.Signals(number)


class Workers:
    """Keeps the processes that read data from ending when all processes of a job are signalled to stop.

    The trainer still needs them to finish its step. After `__exit__` they may be terminated again, as PyTorch and
    Python do with what is left of them. `start` is run by each when it begins.
    """

    def __init__(self, start_method: str | None = None):
        self.leaving = multiprocessing.get_context(start_method).Event()

    def __enter__(self) -> "Workers":
        return self

    def __exit__(self, *_: object) -> None:
        self.leaving.set()

    def start(self, *_: object) -> None:
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, self._leave)

    def _leave(self, number: int, frame: FrameType | None) -> None:
        if self.leaving.is_set():
            os._exit(0)
