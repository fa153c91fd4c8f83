"""A row → the question it asks: the prompt that training puts before the row's last answer, and that answer."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from tuning.data.collator import Collator
from tuning.data.encode import Encoder, Sample
from tuning.data.messages import Conversation, Message, count_images
from tuning.data.sources import Row
from tuning.errors import UserError, error_field

STAND_IN = {"role": "assistant", "content": [{"type": "text", "text": "Yes."}]}  # is cut off again


@dataclass(frozen=True)
class Question:
    """What a model is asked: a row of `file`, its `number` there.

    `text`: the user's last words; `prompt`: all that the model reads, each image as its placeholder. `reference`: the
    row's own answer, None where it has none. `references`: all right answers.
    """

    file: str
    number: int
    text: str
    prompt: str
    reference: str | None
    references: list[str]
    sample: Sample


def ask(row: Row, encoder: Encoder) -> Question:
    """The question to the last answer of a row, or to the answer that its last message waits for.

    The prompt is the text that training has before that answer: rendered as training renders it and cut there. Raises
    `UserError` naming file, row and field.
    """
    whole = row.format.read(row.columns, row.where, needs_answer=False)
    asked, reference = split_answer(whole.messages)
    images = whole.images[: len(whole.images) - count_images(whole.messages[len(asked) :])]
    prepared = encoder.prepare_conversation(row, Conversation([*asked, STAND_IN], images))
    text = prepared.chat.text[: prepared.chat.spans[-1][0]]
    prepared = replace(prepared, chat=replace(prepared.chat, text=text))
    with error_field(row.format.image_field or row.format.text_fields[0]):
        sample = encoder.encode_untrained(prepared)
    words = [part["text"] for message in asked[-1:] for part in message["content"] if part["type"] == "text"]
    return Question(
        row.file,
        row.number,
        text="\n".join(words),
        prompt=encoder.chat.escaper.unescape_text(text),
        reference=reference,
        references=[] if reference is None else [reference],
        sample=sample,
    )


def split_answer(messages: list[Message]) -> tuple[list[Message], str | None]:
    """The messages before the last answer, and its text; all of them and None where they wait for an answer."""
    if messages[-1]["role"] != "assistant":
        return messages, None
    return messages[:-1], "\n".join(part["text"] for part in messages[-1]["content"] if part["type"] == "text")


def join_on_the_right(samples: Sequence[Sample], collator: Collator) -> dict[str, Any]:
    """A batch for generation: all prompts end at the same place, so shorter ones are padded on the left."""
    turned = [
        replace(sample, sequence={name: value.flip(0) for name, value in sample.sequence.items()}) for sample in samples
    ]
    batch = replace(collator, padding_free=False).join(turned)
    del batch["labels"]
    names = [name for name in batch if name in samples[0].sequence]
    return batch | {name: batch[name].flip(1) for name in names}


def ask_or_error(row: Row, encoder: Encoder) -> Question | UserError:
    """As `ask`; a bad row is returned as its error. See `encode_row`."""
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
    """Every right answer, in a column or in the messages, after its row's place. Rows that cannot be read have none."""
    for row in rows:
        if references_field:
            answers: list[str | None] = [*read_references(row.columns[references_field])]
        else:
            try:
                messages = row.format.read(row.columns, row.where, needs_answer=False).messages
            except UserError:  # is told where the row is asked
                continue
            answers = [split_answer(messages)[1]]
        yield from ((row.where, answer) for answer in answers if answer is not None)
