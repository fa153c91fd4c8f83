"""One row → one `Sample`: token ids, labels and image tensors, ready to be batched."""

import copy
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from PIL import Image

from tuning.data.chat_template import ChatFormat, RenderedChat
from tuning.data.images import ImageRules, load_image, measure_image
from tuning.data.messages import Conversation, count_images, keep_first_images
from tuning.data.pixels import patch_image_processor
from tuning.data.sources import Row
from tuning.data.token_spans import EXPANSIONS, Span, after_expansion, expansions_of, overlaps
from tuning.data.truncate import cut_answers
from tuning.errors import UserError, describe_failure, error_field, try_optional

IGNORED = -100
"""The label of a position that is not trained (PyTorch's and Hugging Face's convention)."""
TOO_LONG = "too long"  # the kind of an error


@dataclass(frozen=True)
class Sample:
    """An encoded row of T tokens.

    `sequence`: tensors with a position per token, `[T, …]`: `input_ids`, `attention_mask`, `labels`, and what else the
    processor gives. `images`: the processor's image tensors. `where`: the row's place in the data. `cut_tokens`: how
    many tokens `truncate_text` cut off. `skipped`: why the row was left out; then no label is trained.
    """

    sequence: dict[str, torch.Tensor]
    images: dict[str, torch.Tensor]
    where: str
    dropped_images: int = 0
    cut_tokens: int = 0
    skipped: "Skipped | None" = None


@dataclass(frozen=True)
class Skipped:
    """A row that was left out: its number in its file, the field at fault, and the reason.

    `bad`: the row cannot be used. Otherwise `overlong_rows drop` left it out.
    """

    row: int
    field: str
    reason: str
    bad: bool


@dataclass(frozen=True)
class Prepared:
    """A row whose text is rendered and whose images are known, but not opened."""

    row: Row
    chat: RenderedChat
    images: list[Any]
    dropped_images: int


@dataclass(frozen=True)
class Encoder:
    """Encodes rows: renders the conversation, processes text and images, and labels the tokens.

    `overlong_rows` is error, drop or truncate_text. `embeddings`: for how many tokens the model has embeddings, where
    the tokenizer has more tokens; else None.
    """

    processor: Any
    chat: ChatFormat
    max_seq_length: int
    max_images: int | None = None
    max_messages: int = 1000
    assistant_only_loss: bool = True
    overlong_rows: str = "error"
    image_rules: ImageRules = ImageRules()
    embeddings: int | None = None

    @functools.cached_property
    def image_names(self) -> frozenset[str]:
        """The names of the processor's image tensors."""
        return frozenset(self.processor.image_processor.model_input_names)

    @functools.cached_property
    def image_token_id(self) -> int | None:
        """The id of the token that stands for a part of an image."""
        return getattr(self.processor, "image_token_id", None)

    @functools.cached_property
    def _patched_processor(self) -> Any:
        """A copy of the processor that prepares images faster."""
        processor = copy.copy(self.processor)
        processor.image_processor = patch_image_processor(processor.image_processor)
        return processor

    def encode(self, row: Row) -> Sample:
        """Render, process and label one row. Raises `UserError` with file, row and field."""
        prepared = self.prepare(row)
        return self.encode_prepared(prepared, self.open_images(prepared))

    def encode_prepared(self, prepared: Prepared, images: Sequence[Image.Image]) -> Sample:
        """Process and label a prepared row with its opened images; see `encode`."""
        inputs = self._process_row(prepared, images)
        length = inputs["input_ids"].shape[1]
        if length <= self.max_seq_length:
            return self._label(inputs, prepared)
        if self.overlong_rows != "truncate_text":
            return self._leave_out(prepared, length)
        excess = length - self.max_seq_length
        cut = cut_answers(inputs, prepared.chat, self._find_image_tokens(inputs), excess)
        if cut is None:
            raise self.too_long(prepared, length, "Raise max_seq_length: the row is too long even without its answers.")
        return self._label(cut.inputs, prepared, cut.not_trained, excess)

    def encode_untrained(self, prepared: Prepared) -> Sample:
        """Process a row of which no token is trained, such as a prompt. Raises `UserError` where it is too long."""
        inputs = self._process_row(prepared, self.open_images(prepared))
        if inputs["input_ids"].shape[1] > self.max_seq_length:
            raise self.too_long(prepared, inputs["input_ids"].shape[1], "Raise max_seq_length, or shorten the row.")
        return self.untrained_sample(inputs, prepared.row.where)

    # --- render ---

    def prepare(self, row: Row) -> Prepared:
        """Read and render one row, without opening its images. Raises `UserError` with file, row and field."""
        return self.prepare_conversation(row, row.format.read(row.columns, row.where))

    def prepare_conversation(self, row: Row, conversation: Conversation) -> Prepared:
        """Render a conversation that was read from `row`; see `prepare`."""
        text_field = row.format.text_fields[-1]
        where = f"{row.where}, field '{text_field}'"
        messages, images = conversation.messages, conversation.images
        dropped = 0
        if self.max_images is not None:
            dropped = max(0, len(images) - self.max_images)
            images, messages = images[: self.max_images], keep_first_images(messages, self.max_images)
        if len(messages) > self.max_messages:
            raise UserError(
                where=where,
                problem=f"{len(messages)} messages are more than max_messages_per_row {self.max_messages}.",
                fix="Split the row, or raise max_messages_per_row.",
                field=text_field,
                kind="too many messages",
            )
        with error_field(text_field):
            chat = self.chat.render(messages, where)
        placeholders = self.chat.count_placeholders(chat.text)
        placeholders = count_images(messages) if placeholders is None else placeholders
        if placeholders != len(images):
            raise wrong_number_of_images(row, placeholders, len(images))
        if conversation.trained_from:
            trained = sum(m["role"] == "assistant" for m in messages[conversation.trained_from :])
            chat = replace(chat, spans=chat.spans[-trained:], contents=chat.contents[-trained:])
        return Prepared(row, chat, images, dropped)

    def open_images(self, prepared: Prepared) -> list[Image.Image]:
        """Decode the images of a row. Raises `UserError` for one that cannot be used."""
        return self._read_images(prepared, load_image)

    def measure_images(self, prepared: Prepared) -> list[tuple[int, int]]:
        """Width and height of the images of a row, from their headers. Raises `UserError` as `open_images` does."""
        return self._read_images(prepared, measure_image)

    def _read_images(self, prepared: Prepared, read: Callable) -> list[Any]:
        row, field = prepared.row, prepared.row.format.field_of_images
        with error_field(field):
            return [
                read(image, row.folder, f"{row.where}, field '{field}', image {number}", self.image_rules)
                for number, image in enumerate(prepared.images)
            ]

    # --- process ---

    def _process_row(self, prepared: Prepared, images: Sequence[Image.Image]) -> dict[str, Any]:
        """`process` for a row. Raises `UserError` for what the processor refuses, and for tokens unknown to the model.

        Processors check little, and in their own ways: one refuses a picture that is 200 times as long as wide.
        """
        attempt = try_optional(lambda: self.process(prepared.chat.text, images))
        if attempt.value is None:
            raise self.refused(prepared, attempt.error) from attempt.error
        self.check_ids(attempt.value["input_ids"][0].numpy(), prepared)
        return attempt.value

    def check_ids(self, ids: np.ndarray, prepared: Prepared) -> None:
        """Raises `UserError` for a token of a row that the model has no embedding for."""
        if self.embeddings is None:
            return
        beyond = ids[(ids >= self.embeddings) & (ids != self.image_token_id)]
        if len(beyond):
            token = self.processor.tokenizer.convert_ids_to_tokens(int(beyond[0]))
            raise _text_error(
                prepared.row,
                problem=(
                    f"the token {token!r} has the id {beyond[0]}, but the model has {self.embeddings} embeddings: the"
                    " tokenizer was extended, the model was not."
                ),
                fix="Call the model's resize_token_embeddings(len(tokenizer)) and save it, or use its own tokenizer.",
                kind="token without an embedding",
            )

    def refused(self, prepared: Prepared, error: Exception | None) -> UserError:
        """The error of a row that the processor raised `error` for."""
        assert error is not None
        row = prepared.row
        return UserError(
            where=row.where,
            problem=f"the model's processor refuses this row: {describe_failure(error)}.",
            fix="Change its images or its text, or drop it.",
            field=row.format.field_of_images if prepared.images else row.format.text_fields[-1],
            kind="refused by the processor",
        )

    def process(self, text: str, images: Sequence[Image.Image]) -> dict[str, Any]:
        """The processor's output for one rendered conversation, with both offset maps of its tokens."""
        escaper, processor = self.chat.escaper, self._patched_processor
        escaped = escaper.is_escaped(text)
        if escaped:
            processor = copy.copy(processor)
            processor.tokenizer = escaper.escaped_tokenizer
        made = processor(
            text=[text],
            images=list(images) or None,
            images_kwargs={"return_tensors": "pt"},
            return_offsets_mapping=True,
            return_text_replacement_offsets=True,
            **self.tokenizer_options(text),
        )
        # The tokenizer's own conversion to tensors walks over every number in Python.
        inputs = {
            name: value if torch.is_tensor(value) or name == EXPANSIONS else torch.from_numpy(np.asarray(value))
            for name, value in made.items()
        }
        return escaper.unescape(inputs) if escaped else inputs

    def tokenizer_options(self, text: str) -> dict[str, bool]:
        """Options that keep the tokenizer from adding a second first token, where the template writes one."""
        bos = self.processor.tokenizer.bos_token
        return {"add_special_tokens": False} if bos and text.startswith(bos) else {}

    def process_question(self, images: Sequence[Image.Image], question: str = "?") -> dict[str, Any]:
        """The processor's output for a prompt of `images` and a question."""
        content = [*({"type": "image"} for _ in images), {"type": "text", "text": question}]
        return self.process(self.chat.generation_prompt([{"role": "user", "content": content}]), images)

    def count_image_tokens(self, image: Image.Image) -> int:
        """How many tokens of a row `image` takes."""
        return int(self._find_image_tokens(self.process_question([image])).sum())

    def _find_image_tokens(self, inputs: dict[str, Any]) -> np.ndarray:
        """Which tokens stand for images: expanded placeholders, and placeholders themselves. Boolean `[T]`."""
        found = overlaps(
            inputs["offset_mapping"][0].numpy(), [expansion["new_span"] for expansion in expansions_of(inputs)]
        )
        if self.image_token_id is not None:
            found |= inputs["input_ids"][0].numpy() == self.image_token_id
        return found

    # --- label ---

    def _label(
        self, inputs: dict[str, Any], prepared: Prepared, not_trained: Sequence[Span] = (), cut_tokens: int = 0
    ) -> Sample:
        offsets = inputs["offset_mapping"][0].numpy()
        sequence, images = self._split(inputs)
        trained = np.ones(len(offsets), dtype=bool)
        if self.assistant_only_loss:
            trained = overlaps(offsets, after_expansion(prepared.chat.spans, expansions_of(inputs)))
        trained &= ~self._find_image_tokens(inputs) & ~overlaps(offsets, not_trained)
        trained &= sequence["attention_mask"].numpy().astype(bool)
        trained[0] = False  # no token comes before the first one to predict it from
        if not trained.any():
            raise self.nothing_trained(prepared)
        sequence["labels"] = torch.where(torch.from_numpy(trained), sequence["input_ids"], IGNORED)
        return Sample(sequence, images, prepared.row.where, prepared.dropped_images, cut_tokens)

    def untrained_sample(self, inputs: dict[str, Any], where: str = "") -> Sample:
        """The processor's output as a sample without a trained token."""
        sequence, images = self._split(inputs)
        return Sample({**sequence, "labels": torch.full_like(sequence["input_ids"], IGNORED)}, images, where)

    def _split(self, inputs: dict[str, Any]) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        """The processor's output as tensors with a position per token, `[T, …]`, and image tensors."""
        inputs = {name: inputs[name] for name in inputs if name not in (EXPANSIONS, "offset_mapping")}
        images = {name: value for name, value in inputs.items() if name in self.image_names}
        sequence = {name: value[0] for name, value in inputs.items() if name not in self.image_names}
        tokens = sequence["input_ids"].shape
        wrong = {name for name, value in sequence.items() if value.shape[:1] != tokens}
        assert not wrong, f"{type(self.processor).__name__} gives {wrong} without a position per token"
        return sequence, images

    def placeholder(self, where: str, skipped: Skipped) -> Sample:
        """A sample of one untrained token that takes the place of a skipped row, so that batches keep their size."""
        ids = torch.tensor([self.processor.tokenizer.eos_token_id or 0])
        sequence = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.full_like(ids, IGNORED)}
        return Sample(sequence, {}, where, skipped=skipped)

    # --- rows that cannot be trained ---

    def _leave_out(self, prepared: Prepared, length: int) -> Sample:
        error = self.too_long(prepared, length)
        if self.overlong_rows == "error":
            raise error
        skipped = Skipped(prepared.row.number, error.field, str(error), bad=False)
        return self.placeholder(prepared.row.where, skipped)

    def too_long(self, prepared: Prepared, length: int, fix: str = "") -> UserError:
        """The error of a row of `length` tokens."""
        return _text_error(
            prepared.row,
            problem=f"{length} tokens are more than max_seq_length {self.max_seq_length}.",
            fix=fix or "Raise max_seq_length, shorten the row, or set overlong_rows drop or truncate_text.",
            kind=TOO_LONG,
        )

    def nothing_trained(self, prepared: Prepared) -> UserError:
        """The error of a row without a supervised token."""
        return _text_error(
            prepared.row,
            problem="no token of this row would be trained.",
            fix="Check the answer and the chat template.",
            kind="nothing to train",
        )


def _text_error(row: Row, *, problem: str, fix: str, kind: str) -> UserError:
    field = row.format.text_fields[-1]
    return UserError(where=f"{row.where}, field '{field}'", problem=problem, fix=fix, field=field, kind=kind)


def wrong_number_of_images(row: Row, placeholders: int, images: int) -> UserError:
    """The error of a row that has not one image for each placeholder."""
    fields = [f"'{name}'" for name in (row.format.text_fields[0], row.format.image_field) if name]
    return UserError(
        where=f"{row.where}, field{'s'[: len(fields) - 1]} {' and '.join(fields)}",
        problem=f"the messages have {placeholders} image placeholders, but there are {images} images.",
        fix='Give one {"type": "image"} part for each image.',
        field=row.format.field_of_images,
        kind="wrong number of images",
    )
