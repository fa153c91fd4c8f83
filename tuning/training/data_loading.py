"""Rows → the batches that training, evaluation and the trial of padding-free batches use."""

from collections.abc import Sequence
from dataclasses import replace

import torch

from tuning.data.collator import Collator
from tuning.data.encode import Sample
from tuning.model.padding_free import TrialBatches


def make_trial_batches(samples: Sequence[Sample], collator: Collator) -> TrialBatches:
    """Batches that try whether a model may be given padding-free batches, from `dummy_samples`."""
    alone = replace(collator, padding_free=False, dummy_image_sample=None)
    packed = replace(alone, padding_free=True)
    changed = [_disturb(samples[0], samples[1].sequence["input_ids"]), *samples[1:]]
    return TrialBatches([alone.join([sample]) for sample in samples], packed.join(samples), packed.join(changed))


def _disturb(sample: Sample, others: torch.Tensor) -> Sample:
    """A row of the same length with another picture and another last token, one of `others`, in which is no image."""
    ids = sample.sequence["input_ids"].clone()
    ids[-1] = others[others != ids[-1]][0]
    images = {name: -value if value.is_floating_point() else value for name, value in sample.images.items()}
    return replace(sample, sequence={**sample.sequence, "input_ids": ids}, images=images)
