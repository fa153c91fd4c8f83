"""The options of a run → the batches of its epochs, and where in them it goes on."""

import math

from transformers import TrainerState, TrainingArguments

from tuning.data.batching import Lengths, RowOrder, SharedBatches
from tuning.data.token_budget import TokenBatches
from tuning.errors import UserError


def share_batches(
    training: TrainingArguments, rows: int, lengths: Lengths, group_by_length: bool | None
) -> SharedBatches:
    """Batches of `per_device_train_batch_size` rows each."""
    seed = None if training.train_sampling_strategy == "sequential" else data_seed(training)
    size, rank, world = training.train_batch_size, training.process_index, training.world_size
    group = size * world * training.gradient_accumulation_steps
    order = RowOrder(rows, seed, lengths, group, group_by_length)
    return SharedBatches(order, size, rank=rank, world=world, drop_last=training.dataloader_drop_last)


def pack_batches(
    training: TrainingArguments, rows: int, lengths: Lengths, budget: int, *, padded: bool
) -> TokenBatches:
    """Batches of at most `budget` tokens each; where `max_steps` ends the run, without counting those of an epoch."""
    return TokenBatches(
        rows,
        lengths,
        budget,
        seed=data_seed(training),
        padded=padded,
        accumulation=training.gradient_accumulation_steps,
        rank=training.process_index,
        world=training.world_size,
        drop_last=training.dataloader_drop_last,
        endless=training.max_steps > 0,
    )


def data_seed(training: TrainingArguments) -> int:
    return training.seed if training.data_seed is None else training.data_seed


def begin_epoch(
    batches: SharedBatches | TokenBatches,
    training: TrainingArguments,
    state: TrainerState,
    *,
    padding: bool,
    padded: bool,
) -> None:
    """Before an epoch's first batch. Steps that are done are passed over, without measuring their rows if possible.

    `padding`: whether batches are padded; `padded`: whether rows are ordered as for padded batches.
    """
    if isinstance(batches, TokenBatches) and padding and not batches.padded:
        if not batches.endless or state.global_step:
            what = "this model's batches must be padded, which shows only now; they were filled as if they were not."
            raise UserError(where="max_tokens_per_batch", problem=what, fix="Set padding_free false.")
        batches.padded = True  # nothing was measured or packed yet
    epoch, accumulated = int(state.epoch or 0), training.gradient_accumulation_steps
    if isinstance(batches, TokenBatches):
        batches.begin(epoch)
        return
    batches.padded = padded
    done = state.global_step % max(1, math.ceil(len(batches) / accumulated))
    batches.begin(epoch, 0 if training.ignore_data_skip else done * accumulated)
