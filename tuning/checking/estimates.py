"""From the lengths of all rows: the steps and tokens of a run, its memory, and how much of its batches is padding."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from tuning.checking.memory import MemoryEstimate
from tuning.config.options import RunConfig
from tuning.data.batch_sampler import RowOrder
from tuning.data.sources import Mixture
from tuning.distributed.fsdp import is_fsdp_asked_for, shards_of_a_copy
from tuning.exit_codes import was_launched

GIGABYTE = 1e9


@dataclass(frozen=True)
class Lengths:
    """The tokens of every good row, as arrays of equal length. `file` and `number` are its place in the data."""

    file: np.ndarray
    number: np.ndarray
    tokens: np.ndarray
    image_tokens: np.ndarray
    supervised_tokens: np.ndarray

    def by_role(self) -> dict[str, np.ndarray]:
        """Tokens per row by role, as `Report.lengths` names them."""
        return {
            "total": self.tokens,
            "text": self.tokens - self.image_tokens,
            "image": self.image_tokens,
            "supervised": self.supervised_tokens,
        }

    def spread(self, count: int) -> list[int]:
        """Positions of `count` rows: the first, the longest, and others evenly spread over the data."""
        if not len(self.tokens) or count < 1:
            return []
        longest = int(self.tokens.argmax())
        even = np.linspace(0, len(self.tokens) - 1, min(count, len(self.tokens))).round().astype(int).tolist()
        if longest not in even and len(even) > 1:
            even[-2 if len(even) > 2 else -1] = longest
        return sorted(set(even))

    def padding_shares(self, batch_size: int, seed: int, group: int) -> dict[str, float]:
        """The share of padding with random batches, and with batches of rows of similar length.

        `group`: rows of a step.
        """
        rows = len(self.tokens)
        by_length = RowOrder(rows, seed, lambda chosen: self.tokens[list(chosen)], group)
        orders = {
            "train_sampling_strategy random": np.array(list(RowOrder(rows, seed)), dtype=np.int64),
            "train_sampling_strategy group_by_length": np.array(list(by_length), dtype=np.int64),
        }
        return {name: padding_share(self.tokens, batch_size, order) for name, order in orders.items()}


def padding_share(tokens: np.ndarray, batch_size: int, order: np.ndarray) -> float:
    """The share of the positions of padded batches that is padding, with the rows in `order`."""
    lengths = tokens[order]
    starts = np.arange(0, len(lengths), batch_size)
    if not len(starts):
        return 0.0
    longest = np.maximum.reduceat(lengths, starts)
    sizes = np.diff(np.append(starts, len(lengths)))
    return float(1 - lengths.sum() / (longest * sizes).sum())


def count_processes(config: RunConfig) -> int:
    """How many processes the run will have: as many as run now, or as many as its config launches."""
    if config.training.world_size > 1 or was_launched():
        return config.training.world_size
    return int(config.run.accelerate_launch_args.get("num_processes", 1))


def count_shards(config: RunConfig) -> int:
    """Over how many devices FSDP shards a copy of the model. 1 where each process has all of it.

    Processes that are yet to be launched are taken to shard it: that is what `vlm-tuning train` launches on GPUs.
    """
    if config.training.world_size > 1 and not (is_fsdp_asked_for() or config.training.fsdp):
        return 1
    return shards_of_a_copy(config.run.accelerate_launch_args) or count_processes(config)


def rows_of_a_step(config: RunConfig) -> int:
    training = config.training
    return training.per_device_train_batch_size * training.gradient_accumulation_steps * count_processes(config)


def estimate_run(
    config: RunConfig, source: Any, lengths: Lengths, memory: MemoryEstimate | None, batches: int | None = None
) -> dict[str, tuple[float, str]]:
    """Estimates by name, each with a text about how it was found.

    `batches`: batches of an epoch with `max_tokens_per_batch`; None where not all rows were measured, or without it.
    """
    training, processes = config.training, count_processes(config)
    weights = _row_weights(source, lengths)
    tokens = float(lengths.tokens @ weights)
    steps_of_epoch, how = _steps_of_epoch(config, float(weights.sum()), tokens, batches)
    epochs = training.num_train_epochs if training.max_steps < 0 else training.max_steps / max(steps_of_epoch, 1)
    estimates = {
        "steps_per_epoch": (steps_of_epoch, how),
        "tokens_per_epoch": (tokens, "text and image tokens of all good rows, without padding"),
        "supervised_tokens_per_epoch": (float(lengths.supervised_tokens @ weights), "the tokens that are trained"),
        "steps": (
            training.max_steps if training.max_steps > 0 else math.ceil(steps_of_epoch * epochs),
            f"{epochs:.3g} epochs",
        ),
    }
    if memory is None:
        return estimates
    activations = f"unknown ({memory.unknown})"
    if memory.activations is not None:
        activations = f"{memory.activations / GIGABYTE:.3g}"
    budget = config.data.max_tokens_per_batch
    heaviest = f"{budget:,} tokens" if budget else "a batch of the longest rows"
    how = (
        f"the tensors of one step on {heaviest}, run without weights:"
        f" weights {memory.weights / GIGABYTE:.3g}, gradients {memory.gradients / GIGABYTE:.3g}, optimizer"
        f" {memory.optimizer / GIGABYTE:.3g}, activations {activations} GB"
        + (f"; {_describe_processes(config)}" if processes > 1 else "")
    )
    return {**estimates, "peak_memory_gb_per_device": (memory.peak / GIGABYTE, how)}


def _describe_processes(config: RunConfig) -> str:
    shards, processes = count_shards(config), count_processes(config)
    return f"FSDP over {shards} processes" if shards > 1 else f"each of {processes} processes has all of the model"


def _steps_of_epoch(config: RunConfig, rows: float, tokens: float, batches: int | None) -> tuple[int, str]:
    training, processes, budget = config.training, count_processes(config), config.data.max_tokens_per_batch
    batches_of_step = processes * training.gradient_accumulation_steps
    per_step = f"{processes} processes × {training.gradient_accumulation_steps} accumulated"
    if budget is None:
        how = f"{rows:,.0f} rows in batches of {training.per_device_train_batch_size} × {per_step}"
        return math.ceil(rows / rows_of_a_step(config)), how
    if batches is not None:
        return math.ceil(batches / batches_of_step), f"{batches:,} batches of at most {budget:,} tokens; {per_step}"
    how = f"at least, as not all rows were measured: {tokens:,.0f} tokens in batches of {budget:,}; {per_step}"
    return math.ceil(tokens / (budget * batches_of_step)), how


def _row_weights(source: Any, lengths: Lengths) -> np.ndarray:
    """How often an epoch contains each row: once, but more or less often where datasets are mixed by weight."""
    weights = np.ones(len(lengths.tokens))
    if isinstance(source, Mixture):
        first = 0
        for dataset, draws in zip(source.sources, source.draws, strict=True):
            inside = (lengths.file >= first) & (lengths.file < first + len(dataset.files))
            weights[inside] = draws / len(dataset)
            first += len(dataset.files)
    return weights
