"""LoRA on several GPUs: a whole copy of the model on each (DDP) where a step fits, and shards of it (FSDP2) where not.

With adapters there is little to add up after a step, so that DDP sends megabytes where FSDP2 sends the model three
times. Only runs whose launcher leaves the choice to us are changed: see `tuning.distributed.launch`.
"""

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from accelerate.utils import gather_object
from transformers import PreTrainedConfig

from tuning.checking.memory_plan import GIGABYTE, find_limit, left_to_memory
from tuning.checking.step_memory import LongestRows, StepMemory
from tuning.config.options import BATCH_SIZE, RunConfig
from tuning.console import print0
from tuning.data.dataset import EncodedRows
from tuning.data.from_config import TrainingData
from tuning.data.row_lengths import RowLengths
from tuning.distributed.fsdp import STRATEGY_IS_OURS, is_fsdp_asked_for
from tuning.distributed.processes import decide_on_first_process
from tuning.model.build import ModelPlan
from tuning.training.data_loading import choose_collator
from tuning.training.resume import Progress

MEASURED_ROWS = 512
LONGER = 1.5
"""Other rows may be so much longer than the longest of those that are measured."""


def choose_strategy(
    config: RunConfig, model_config: PreTrainedConfig, plan: ModelPlan, data: TrainingData, progress: Progress
) -> None:
    """Turn FSDP off, on all processes, for a LoRA run whose launcher has left that to us and whose steps fit so."""
    is_ours = os.environ.get(STRATEGY_IS_OURS) == "1" and is_fsdp_asked_for() and not config.training.fsdp
    if not is_ours or config.lora.peft_method is None or not isinstance(data.train, EncodedRows):
        return
    limit = min(gather_object([find_limit(config)]))
    with fsdp("false"):
        needs = decide_on_first_process(lambda: estimate_whole_copy(config, model_config, plan, data, progress))
    if needs is None:
        print0("LoRA, FSDP2: it is unknown how much memory a whole copy of the model needs.")
        return
    says = f"by the estimate a step with a whole copy of the model needs {needs / GIGABYTE:.3g} GB"
    if needs <= limit:
        os.environ["ACCELERATE_USE_FSDP"] = "false"  # accelerate and transformers read it
        print0(f"LoRA, DDP: {says}, of {limit / GIGABYTE:.3g} GB. accelerate_launch_args can name fixtures of FSDP2.")
    else:
        print0(f"LoRA, FSDP2: {says}, and it may take {limit / GIGABYTE:.3g} GB, so the model is sharded.")


@contextmanager
def fsdp(value: str) -> Iterator[None]:
    """As if the launcher had asked for FSDP, or had not."""
    before = os.environ["ACCELERATE_USE_FSDP"]
    os.environ["ACCELERATE_USE_FSDP"] = value
    try:
        yield
    finally:
        os.environ["ACCELERATE_USE_FSDP"] = before


def estimate_whole_copy(
    config: RunConfig, model_config: PreTrainedConfig, plan: ModelPlan, data: TrainingData, progress: Progress
) -> float | None:
    """The bytes that a step needs with the whole model on its device; None where that is unknown.

    The longest of some rows stand for rows that are longer by half, or as long as a row may be.
    """
    rows = data.train
    places = np.linspace(0, len(rows) - 1, min(MEASURED_ROWS, len(rows))).astype(int).tolist()
    tokens = RowLengths(rows.source, data.encoder, exact=True).sizes(places)[:, 0]
    longest = int(tokens.max(initial=1))
    longer = min(LONGER * longest, data.encoder.max_seq_length)
    budget, auto = config.data.max_tokens_per_batch, BATCH_SIZE in left_to_memory(config)
    batch = budget or longer * (1 if auto else config.training.per_device_train_batch_size)
    collator = choose_collator(config, data.encoder, data.collator, progress.padded)
    heaviest = [LongestRows(tokens, lambda number: data.encode(places[number]))]
    estimate = StepMemory(config, model_config, plan, collator, heaviest, None).estimate(math.ceil(batch / longest))
    return None if estimate is None or estimate.activations is None else estimate.peak
