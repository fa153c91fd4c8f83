"""A row → its question to a server: without a processor, which only the server has."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from tuning.config.box_formats import BOX_FORMATS
from tuning.config.options import RowArguments
from tuning.data import row_errors
from tuning.data.from_config import image_rules
from tuning.data.grounding import FIELD, BoxOnImage, Grounded, Size, ground_row
from tuning.data.messages import Conversation, count_images, keep_first_images
from tuning.data.prompts import last_words, split_answer, without_answer
from tuning.data.sources import Row
from tuning.errors import UserError
from tuning.serving.chat_request import make_body


@dataclass(frozen=True)
class ServedQuestion:
    """The `body` of a request, and what the output says of its row: see `Question`."""

    text: str
    reference: str | None
    references: list[str]
    boxes: Sequence[BoxOnImage]
    body: dict[str, Any]


def template_kwargs_of(options: Any) -> dict[str, Any]:
    """Variables for a server's chat template. The date is only sent where it is set: a server has its own.

    `options`: a command's, with those of `RowArguments` and `ModelSource`.
    """
    return ({"date_string": options.date_string} if options.date_string else {}) | options.chat_template_kwargs


def ask_server(row: Row, options: RowArguments, template_kwargs: Mapping[str, Any]) -> ServedQuestion:
    """The question before the last answer of a row, as `ask` takes it. Raises `UserError` with file, row and field."""
    whole = _ground(row, options)
    asked = limit_images(row, without_answer(whole.conversation), options.max_images_per_sample)
    if len(asked.messages) > options.max_messages_per_row:
        raise row_errors.too_many_messages(row, len(asked.messages), options.max_messages_per_row)
    _, reference = split_answer(whole.conversation.messages)
    references = [] if reference is None else [reference]
    body = make_body(asked, row, image_rules(options), template_kwargs)
    return ServedQuestion(last_words(asked.messages), reference, references, whole.boxes, body)


def limit_images(row: Row, conversation: Conversation, limit: int | None) -> Conversation:
    """The conversation with its first `limit` images. Raises `UserError` where images and their places differ."""
    messages, images = conversation.messages, conversation.images
    if count_images(messages) != len(images):
        raise row_errors.wrong_number_of_images(row, count_images(messages), len(images))
    if limit is None or len(images) <= limit:
        return conversation
    return replace(conversation, messages=keep_first_images(messages, limit), images=images[:limit])


def _ground(row: Row, options: RowArguments) -> Grounded:
    """The conversation of a row, with its boxes written as `bbox_format` says."""
    conversation = row.format.read(row.columns, row.where, needs_answer=False)
    if FIELD not in row.format.extra_columns:
        return Grounded(conversation)
    return ground_row(
        row,
        conversation,
        BOX_FORMATS[options.bbox_format] if options.bbox_format else None,
        _refuse_resizing,
        rules=image_rules(options),
        max_images=options.max_images_per_sample,
    )


def _refuse_resizing(size: Size, where: str) -> Size:
    raise UserError(
        where=where,
        problem="a box in resized pixels needs the model's image processor, which only the server has.",
        fix="Let the model answer here, with model_name_or_path.",
        field=FIELD,
        kind="box in resized pixels",
    )
