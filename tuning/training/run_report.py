"""The page of a run, kept up to date while it trains."""

import os
import time
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import Any

from transformers import TrainerCallback

from tuning.console import say
from tuning.errors import RunEnded, UserError
from tuning.files import PROGRESS_FILE, REPORT_FILE, read_json, write_json
from tuning.report.page import write_report
from tuning.report.record import ENDED, FINISHED, RUNNING

REST = 50  # a page is next written after so many times as long as the last one took: 2 % of the time at most


class RunReport(TrainerCallback):
    """Writes `run_progress.json` and `report.html`, at every log and at the end; nothing unless `writes`.

    A `with` block around the run notes how it ended. A disk that cannot be written ends no training.
    """

    def __init__(self, output_dir: str | os.PathLike, *, writes: bool):
        self.output_dir, self.writes = Path(output_dir), writes
        self.progress: dict[str, Any] = read_json(self.output_dir / PROGRESS_FILE) or {} if writes else {}
        self._began, self._first_step = 0.0, 0
        self._next, self._failed = 0.0, False

    def on_train_begin(self, args, state, control, **kwargs):
        self._began, self._first_step, self._next = time.monotonic(), state.global_step, 0.0
        self.progress = {"batches": self.progress.get("batches"), "max_steps": state.max_steps}
        self._note(state)

    def on_log(self, args, state, control, logs=None, **kwargs):
        self._note(state)

    def _note(self, state: Any) -> None:
        done, seconds = state.global_step - self._first_step, time.monotonic() - self._began
        left = seconds / done * (state.max_steps - state.global_step) if done else 0
        self.progress |= {"state": RUNNING, "step": state.global_step, "seconds_left": round(left, 2)}
        if time.monotonic() >= self._next:
            self.refresh()

    def refresh(self) -> None:
        """Write both files now."""
        if not self.writes:
            return
        started = time.monotonic()
        self.progress["updated"] = datetime.now().astimezone().isoformat(timespec="seconds")
        try:
            write_json(self.output_dir / PROGRESS_FILE, self.progress)
            write_report(self.output_dir)
        except OSError as error:
            if not self._failed:
                say(f"{self.output_dir / REPORT_FILE} cannot be written: {error.strerror}. The run goes on without it.")
            self._failed = True
        self._next = time.monotonic() + REST * (time.monotonic() - started)

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.progress |= {"state": ENDED if error else FINISHED, "seconds_left": 0, "reason": explain_end(error)}
        self.refresh()


def explain_end(error: BaseException | None) -> str:
    """Why a run ended early, in the words its user is told."""
    if isinstance(error, RunEnded):
        return error.message
    if isinstance(error, KeyboardInterrupt):
        return "Interrupted."
    return str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}" if error else ""
