"""What is recorded of the steps: log lines, throughput, the live report; and early stopping."""

import json
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import Any

from transformers import EarlyStoppingCallback, TrainerCallback, TrainerState

from tuning.console import print0
from tuning.errors import RunEnded, UserError
from tuning.files import LOG_FILE, PROGRESS_FILE, REPORT_FILE, read_json, read_lines, to_lines, write_json, write_text
from tuning.machine import peak_memory_bytes
from tuning.model.flops import utilisation
from tuning.pages.run_page import write_report
from tuning.pages.run_record import ENDED, FINISHED, RUNNING
from tuning.training.data_loading import DataLoading


class JsonLinesLog(TrainerCallback):
    """Writes `training_logs.jsonl`: one flat JSON object per line, not rounded. Evaluations have their own lines.

    On resume it first removes the lines after the checkpoint's step: those steps are trained again.
    """

    def __init__(self, output_dir: str | os.PathLike):
        self.path = Path(output_dir, LOG_FILE)

    def on_train_begin(self, args, state, control, **kwargs):
        if not state.is_world_process_zero:
            return
        kept = (
            [line for line in read_lines(self.path) if line["step"] <= state.global_step] if state.global_step else []
        )
        write_text(self.path, to_lines(kept))

    def on_log(self, args, state, control, logs=None, **kwargs):
        if state.is_world_process_zero and logs and ("loss" in logs or "eval_loss" in logs):
            with open(self.path, "a") as file:
                file.write(json.dumps({"step": state.global_step, **logs}) + "\n")


class EarlyStopping(EarlyStoppingCallback):
    """Hugging Face's, but on resume it continues to count the evaluations without a better one."""

    def on_train_begin(self, args, state, control, **kwargs):
        super().on_train_begin(args, state, control, **kwargs)
        kept = state.stateful_callbacks.get(type(self).__name__, {})
        self.early_stopping_patience_counter = kept.get("attributes", {}).get("early_stopping_patience_counter", 0)


@dataclass
class StepMeter(TrainerCallback):
    """Measures steps between two log lines. The time for logging, evaluation and saving is left out.

    `peak`: operations per second that the device can do, where it is known.
    """

    peak: float | None = None
    steps: int = 0
    seconds: float = 0.0
    waited: float = 0.0
    tokens: int = 0
    supervised_tokens: int = 0
    operations: float = 0.0
    imbalances: list[float] = field(default_factory=list)
    _started: float = field(default_factory=time.perf_counter)

    def begin_step(self) -> None:
        """A step begins with reading its batches."""
        self._started = time.perf_counter()

    def data_arrived(self, tokens: int, supervised_tokens: int, operations: Sequence[float]) -> None:
        """The step's batches have been read. `operations`: those that they cost each process (`Flops.count`)."""
        self.waited += time.perf_counter() - self._started
        self.tokens += tokens
        self.supervised_tokens += supervised_tokens
        mean = sum(operations) / len(operations)
        self.operations += mean
        if len(operations) > 1 and mean:
            self.imbalances.append(max(operations) / mean)

    def on_step_end(self, args, state, control, **kwargs):
        self.seconds += time.perf_counter() - self._started
        self.steps += 1

    def report(self) -> dict[str, float]:
        """The figures of this process since the last report. Starts a new count.

        `step_seconds`: mean wall seconds of an optimizer step. `tokens_per_second`: real tokens, without padding.
        `supervised_tokens`: how many were trained. `data_wait_share`: share of the time spent waiting for batches.
        `peak_memory_gb`: GB (10⁹ bytes), the most that PyTorch allocated on CUDA, else the most resident memory.
        `mfu`: operations of real tokens and patches ÷ (seconds · peak), the mean of all processes; only where the peak
        is known. `rank_imbalance`: the operations of the process with most ÷ the mean, the mean over steps; only with
        several processes.
        """
        seconds = max(self.seconds, 1e-9)
        figures = {
            "step_seconds": self.seconds / max(self.steps, 1),
            "tokens_per_second": self.tokens / seconds,
            "supervised_tokens": self.supervised_tokens,
            "data_wait_share": self.waited / seconds,
            "peak_memory_gb": peak_memory_bytes() / 1e9,
        }
        if (mfu := utilisation(self.operations, seconds, self.peak)) is not None and self.operations:
            figures["mfu"] = mfu
        if self.imbalances:
            figures["rank_imbalance"] = sum(self.imbalances) / len(self.imbalances)
        self.steps = self.tokens = self.supervised_tokens = 0
        self.seconds = self.waited = self.operations = 0.0
        self.imbalances = []
        return figures


REST = 50  # the page is written again after 50 times as long as the last one took: at most 2 % of the time


class RunReport(TrainerCallback):
    """Writes `run_progress.json` and `report.html` at every log and at the end, on the main process.

    Use it in a `with` block around the run: it then records how the run ended. If the files cannot be written, training
    continues.
    """

    def __init__(self, output_dir: str | os.PathLike, loading: DataLoading, *, is_main_process: bool):
        self.output_dir, self.loading, self.is_main_process = Path(output_dir), loading, is_main_process
        self.progress: dict[str, Any] = read_json(self.output_dir / PROGRESS_FILE) or {} if is_main_process else {}
        self._began, self._first_step = 0.0, 0
        self._next, self._failed = 0.0, False

    def on_train_begin(self, args, state, control, **kwargs):
        self._began, self._first_step, self._next = time.monotonic(), state.global_step, 0.0
        self.progress = {"batches": str(self.loading.batching), "max_steps": state.max_steps}
        self._note(state)

    def on_log(self, args, state, control, logs=None, **kwargs):
        self._note(state)

    def _note(self, state: TrainerState) -> None:
        done, seconds = state.global_step - self._first_step, time.monotonic() - self._began
        left = seconds / done * (state.max_steps - state.global_step) if done else 0
        self.progress |= {"state": RUNNING, "step": state.global_step, "seconds_left": round(left, 2)}
        if time.monotonic() >= self._next:
            self.refresh()

    def refresh(self) -> None:
        """Write both files now."""
        if not self.is_main_process:
            return
        started = time.monotonic()
        self.progress["updated"] = datetime.now().astimezone().isoformat(timespec="seconds")
        try:
            write_json(self.output_dir / PROGRESS_FILE, self.progress)
            write_report(self.output_dir)
        except OSError as error:
            if not self._failed:
                file = self.output_dir / REPORT_FILE
                print0(f"{file} cannot be written: {error.strerror}. The run continues without it.")
            self._failed = True
        self._next = time.monotonic() + REST * (time.monotonic() - started)

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.progress |= {"state": ENDED if error else FINISHED, "seconds_left": 0, "reason": explain_end(error)}
        self.refresh()


def explain_end(error: BaseException | None) -> str:
    """Why a run ended early, in the words of its error message; "" if it did not."""
    if isinstance(error, RunEnded):
        return error.message
    if isinstance(error, KeyboardInterrupt):
        return "Interrupted."
    return str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}" if error else ""
