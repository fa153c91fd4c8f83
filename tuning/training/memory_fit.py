"""Before the weights are read: decide what is auto by the memory of all processes, and keep it when a run resumes."""

import os

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather_object, reduce
from transformers import PreTrainedConfig

from tuning.checking.estimates import count_processes
from tuning.checking.memory_plan import MemoryPlan, find_limit, left_to_memory, plan_memory
from tuning.checking.step_memory import LongestRows, StepMemory
from tuning.config.legacy_names import CHECKPOINTING
from tuning.config.options import BATCH_SIZE, RunConfig
from tuning.console import print0
from tuning.data.from_config import TrainingData
from tuning.data.row_lengths import RowLengths
from tuning.distributed.fsdp import is_fsdp_asked_for
from tuning.distributed.processes import decide_on_first_process
from tuning.errors import UserError
from tuning.model.build import ModelPlan
from tuning.training.data_loading import choose_collator
from tuning.training.optimizer import patch_master_weights
from tuning.training.resume import Progress, require_same_steps
from tuning.training.strategy import choose_strategy


def fit_to_memory(
    config: RunConfig, model_config: PreTrainedConfig, plan: ModelPlan, data: TrainingData, progress: Progress
) -> RunConfig:
    """The config with numbers where it says auto, the same on all processes, and a line that says which.

    First of all it may choose between DDP and FSDP2; see `choose_strategy`.
    A resumed run keeps the rows of its steps. It decides again how many layers are recomputed, which changes no result.
    Raises `UserError` where the processes cannot share these rows, or one of the longest rows is bad.
    """
    choose_strategy(config, model_config, plan, data, progress)
    decides = left_to_memory(config)
    if not decides:
        return config
    require_estimate(config)
    require_same_steps(config, gather_object([progress.global_step]))
    rows = share_rows(config, progress.rows_of_step) if BATCH_SIZE in decides and progress.rows_of_step else None
    if rows and decides == {BATCH_SIZE}:
        print0(f"{BATCH_SIZE} auto: {rows}, as before.")
        return MemoryPlan(rows, 0, 0, None).apply(config)
    sizes = measure_rows(config, data)
    limit = min(gather_object([find_limit(config)]))
    collator = choose_collator(config, data.encoder, data.collator, progress.padded)
    patch_optimizer = patch_master_weights if config.model.keep_master_weights else None
    heaviest = [LongestRows(lengths, data.encode) for lengths in sizes.T]
    memory = StepMemory(config, model_config, plan, collator, heaviest, patch_optimizer)
    most = max(1, len(sizes) // count_processes(config))
    decided = decide_on_first_process(lambda: plan_memory(memory, limit, most_rows=most, rows=rows))
    print0(decided.describe(config, limit))
    return decided.apply(config)


def require_estimate(config: RunConfig) -> None:
    """Raises `UserError` where the launcher asks for what the estimate of memory does not know."""
    training, settings = config.training, config.training.fsdp_config
    if training.deepspeed_plugin is not None:
        raise UserError(
            where=", ".join(sorted(left_to_memory(config))),
            problem="auto needs an estimate of memory, and there is none for DeepSpeed.",
            fix="Use FSDP, or another value.",
        )
    recomputes = os.environ.get("FSDP_ACTIVATION_CHECKPOINTING", "false").lower() in ("true", "1")
    recomputes |= isinstance(settings, dict) and bool(settings.get("activation_checkpointing"))
    if CHECKPOINTING in config.auto and is_fsdp_asked_for() and recomputes:
        raise UserError(
            where="fsdp_activation_checkpointing",
            problem="FSDP would recompute layers, too.",
            fix="Set it to false: gradient_checkpointing auto decides how many layers are recomputed.",
        )


def share_rows(config: RunConfig, rows_of_step: int) -> int:
    """The rows of a batch that give a step as many rows as before."""
    steps, processes = config.training.gradient_accumulation_steps, count_processes(config)
    rows, rest = divmod(rows_of_step, steps * processes)
    if rest:
        raise UserError(
            where=BATCH_SIZE,
            problem=f"a step of this run has {rows_of_step} rows. {processes} processes × {steps} accumulated batches"
            " cannot share them equally.",
            fix="Change gradient_accumulation_steps or the number of processes back, or give another output_dir.",
        )
    return rows


def measure_rows(config: RunConfig, data: TrainingData) -> np.ndarray:
    """`[rows, 2]`: the tokens of every row, and how many of them stand for images. Each process measures its share."""
    training, rows = config.training, data.train
    lengths = RowLengths(rows.source, data.encoder, exact=True, workers=training.dataloader_num_workers)

    def add_up(numbers: np.ndarray) -> np.ndarray:
        return reduce(torch.from_numpy(numbers).to(PartialState().device), "sum").cpu().numpy()

    rank, world = training.process_index, training.world_size
    lengths.measure_all(add_up, rank=rank, world=world, show=not training.disable_tqdm)
    return lengths.sizes(range(len(rows)))
