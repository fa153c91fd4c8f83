"""The format of a dataset (LLaVA, ShareGPT, prompt and completion, …), and how its rows are read."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from tuning.data.fitting_columns import check_needs_no_image, no_text_column
from tuning.data.images import list_images
from tuning.data.json_files import parse_list
from tuning.data.messages import (
    IMAGE_STRING,
    WEIGHT,
    Conversation,
    Message,
    find_own_image,
    parse_json,
    read_messages,
    strip_nulls,
    take_images,
)
from tuning.errors import UserError, error_field

DEFAULT_TEXT_FIELD, DEFAULT_IMAGE_FIELD = "messages", "images"
PROMPT = "prompt"  # a column of questions without answers, and the name of that format
EXTRA_COLUMNS = ("system", "tools", "chat_template_kwargs", "objects")  # belong to a conversation, in every format


@dataclass(frozen=True)
class RowFormat:
    """The columns of a conversation, and how to read them.

    `text_fields`: one column of messages, or the columns of a prompt and its completion. `image_field`: the column of
    images, or None where the messages contain them. `image_strings`: `<image>` in a question stands for an image.
    `extra_columns`: those of `EXTRA_COLUMNS` that the data has. `keep_nulls`: nulls in calls, tools and variables are
    the user's. Without it, Arrow may have added them.
    """

    text_fields: tuple[str, ...] = (DEFAULT_TEXT_FIELD,)
    image_field: str | None = DEFAULT_IMAGE_FIELD
    image_strings: bool = False
    name: str = "messages"
    extra_columns: tuple[str, ...] = ()
    keep_nulls: bool = False

    @property
    def columns(self) -> list[str]:
        return [*self.text_fields, *([self.image_field] if self.image_field else []), *self.extra_columns]

    @property
    def field_of_images(self) -> str:
        """The column that images come from."""
        return self.image_field or self.text_fields[0]

    def read(self, columns: Mapping[str, Any], where: str, *, needs_answer: bool = True) -> Conversation:
        """The conversation of a row. `needs_answer` refuses one without an answer.

        Raises `UserError` with field, message and part.
        """
        stored = list_images(columns[self.image_field]) if self.image_field else []
        if len(self.text_fields) == 2 or self.name == PROMPT:
            messages = self._read_prompt(columns, stored, where)
        else:
            field = self.text_fields[0]
            value, place = columns[field], f"{where}, field '{field}'"
            if isinstance(value, str):  # a table has only texts
                value = parse_list(value) or value
            with error_field(field):
                messages = read_messages(
                    value,
                    place,
                    image_strings=self.image_strings,
                    needs_answer=needs_answer,
                    keep_nulls=self.keep_nulls,
                )
        extras = {name: columns[name] for name in self.extra_columns if columns.get(name) not in (None, "", [], {})}
        if "system" in extras:
            messages = _add_system_message(messages, extras["system"], f"{where}, field 'system'")
        return Conversation(
            *take_images(messages, stored),
            tools=self._read_json(extras, "tools", list, where),
            template_kwargs=self._read_json(extras, "chat_template_kwargs", dict, where) or {},
            objects=extras.get("objects"),
        )

    def _read_json(self, extras: Mapping[str, Any], field: str, kind: type[list] | type[dict], where: str) -> Any:
        """The list or object in a column, which may be JSON text. None where the row has none."""
        if field not in extras:
            return None
        stored = extras[field]
        value: Any = parse_json(stored if self.keep_nulls else strip_nulls(stored))
        if kind is list and isinstance(value, dict):
            value = [value]
        if not isinstance(value, kind):
            raise UserError(
                where=f"{where}, field '{field}'",
                problem=f"expected a JSON {'list' if kind is list else 'object'}, found {str(value)[:60]!r}.",
                fix="Correct the row.",
                field=field,
                kind=f"malformed {field}",
            )
        return [parse_json(entry) for entry in value] if kind is list else value

    def _read_prompt(self, columns: Mapping[str, Any], stored: list[Any], where: str) -> list[Message]:
        """A prompt and its completion, if it has one, as text or as messages. Only the completion is trained."""
        prompt_field, completion_field = self.text_fields[0], self.text_fields[-1]
        is_pair = completion_field != prompt_field
        prompt = _read_turns(columns[prompt_field], "user", where, prompt_field)
        completion = _read_turns(columns[completion_field], "assistant", where, completion_field) if is_pair else []
        with error_field(completion_field):
            place = f"{where}, field{f's {prompt_field!r} and' if is_pair else ''} '{completion_field}'"
            messages = read_messages(
                [*prompt, *completion],
                place,
                image_strings=self.image_strings,
                needs_answer=is_pair,
                keep_nulls=self.keep_nulls,
            )
        if is_pair and not any(message["role"] == "assistant" for message in messages[len(prompt) :]):
            raise UserError(
                where=f"{where}, field '{completion_field}'",
                problem="the completion has no assistant turn.",
                fix="Add an answer or drop the row.",
                field=completion_field,
                kind="no answer",
            )
        for number, message in enumerate(messages[: len(prompt)]):
            if message["role"] == "assistant":
                messages[number] = {**message, WEIGHT: 0}
        if stored and not any(part["type"] == "image" for message in messages for part in message["content"]):
            first = next((i for i, message in enumerate(messages[: len(prompt)]) if message["role"] != "system"), None)
            if first is None:
                raise UserError(
                    where=f"{where}, field '{prompt_field}'",
                    problem="the prompt has no user message, so there is no place for the images.",
                    fix="Add a user message or drop the row.",
                    field=prompt_field,
                    kind="no question",
                )
            images = [{"type": "image"} for _ in stored]  # where a prompt does not place its images, they come first
            messages[first] = {**messages[first], "content": [*images, *messages[first]["content"]]}
        return messages


def _add_system_message(messages: list[Message], text: Any, where: str) -> list[Message]:
    """The messages after a system message with the text of the column `system`."""
    (message,) = read_messages([{"role": "system", "content": text}], where, needs_answer=False)
    if messages[0]["role"] != "system":
        return [message, *messages]
    if messages[0] != message:
        raise UserError(
            where=where,
            problem="the messages begin with another system message.",
            fix="Keep one of the two.",
            field="system",
            kind="two system messages",
        )
    return messages


def _read_turns(value: Any, role: str, where: str, field: str) -> list[Any]:
    """The messages of a prompt or a completion. Text is one message of `role`."""
    where = f"{where}, field '{field}'"
    if not value:
        raise UserError(
            where=where,
            problem="the field is empty.",
            fix="Fill it in or drop the row.",
            field=field,
            kind="empty content",
        )
    if not isinstance(value, (str, list, tuple)):
        raise UserError(
            where=where,
            problem=f"expected text or messages, found {type(value).__name__} {str(value)[:60]}.",
            fix="Use text or a list of messages.",
            field=field,
            kind="malformed content",
        )
    return [{"role": role, "content": value}] if isinstance(value, str) else list(value)


def detect_format(
    names: Sequence[str],
    first_rows: Sequence[Mapping[str, Any]],
    *,
    text_field: str,
    image_field: str,
    where: str,
    path: str = "",
    more_images: Sequence[str] = (),
    needs_answers: bool = True,
) -> RowFormat:
    """Find the format of a dataset from its columns `names` and its first rows.

    Uses `text_field` and `image_field` where they exist. Where they do not and have their default, uses the columns of
    LLaVA, ShareGPT and prompt/completion files, and `more_images` for images. Rows that need no image need no such
    column. Without `needs_answers`, a prompt needs no completion. Raises `UserError` with the list of columns where
    none fits. It names the command that converts `path`.
    """
    text_fields: tuple[str, ...]
    if text_field in names:
        text_fields, name = (text_field,), "messages"
    elif text_field == DEFAULT_TEXT_FIELD and "conversations" in names:
        text_fields, name = ("conversations",), "conversations"
    elif text_field == DEFAULT_TEXT_FIELD and {"prompt", "completion"} <= set(names):
        text_fields, name = ("prompt", "completion"), "prompt and completion"
    elif text_field == DEFAULT_TEXT_FIELD and PROMPT in names and not needs_answers:
        text_fields, name = (PROMPT,), PROMPT
    else:
        raise no_text_column(names, first_rows, text_field, where=where, path=path or where)
    values = _values_of(text_fields, first_rows)
    if any("from" in message and message["from"] is not None for value in values for message in _messages_of(value)):
        name = "conversations with from and value"
    usual = ("image", *more_images) if image_field == DEFAULT_IMAGE_FIELD else ()
    found = next((field for field in (image_field, *usual) if field in names), None)
    format = RowFormat(text_fields, found, name=name)
    if found is None and not any(_has_own_image(part) for value in values for part in _parts_of(value)):
        check_needs_no_image(names, first_rows, text_fields, image_field, where)
    return _add_details(format, names, first_rows)


def fit_format(
    format: RowFormat,
    names: Sequence[str],
    first_rows: Sequence[Mapping[str, Any]],
    *,
    where: str,
    more_images: Sequence[str] = (),
) -> RowFormat:
    """A format that the user described, for a file with the columns `names`.

    Without a column of images, takes a usual one. Raises `UserError` where a column is missing.
    """
    usual = (DEFAULT_IMAGE_FIELD, "image", *more_images)
    image_field = format.image_field or next((field for field in usual if field in names), None)
    format = replace(format, image_field=image_field)
    for field in format.columns:
        if field not in names:
            raise UserError(
                where=where,
                problem=f"there is no column '{field}', only: {', '.join(names)}.",
                fix="Name another column.",
            )
    return _add_details(format, names, first_rows)


def _add_details(format: RowFormat, names: Sequence[str], first_rows: Sequence[Mapping[str, Any]]) -> RowFormat:
    """The format with the further columns that belong to a conversation, and what `<image>` means in it."""
    extras = tuple(name for name in EXTRA_COLUMNS if name in names and name not in format.columns)
    return replace(format, image_strings=_uses_image_strings(format, first_rows), extra_columns=extras)


def describe_format(format: RowFormat, text_field: str, image_field: str) -> str | None:
    """One sentence about a detected format. None for messages and images in the columns that the options name."""
    if replace(format, extra_columns=(), keep_nulls=False) == RowFormat((text_field,), image_field):
        return None
    images = f"images in '{format.image_field}'" if format.image_field else "images inside the messages, if any"
    strings = f", {IMAGE_STRING} in the text marks their places" if format.image_strings else ""
    fields = " and ".join(f"'{field}'" for field in format.text_fields)
    return f"{format.name} in {fields}, {images}{strings}."


def _values_of(text_fields: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> list[Any]:
    values = [row[field] for row in rows for field in text_fields]
    return [parse_list(value) or value for value in values] if len(text_fields) == 1 else values


def _messages_of(value: Any) -> Iterable[Message]:
    return [message for message in value if isinstance(message, dict)] if isinstance(value, (list, tuple)) else []


def _parts_of(value: Any) -> Iterable[dict]:
    for message in _messages_of(value):
        content = message.get("content")
        yield from (part for part in content if isinstance(part, dict)) if isinstance(content, (list, tuple)) else ()


def _has_own_image(part: dict) -> bool:
    return part.get("type") in ("image", "image_url") and find_own_image(part) is not None


def _uses_image_strings(format: RowFormat, first_rows: Sequence[Mapping[str, Any]]) -> bool:
    """Whether `<image>` marks images.

    It does in LLaVA's format, and where no row has an image part and most rows have as many marks as images.
    """
    if format.name.startswith("conversations with"):
        return True
    fitting = 0
    for row in first_rows:
        values = _values_of(format.text_fields, [row])
        if any(part.get("type") in ("image", "image_url") for value in values for part in _parts_of(value)):
            return False
        stored = len(list_images(row[format.image_field])) if format.image_field else 0
        if stored:
            fitting += 1 if sum(str(value).count(IMAGE_STRING) for value in values) == stored else -1
    return fitting > 0
