"""One row → one `Sample`: token ids, labels and image tensors, ready to be batched."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from PIL import Image

from tuning.data.chat_template import ChatFormat, RenderedChat
from tuning.data.images import ImageRules, load_image
from tuning.data.messages import Conversation, count_images, keep_first_images
from tuning.data.pixels import patch_image_processor
from tuning.data.sources import Row
from tuning.errors import UserError, error_field

IGNORED = -100
"""The label of a position that is not trained (PyTorch's and Hugging Face's convention)."""
EXPANSIONS = "text_replacement_offsets"
TOO_LONG = "too long"  # the kind of an error


@dataclass(frozen=True)
class Sample:
    """An encoded row of T tokens.

    `sequence`: tensors with a position per token, `[T, …]`: `input_ids`, `attention_mask`, `labels` and what else the
    processor gives. `images`: the processor's image tensors. `where` names the row. `cut_tokens`: how many tokens
    `truncate_text` took away. `skipped`: why the row was left out, in which case no label is trained.
    """

    sequence: dict[str, torch.Tensor]
    images: dict[str, torch.Tensor]
    where: str
    dropped_images: int = 0
    cut_tokens: int = 0
    skipped: "Skipped | None" = None


@dataclass(frozen=True)
class Skipped:
    """A row left out: its number in its file, the field at fault, and the reason. `bad`: not by `overlong_rows`."""

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

    @property
    def image_places(self) -> list[str]:
        field = self.row.format.image_field or self.row.format.text_fields[0]
        return [f"{self.row.where}, field '{field}', image {index}" for index in range(len(self.images))]


@dataclass(frozen=True)
class Encoder:
    """How rows become samples. `overlong_rows` is error, drop or truncate_text."""

    processor: Any
    chat: ChatFormat
    max_seq_length: int
    max_images: int | None = None
    max_messages: int = 1000
    assistant_only_loss: bool = True
    overlong_rows: str = "error"
    image_rules: ImageRules = ImageRules()
    image_names: frozenset[str] = field(init=False)
    image_token_id: int | None = field(init=False)

    def __post_init__(self):
        quick = copy.copy(self.processor)
        quick.image_processor = patch_image_processor(quick.image_processor)
        object.__setattr__(self, "processor", quick)
        names = frozenset(self.processor.image_processor.model_input_names)
        object.__setattr__(self, "image_names", names)
        object.__setattr__(self, "image_token_id", getattr(self.processor, "image_token_id", None))

    def prepare(self, row: Row) -> Prepared:
        """Read and render one row; its images stay closed. Raises `UserError` naming file, row and field."""
        return self.prepare_conversation(row, row.format.read(row.columns, row.where))

    def prepare_conversation(self, row: Row, conversation: Conversation) -> Prepared:
        """Render what was read of a row. See `prepare`."""
        text_field = row.format.text_fields[-1]
        where = f"{row.where}, field '{text_field}'"
        messages, images = conversation.messages, conversation.images
        dropped = 0
        if self.max_images is not None:
            dropped = max(0, len(images) - self.max_images)
            images, messages = images[: self.max_images], keep_first_images(messages, self.max_images)
        with error_field(text_field):
            if len(messages) > self.max_messages:
                raise UserError(
                    where=where,
                    problem=f"{len(messages)} messages are more than max_messages_per_row {self.max_messages}.",
                    fix="Split the row, or raise max_messages_per_row.",
                    kind="too many messages",
                )
            chat = self.chat.render(messages, where)
        placeholders = self.chat.count_placeholders(chat.text)
        placeholders = count_images(messages) if placeholders is None else placeholders
        if placeholders != len(images):
            raise wrong_number_of_images(row, placeholders, len(images))
        if conversation.trained_from:
            trained = sum(m["role"] == "assistant" for m in messages[conversation.trained_from :])
            chat = replace(chat, spans=chat.spans[-trained:], contents=chat.contents[-trained:])
        return Prepared(row, chat, images, dropped)

    def encode(self, row: Row) -> Sample:
        """Render, tokenize and label one row. Raises `UserError` naming file, row and field of what is wrong."""
        prepared = self.prepare(row)
        return self.encode_prepared(prepared, self.open_images(prepared))

    def encode_prepared(self, prepared: Prepared, images: Sequence[Image.Image]) -> Sample:
        """Tokenize and label a prepared row with its opened images. See `encode`."""
        inputs = self.process(prepared.chat.text, images)
        excess = inputs["input_ids"].shape[1] - self.max_seq_length
        if excess <= 0:
            return self._label(inputs, prepared)
        if self.overlong_rows != "truncate_text":
            return self._leave_out(prepared, excess)
        inputs, not_trained = self._cut_answers(inputs, prepared, excess)
        return self._label(inputs, prepared, not_trained, excess)

    def encode_untrained(self, prepared: Prepared) -> Sample:
        """A row of which no token is trained, such as a prompt. Raises `UserError` where it is too long."""
        inputs = self.process(prepared.chat.text, self.open_images(prepared))
        if inputs["input_ids"].shape[1] > self.max_seq_length:
            raise self.too_long(prepared, inputs["input_ids"].shape[1], "Raise max_seq_length, or shorten the row.")
        return self._untrained(inputs, prepared.row.where)

    def open_images(self, prepared: Prepared) -> list[Image.Image]:
        """The images of a row. Raises `UserError` for one that cannot be used."""
        row = prepared.row
        with error_field(row.format.image_field or row.format.text_fields[0]):
            return [
                load_image(image, row.folder, place, self.image_rules)
                for image, place in zip(prepared.images, prepared.image_places, strict=True)
            ]

    def process(self, text: str, images: Sequence[Image.Image]) -> dict[str, Any]:
        """The processor's output for one rendered conversation, with both offset maps of its tokens."""
        controls, processor = self.chat.controls, self.processor
        if controls.is_hidden_in(text):
            processor = copy.copy(processor)
            processor.tokenizer = controls.escaped_tokenizer
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
        return controls.unescape(inputs) if processor is not self.processor else inputs

    def tokenizer_options(self, text: str) -> dict[str, bool]:
        """A template that writes the token a text begins with must not get a second one."""
        bos = self.processor.tokenizer.bos_token
        return {"add_special_tokens": False} if bos and text.startswith(bos) else {}

    def count_image_tokens(self, image: Image.Image) -> int:
        """How many tokens of a row `image` takes."""
        return int(self._find_image_tokens(self._ask_about([image])).sum())

    def _ask_about(self, images: list[Image.Image], question: str = "?") -> dict[str, Any]:
        content = [*({"type": "image"} for _ in images), {"type": "text", "text": question}]
        return self.process(self.chat.generation_prompt([{"role": "user", "content": content}]), images)

    def find_split_prompt(self) -> str:
        """The end of the generation prompt, where an answer's first word joins it into another token; else ""."""
        question = {"role": "user", "content": [{"type": "text", "text": "Why?"}]}
        prompt = self.chat.generation_prompt([question])
        asked = self._plain_ids(prompt)
        for words in ("It is.", "The", "Yes.", "1"):
            answer = {"role": "assistant", "content": [{"type": "text", "text": words}]}
            whole = self.chat.render([question, answer]).text
            if whole.startswith(prompt) and self._plain_ids(whole)[: len(asked)] != asked:
                return prompt[-1:]
        return ""

    def _plain_ids(self, text: str) -> list[int]:
        return self.processor.tokenizer(text, add_special_tokens=False)["input_ids"]

    def _find_image_tokens(self, inputs: dict[str, Any]) -> np.ndarray:
        """Which tokens stand for images: what placeholders were expanded to, and placeholders themselves. `[T]`."""
        offsets, expansions = inputs["offset_mapping"][0].numpy(), _expansions(inputs)
        found = overlaps(offsets, [expansion["new_span"] for expansion in expansions])
        if self.image_token_id is not None:
            found |= inputs["input_ids"][0].numpy() == self.image_token_id
        return found

    def _cut_answers(
        self, inputs: dict[str, Any], prepared: Prepared, excess: int
    ) -> tuple[dict[str, Any], list[tuple[int, int]]]:
        """Take `excess` tokens off the ends of answers, the last answer's first; each keeps at least one token.

        Returns the shorter inputs and the spans that are no longer trained: the end of turn of every answer that was
        cut, which would teach the model to stop in mid-sentence. Images and all other text stay.
        """
        offsets, chat = inputs["offset_mapping"][0].numpy(), prepared.chat
        image_tokens = self._find_image_tokens(inputs)
        moved = after_expansion([*chat.contents, *chat.spans], _expansions(inputs))
        keep, not_trained = np.ones(len(offsets), dtype=bool), []
        for content, span in reversed(list(zip(moved[: len(chat.spans)], moved[len(chat.spans) :], strict=True))):
            words = np.flatnonzero(overlaps(offsets, [content]) & ~image_tokens)
            end = len(words) - min(excess, len(words) - 1)
            while 1 < end < len(words) and offsets[words[end], 0] < offsets[words[end - 1], 1]:
                end -= 1  # several tokens may make one character: it is kept or cut as a whole
            if end < len(words):
                keep[words[end:]] = False
                excess -= len(words) - end
                not_trained.append((content[1], span[1]))
            if excess <= 0:
                break
        if excess > 0:
            raise self.too_long(
                prepared, len(offsets), "Even without its answers it is too long: raise max_seq_length."
            )
        chosen = torch.from_numpy(np.flatnonzero(keep))
        shorter = {
            name: value[:, chosen] if torch.is_tensor(value) and value.shape[:2] == (1, len(offsets)) else value
            for name, value in inputs.items()
        }
        return shorter, not_trained

    def _label(
        self,
        inputs: dict[str, Any],
        prepared: Prepared,
        not_trained: Sequence[tuple[int, int]] = (),
        cut_tokens: int = 0,
    ) -> Sample:
        image_tokens, expansions = self._find_image_tokens(inputs), _expansions(inputs)
        offsets = inputs["offset_mapping"][0].numpy()
        sequence, images = self._split(inputs)
        trained = np.ones(len(offsets), dtype=bool)
        if self.assistant_only_loss:
            trained = overlaps(offsets, after_expansion(prepared.chat.spans, expansions))
        trained &= ~image_tokens & ~overlaps(offsets, not_trained) & sequence["attention_mask"].numpy().astype(bool)
        trained[0] = False  # nothing comes before the first token that could predict it
        if not trained.any():
            raise self.nothing_trained(prepared)
        sequence["labels"] = torch.where(torch.from_numpy(trained), sequence["input_ids"], IGNORED)
        return Sample(sequence, images, prepared.row.where, prepared.dropped_images, cut_tokens)

    def _leave_out(self, prepared: Prepared, excess: int) -> Sample:
        error = self.too_long(prepared, self.max_seq_length + excess)
        if self.overlong_rows == "error":
            raise error
        skipped = Skipped(prepared.row.number, error.field, str(error), bad=False)
        return self.placeholder(prepared.row.where, skipped)

    def nothing_trained(self, prepared: Prepared) -> UserError:
        return _blame_text(
            prepared,
            "no token of this row would be trained.",
            "Check the answer and the chat template.",
            kind="nothing to train",
        )

    def too_long(self, prepared: Prepared, length: int, advice: str = "") -> UserError:
        return _blame_text(
            prepared,
            f"{length} tokens are more than max_seq_length {self.max_seq_length}.",
            advice or "Raise max_seq_length, shorten the row, or set overlong_rows drop or truncate_text.",
            kind=TOO_LONG,
        )

    def dummy_image_sample(self) -> Sample:
        """A blank image and no trained token: for a process that has no image, or no row, where others have some.

        Its vision tower then computes as theirs do. Without it the processes wait for each other for ever (FSDP), or
        fail for want of a gradient (DDP).
        """
        return self._untrained(self._ask_about([Image.new("RGB", (32, 32))]))

    def dummy_samples(self) -> list[Sample]:
        """Short rows that differ, one without an image between two with one, to try a model on."""
        images = Image.new("RGB", (48, 32), "red"), Image.new("RGB", (32, 48), "blue")
        inputs = [
            self._ask_about([images[0]], "What is this?"),
            self._ask_about([], "Is it as it was before?"),
            self._ask_about([images[1]], "And now?"),
        ]
        return [self._untrained(tried) for tried in inputs]

    def _untrained(self, inputs: dict[str, Any], where: str = "") -> Sample:
        sequence, images = self._split(inputs)
        return Sample({**sequence, "labels": torch.full_like(sequence["input_ids"], IGNORED)}, images, where)

    def _split(self, inputs: dict[str, Any]) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        """The processor's output as what has a position per token, `[T, …]`, and the tensors of the images."""
        inputs = {name: inputs[name] for name in inputs if name not in (EXPANSIONS, "offset_mapping")}
        images = {name: value for name, value in inputs.items() if name in self.image_names}
        sequence = {name: value[0] for name, value in inputs.items() if name not in self.image_names}
        tokens = sequence["input_ids"].shape
        wrong = {name for name, value in sequence.items() if value.shape[:1] != tokens}
        assert not wrong, f"{type(self.processor).__name__} gives {wrong} without a position per token"
        return sequence, images

    def placeholder(self, where: str, skipped: Skipped) -> Sample:
        """A sample of one untrained token that takes the place of a row left out, so that batches keep their size."""
        ids = torch.tensor([self.processor.tokenizer.eos_token_id or 0])
        sequence = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.full_like(ids, IGNORED)}
        return Sample(sequence, {}, where, skipped=skipped)


def _blame_text(prepared: Prepared, what: str, advice: str, *, kind: str) -> UserError:
    field = prepared.row.format.text_fields[-1]
    where = f"{prepared.row.where}, field '{field}'"
    return UserError(where=where, problem=what, fix=advice, field=field, kind=kind)


def wrong_number_of_images(row: Row, placeholders: int, images: int) -> UserError:
    fields = [f"'{name}'" for name in (row.format.text_fields[0], row.format.image_field) if name]
    return UserError(
        where=f"{row.where}, field{'s'[: len(fields) - 1]} {' and '.join(fields)}",
        problem=f"the messages have {placeholders} image placeholders, but there are {images} images.",
        fix='Give one {"type": "image"} part for each image.',
        field=row.format.image_field or row.format.text_fields[0],
        kind="wrong number of images",
    )


def _expansions(inputs: dict[str, Any]) -> list[dict]:
    return (inputs.get(EXPANSIONS) or [[]])[0]


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
