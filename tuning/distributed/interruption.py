"""Requests to stop: signals, and the time limit of a queue."""

import multiprocessing
import os
import signal
import threading
import time
from types import FrameType

import psutil

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
RESERVE = 1.5  # how much longer than the longest step and checkpoint so far the last ones may take
LEAST_SECONDS = 120  # enough for the first checkpoint, whose duration is not known


class Interruption:
    """As a context, remembers that SIGTERM or SIGUSR1 arrived; `check` then tells why the run should stop.

    `minutes`: the time that the queue allows, counted from the start of this process. The run should stop while a step
    and a checkpoint still fit into it. They are taken to last `RESERVE` times as long as the longest so far, and at
    least `LEAST_SECONDS`.
    """

    def __init__(self, minutes: float | None = None):
        self.deadline = None if minutes is None else psutil.Process().create_time() + 60 * minutes
        self.signal: signal.Signals | None = None
        self.longest_step = self.longest_save = 0.0
        self._checked: float | None = None
        self._before: dict[signal.Signals, object] = {}

    def check(self) -> str:
        """Why the run should stop, or "". Call this once a step: the time between two calls counts as a step's."""
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
            self._before = {number: signal.signal(number, self._remember) for number in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self.signal = signal.Signals(number)


class Workers:
    """As a context, keeps data workers alive when all processes of a job are signalled to stop.

    The trainer needs them to finish its step. After the context they may exit: PyTorch and Python terminate workers
    that are left. `start` is the `worker_init_fn` of a loader.
    """

    def __init__(self, start_method: str | None = None):
        self.may_exit = multiprocessing.get_context(start_method).Event()

    def __enter__(self) -> "Workers":
        return self

    def __exit__(self, *_: object) -> None:
        self.may_exit.set()

    def start(self, *_: object) -> None:
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, self._exit_if_allowed)

    def _exit_if_allowed(self, number: int, frame: FrameType | None) -> None:
        if self.may_exit.is_set():
            os._exit(0)
