"""What happens beside the steps: a line of JSON a logging step, early stopping, the trainer's own doings."""

import json
import os
import weakref
from pathlib import Path
from typing import Any

from transformers import EarlyStoppingCallback, TrainerCallback

from tuning.files import LOG_FILE, read_lines, to_lines, write_text
from tuning.training.epochs import begin_epoch


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
        self.trainer.settle_batches()
        if self.trainer.examiner is not None:
            self.trainer.examiner.begin(state.global_step, first=state.is_world_process_zero)
        if not state.global_step:
            self.trainer.answer_samples()

    def on_train_end(self, args, state, control, **kwargs):
        self.trainer.answer_samples()

    def on_epoch_begin(self, args, state, control, **kwargs):
        if self.trainer.train_batches is not None:
            padding = not self.trainer.collator.padding_free
            begin_epoch(self.trainer.train_batches, args, state, padding=padding, padded=self.trainer.order_is_padded)

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
