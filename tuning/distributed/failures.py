"""Messages for faults of the machine: no memory left, and killed data workers."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from transformers import TrainingArguments

from tuning.data.collator import BatchInfo
from tuning.errors import RunEnded, UserError, describe_dead_worker

NEWS_SECONDS = 1  # until the system has told PyTorch that a process ended


def out_of_memory(
    training: TrainingArguments,
    batches: Sequence[BatchInfo],
    step: int,
    *,
    lora: bool,
    recomputes_all: bool,
    max_tokens: int | None = None,
) -> UserError:
    """The error to raise when memory ran out in step `step`, with what may help.

    `recomputes_all`: gradient checkpointing recomputes every layer. `max_tokens`: max_tokens_per_batch.
    """
    tokens = ", ".join(f"{batch.tokens:,}" for batch in batches)
    return UserError(
        problem=f"the {training.device.type.upper()} has no memory left in step {step}, on batches of {tokens} tokens.",
        fix=f"Try one of these, in this order: {', '.join(_remedies(training, lora, recomputes_all, max_tokens))}.",
    )


def _remedies(training: TrainingArguments, lora: bool, recomputes_all: bool, max_tokens: int | None) -> list[str]:
    """The three settings most likely to help, first those that change nothing about what is trained."""
    size, steps = training.per_device_train_batch_size, training.gradient_accumulation_steps
    remedies = []
    if max_tokens:
        remedies.append(f"max_tokens_per_batch {max_tokens // 2} with gradient_accumulation_steps {2 * steps}")
    elif size > 1:
        fewer = size // 2
        steps = -(-size * steps // fewer)
        remedies.append(f"per_device_train_batch_size {fewer} with gradient_accumulation_steps {steps}")
    if not recomputes_all:
        remedies.append("gradient_checkpointing true")
    if not lora:
        remedies.append("peft_method lora")
    return [*remedies, "a lower max_seq_length", "more processes under FSDP", "dtype bfloat16"][:3]


@contextmanager
def name_killed_worker() -> Iterator[None]:
    """Turn an error that a data worker's end has caused into a `UserError`. A library may have made any error of it.

    PyTorch raises once more when the system tells it of that end: it must not meet the run while that ends.
    """
    try:
        yield
    except (UserError, RunEnded):
        raise
    except Exception as error:
        if not (dead := describe_dead_worker(error)):
            raise
        try:
            time.sleep(NEWS_SECONDS)
        except RuntimeError as news:
            dead = describe_dead_worker(news) or dead
        raise UserError(
            where="dataloader_num_workers",
            problem=dead,
            fix="Often the machine has run out of memory: use fewer workers, or a lower dataloader_prefetch_factor.",
        ) from error
