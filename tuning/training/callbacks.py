"""What happens beside the steps: a line of JSON a logging step, early stopping, the trainer's own doings."""

import json
import os
import time
import weakref
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import Any

from transformers import EarlyStoppingCallback, TrainerCallback

from tuning.console import print0
from tuning.data.batch_sampler import begin_epoch
from tuning.errors import RunEnded, UserError
from tuning.files import LOG_FILE, PROGRESS_FILE, REPORT_FILE, read_json, read_lines, to_lines, write_json, write_text
from tuning.machine import peak_memory_bytes
from tuning.pages.run_page import write_report
from tuning.pages.run_record import ENDED, FINISHED, RUNNING


class JsonLinesLog(TrainerCallback):
    """Writes `training_logs.jsonl`: a flat JSON object a line, unrounded; evaluations are lines of their own.

    After a resume, lines beyond the checkpoint's step are taken out first: those steps are trained again.
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
    """Hugging Face's, which after a resume goes on counting the evaluations without a better one."""

    def on_train_begin(self, args, state, control, **kwargs):
        super().on_train_begin(args, state, control, **kwargs)
        kept = state.stateful_callbacks.get(type(self).__name__, {})
        self.early_stopping_patience_counter = kept.get("attributes", {}).get("early_stopping_patience_counter", 0)


class LoopCallback(TrainerCallback):
    """Tells a `SupervisedTrainer` of certain moments of its loop."""

    def __init__(self, trainer: Any):
        # In a cycle with the trainer, loaders would be collected after their queues, and wait for their processes.
        self.trainer = weakref.proxy(trainer)

    def on_train_begin(self, args, state, control, **kwargs):
        self.trainer.decide_padding()
        if self.trainer.examiner is not None:
            self.trainer.examiner.begin(state.global_step, first=state.is_world_process_zero)
        if not state.global_step:
            self.trainer.answer_samples()

    def on_train_end(self, args, state, control, **kwargs):
        self.trainer.answer_samples()

    def on_epoch_begin(self, args, state, control, **kwargs):
        if self.trainer.train_batches is not None:
            padding = not self.trainer.collator.padding_free
            begin_epoch(
                self.trainer.train_batches, args, state, padding=padding, padded=self.trainer.length_grouped_order
            )

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self.trainer.end_of_backward()

    def on_step_end(self, args, state, control, **kwargs):
        self.trainer.meter.end_step()
        if self.trainer.stop_reason and state.global_step < state.max_steps:
            control.should_save, control.should_evaluate, control.should_training_stop = True, False, True

    def on_epoch_end(self, args, state, control, **kwargs):
        if control.should_training_stop and self.trainer.stop_reason:
            control.should_save = control.should_evaluate = False

    def on_save(self, args, state, control, **kwargs):
        self.trainer.interruption.longest_save = self.trainer.seconds_to_save


@dataclass
class Meter:
    """Counts between two log lines. Logging, evaluation and saving are outside the measured time."""

    steps: int = 0
    seconds: float = 0.0
    waited: float = 0.0
    tokens: int = 0
    supervised_tokens: int = 0
    _started: float = field(default_factory=time.perf_counter)

    def begin_step(self) -> None:
        """The step begins with fetching its batches."""
        self._started = time.perf_counter()

    def data_arrived(self, tokens: int, supervised_tokens: int) -> None:
        self.waited += time.perf_counter() - self._started
        self.tokens += tokens
        self.supervised_tokens += supervised_tokens

    def end_step(self) -> None:
        self.seconds += time.perf_counter() - self._started
        self.steps += 1

    def report(self) -> dict[str, float]:
        """The figures of this process since the last report, which starts the count anew.

        `step_seconds`: mean wall seconds of an optimizer step. `tokens_per_second`: real tokens, padding excluded.
        `supervised_tokens`: how many were trained. `data_wait_share`: share of the time spent waiting for batches.
        `peak_memory_gb`: GB (10⁹ bytes), most allocated by PyTorch on CUDA, else most resident memory.
        """
        seconds = max(self.seconds, 1e-9)
        figures = {
            "step_seconds": self.seconds / max(self.steps, 1),
            "tokens_per_second": self.tokens / seconds,
            "supervised_tokens": self.supervised_tokens,
            "data_wait_share": self.waited / seconds,
            "peak_memory_gb": peak_memory_bytes() / 1e9,
        }
        self.steps = self.tokens = self.supervised_tokens = 0
        self.seconds = self.waited = 0.0
        return figures


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
                print0(
                    f"{self.output_dir / REPORT_FILE} cannot be written: {error.strerror}. The run goes on without it."
                )
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
