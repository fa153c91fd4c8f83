"""Which of the forms people keep chat data in a dataset has, and how its rows are read."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from tuning.data.images import list_images
from tuning.data.messages import IMAGE_STRING, Conversation, Message, find_source, read_messages, take_images
from tuning.errors import UserError, error_field

DEFAULT_TEXT_FIELD, DEFAULT_IMAGE_FIELD = "messages", "images"


@dataclass(frozen=True)
class RowFormat:
    """How rows hold their conversation.

    `text_fields`: one column of messages, or a prompt's and its completion's. `image_field`: the column of images, or
    None where messages bring their own. `image_strings`: `<image>` within text stands for an image.
    """

    text_fields: tuple[str, ...] = (DEFAULT_TEXT_FIELD,)
    image_field: str | None = DEFAULT_IMAGE_FIELD
    image_strings: bool = False
    name: str = "messages"

    @property
    def columns(self) -> list[str]:
        return [*self.text_fields, *([self.image_field] if self.image_field else [])]

    def read(self, columns: Mapping[str, Any], where: str, *, needs_answer: bool = True) -> Conversation:
        """The conversation of a row; with `needs_answer`, one without an answer cannot be used.

        Raises `UserError` naming field, message and part of what is wrong.
        """
        stored = list_images(columns[self.image_field]) if self.image_field else []
        if len(self.text_fields) == 2:
            return self._read_pair(columns, stored, where)
        field = self.text_fields[0]
        with error_field(field):
            messages = read_messages(
                columns[field],
                f"{where}, field '{field}'",
                image_strings=self.image_strings,
                needs_answer=needs_answer,
            )
        return Conversation(*take_images(messages, stored))

    def _read_pair(self, columns: Mapping[str, Any], stored: list[Any], where: str) -> Conversation:
        """A prompt and its completion, as text or as messages; only the completion is trained."""
        values = []
        for field, role in zip(self.text_fields, ("user", "assistant"), strict=True):
            value = columns[field]
            place = f"{where}, field '{field}'"
            with error_field(field):
                if value and not isinstance(value, (str, list, tuple)):
                    found = f"{type(value).__name__} {str(value)[:60]}"
                    raise UserError(
                        where=place, problem=f"expected text or messages, found {found}.", kind="malformed content"
                    )
                if not value:
                    raise UserError(
                        where=place, problem="is empty.", fix="Fill it in or drop the row.", kind="empty content"
                    )
            values.append([{"role": role, "content": value}] if isinstance(value, str) else list(value))
        prompt, completion = values
        with error_field(self.text_fields[1]):
            place = f"{where}, fields '{self.text_fields[0]}' and '{self.text_fields[1]}'"
            messages = read_messages([*prompt, *completion], place, image_strings=self.image_strings)
            if not any(message["role"] == "assistant" for message in messages[len(prompt) :]):
                place = f"{where}, field '{self.text_fields[1]}'"
                raise UserError(
                    where=place,
                    problem="has no assistant turn.",
                    fix="Add an answer or drop the row.",
                    kind="no answer",
                )
        if stored and not any(part["type"] == "image" for message in messages for part in message["content"]):
            first = next((i for i, message in enumerate(messages[: len(prompt)]) if message["role"] != "system"), None)
            if first is None:
                with error_field(self.text_fields[0]):
                    place = f"{where}, field '{self.text_fields[0]}'"
                    raise UserError(
                        where=place, problem="has no user message for the images to be in.", kind="no question"
                    )
            images = [{"type": "image"} for _ in stored]  # a prompt that does not place its images has them first
            messages[first] = {**messages[first], "content": [*images, *messages[first]["content"]]}
        return Conversation(*take_images(messages, stored), trained_from=len(prompt))


def detect_format(
    names: Sequence[str], first_rows: Sequence[Mapping[str, Any]], *, text_field: str, image_field: str, where: str
) -> RowFormat:
    """The form of a dataset, from its columns `names` and its first rows.

    `text_field` and `image_field` are taken where they exist; else, unless the user named others, the columns that
    LLaVA, ShareGPT and prompt/completion files have. Raises `UserError` listing the columns where none fits.
    """
    text_fields, name = _find_text_fields(names, text_field, where)
    values = [row[field] for row in first_rows for field in text_fields]
    if any("from" in message and message["from"] is not None for value in values for message in _messages_of(value)):
        name = "conversations with from and value"
    format = RowFormat(text_fields, None, name=name)
    if image_field in names:
        format = replace(format, image_field=image_field)
    elif image_field == DEFAULT_IMAGE_FIELD and "image" in names:
        format = replace(format, image_field="image")
    elif not any(_brings_image(part) for value in values for part in _parts_of(value)):
        raise _missing("dataset_image_field", image_field, names, where)
    return replace(format, image_strings=_uses_image_strings(format, first_rows))


def _find_text_fields(names: Sequence[str], text_field: str, where: str) -> tuple[tuple[str, ...], str]:
    if text_field in names:
        return (text_field,), "messages"
    if text_field == DEFAULT_TEXT_FIELD and "conversations" in names:
        return ("conversations",), "conversations"
    if text_field == DEFAULT_TEXT_FIELD and {"prompt", "completion"} <= set(names):
        return ("prompt", "completion"), "prompt and completion"
    raise _missing("dataset_text_field", text_field, names, where)


def _missing(option: str, field: str, names: Sequence[str], where: str) -> UserError:
    return UserError(where=where, problem=f"has no column '{field}'; it has: {', '.join(names)}.", fix=f"Set {option}.")


def describe_format(format: RowFormat, text_field: str, image_field: str) -> str | None:
    """One sentence on a form that was detected; None for the documented one under the names that were given."""
    if format == RowFormat((text_field,), image_field):
        return None
    images = f"images in '{format.image_field}'" if format.image_field else "images inside the messages"
    strings = f", {IMAGE_STRING} in the text marks their places" if format.image_strings else ""
    fields = " and ".join(f"'{field}'" for field in format.text_fields)
    return f"{format.name} in {fields}, {images}{strings}."


def _messages_of(value: Any) -> Iterable[Message]:
    return [message for message in value if isinstance(message, dict)] if isinstance(value, (list, tuple)) else []


def _parts_of(value: Any) -> Iterable[dict]:
    for message in _messages_of(value):
        content = message.get("content")
        yield from (part for part in content if isinstance(part, dict)) if isinstance(content, (list, tuple)) else ()


def _brings_image(part: dict) -> bool:
    return part.get("type") in ("image", "image_url") and find_source(part) is not None


def _uses_image_strings(format: RowFormat, first_rows: Sequence[Mapping[str, Any]]) -> bool:
    """Whether `<image>` marks images: LLaVA's form, or most rows have as many as images, and none an image part."""
    if format.name.startswith("conversations with"):
        return True
    fitting = 0
    for row in first_rows:
        values = [row[field] for field in format.text_fields]
        if any(part.get("type") in ("image", "image_url") for value in values for part in _parts_of(value)):
            return False
        stored = len(list_images(row[format.image_field])) if format.image_field else 0
        if stored:
            fitting += 1 if sum(str(value).count(IMAGE_STRING) for value in values) == stored else -1
    return fitting > 0
