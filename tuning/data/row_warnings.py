"""What in the rows has no effect, and where training shows the model another prompt than a server will."""

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from tuning.data.chat_template import ChatFormat, RenderedChat
from tuning.data.encode import Encoder
from tuning.data.grounding import BOX_MARK, MARK, REF_MARK
from tuning.data.messages import CALLS, THOUGHT, WEIGHT, Conversation
from tuning.data.sources import DataFile, Mixture, Row, Source
from tuning.data.token_spans import shared_start
from tuning.errors import UserError

SHOWN_CHARACTERS = 60
BOX_MARKS = f"{BOX_MARK} or {REF_MARK}"
EARLIER_TURN = "An answer follows it: set train_on last_turn, or make a row of each answer."
KWARGS_TO_TRY: tuple[dict[str, Any], ...] = (
    *({"enable_thinking": value} for value in (False, True)),
    *({"thinking": value} for value in (False, True)),
)


def describe_rows(rows: Iterable[Row | UserError], encoder: Encoder) -> list[str]:
    """Warnings about some rows: keys without an effect, and prompts that differ from a server's.

    Rows that cannot be used are passed over: they are reported when they are encoded.
    """
    ignored, gaps, number = Counter[str](), dict[str, None](), 0
    for number, row in enumerate(rows, start=1):  # noqa: B007 (used after the loop)
        if isinstance(row, UserError):
            continue
        try:
            prepared = encoder.prepare(row)
        except UserError:
            continue
        ignored.update(find_ignored_keys(encoder.chat, prepared.conversation))
        if gap := describe_prompt_gap(encoder.chat, prepared.conversation, encoder.train_on):
            gaps[gap] = None
    return [*describe_ignored_keys(ignored, f", in {_rows(number)} that were looked at"), *gaps]


def describe_ignored_keys(ignored: Counter[str], of: str = "") -> list[str]:
    """A warning that names keys of messages without an effect, with the number of rows that have them."""
    marks = ignored.pop(BOX_MARKS, 0)
    if marks:
        what = f"{_rows(marks)}{of}: the texts have {BOX_MARKS}, and there is no column objects."
        return [f"{what} The marks are trained as words.", *describe_ignored_keys(ignored, of)]
    if not ignored:
        return []
    listed = ", ".join(f"{name} (in {_rows(count)})" for name, count in sorted(ignored.items()))
    return [f"The chat template does not use these keys of messages{of}: {listed}."]


def describe_unused_columns(files: Iterable[DataFile]) -> list[str]:
    """A sentence that names the columns that are not read, with the number of rows that have them."""
    unused = Counter[str]()
    for file in files:
        unused.update(file.unused)
    listed = ", ".join(f"{name} ({_rows(count)})" if count else name for name, count in sorted(unused.items()))
    return [f"These columns are not used: {listed}."] if unused else []


def find_ignored_keys(chat: ChatFormat, conversation: Conversation) -> list[str]:
    """The keys of the messages, and of the row's template variables, without which the rendered text stays the same."""
    texts = (part.get("text", "") for message in conversation.messages for part in message["content"])
    unboxed = [BOX_MARKS] if any(MARK.search(text) for text in texts) else []
    if not conversation.template_kwargs and all(len(message) == 2 for message in conversation.messages):
        return unboxed
    names = {name for message in conversation.messages for name in message} - {"role", "content", CALLS, WEIGHT}
    found = unboxed + [
        f"chat_template_kwargs {name}" for name in conversation.template_kwargs if not chat.template.mentions(name)
    ]
    found += ["the column objects"] if conversation.objects is not None else []  # no boxes: see `write_objects`
    whole = chat.template.try_render(conversation) if names else ""
    for name in sorted(names):
        messages = [{key: value for key, value in message.items() if key != name} for message in conversation.messages]
        if (name == THOUGHT and not chat.template.thought_key) or (
            chat.template.try_render(replace(conversation, messages=messages)) == whole
        ):
            found.append(name)
        elif name == THOUGHT and _drops_thoughts(chat, conversation, whole):
            found.append(f"{THOUGHT} of earlier turns")
    return found


def _drops_thoughts(chat: ChatFormat, conversation: Conversation, whole: str) -> bool:
    """Whether the template leaves out the thought of a turn that is trained."""
    for number, message in enumerate(conversation.messages):
        if THOUGHT in message and message.get(WEIGHT) != 0:
            without = {key: value for key, value in message.items() if key != THOUGHT}
            messages = [without if place == number else other for place, other in enumerate(conversation.messages)]
            if chat.template.try_render(replace(conversation, messages=messages)) == whole:
                return True
    return False


def describe_prompt_gap(chat: ChatFormat, conversation: Conversation, train_on: str = "all") -> str:
    """Where the text before a trained answer differs from the prompt of a server, in words; else ""."""
    numbers = [number for number, message in enumerate(conversation.messages) if message["role"] == "assistant"]
    rendered = chat.render(conversation)
    if not numbers or len(rendered.spans) != len(numbers):  # with {% generation %} markers
        return ""
    asked = ""
    for number, (start, _) in zip(numbers, rendered.spans, strict=True):
        is_last = number == numbers[-1]
        if conversation.messages[number].get(WEIGHT) == 0 or (train_on == "last_turn" and not is_last):
            continue
        asked = _render_prompt(chat, conversation, number)
        if rendered.text[:start] != asked:
            remedy = _find_remedy(chat, conversation, number) if is_last else EARLIER_TURN
            return _describe_difference(chat, asked, rendered.text[:start], remedy)
    return _describe_joined_token(chat, rendered, asked) if asked else ""


def _render_prompt(chat: ChatFormat, conversation: Conversation, number: int) -> str:
    """The prompt of a server that asks for message `number`."""
    return chat.render_prompt(replace(conversation, messages=conversation.messages[:number])).text


def _find_remedy(chat: ChatFormat, conversation: Conversation, number: int) -> str:
    """What makes the text before the last answer, message `number`, the prompt of a server."""
    for kwargs in KWARGS_TO_TRY:
        changed = replace(conversation, template_kwargs={**conversation.template_kwargs, **kwargs})
        rendered = chat.render(changed)
        if rendered.text[: rendered.spans[-1][0]] == _render_prompt(chat, changed, number):
            return f"With chat_template_kwargs '{json.dumps(kwargs)}' both are the same."
    return "Set a chat_template whose generation prompt is the text before an answer."


def _describe_difference(chat: ChatFormat, asked: str, trained: str, remedy: str) -> str:
    start = max(0, shared_start(asked, trained) - SHOWN_CHARACTERS // 2)
    cut = "…" if start else ""
    asked_text, trained_text = (
        cut + chat.escaper.unescape_text(text[start:])[:SHOWN_CHARACTERS] for text in (asked, trained)
    )
    return (
        "The prompt that a server writes is not the text that stands before an answer in training. The model will be"
        f" asked with {asked_text!r}, and is trained after {trained_text!r}. {remedy}"
    )


def _describe_joined_token(chat: ChatFormat, rendered: RenderedChat, asked: str) -> str:
    """The case that the tokenizer joins the end of the prompt with the first word of the answer."""
    prompt, whole = chat.encode(asked), chat.encode(rendered.text)
    if whole[: len(prompt)] == prompt:
        return ""
    return (
        f"The chat template's generation prompt ends in {asked[-1:]!r}. In training, this end and the first word of the"
        " answer become one token, so you would ask the model in another way than it was trained. Set a chat_template"
        " without this end."
    )


def find_prompt_gap(encoder: Encoder, row: Row) -> str:
    """As `describe_prompt_gap`, for a row."""
    return describe_prompt_gap(encoder.chat, encoder.prepare(row).conversation, encoder.train_on)


def spread_rows(source: Source | Mixture, count: int) -> Iterable[Row]:
    """Up to `count` rows of a source, spread over all of it."""
    step = max(1, len(source) // count)
    return (source[index] for index in range(0, len(source), step)[:count])


def _rows(count: int) -> str:
    return f"{count:,} row{'' if count == 1 else 's'}"
