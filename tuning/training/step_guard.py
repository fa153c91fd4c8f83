"""Checks every optimizer step before it changes a weight: finite numbers, signals to stop, memory."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback, TrainerState

from tuning.config.legacy_names import CHECKPOINTING
from tuning.config.options import RunConfig
from tuning.data.collator import BatchInfo
from tuning.distributed.failures import out_of_memory
from tuning.distributed.interruption import Interruption
from tuning.distributed.processes import Processes
from tuning.errors import RunEnded, UserError, is_out_of_memory
from tuning.exit_codes import EXIT_STOPPED


@dataclass
class StepState:
    """What is known of the current optimizer step, number `number` of the run. The trainer keeps it; callbacks read it.

    `batches`, `losses` and `grad_norm` are this process's. `is_supervised`: some process has a supervised token.
    `has_images`: some process has an image in a row with a supervised token. `stop_reason`: why the run stops after
    this step, "" where it continues.
    """

    number: int
    batches: Sequence[BatchInfo] = ()
    losses: list[torch.Tensor] = field(default_factory=list)
    grad_norm: float | torch.Tensor = 0.0
    is_supervised: bool = False
    has_images: bool = False
    stop_reason: str = ""

    def begin(self, number: int, batches: Sequence[BatchInfo], *, is_supervised: bool, has_images: bool) -> None:
        """Begin a step whose batches have been read."""
        self.number, self.batches, self.losses = number, batches, []
        self.is_supervised, self.has_images = is_supervised, has_images


class StepGuard(TrainerCallback):
    """Ends the run before a step whose loss or gradient is not finite, and stops it after a step when asked to."""

    def __init__(self, config: RunConfig, step: StepState, processes: Processes, interruption: Interruption):
        self.config, self.step, self.processes, self.interruption = config, step, processes, interruption

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        losses, grad_norm = read_from_device(self.step.losses, self.step.grad_norm)
        is_bad = [not math.isfinite(loss) for loss in losses]
        reason = self.interruption.check()
        found = self.processes.all_gather_ints([any(is_bad), reason != ""])
        if found[:, 0].any():
            self._end_at_bad_loss(losses, is_bad)
        if found[:, 1].any():
            self.step.stop_reason = reason or "a signal to another process"
        is_deepspeed, accelerator = args.deepspeed_plugin is not None, self.processes.accelerator
        # The gradient scaler of fp16 skips a step with such gradients. DeepSpeed has done so already in any precision.
        if is_deepspeed and not args.fp16 and accelerator.optimizer_step_was_skipped:
            raise self._not_finite("the gradients became NaN or infinite", self.step.batches)
        if not args.fp16 and not is_deepspeed and not math.isfinite(grad_norm):
            raise self._not_finite(f"the gradients became {grad_norm}", self.step.batches)
        # Parameters that no batch of this step reached (the vision tower's, where all rows are text) get a gradient of
        # zero, as on a process whose rows have images. Without a gradient the optimizer would skip them on one process.
        for parameter in () if is_deepspeed else model.parameters():  # DeepSpeed keeps gradients elsewhere
            if parameter.requires_grad and parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)

    def _end_at_bad_loss(self, losses: list[float], is_bad: list[bool]) -> None:
        error = None
        if any(is_bad):
            number = is_bad.index(True)
            error = self._not_finite(f"the loss became {losses[number]}", self.step.batches[number : number + 1])
        self.processes.raise_on_all_ranks(error)

    def _not_finite(self, what: str, batches: Sequence[BatchInfo]) -> UserError:
        return UserError(
            where="; ".join(row for batch in batches for row in batch.rows),
            problem=f"{what} at step {self.step.number}, before the optimizer's step.",
            fix="Look at these rows. Lower learning_rate or max_grad_norm, or use bf16 instead of fp16.",
        )

    def on_step_end(self, args, state, control, **kwargs):
        if self.step.stop_reason and state.global_step < state.max_steps:
            control.should_save, control.should_evaluate, control.should_training_stop = True, False, True

    def on_epoch_end(self, args, state, control, **kwargs):
        if control.should_training_stop and self.step.stop_reason:
            control.should_save = control.should_evaluate = False

    @contextmanager
    def raise_friendly_oom(self) -> Iterator[None]:
        """Turn running out of memory, in a step or in the optimizer, into an error that names what helps."""
        try:
            yield
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            config, step = self.config, self.step
            raise out_of_memory(
                config.training,
                step.batches,
                step.number,
                lora=config.lora.peft_method is not None,
                recomputes_all=getattr(config.training, CHECKPOINTING) and config.recomputed_layers is None,
                max_tokens=config.data.max_tokens_per_batch,
            ) from error

    def raise_if_stopped(self, state: TrainerState) -> None:
        """Raises `RunEnded`, which says how to resume, where the run was stopped before its end."""
        if not self.step.stop_reason or state.global_step >= state.max_steps:
            return
        training = self.config.training
        is_named = isinstance(training.resume_from_checkpoint, str)
        raise RunEnded(
            f"Stopped by {self.step.stop_reason} after step {state.global_step} of {state.max_steps}:"
            f" {training.output_dir}/checkpoint-{state.global_step} is complete. Run the same command again"
            f"{', without resume_from_checkpoint,' if is_named else ''} to continue.",
            EXIT_STOPPED,
        )


def read_from_device(losses: Sequence[torch.Tensor], grad_norm: float | torch.Tensor) -> tuple[list[float], float]:
    """The losses of a step and its gradient norm as numbers, for which the host waits once."""
    if not isinstance(grad_norm, torch.Tensor):
        return torch.stack(list(losses)).tolist(), grad_norm
    norm = grad_norm.full_tensor() if isinstance(grad_norm, DTensor) else grad_norm
    *numbers, last = torch.stack([value.double() for value in (*losses, norm)]).tolist()
    return numbers, last
