"""What `auto` stands for: the rows of a batch and the layers that are recomputed, so that a step fits in memory."""

import copy
import os
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from tuning.checking.memory import MemoryEstimate
from tuning.checking.step_memory import StepMemory, with_checkpointing
from tuning.config.legacy_names import CHECKPOINTING
from tuning.config.options import BATCH_SIZE, RunConfig
from tuning.machine import free_memory

GIGABYTE = 1e9
MOST_ROWS = 1024  # of a batch that is auto: more would take minutes to try
SHARE = 0.9  # of the free memory; the rest is for what the allocator wastes, and for the data


@dataclass(frozen=True)
class MemoryPlan:
    """A step that fits. `rows`: of a batch. `recomputed`: how many of the `layers`. `estimate`: None without a row."""

    rows: int
    recomputed: int
    layers: int
    estimate: MemoryEstimate | None

    def apply(self, config: RunConfig) -> RunConfig:
        """The config with numbers where it says auto."""
        training, recomputed = copy.copy(config.training), None
        if BATCH_SIZE in config.auto:
            training.per_device_train_batch_size = self.rows
        if CHECKPOINTING in config.auto:
            training, recomputed = with_checkpointing(training, self.recomputed > 0), self.recomputed
        return replace(config, training=training, recomputed_layers=recomputed)

    def describe(self, config: RunConfig, limit: float) -> str:
        """What is decided, and the estimate behind it. `limit`: the bytes that a step may take."""
        says, estimate = [], self.estimate
        if BATCH_SIZE in config.auto:
            says.append(f"{BATCH_SIZE} auto: {self.rows}.")
        if CHECKPOINTING in config.auto:
            says.append(f"gradient_checkpointing auto: {self.recomputed} of {self.layers} layers are recomputed.")
        if estimate is None:
            return " ".join(says)
        source = "max_memory_gb" if config.run.max_memory_gb else f"{SHARE:.0%} of what is free"
        if estimate.activations is None:
            return " ".join([*says, f"The memory of a step is unknown ({estimate.unknown})."])
        needs = f"By the estimate, the heaviest rows need {estimate.peak / GIGABYTE:.3g} GB"
        says.append(f"{needs}, and a step may take {limit / GIGABYTE:.3g} GB ({source}).")
        if estimate.peak > limit:
            says.append("It may not fit: if memory runs out, use a lower max_seq_length, LoRA, or more processes.")
        return " ".join(says)


def left_to_memory(config: RunConfig) -> frozenset[str]:
    """The options that are auto and that the memory decides."""
    return config.auto & {BATCH_SIZE, CHECKPOINTING}


def find_limit(config: RunConfig) -> float:
    """Bytes that a step may take on this process's device."""
    if config.run.max_memory_gb:
        return config.run.max_memory_gb * GIGABYTE
    device = config.training.device
    if device.type == "cuda":
        return SHARE * torch.cuda.mem_get_info(device)[0]
    return SHARE * free_memory() / int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def plan_memory(memory: StepMemory, limit: float, *, most_rows: int, rows: int | None = None) -> MemoryPlan:
    """The largest batch, and the fewest recomputed layers, with which a step fits into `limit` bytes.

    With both options auto this is the largest batch without recomputing; if not even one row fits so, one row with as
    few recomputed layers as possible. `most_rows`: the most that a batch can have. `rows`: those of a batch, where a
    checkpoint tells.
    """
    config, layers = memory.config, memory.count_layers()
    finds_layers = CHECKPOINTING in config.auto
    fewest = 0 if finds_layers else None

    def fits(rows: int, recomputed: int | None) -> bool:
        estimate = memory.estimate(rows, recomputed)
        return estimate is None or (estimate.activations is not None and estimate.peak <= limit)

    if rows is None and BATCH_SIZE in config.auto:
        rows = find_most(lambda number: fits(number, fewest), min(most_rows, MOST_ROWS))
    rows = rows or count_rows(config, memory.longest)
    recomputed = fewest
    if finds_layers and not fits(rows, fewest):
        recomputed = find_fewest(lambda number: fits(rows, number), layers)
    return MemoryPlan(rows, recomputed or 0, layers, memory.estimate(rows, recomputed))


def count_rows(config: RunConfig, longest: int) -> int:
    """Rows of the batch that needs the most memory. `longest`: the tokens of the longest row."""
    budget = config.data.max_tokens_per_batch
    return max(1, budget // longest) if budget else config.training.per_device_train_batch_size


def find_most(fits: Callable[[int], bool], most: int) -> int:
    """The largest number from 1 to `most` that fits; 1 if none does."""
    good, bad = 1, 2
    while bad <= most and fits(bad):
        good, bad = bad, 2 * bad
    return _search(fits, good, min(bad, most + 1))


def find_fewest(fits: Callable[[int], bool], most: int) -> int:
    """The smallest number from 1 to `most` that fits; `most` if none does."""
    return _search(fits, most, 0) if most and fits(most) else most


def _search(fits: Callable[[int], bool], good: int, bad: int) -> int:
    """The number next to `bad` that fits, on the side of `good`, which is taken to fit."""
    while abs(good - bad) > 1:
        middle = (good + bad) // 2
        good, bad = (middle, bad) if fits(middle) else (good, middle)
    return good
