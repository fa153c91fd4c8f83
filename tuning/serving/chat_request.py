"""A conversation → the body of a request to `/chat/completions`, in the form of OpenAI's API."""

import itertools
import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from tuning.data.images import ImageRules, encode_image
from tuning.data.messages import CALLS, WEIGHT, Conversation, Message
from tuning.data.sources import Row
from tuning.errors import error_field

TEMPLATE_KWARGS = "chat_template_kwargs"
CALL_ID = "tool_call_id"


def make_body(
    conversation: Conversation, row: Row, rules: ImageRules, template_kwargs: Mapping[str, Any]
) -> dict[str, Any]:
    """The fields that a row determines: `messages` with its images inside, and `tools` where it has some.

    `template_kwargs`: variables for the chat template, under those of the row. Without any, no field is added for them:
    OpenAI's API has none. Raises `UserError` for an image that cannot be used.
    """
    field = row.format.field_of_images
    with error_field(field):
        urls = [
            encode_image(image, row.folder, f"{row.where}, field '{field}', image {number}", rules)
            for number, image in enumerate(conversation.images)
        ]
    body: dict[str, Any] = {"messages": write_messages(conversation.messages, urls)}
    if conversation.tools:
        body["tools"] = [
            tool if "function" in tool else {"type": "function", "function": tool} for tool in conversation.tools
        ]
    kwargs = {**template_kwargs, **conversation.template_kwargs}
    return body | ({TEMPLATE_KWARGS: kwargs} if kwargs else {})


def write_messages(messages: list[Message], urls: list[str]) -> list[dict[str, Any]]:
    """The messages with an image URL in each image part. Every call has an id, and every result names one."""
    left, open_calls, numbers = iter(urls), list[str](), itertools.count(1)
    written = []
    for message in messages:
        keys = {name: value for name, value in message.items() if name not in (WEIGHT, "content")}
        if CALLS in message:
            keys[CALLS] = [_write_call(call, lambda: f"call{next(numbers):05}") for call in message[CALLS]]
            open_calls = [call["id"] for call in keys[CALLS]]
        if message["role"] == "tool" and CALL_ID not in keys and open_calls:
            keys[CALL_ID] = open_calls.pop(0)
        written.append({"role": keys.pop("role"), "content": _write_content(message, left), **keys})
    return written


def _write_content(message: Message, urls: Iterator[str]) -> Any:
    """Parts in their order; a single text as a string, which every server takes; None for calls alone."""
    parts = [
        {"type": "text", "text": part["text"]}
        if part["type"] == "text"
        else {"type": "image_url", "image_url": {"url": next(urls)}}
        for part in message["content"]
    ]
    if len(parts) == 1 and parts[0]["type"] == "text":
        return parts[0]["text"]
    return parts or None


def _write_call(call: dict[str, Any], new_id: Callable[[], str]) -> dict[str, Any]:
    function = call["function"]
    arguments = function["arguments"]
    text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
    return {"id": call.get("id") or new_id(), "type": "function", "function": {**function, "arguments": text}}
