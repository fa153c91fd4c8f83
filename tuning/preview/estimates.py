"""Lengths of all rows → what an epoch costs, and how much of it is padding."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from tuning.config.arguments import RunConfig
from tuning.data.sources import Mixture
from tuning.preview.memory import MemoryEstimate
from tuning.preview.rows import padding_share

GIGABYTE = 1e9


@dataclass(frozen=True)
class Lengths:
    """Figures of every good row, arrays of equal length: where it stands, and its tokens."""

    part: np.ndarray
    number: np.ndarray
    tokens: np.ndarray
    image_tokens: np.ndarray
    supervised_tokens: np.ndarray

    def by_role(self) -> dict[str, np.ndarray]:
        return {
            "total": self.tokens,
            "text": self.tokens - self.image_tokens,
            "image": self.image_tokens,
            "supervised": self.supervised_tokens,
        }

    def spread(self, count: int) -> list[int]:
        """The positions of `count` rows from all over the data, the first among them, and the longest row."""
        if not len(self.tokens) or count < 1:
            return []
        longest = int(self.tokens.argmax())
        even = np.linspace(0, len(self.tokens) - 1, min(count, len(self.tokens))).round().astype(int).tolist()
        if longest not in even and len(even) > 1:
            even[-2 if len(even) > 2 else -1] = longest
        return sorted(set(even))

    def padding_shares(self, batch_size: int, seed: int) -> dict[str, float]:
        """Padding in batches of random rows, and in batches of rows of similar length."""
        orders = {
            "random order": np.random.default_rng(seed).permutation(len(self.tokens)),
            "train_sampling_strategy group_by_length": np.argsort(self.tokens, kind="stable"),
        }
        return {name: padding_share(self.tokens, batch_size, order) for name, order in orders.items()}


def count_processes(config: RunConfig) -> int:
    """How many processes the run will have: those running now, or those that its config asks to launch."""
    if config.training.world_size > 1:
        return config.training.world_size
    return int(config.run.accelerate_launch_args.get("num_processes", 1))


def estimate_run(
    config: RunConfig, source: Any, lengths: Lengths, memory: MemoryEstimate | None
) -> dict[str, tuple[float, str]]:
    """Figures by name, each with how it was found."""
    training, processes = config.training, count_processes(config)
    weights = _row_weights(source, lengths)
    rows = float(weights.sum())
    batch = training.per_device_train_batch_size * training.gradient_accumulation_steps * processes
    how = (
        f"{rows:,.0f} rows in batches of {training.per_device_train_batch_size} × {processes} processes"
        f" × {training.gradient_accumulation_steps} accumulated"
    )
    epochs = training.num_train_epochs if training.max_steps < 0 else training.max_steps * batch / max(rows, 1)
    estimates = {
        "steps_per_epoch": (math.ceil(rows / batch), how),
        "tokens_per_epoch": (float(lengths.tokens @ weights), "text and image tokens of all good rows, no padding"),
        "supervised_tokens_per_epoch": (float(lengths.supervised_tokens @ weights), "the tokens that are trained"),
        "steps": (
            training.max_steps if training.max_steps > 0 else math.ceil(math.ceil(rows / batch) * epochs),
            f"{epochs:.3g} epochs",
        ),
    }
    if memory is None:
        return estimates
    activations = f"not found ({memory.unknown})"
    if memory.activations is not None:
        activations = f"{memory.activations / GIGABYTE:.3g}"
    how = (
        f"one step on the {training.per_device_train_batch_size} longest rows, run without weights, counting tensors:"
        f" weights {memory.weights / GIGABYTE:.3g}, gradients {memory.gradients / GIGABYTE:.3g}, optimizer"
        f" {memory.optimizer / GIGABYTE:.3g}, activations {activations} GB"
        + (f"; FSDP over {processes} processes" if processes > 1 else "")
    )
    return {**estimates, "peak_memory_gb_per_device": (memory.peak / GIGABYTE, how)}


def _row_weights(source: Any, lengths: Lengths) -> np.ndarray:
    """How often an epoch passes each row: more than once, or less, where datasets are mixed by weight."""
    weights = np.ones(len(lengths.tokens))
    if isinstance(source, Mixture):
        first = 0
        for dataset, draws in zip(source.sources, source.draws, strict=True):
            inside = (lengths.part >= first) & (lengths.part < first + len(dataset.parts))
            weights[inside] = draws / len(dataset)
            first += len(dataset.parts)
    return weights
