"""The text column of a row → checked messages in one canonical shape."""

from typing import Any

from tuning.errors import UserError

ROLES = ("system", "user", "assistant")
PART_TYPES = ("text", "image")

Message = dict[str, Any]
"""`{"role": …, "content": [{"type": "text", "text": …} | {"type": "image"}, …]}`"""


def read_messages(value: Any, where: str) -> list[Message]:
    """Check the messages of a row and give each a list of parts as its content.

    Empty values that Arrow adds and unknown keys of a part are dropped. Raises `UserError` naming message and part
    for an unknown role or part type, missing text, an empty answer, or a conversation without an assistant turn.
    """
    if not isinstance(value, (list, tuple)) or not value:
        raise UserError(f"expected a list of messages, found {_brief(value)}.", where)
    messages = [_read_message(message, f"{where}, message {index}") for index, message in enumerate(value)]
    if not any(message["role"] == "assistant" for message in messages):
        raise UserError("has no assistant turn, so there is nothing to train.", where, "Add an answer or drop the row.")
    return messages


def _read_message(message: Any, where: str) -> Message:
    if not isinstance(message, dict):
        raise UserError(f"expected an object with role and content, found {_brief(message)}.", where)
    role, content = message.get("role"), message.get("content")
    if role not in ROLES:
        raise UserError(f"unknown role {role!r}.", where, f"Use one of {', '.join(ROLES)}.")
    if isinstance(content, str):
        content = [{"type": "text", "text": content}]
    if not isinstance(content, (list, tuple)):
        raise UserError(f"content must be text or a list of parts, found {_brief(content)}.", where)
    parts = [_read_part(part, f"{where}, part {index}") for index, part in enumerate(content)]
    if role == "assistant" and not "".join(part.get("text", "") for part in parts).strip():
        raise UserError("the assistant's answer is empty.", where, "Fill it in or drop the row.")
    if not parts:
        raise UserError("content is empty.", where)
    return {"role": role, "content": parts}


def _read_part(part: Any, where: str) -> dict[str, str]:
    if not isinstance(part, dict):
        raise UserError(f"expected an object with a type, found {_brief(part)}.", where)
    kind = part.get("type")
    if kind not in PART_TYPES:
        raise UserError(f"unknown part type {kind!r}.", where, f"Use one of {', '.join(PART_TYPES)}.")
    if kind == "image":
        return {"type": "image"}
    if not isinstance(part.get("text"), str):
        raise UserError(f"a text part needs text, found {_brief(part.get('text'))}.", where)
    return {"type": "text", "text": part["text"]}


def count_images(messages: list[Message]) -> int:
    """The number of image parts."""
    return sum(part["type"] == "image" for message in messages for part in message["content"])


def keep_first_images(messages: list[Message], limit: int) -> list[Message]:
    """The same messages with only the first `limit` image parts."""
    kept, shortened = 0, []
    for message in messages:
        parts = []
        for part in message["content"]:
            kept += part["type"] == "image"
            if part["type"] != "image" or kept <= limit:
                parts.append(part)
        shortened.append({**message, "content": parts})
    return shortened


def _brief(value: Any) -> str:
    text = repr(value)
    return f"{type(value).__name__} {text[:60]}{'…' if len(text) > 60 else ''}"
