"""The text of a row → checked messages in one shape, and their images."""

import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from tuning.errors import UserError

ROLES = ("system", "user", "assistant", "tool")
ROLES_OF_FROM = {
    **{"human": "user", "gpt": "assistant", "model": "assistant", "bot": "assistant", "chatgpt": "assistant"},
    **{"function_call": "assistant", "observation": "tool"},  # ShareGPT: a call as JSON text, and its result
}
IMAGE_STRING = "<image>"  # LLaVA's files mark an image in a text like this, whatever the model's own token is
IMAGE_KEYS = ("image", "path", "url", "base64", "image_url")
THOUGHT, CALLS, WEIGHT = "reasoning_content", "tool_calls", "weight"
THOUGHT_KEYS = (THOUGHT, "reasoning", "thinking")
WEIGHT_KEYS = (WEIGHT, "loss", "train")
PLAIN_KEYS = {"role", "content", "from", "value"}
READ_KEYS = {*PLAIN_KEYS, CALLS, *THOUGHT_KEYS, *WEIGHT_KEYS}

Message = dict[str, Any]
"""`{"role": …, "content": [{"type": "text", "text": …} | {"type": "image"}, …]}`, and further keys.

`weight` 0: the answer is context and is not trained. `reasoning_content`: the thought before the answer. `tool_calls`:
`[{"type": "function", "function": {"name": …, "arguments": {…}}}, …]`. Other keys are for the chat template.
"""


@dataclass(frozen=True)
class Conversation:
    """Messages in one shape, and the stored images of their image parts, in order.

    `tools`: JSON schemas of the functions that the assistant may call. `template_kwargs`: variables for the chat
    template. `objects`: the boxes of the images, as they are stored.
    """

    messages: list[Message]
    images: list[Any] = field(default_factory=list)
    tools: list[Any] | None = None
    template_kwargs: dict[str, Any] = field(default_factory=dict)
    objects: Any = None


def read_messages(
    value: Any, where: str, *, image_strings: bool = False, needs_answer: bool = True, keep_nulls: bool = False
) -> list[Message]:
    """Check the messages of a row and give each a list of parts as its content.

    Takes `role` and `content`, or `from` and `value` (LLaVA, ShareGPT). Drops the nulls that Arrow adds (`keep_nulls`:
    not those in calls), and unknown keys of a part. An image part that contains its image keeps it under `stored`. With
    `image_strings`,
    `<image>` in a user's text becomes an image part. Raises `UserError` with message and part for an unknown role or
    part type, missing text, an empty answer, or, with `needs_answer`, a conversation without an assistant turn.
    """
    if not isinstance(value, (list, tuple)) or not value:
        raise UserError(
            where=where,
            problem=f"expected a list of messages, found {_brief(value)}.",
            fix="Give a list of messages or drop the row.",
            kind="no messages",
        )
    messages = [
        _read_message(message, f"{where}, message {index}", image_strings, keep_nulls)
        for index, message in enumerate(value)
    ]
    if needs_answer and not any(message["role"] == "assistant" for message in messages):
        raise UserError(
            where=where,
            problem="the conversation has no assistant turn, so there is nothing to train.",
            fix="Add an answer or drop the row.",
            kind="no answer",
        )
    return messages


def _read_message(message: Any, where: str, image_strings: bool, keep_nulls: bool) -> Message:
    if not isinstance(message, dict):
        raise UserError(
            where=where,
            problem=f"expected an object with role and content, found {_brief(message)}.",
            fix="Give every message a role and content.",
            kind="malformed message",
        )
    role, content, calls = message.get("role"), message.get("content"), message.get(CALLS)
    if (speaker := message.get("from")) is not None:
        role = ROLES_OF_FROM.get(speaker, speaker) if isinstance(speaker, str) else speaker
        content = message.get("value")
        if speaker == "function_call":
            content, calls = None, content
    if role not in ROLES:
        raise UserError(
            where=where, problem=f"unknown role {role!r}.", fix=f"Use one of {', '.join(ROLES)}.", kind="unknown role"
        )
    keys = _read_keys(message, role, where)
    if calls:
        keys[CALLS] = _read_calls(calls if keep_nulls else strip_nulls(calls), where)
    parts = [] if calls and not content else _read_content(content, where)
    if image_strings and role == "user":
        parts = [piece for part in parts for piece in split_image_strings(part)]
    if role == "assistant" and not calls and not "".join(part.get("text", "") for part in parts).strip():
        raise UserError(
            where=where,
            problem="the assistant's answer is empty.",
            fix="Fill it in or drop the row.",
            kind="empty answer",
        )
    if not parts and not calls:
        raise UserError(
            where=where, problem="the content is empty.", fix="Fill it in or drop the row.", kind="empty content"
        )
    return {"role": role, "content": parts, **keys}


def _read_content(content: Any, where: str) -> list[dict[str, Any]]:
    if isinstance(content, str):
        content = [{"type": "text", "text": content}]
    if not isinstance(content, (list, tuple)):
        raise UserError(
            where=where,
            problem=f"content must be text or a list of parts, found {_brief(content)}.",
            fix="Use text or a list of parts.",
            kind="malformed content",
        )
    return [_read_part(part, f"{where}, part {index}") for index, part in enumerate(content)]


def _read_keys(message: dict, role: str, where: str) -> dict[str, Any]:
    """The further keys of a message: its thought, its weight if that is 0, and what is for the chat template only."""
    if not any(value is not None for name, value in message.items() if name not in PLAIN_KEYS):
        return {}
    keys = {name: strip_nulls(value) for name, value in message.items() if name not in READ_KEYS}
    keys = {name: value for name, value in keys.items() if value not in (None, "", [], {})}
    thoughts = [message[name] for name in THOUGHT_KEYS if message.get(name)]
    if thoughts:
        if not isinstance(thoughts[0], str):
            raise UserError(
                where=where,
                problem=f"the thought must be text, found {_brief(thoughts[0])}.",
                fix="Use text.",
                kind="malformed message",
            )
        keys[THOUGHT] = thoughts[0]
    weights = [message[name] for name in WEIGHT_KEYS if message.get(name) is not None]
    if wrong := [weight for weight in weights if weight not in (0, 1)]:
        raise UserError(
            where=where,
            problem=f"the weight of an answer must be 0 (context) or 1 (trained), found {_brief(wrong[0])}.",
            fix="Use 0 or 1, or true or false.",
            kind="malformed weight",
        )
    if role == "assistant" and not all(weights):
        keys[WEIGHT] = 0
    return keys


def _read_calls(calls: Any, where: str) -> list[dict[str, Any]]:
    """Tool calls as objects with a function, its name, and its arguments as an object.

    Takes OpenAI's form (arguments are JSON text), Hugging Face's (an object), one without `function`, and JSON text.
    """
    calls = parse_json(calls)
    read = []
    for number, call in enumerate(
        [calls] if isinstance(calls, dict) else calls if isinstance(calls, list) else [calls]
    ):
        call = parse_json(call)
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise UserError(
                where=f"{where}, tool call {number}",
                problem=f"expected a function with a name and arguments, found {_brief(call)}.",
                fix='Write {"function": {"name": …, "arguments": {…}}}.',
                kind="malformed tool call",
            )
        arguments = parse_json(function.get("arguments", {}))
        others = {name: call[name] for name in ("id", "index") if call.get(name) is not None}
        read.append({"type": "function", "function": {"name": function["name"], "arguments": arguments}, **others})
    return read


def parse_json(value: Any) -> Any:
    """The value of JSON text; anything else as it is."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except ValueError:
        return value


def strip_nulls(value: Any) -> Any:
    """The value without the nulls in its objects. Arrow gives every object of a column the keys of all others."""
    if isinstance(value, dict):
        return {name: strip_nulls(inner) for name, inner in value.items() if inner is not None}
    return [strip_nulls(inner) for inner in value] if isinstance(value, (list, tuple)) else value


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
