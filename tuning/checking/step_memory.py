"""The memory that steps of a run need, by the rows of a batch and by how many layers are recomputed."""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache

import numpy as np
import torch
from torch import nn
from torch.optim import Optimizer
from transformers import PreTrainedConfig, TrainingArguments

from tuning.checking.estimates import count_processes, count_shards
from tuning.checking.memory import MemoryEstimate, estimate_memory
from tuning.config.legacy_names import CHECKPOINTING
from tuning.config.options import RunConfig
from tuning.data.collator import Collator
from tuning.data.encode import Sample
from tuning.model import load
from tuning.model.attention import set_decoder_attention
from tuning.model.build import ModelPlan, prepare_model
from tuning.model.dry_run import META
from tuning.model.packed_attention import PACKED
from tuning.model.parts import freeze_parameters
from tuning.model.quantize import quantise_skeleton
from tuning.model.recompute import Recomputed, recomputable_layers


class LongestRows:
    """The samples of the longest rows, encoded when they are first needed. Their pictures have no values.

    `tokens` `[rows]`: the length of each row. `encode(row)`: its sample, or None where it cannot be trained.
    """

    def __init__(self, tokens: np.ndarray, encode: Callable[[int], Sample | None]):
        self.longest = int(tokens.max(initial=1))
        self._left, self._encode = iter(np.argsort(-tokens, kind="stable").tolist()), encode
        self._samples = list[Sample]()

    def take(self, number: int) -> list[Sample]:
        """The `number` longest rows. Where there are fewer, they are repeated; empty where there is none."""
        while len(self._samples) < number and (row := next(self._left, None)) is not None:
            if (sample := self._encode(row)) is not None:
                self._samples.append(_without_values(sample))
        return [self._samples[i % len(self._samples)] for i in range(number)] if self._samples else []


def _without_values(sample: Sample) -> Sample:
    return replace(sample, images=_on_meta(sample.images))


def _on_meta(images: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: value.to(META) if value.is_floating_point() else value for name, value in images.items()}


class StepMemory:
    """Estimates the memory of a run's steps. Each estimate runs a skeleton of the model.

    `collator`: joins batches as the run will. `heaviest`: the rows by their tokens, and by their image tokens: where a
    tower trains, pictures may need more than text. `patch_optimizer`: see `estimate_memory`.
    """

    def __init__(
        self,
        config: RunConfig,
        model_config: PreTrainedConfig,
        plan: ModelPlan,
        collator: Collator,
        heaviest: Sequence[LongestRows],
        patch_optimizer: Callable[[Optimizer], Optimizer] | None,
    ):
        self.config, self.model_config, self.plan = config, model_config, plan
        layout, dummy = collator.image_layout, collator.dummy_image_sample
        layout, dummy = replace(layout, blank=_on_meta(layout.blank)), dummy and _without_values(dummy)
        self.collator = replace(collator, image_layout=layout, dummy_image_sample=dummy)
        self.heaviest, self.patch_optimizer = heaviest, patch_optimizer
        self.longest = heaviest[0].longest
        self.estimate = cache(self._estimate)

    def count_layers(self) -> int:
        """How many layers the backward can recompute."""
        return len(recomputable_layers(self.build_skeleton(), self.plan.parts))

    def build_skeleton(self) -> nn.Module:
        """The model without weights, prepared as for training."""
        config, plan, model_config = self.config, self.plan, copy.deepcopy(self.model_config)
        is_eager = plan.attention.loaded == "eager"
        model_config._attn_implementation = "eager" if is_eager else None  # SDPA in each part that supports it
        with torch.random.fork_rng(devices=[]):  # new adapters are random
            skeleton = load.build_skeleton(model_config).to(load.choose_dtype(config.model, model_config))
            if plan.quantization:
                quantise_skeleton(skeleton, plan.quantization)
            model = prepare_model(skeleton, config, plan.parts, plan.lora_targets)
        freeze_parameters(model, plan.idle or set())
        return model

    def _estimate(self, rows: int, recomputed: int | None = None) -> MemoryEstimate | None:
        """The peak of a step on the `rows` heaviest rows; None where there is no row.

        `recomputed`: how many layers are recomputed; None for what the options say.
        """
        taken = (order.take(rows) for order in self.heaviest)
        batches = {tuple(sorted(sample.where for sample in batch)): batch for batch in taken}
        estimates = [self._estimate_batch(samples, recomputed) for samples in batches.values() if samples]
        return max(estimates, key=lambda estimate: estimate.peak, default=None)

    def _estimate_batch(self, samples: Sequence[Sample], recomputed: int | None) -> MemoryEstimate:
        training = self.config.training
        batch, model = self.collator.join(samples), self.build_skeleton()
        if self.collator.padding_free:
            set_decoder_attention(model, PACKED)
        elif "flash" in self.plan.attention.loaded:
            del batch["attention_mask"]
        shards = count_shards(self.config)
        return estimate_memory(
            model,
            batch,
            training if recomputed is None else with_checkpointing(training, recomputed > 0),
            processes=shards,
            replicated=shards == 1 < count_processes(self.config),  # copies that are sharded exchange no second one
            recomputed=Recomputed(self.plan.parts, recomputed) if recomputed else None,
            patch_optimizer=self.patch_optimizer,
        )


def with_checkpointing(training: TrainingArguments, wanted: bool) -> TrainingArguments:
    training = copy.copy(training)
    setattr(training, CHECKPOINTING, wanted)
    return training
