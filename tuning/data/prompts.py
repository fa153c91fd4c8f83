"""A row → its question: the prompt that asks for its last answer, and that answer."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from tuning.data.collator import Collator
from tuning.data.encode import Encoder, Sample
from tuning.data.grounding import BOX_MARK, BoxOnImage
from tuning.data.messages import Conversation, Message, count_images
from tuning.data.sources import Row
from tuning.errors import UserError

ANY_BOX = "[0, 0, 0, 0]"


@dataclass(frozen=True)
class Question:
    """A question to a model: the row `number` of `file`.

    `text`: the user's last words. `prompt`: all text that the model reads, with a placeholder for each image.
    `reference`: the row's own answer, if it has one. `references`: all right answers. `boxes`: those of the row.
    """

    file: str
    number: int
    text: str
    prompt: str
    reference: str | None
    references: list[str]
    sample: Sample
    boxes: Sequence[BoxOnImage] = ()


def ask(row: Row, encoder: Encoder) -> Question:
    """The question before the last answer of a row, or the row's last message where it has no answer.

    The prompt ends with the template's generation prompt, as a server writes it. Raises `UserError` with file, row and
    field.
    """
    grounded = encoder.ground(row, row.format.read(row.columns, row.where, needs_answer=False))
    whole = grounded.conversation
    _, reference = split_answer([encoder.chat.escaper.as_decoded(whole.messages[-1])])
    asked = without_answer(whole)
    prepared = encoder.prepare_conversation(row, asked, prompt=True)
    sample = encoder.encode_untrained(prepared)
    return Question(
        row.file,
        row.number,
        text=last_words(asked.messages),
        prompt=encoder.chat.escaper.unescape_text(prepared.chat.text),
        reference=reference,
        references=[] if reference is None else [reference],
        sample=sample,
        boxes=grounded.boxes,
    )


def split_answer(messages: list[Message]) -> tuple[list[Message], str | None]:
    """The messages before the last answer, and its text. Where no answer comes last, all messages and None."""
    if messages[-1]["role"] != "assistant":
        return messages, None
    return messages[:-1], "\n".join(part["text"] for part in messages[-1]["content"] if part["type"] == "text")


def without_answer(conversation: Conversation) -> Conversation:
    """The conversation before its last answer, with the images of these messages."""
    asked, _ = split_answer(conversation.messages)
    answered = count_images(conversation.messages[len(asked) :])
    return replace(conversation, messages=asked, images=conversation.images[: len(conversation.images) - answered])


def last_words(messages: Sequence[Message]) -> str:
    """The text of the last message."""
    return "\n".join(part["text"] for message in messages[-1:] for part in message["content"] if part["type"] == "text")


def join_on_the_right(samples: Sequence[Sample], collator: Collator) -> dict[str, Any]:
    """A batch for generation. Shorter prompts are padded on the left, so that all end at the same place."""
    turned = [
        replace(sample, sequence={name: value.flip(0) for name, value in sample.sequence.items()}) for sample in samples
    ]
    batch = replace(collator, padding_free=False).join(turned)
    del batch["labels"]
    names = [name for name in batch if name in samples[0].sequence]
    return batch | {name: batch[name].flip(1) for name in names}


def ask_or_error(row: Row, encoder: Encoder) -> Question | UserError:
    """As `ask`, but returns the error of a bad row. See `encode_row`."""
    try:
        return ask(row, encoder)
    except UserError as error:
        return error


def read_references(value: Any) -> list[str]:
    """The right answers in a column: one text, a list of texts, or VQA's list of objects with an `answer`."""
    values = value if isinstance(value, (list, tuple)) else [value]
    found = [entry.get("answer") if isinstance(entry, dict) else entry for entry in values]
    return [str(entry) for entry in found if entry is not None]


def right_answers(rows: Iterable[Row], references_field: str | None = None) -> Iterator[tuple[str, str]]:
    """Each right answer with its row's place, from a column or from the messages. Skips rows that cannot be read.

    An answer with marks of boxes has `ANY_BOX` for each.
    """
    for row in rows:
        if references_field:
            answers: list[str | None] = [*read_references(row.columns[references_field])]
        else:
            try:
                conversation = row.format.read(row.columns, row.where, needs_answer=False)
            except UserError:  # `ask` reports it
                continue
            answer = split_answer(conversation.messages)[1]
            if answer and conversation.objects is not None:  # without a model, its boxes cannot be written
                answer = answer.replace(BOX_MARK, ANY_BOX)
            answers = [answer]
        yield from ((row.where, answer) for answer in answers if answer is not None)
