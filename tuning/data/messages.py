"""The text of a row → checked messages in one shape, and their images."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tuning.errors import UserError

ROLES = ("system", "user", "assistant")
ROLES_OF_FROM = {"human": "user", "gpt": "assistant", "model": "assistant", "bot": "assistant", "chatgpt": "assistant"}
IMAGE_STRING = "<image>"  # LLaVA's files mark an image in a text like this, whatever the model's own token is
IMAGE_KEYS = ("image", "path", "url", "base64", "image_url")

Message = dict[str, Any]
"""`{"role": …, "content": [{"type": "text", "text": …} | {"type": "image"}, …]}`"""


@dataclass(frozen=True)
class Conversation:
    """Messages in one shape, and the stored images of their image parts, in order.

    `trained_from`: the number of the first message that may be trained. Answers before it are context.
    """

    messages: list[Message]
    images: list[Any]
    trained_from: int = 0


def read_messages(value: Any, where: str, *, image_strings: bool = False, needs_answer: bool = True) -> list[Message]:
    """Check the messages of a row and give each a list of parts as its content.

    Takes `role` and `content`, or `from` and `value` (LLaVA, ShareGPT). Drops the empty values that Arrow adds, and
    unknown keys of a part. An image part that contains its image keeps it under `stored`. With `image_strings`,
    `<image>` in a text becomes an image part. Raises `UserError` with message and part for an unknown role or part
    type, missing text, an empty answer, or, with `needs_answer`, a conversation without an assistant turn.
    """
    if not isinstance(value, (list, tuple)) or not value:
        raise UserError(
            where=where,
            problem=f"expected a list of messages, found {_brief(value)}.",
            fix="Give a list of messages or drop the row.",
            kind="no messages",
        )
    messages = [
        _read_message(message, f"{where}, message {index}", image_strings) for index, message in enumerate(value)
    ]
    if needs_answer and not any(message["role"] == "assistant" for message in messages):
        raise UserError(
            where=where,
            problem="the conversation has no assistant turn, so there is nothing to train.",
            fix="Add an answer or drop the row.",
            kind="no answer",
        )
    return messages


def _read_message(message: Any, where: str, image_strings: bool) -> Message:
    if not isinstance(message, dict):
        raise UserError(
            where=where,
            problem=f"expected an object with role and content, found {_brief(message)}.",
            fix="Give every message a role and content.",
            kind="malformed message",
        )
    role, content = message.get("role"), message.get("content")
    if (speaker := message.get("from")) is not None:
        role = ROLES_OF_FROM.get(speaker, speaker) if isinstance(speaker, str) else speaker
        content = message.get("value")
    if role not in ROLES:
        raise UserError(
            where=where, problem=f"unknown role {role!r}.", fix=f"Use one of {', '.join(ROLES)}.", kind="unknown role"
        )
    if isinstance(content, str):
        content = [{"type": "text", "text": content}]
    if not isinstance(content, (list, tuple)):
        raise UserError(
            where=where,
            problem=f"content must be text or a list of parts, found {_brief(content)}.",
            fix="Use text or a list of parts.",
            kind="malformed content",
        )
    parts = [_read_part(part, f"{where}, part {index}") for index, part in enumerate(content)]
    if image_strings:
        parts = [piece for part in parts for piece in split_image_strings(part)]
    if role == "assistant" and not "".join(part.get("text", "") for part in parts).strip():
        raise UserError(
            where=where,
            problem="the assistant's answer is empty.",
            fix="Fill it in or drop the row.",
            kind="empty answer",
        )
    if not parts:
        raise UserError(
            where=where, problem="the content is empty.", fix="Fill it in or drop the row.", kind="empty content"
        )
    return {"role": role, "content": parts}


def _read_part(part: Any, where: str) -> dict[str, Any]:
    if not isinstance(part, dict):
        raise UserError(
            where=where,
            problem=f"expected an object with a type, found {_brief(part)}.",
            fix="Give every part a type.",
            kind="malformed part",
        )
    kind = part.get("type")
    if kind in ("image", "image_url"):
        stored = find_own_image(part)
        if kind == "image_url" and stored is None:
            raise UserError(
                where=where,
                problem=f"an image_url part needs image_url, found {_brief(part.get('image_url'))}.",
                fix="Give it an address, or use a part of type image.",
                kind="malformed part",
            )
        return {"type": "image"} if stored is None else {"type": "image", "stored": stored}
    if kind != "text":
        raise UserError(
            where=where,
            problem=f"unknown part type {kind!r}.",
            fix="Use one of text, image, image_url.",
            kind="unknown part type",
        )
    if not isinstance(part.get("text"), str):
        raise UserError(
            where=where,
            problem=f"a text part needs text, found {_brief(part.get('text'))}.",
            fix="Give it text.",
            kind="malformed part",
        )
    return {"type": "text", "text": part["text"]}


def find_own_image(part: dict) -> Any:
    """The image that an image part contains, as `load_image` takes it. None where it contains none."""
    for key in IMAGE_KEYS:
        stored = part.get(key)
        if key == "image_url" and isinstance(stored, dict):
            stored = stored.get("url")
        if stored in (None, "", b"") or (isinstance(stored, dict) and not any(stored.values())):
            continue
        is_bare = key == "base64" and isinstance(stored, str) and not stored.startswith("data:")
        return f"data:;base64,{stored}" if is_bare else stored
    return None


def split_image_strings(part: dict[str, Any]) -> list[dict[str, Any]]:
    """Split a text part at each `<image>` into text and image parts. One line break next to each mark is removed."""
    if part["type"] != "text" or IMAGE_STRING not in part["text"]:
        return [part]
    first, *others = part["text"].split(IMAGE_STRING)
    parts: list[dict[str, Any]] = [{"type": "text", "text": first}]
    for text in others:
        if not text.startswith("\n"):
            parts[-1] = {**parts[-1], "text": parts[-1]["text"].removesuffix("\n")}
        parts += [{"type": "image"}, {"type": "text", "text": text.removeprefix("\n")}]
    return [part for part in parts if part.get("text") != ""]


def take_images(messages: list[Message], stored: Sequence[Any]) -> tuple[list[Message], list[Any]]:
    """Match image parts with images: the part's own, or the next of `stored`, the row's image column.

    Returns the messages without images, and the images in the order of their parts. Images of the column that are left
    over come last, so that there are more images than parts.
    """
    column, images = iter(stored), list[Any]()
    bare = []
    for message in messages:
        for part in message["content"]:
            if part["type"] == "image":
                images += [part["stored"]] if "stored" in part else itertools.islice(column, 1)
        bare.append({**message, "content": [{k: v for k, v in p.items() if k != "stored"} for p in message["content"]]})
    return bare, [*images, *column]


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
