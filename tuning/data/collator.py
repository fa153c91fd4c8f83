"""Samples → one batch: end to end in a single row, or padded to the longest."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch.utils._pytree import tree_map_only

from tuning.data.encode import IGNORED, Sample, Skipped
from tuning.data.image_joins import ImageLayout, learn_image_layout, pad_to_largest
from tuning.errors import UserError

INFO = "info"  # the key of a batch under which its `BatchInfo` lies


@dataclass(frozen=True)
class BatchInfo:
    """Counts and messages about a batch, for the trainer. The model never gets them.

    `row_tokens`: of each row, without padding. `pictures`: of each row with images, the shape of its pixels and how
    many pictures they are. `rows_with_images` counts rows with a supervised token only. `cut`: rows whose answers were
    cut. `skipped`: rows left out, by their place in the data. `error`: a bad row that must end the run; such a batch
    has no tensors.
    """

    rows: list[str] = field(default_factory=list)
    row_tokens: list[int] = field(default_factory=list)
    pictures: list[tuple[tuple[int, ...], int]] = field(default_factory=list)
    supervised_tokens: int = 0
    rows_with_images: int = 0
    dropped_images: int = 0
    cut: list[str] = field(default_factory=list)
    skipped: dict[str, Skipped] = field(default_factory=dict)
    error: UserError | None = None

    @property
    def tokens(self) -> int:
        """The tokens of all rows, without padding."""
        return sum(self.row_tokens)


class Positions(Protocol):
    """Computes the position ids of a row, `[axes, T]`, from its sequence and its image tensors."""

    def __call__(self, sequence: Mapping[str, torch.Tensor], images: Mapping[str, torch.Tensor]) -> torch.Tensor: ...


@dataclass
class Collator:
    """Joins samples and their images.

    `padding_free`: samples lie end to end in one row `[1, T]`, with positions that restart at 0 in each sample and
    without an attention mask. `cu_seq_lens_q` `[samples + 1]` has the bounds of the samples (Hugging Face's name:
    `FlashAttentionKwargs`). Otherwise samples are padded on the right to the longest, `[samples, T]`.

    `positions`: how a model computes positions in several dimensions, `[axes, 1, T]` of a padding-free batch. `adapt`:
    what else the model needs to be changed in such a batch.

    `image_layout`: how image tensors are joined. `picture_dtype`: what their floats become, unless it is None.
    `dummy_image_sample` is added to a batch without an image, where there are several processes: see
    `dummy_samples.py`.
    """

    pad_token_id: int
    image_layout: ImageLayout = ImageLayout()
    dummy_image_sample: Sample | None = None
    padding_free: bool = False
    positions: Positions | None = None
    adapt: Callable[[dict[str, Any]], dict[str, Any]] | None = None
    picture_dtype: torch.dtype | None = None

    @property
    def nested_images(self) -> bool:
        """Whether the first dimension of image tensors is the rows."""
        return self.image_layout.nested

    def __call__(self, samples: Sequence[Sample | UserError]) -> dict[str, Any]:
        for sample in samples:
            if isinstance(sample, UserError):
                return {INFO: BatchInfo(error=sample)}
        good = [sample for sample in samples if isinstance(sample, Sample)]
        return {**self.join(good), INFO: describe_batch(good)}

    def join(self, samples: Sequence[Sample]) -> dict[str, Any]:
        """The batch as the model takes it, with labels and without its info."""
        joined = list(samples)
        if self.dummy_image_sample and not any(sample.images for sample in joined):
            joined.append(self.dummy_image_sample)
        images = [sample.images for sample in joined]
        pictures = self.image_layout.join(images, end_to_end=self.padding_free)
        if self.picture_dtype:  # half of the bytes between processes, and on the way to a GPU
            pictures = tree_map_only(torch.Tensor, self._cast_floats, pictures)
        batch = {**self._sequences(joined), **pictures}
        return self.adapt(batch) if self.padding_free and self.adapt else batch

    def _cast_floats(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(self.picture_dtype) if tensor.is_floating_point() else tensor

    def find_masks_of_images(self, samples: Sequence[Sample]) -> list[str]:
        """Names of tensors `[T, images, …]` (Mllama's mask): end to end, a token would get the images of all rows."""
        tensors = [pair for sample in samples for pair in sample.sequence.items()]
        return [name for name, value in tensors if self.nested_images and value.dim() > 1]

    def _sequences(self, samples: list[Sample]) -> dict[str, Any]:
        rows = _columns([sample.sequence for sample in samples])
        if self.padding_free and (by_images := self.find_masks_of_images(samples)):
            raise UserError(where="collator", problem=f"{by_images[0]} has a place for each token and image.")
        if self.padding_free and self.positions:
            made = [self.positions(sample.sequence, sample.images) for sample in samples]
            return {**join_end_to_end(rows), "position_ids": torch.cat(made, dim=1)[:, None]}
        if self.padding_free:
            return join_end_to_end(rows)
        fill = {"input_ids": self.pad_token_id, "labels": IGNORED}
        return {name: torch.stack(pad_to_largest(values, fill.get(name, 0))) for name, values in rows.items()}


def take_info(batch: dict[str, Any]) -> BatchInfo:
    """Take the info off a batch. What is left is for the model."""
    return batch.pop(INFO)


def describe_batch(samples: Sequence[Sample]) -> BatchInfo:
    """The info of a batch of these samples."""
    supervised = [int((sample.sequence["labels"] != IGNORED).sum()) for sample in samples]
    return BatchInfo(
        rows=[sample.where for sample in samples],
        row_tokens=[int(sample.sequence["attention_mask"].sum()) for sample in samples],
        pictures=[describe_pictures(sample.images) for sample in samples if sample.images],
        supervised_tokens=sum(supervised),
        rows_with_images=sum(
            bool(sample.images and number) for sample, number in zip(samples, supervised, strict=True)
        ),
        dropped_images=sum(sample.dropped_images for sample in samples),
        cut=[sample.where for sample in samples if sample.cut_tokens],
        skipped={sample.where: sample.skipped for sample in samples if sample.skipped},
    )


def describe_pictures(images: Mapping[str, torch.Tensor]) -> tuple[tuple[int, ...], int]:
    """The shape of a row's pixels, its largest tensor, and the number of pictures: some tensor has a line for each."""
    pixels = max(images.values(), key=torch.Tensor.numel)
    return tuple(pixels.shape), min(len(value) for value in images.values() if value.dim())


def _columns(sequences: list[dict[str, torch.Tensor]]) -> dict[str, list[torch.Tensor]]:
    """By name, the tensor of each row, `[T, …]`. A row that lacks one gets zeros."""
    columns = {}
    for name in dict.fromkeys(name for sequence in sequences for name in sequence):
        like = next(sequence[name] for sequence in sequences if name in sequence)
        columns[name] = [
            sequence[name] if name in sequence else like.new_zeros(len(sequence["input_ids"]), *like.shape[1:])
            for sequence in sequences
        ]
    return columns


def join_end_to_end(rows: dict[str, list[torch.Tensor]]) -> dict[str, Any]:
    """One row of all samples, `[1, T, …]`, with the bounds of the samples; see `Collator`."""
    lengths = torch.tensor([len(ids) for ids in rows["input_ids"]])
    bounds = F.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)
    batch = {name: torch.cat(values)[None] for name, values in rows.items() if name != "attention_mask"}
    batch["position_ids"] = torch.cat([torch.arange(length) for length in lengths])[None]
    longest = int(lengths.max())
    return batch | dict(cu_seq_lens_q=bounds, cu_seq_lens_k=bounds, max_length_q=longest, max_length_k=longest)


def probe_collator(processor: Any) -> Collator:
    """The collator for `processor`. Processes a few small pictures to see how it joins those of several rows."""
    pad = processor.tokenizer.pad_token_id
    return Collator(pad if pad is not None else 0, learn_image_layout(processor.image_processor))
