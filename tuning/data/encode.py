"""One row → one `Sample`: token ids, labels and image tensors, ready to be batched."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from PIL import Image

from tuning.data.chat import ChatFormat
from tuning.data.images import list_images, load_image
from tuning.data.messages import count_images, keep_first_images, read_messages
from tuning.data.sources import Row
from tuning.errors import UserError

IGNORED = -100
"""The label of a position that is not trained (PyTorch's and Hugging Face's convention)."""


@dataclass(frozen=True)
class Sample:
    """An encoded row of T tokens.

    `sequence`: tensors with a position per token, `[T, …]`: `input_ids`, `attention_mask`, `labels` and what else the
    processor gives. `images`: the processor's image tensors. `where` names the row; `skipped` says why a row was left
    out, in which case no label is trained.
    """

    sequence: dict[str, torch.Tensor]
    images: dict[str, torch.Tensor]
    where: str
    dropped_images: int = 0
    skipped: str = ""


@dataclass(frozen=True)
class Encoder:
    """How rows become samples. `text_field` and `image_field` name the columns."""

    processor: Any
    chat: ChatFormat
    text_field: str
    image_field: str
    max_seq_length: int
    max_images: int | None = None
    assistant_only_loss: bool = True
    drop_overlong: bool = False
    image_names: frozenset[str] = field(init=False)
    image_token_id: int | None = field(init=False)

    def __post_init__(self):
        names = frozenset(self.processor.image_processor.model_input_names)
        object.__setattr__(self, "image_names", names)
        object.__setattr__(self, "image_token_id", getattr(self.processor, "image_token_id", None))

    def encode(self, row: Row) -> Sample:
        """Render, tokenize and label one row. Raises `UserError` naming file, row and field of what is wrong."""
        text_where, image_where = (f"{row.where}, field '{name}'" for name in (self.text_field, self.image_field))
        messages = read_messages(row.columns[self.text_field], text_where)
        stored = list_images(row.columns[self.image_field])
        dropped = 0
        if self.max_images is not None:
            dropped = max(0, len(stored) - self.max_images)
            stored = stored[: self.max_images]
            messages = keep_first_images(messages, self.max_images)
        chat = self.chat.render(messages, text_where)
        placeholders = self.chat.count_placeholders(chat.text)
        placeholders = count_images(messages) if placeholders is None else placeholders
        if placeholders != len(stored):
            raise UserError(
                f"the messages have {placeholders} image placeholders, but there are {len(stored)} images.",
                f"{row.where}, fields '{self.text_field}' and '{self.image_field}'",
                'Give one {"type": "image"} part for each image.',
            )
        images = [load_image(image, row.folder, f"{image_where}, image {i}") for i, image in enumerate(stored)]
        inputs = self.process(chat.text, images)
        length = inputs["input_ids"].shape[1]
        if length > self.max_seq_length:
            return self._overlong(row.where, length)
        return self._label(inputs, chat.spans, row.where, dropped)

    def process(self, text: str, images: Sequence[Image.Image]) -> dict[str, Any]:
        """The processor's output for one rendered conversation, with both offset maps of its tokens."""
        bos = self.processor.tokenizer.bos_token
        options = {"add_special_tokens": False} if bos and text.startswith(bos) else {}
        inputs = self.processor(
            text=[text],
            images=list(images) or None,
            return_tensors="pt",
            return_offsets_mapping=True,
            return_text_replacement_offsets=True,
            **options,
        )
        return dict(inputs)

    def count_image_tokens(self, image: Image.Image) -> int:
        """How many tokens of a row `image` takes."""
        question = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "?"}]}]
        return int(self._find_image_tokens(self.process(self.chat.generation_prompt(question), [image])).sum())

    def _find_image_tokens(self, inputs: dict[str, Any]) -> np.ndarray:
        """Which tokens stand for images: what placeholders were expanded to, and placeholders themselves. `[T]`."""
        offsets, expansions = inputs["offset_mapping"][0].numpy(), _expansions(inputs)
        found = overlaps(offsets, [expansion["new_span"] for expansion in expansions])
        if self.image_token_id is not None:
            found |= inputs["input_ids"][0].numpy() == self.image_token_id
        return found

    def _label(self, inputs: dict[str, Any], spans: list[tuple[int, int]], where: str, dropped: int) -> Sample:
        image_tokens = self._find_image_tokens(inputs)
        expansions = _expansions(inputs)
        inputs.pop("text_replacement_offsets", None)
        offsets = inputs.pop("offset_mapping")[0].numpy()
        input_ids = inputs["input_ids"][0]
        images = {name: value for name, value in inputs.items() if name in self.image_names}
        sequence = {name: value[0] for name, value in inputs.items() if name not in self.image_names}
        wrong = {name for name, value in sequence.items() if value.shape[:1] != input_ids.shape}
        assert not wrong, f"{type(self.processor).__name__} gives {wrong} without a position per token"
        trained = np.ones(len(offsets), dtype=bool)
        if self.assistant_only_loss:
            trained = overlaps(offsets, after_expansion(spans, expansions))
        trained &= ~image_tokens & sequence["attention_mask"].numpy().astype(bool)
        trained[0] = False  # nothing comes before the first token that could predict it
        if not trained.any():
            raise UserError("no token of this row would be trained.", where, "Check the answer and the chat template.")
        sequence["labels"] = torch.where(torch.from_numpy(trained), input_ids, IGNORED)
        return Sample(sequence, images, where, dropped)

    def _overlong(self, where: str, length: int) -> Sample:
        reason = f"{length} tokens are more than max_seq_length {self.max_seq_length}"
        if not self.drop_overlong:
            raise UserError(f"{reason}.", where, "Raise max_seq_length, shorten the row, or set overlong_rows drop.")
        return placeholder(self.processor.tokenizer.eos_token_id or 0, where, reason)


def _expansions(inputs: dict[str, Any]) -> list[dict]:
    return (inputs.get("text_replacement_offsets") or [[]])[0]


def placeholder(token_id: int, where: str, reason: str) -> Sample:
    """A sample of one untrained token that takes the place of a row left out, so that batches keep their size."""
    ids = torch.tensor([token_id])
    sequence = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.full_like(ids, IGNORED)}
    return Sample(sequence, {}, where, skipped=reason)


def after_expansion(spans: Sequence[tuple[int, int]], expansions: Sequence[dict]) -> list[tuple[int, int]]:
    """Move character spans of the rendered text to where they stand once image placeholders are expanded.

    `expansions` are the processor's `text_replacement_offsets`: `span` in the rendered and `new_span` in the expanded
    text, in order.
    """
    ends = [expansion["span"][1] for expansion in expansions]
    growth = [0, *(expansion["new_span"][1] - expansion["span"][1] for expansion in expansions)]

    def move(position: int) -> int:
        return position + growth[int(np.searchsorted(ends, position, side="right"))]

    return [(move(start), move(end)) for start, end in spans]


def overlaps(offsets: np.ndarray, spans: Sequence[tuple[int, int]]) -> np.ndarray:
    """Which tokens, with character `offsets` `[T, 2]`, share a character with any of `spans`. Boolean `[T]`."""
    hit = np.zeros(len(offsets), dtype=bool)
    for start, end in spans:
        hit |= (offsets[:, 0] < end) & (offsets[:, 1] > start)
    return hit
