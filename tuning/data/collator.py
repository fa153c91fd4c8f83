"""Samples → one padded batch."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F

from tuning.data.encode import IGNORED, Sample, Skipped
from tuning.errors import UserError


@dataclass(frozen=True)
class BatchFacts:
    """What the trainer tells of a batch; travels beside its tensors and never reaches the model.

    `tokens` counts real tokens, padding excluded. `cut`: rows whose answers were cut. `skipped`: rows left out, by
    where they stand.
    """

    rows: list[str] = field(default_factory=list)
    tokens: int = 0
    supervised_tokens: int = 0
    dropped_images: int = 0
    cut: list[str] = field(default_factory=list)
    skipped: dict[str, Skipped] = field(default_factory=dict)
    error: UserError | None = None


@dataclass(frozen=True)
class PaddingCollator:
    """Pads samples on the right to the longest and joins their images.

    `nested_images`: the processor gives image tensors a dimension of rows first (`[rows, images, …]`, Mllama,
    Idefics) instead of joining the images of all rows (`[images, …]`, LLaVA). `blank_image` holds such a processor's
    tensors for one blank image: they fill the place of a row without images. `filler`: joins a batch that has no
    image, where there are several processes; see `Encoder.filler`.
    """

    pad_token_id: int
    nested_images: bool = False
    blank_image: dict[str, torch.Tensor] = field(default_factory=dict)
    filler: Sample | None = None

    def __call__(self, samples: Sequence[Sample | UserError]) -> dict[str, Any]:
        for sample in samples:
            if isinstance(sample, UserError):
                return {"facts": BatchFacts(error=sample)}
        good = [sample for sample in samples if isinstance(sample, Sample)]
        facts = gather_facts(good)
        if self.filler and not any(sample.images for sample in good):
            good.append(self.filler)
        return {**self._sequences(good), **self._images(good), "facts": facts}

    def _sequences(self, samples: list[Sample]) -> dict[str, torch.Tensor]:
        fill = {"input_ids": self.pad_token_id, "labels": IGNORED}
        names = dict.fromkeys(name for sample in samples for name in sample.sequence)
        batch = {}
        for name in names:
            like = next(sample.sequence[name] for sample in samples if name in sample.sequence)
            rows = [
                sample.sequence[name]
                if name in sample.sequence
                else like.new_zeros(len(sample.sequence["input_ids"]), *like.shape[1:])
                for sample in samples
            ]
            batch[name] = torch.stack(pad_to_largest(rows, fill.get(name, 0)))
        return batch

    def _images(self, samples: list[Sample]) -> dict[str, torch.Tensor]:
        with_images = [sample.images for sample in samples if sample.images]
        if not with_images:
            return {}
        if self.nested_images:
            with_images = [sample.images or self.blank_image for sample in samples]
        return {
            name: torch.cat(pad_to_largest([images[name] for images in with_images], 0, keep_first=True))
            for name in with_images[0]
        }


def gather_facts(samples: Sequence[Sample]) -> BatchFacts:
    return BatchFacts(
        rows=[sample.where for sample in samples],
        tokens=sum(int(sample.sequence["attention_mask"].sum()) for sample in samples),
        supervised_tokens=sum(int((sample.sequence["labels"] != IGNORED).sum()) for sample in samples),
        dropped_images=sum(sample.dropped_images for sample in samples),
        cut=[sample.where for sample in samples if sample.cut_tokens],
        skipped={sample.where: sample.skipped for sample in samples if sample.skipped},
    )


def pad_to_largest(tensors: list[torch.Tensor], value: float, *, keep_first: bool = False) -> list[torch.Tensor]:
    """Pad every dimension (all but the first with `keep_first`) at its end to the largest among `tensors`."""
    largest = [max(sizes) for sizes in zip(*(tensor.shape for tensor in tensors), strict=True)]
    padded = []
    for tensor in tensors:
        missing = [wanted - size for wanted, size in zip(largest, tensor.shape, strict=True)]
        if keep_first:
            missing[0] = 0
        # F.pad counts dimensions from the last: (before, after) of each.
        widths = [width for amount in reversed(missing) for width in (0, amount)]
        padded.append(F.pad(tensor, widths, value=value) if any(missing) else tensor)
    return padded


def probe_collator(processor: Any) -> PaddingCollator:
    """The collator that fits `processor`, found by giving it one row of two blank images."""
    from PIL import Image

    blank = Image.new("RGB", (32, 32))
    process = processor.image_processor
    nested = process([[blank, blank]], return_tensors="pt")["pixel_values"].shape[0] == 1
    tensors: dict[str, torch.Tensor] = {}
    if nested:
        made = process([[blank]], return_tensors="pt")
        tensors = {name: value for name, value in made.items() if torch.is_tensor(value)}
        tensors["pixel_values"] = torch.zeros_like(tensors["pixel_values"])
    pad = processor.tokenizer.pad_token_id
    return PaddingCollator(pad if pad is not None else 0, nested, tensors)
