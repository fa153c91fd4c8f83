"""One row → one `Sample`: token ids, labels and image tensors, ready to be batched."""

import copy
import functools
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from PIL import Image

from tuning.config.box_formats import BoxFormat
from tuning.data import row_errors
from tuning.data.chat_template import ChatFormat, RenderedChat
from tuning.data.grounding import FIELD, BoxOnImage, Grounded, ground_row
from tuning.data.images import ImageRules, load_image, measure_image
from tuning.data.messages import WEIGHT, Conversation, count_images, keep_first_images
from tuning.data.pixels import patch_image_processor
from tuning.data.resized_size import ResizedSize
from tuning.data.sources import Row
from tuning.data.token_spans import (
    EXPANSIONS,
    Span,
    after_expansion,
    expansions_of,
    is_insertion,
    overlaps,
    report_insertion,
)
from tuning.data.truncate import cut_answers
from tuning.errors import error_field, try_optional

IGNORED = -100
"""The label of a position that is not trained (PyTorch's and Hugging Face's convention)."""


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
    conversation: Conversation
    chat: RenderedChat
    images: list[Any]
    dropped_images: int
    boxes: Sequence[BoxOnImage] = ()


@dataclass(frozen=True)
class Encoder:
    """Encodes rows: renders the conversation, processes text and images, and labels the tokens.

    `overlong_rows` is error, drop or truncate_text. `train_on`: all answers of a row, or only its last_turn.
    `embeddings`: for how many tokens the model has embeddings, where the tokenizer has more tokens; else None.
    `box_format`: how the model writes boxes, if that is known.
    """

    processor: Any
    chat: ChatFormat
    max_seq_length: int
    max_images: int | None = None
    max_messages: int = 1000
    assistant_only_loss: bool = True
    overlong_rows: str = "error"
    train_on: str = "all"
    image_rules: ImageRules = ImageRules()
    box_format: BoxFormat | None = None
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
            fix = "Raise max_seq_length: the row is too long even without its answers."
            raise row_errors.too_long(prepared.row, length, self.max_seq_length, fix)
        return self._label(cut.inputs, prepared, cut.not_trained, excess)

    def encode_untrained(self, prepared: Prepared) -> Sample:
        """Process a row of which no token is trained, such as a prompt. Raises `UserError` where it is too long."""
        inputs = self._process_row(prepared, self.open_images(prepared))
        if inputs["input_ids"].shape[1] > self.max_seq_length:
            fix = "Raise max_seq_length, or shorten the row."
            raise row_errors.too_long(prepared.row, inputs["input_ids"].shape[1], self.max_seq_length, fix)
        return self.untrained_sample(inputs, prepared.row.where)

    # --- render ---

    def prepare(self, row: Row) -> Prepared:
        """Read and render one row, without opening its images. Raises `UserError` with file, row and field."""
        grounded = self.ground(row, row.format.read(row.columns, row.where))
        prepared = self.prepare_conversation(row, grounded.conversation)
        return replace(prepared, boxes=grounded.boxes) if grounded.boxes else prepared

    def ground(self, row: Row, conversation: Conversation) -> Grounded:
        """Write the boxes of a row into its texts: see `ground_row`."""
        if FIELD not in row.format.extra_columns:
            return Grounded(conversation)
        return ground_row(
            row, conversation, self.box_format, self._resized_size, rules=self.image_rules, max_images=self.max_images
        )

    @functools.cached_property
    def _resized_size(self) -> ResizedSize:
        return ResizedSize(self.processor.image_processor)

    def prepare_conversation(self, row: Row, conversation: Conversation, *, prompt: bool = False) -> Prepared:
        """Render a conversation that was read from `row`; see `prepare`. `prompt`: as a prompt for the next answer."""
        text_field = row.format.text_fields[-1]
        where = f"{row.where}, field '{text_field}'"
        messages, images = conversation.messages, conversation.images
        if count_images(messages) != len(images):
            raise row_errors.wrong_number_of_images(row, count_images(messages), len(images))
        dropped = 0
        if self.max_images is not None:
            dropped = max(0, len(images) - self.max_images)
            images, messages = images[: self.max_images], keep_first_images(messages, self.max_images)
        if len(messages) > self.max_messages:
            raise row_errors.too_many_messages(row, len(messages), self.max_messages)
        conversation = replace(conversation, messages=messages, images=images)
        with error_field(text_field):
            chat = self.chat.render_prompt(conversation, where) if prompt else self.chat.render(conversation, where)
        placeholders = self.chat.count_placeholders(chat.text)
        if placeholders not in (None, len(images)):
            raise row_errors.wrong_number_of_images(row, placeholders, len(images))
        chosen = chat if prompt else self._choose_answers(row, chat, conversation)
        return Prepared(row, conversation, chosen, images, dropped)

    def _choose_answers(self, row: Row, chat: RenderedChat, conversation: Conversation) -> RenderedChat:
        """The chat with the spans of those answers only that are trained."""
        answers = [message for message in conversation.messages if message["role"] == "assistant"]
        trained = [message.get(WEIGHT, 1) != 0 for message in answers]
        if self.train_on == "last_turn":
            trained[:-1] = [False] * (len(answers) - 1)
        if all(trained):
            return chat
        owners = self.chat.find_owners(conversation, chat)
        if owners is None:
            raise row_errors.not_left_out(row, len(chat.spans), len(answers))
        chosen = [trained[owner] for owner in owners]
        return replace(
            chat,
            spans=list(itertools.compress(chat.spans, chosen)),
            contents=list(itertools.compress(chat.contents, chosen)),
            untrained=list(itertools.compress(chat.spans, [not choice for choice in chosen])),
        )

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
            assert attempt.error is not None
            has_images = bool(prepared.images)
            raise row_errors.refused(prepared.row, attempt.error, has_images=has_images) from attempt.error
        self.check_ids(attempt.value["input_ids"][0].numpy(), prepared)
        return attempt.value

    def check_ids(self, ids: np.ndarray, prepared: Prepared) -> None:
        """Raises `UserError` for a token of a row that the model has no embedding for."""
        if self.embeddings is None:
            return
        beyond = ids[(ids >= self.embeddings) & (ids != self.image_token_id)]
        if len(beyond):
            token = self.processor.tokenizer.convert_ids_to_tokens(int(beyond[0]))
            raise row_errors.unknown_token(prepared.row, token, int(beyond[0]), self.embeddings)

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
            **self._type_options,
            **self.tokenizer_options(text),
        )
        # The tokenizer's own conversion to tensors walks over every number in Python.
        inputs = {
            name: value if torch.is_tensor(value) or name == EXPANSIONS else torch.from_numpy(np.asarray(value))
            for name, value in made.items()
        }
        inputs = report_insertion(inputs, text, processor, images)
        return escaper.unescape(inputs, text) if escaped else inputs

    @functools.cached_property
    def _type_options(self) -> dict[str, bool]:
        """Asks for the kind of each token where the model needs it, and the processor does not give it unasked."""
        needed = "mm_token_type_ids" in getattr(self.processor, "model_input_names", ())
        return {"return_mm_token_type_ids": True} if needed else {}

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
        spans = [expansion["new_span"] for expansion in expansions_of(inputs) if not is_insertion(expansion)]
        found = overlaps(inputs["offset_mapping"][0].numpy(), spans)
        if self.image_token_id is not None:
            found |= inputs["input_ids"][0].numpy() == self.image_token_id
        return found

    # --- label ---

    def _label(
        self, inputs: dict[str, Any], prepared: Prepared, not_trained: Sequence[Span] = (), cut_tokens: int = 0
    ) -> Sample:
        offsets = inputs["offset_mapping"][0].numpy()
        sequence, images = self._split(inputs)
        trained = self.find_trained(offsets, prepared.chat, expansions_of(inputs))
        trained &= ~self._find_image_tokens(inputs) & ~overlaps(offsets, not_trained)
        trained &= sequence["attention_mask"].numpy().astype(bool)
        trained[0] = False  # no token comes before the first one to predict it from
        if not trained.any():
            raise row_errors.nothing_trained(prepared.row)
        sequence["labels"] = torch.where(torch.from_numpy(trained), sequence["input_ids"], IGNORED)
        return Sample(sequence, images, prepared.row.where, prepared.dropped_images, cut_tokens)

    def find_trained(self, offsets: np.ndarray, chat: RenderedChat, expansions: Sequence[dict] = ()) -> np.ndarray:
        """Which tokens, with character `offsets` `[T, 2]`, the chat says to train. Boolean `[T]`.

        `expansions`: how the placeholders of images were expanded, if they were.
        """
        if self.assistant_only_loss:
            return overlaps(offsets, after_expansion(chat.spans, expansions))
        return ~overlaps(offsets, after_expansion(chat.untrained, expansions))

    def untrained_sample(self, inputs: dict[str, Any], where: str = "") -> Sample:
        """The processor's output as a sample without a trained token."""
        sequence, images = self._split(inputs)
        return Sample({**sequence, "labels": torch.full_like(sequence["input_ids"], IGNORED)}, images, where)

    def _split(self, inputs: dict[str, Any]) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        """The processor's output as tensors with a position per token, `[T, …]`, and image tensors."""
        inputs = {name: inputs[name] for name in inputs if name not in (EXPANSIONS, "offset_mapping")}
        tokens = inputs["input_ids"].shape
        # Some image processors name only half of their tensors: the others have no position per token.
        of_images = {n for n, value in inputs.items() if n in self.image_names or value.shape[:2] != tokens}
        images = {name: value for name, value in inputs.items() if name in of_images}
        sequence = {name: value[0] for name, value in inputs.items() if name not in of_images}
        return sequence, images

    def placeholder(self, where: str, skipped: Skipped) -> Sample:
        """A sample of one untrained token that takes the place of a skipped row, so that batches keep their size."""
        ids = torch.tensor([self.processor.tokenizer.eos_token_id or 0])
        sequence = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.full_like(ids, IGNORED)}
        return Sample(sequence, {}, where, skipped=skipped)

    def _leave_out(self, prepared: Prepared, length: int) -> Sample:
        error = row_errors.too_long(prepared.row, length, self.max_seq_length)
        if self.overlong_rows == "error":
            raise error
        skipped = Skipped(prepared.row.number, error.field, str(error), bad=False)
        return self.placeholder(prepared.row.where, skipped)
