"""Where the texts and the assistant's turns of a conversation are in its rendered text."""

import json
import re
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from tuning.data.messages import CALLS, THOUGHT, Conversation, Message
from tuning.data.template import MARK, PROBE, Template, answer, text_part
from tuning.data.token_spans import Span, shared_start

OTHERS = ("system", "user", "tool")
PROMPT = {"add_generation_prompt": True}
ANY_MARK = re.compile(MARK.pattern, re.IGNORECASE)  # a template may write a text in capitals


class WordsLeftOut(Exception):
    """The template leaves out `words` of the message `number`."""

    def __init__(self, number: int, words: str):
        super().__init__(words)
        self.number, self.words = number, words


class _Marks:
    """Marks by which texts are found in a rendered conversation. `texts`: mark → text."""

    def __init__(self) -> None:
        self.texts: dict[str, str] = {}

    def put(self, text: str) -> str:
        """A new mark for a text."""
        mark = PROBE.format(len(self.texts))
        self.texts[mark] = text
        return mark


def find_left_out(template: Template, conversation: Conversation, **options: Any) -> WordsLeftOut | None:
    """The first text of a message that is not the assistant's and that the template leaves out, if there is one."""
    marked, texts = _mark_texts(conversation.messages, OTHERS)
    written = template.try_render(replace(conversation, messages=marked), **options)
    found = {int(number) for number in ANY_MARK.findall(written)}
    left_out = (WordsLeftOut(*texts[number]) for number in range(len(texts)) if number not in found)
    return next((error for error in left_out if error.words.strip()), None) if written else None


@dataclass(frozen=True)
class Turn:
    """What the assistant writes in one turn, with its end, and the span of its words, which may be empty."""

    span: Span
    words: Span


def align(
    template: Template, conversation: Conversation, text: str, roles: Collection[str]
) -> list[tuple[int, Span]] | None:
    """The number of the message and the span of every text part of `roles`, or None if they cannot be located.

    Renders again with every one of them replaced by a unique mark. The text between the marks is what the template
    adds. With the texts put back in the place of the marks it must equal `text`. Unlike rendering prefixes, this needs
    two renderings for any number of turns, and works for templates that write a turn differently where others follow.
    """
    marked, texts = _mark_texts(conversation.messages, roles)
    pieces = MARK.split(template.render(replace(conversation, messages=marked))[0])
    # text, number of a mark, text, number, …, text
    if pieces[1::2] != [str(number) for number in range(len(texts))] or not text.startswith(pieces[0]):
        return None
    spans, position = [], len(pieces[0])
    for (index, words), piece in zip(texts, pieces[2::2], strict=True):
        forms = written_forms(words, conversation.messages[index]["role"])
        written = next((form for form in forms if text.startswith(form + piece, position)), None)
        if written is None:
            return None
        spans.append((index, (position, position + len(written))))
        position += len(written) + len(piece)
    return spans if position == len(text) else None


def written_forms(words: str, role: str) -> Iterable[str]:
    """How a template may write a text: as it is, without outer blanks, or, for the result of a tool, as JSON."""
    yield from (words, words.strip())
    if role == "tool":
        yield from (json.dumps(words, ensure_ascii=False)[1:-1], json.dumps(words)[1:-1])


def _mark_texts(messages: Sequence[Message], roles: Collection[str]) -> tuple[list[Message], list[tuple[int, str]]]:
    """The messages with a mark in the place of every text of `roles`, and those texts with their messages' numbers."""
    marked, texts = [], list[tuple[int, str]]()
    for index, message in enumerate(messages):
        parts = list(message["content"])
        for number, part in enumerate(parts):
            if message["role"] in roles and part["type"] == "text":
                parts[number] = text_part(PROBE.format(len(texts)))
                texts.append((index, part["text"]))
        marked.append({**message, "content": parts})
    return marked, texts


@dataclass(frozen=True)
class TurnFinder:
    """Finds the turns of an assistant that thinks or calls tools, whose syntax only the template knows.

    A turn lies between the last text before it and the first text after it. It begins where the generation prompt ends
    there, and ends with the last of `ends`, the marks that end a turn. `split_tokens` splits a text into added tokens
    and characters. `empty_thought` is not part of a turn without a thought.
    """

    template: Template
    ends: Sequence[str]
    empty_thought: str
    split_tokens: Callable[[str], list[str]]

    def find(self, conversation: Conversation, text: str) -> list[Turn] | None:
        """The turns in order, or None if one cannot be located."""
        aligned = align(self.template, conversation, text, OTHERS)
        if aligned is None:
            return None
        turns, before = list[Turn](), -1
        for index, message in enumerate(conversation.messages):
            if message["role"] != "assistant":
                continue
            first = max((end for number, (_, end) in aligned if number < index), default=0)
            last = min((start for number, (start, _) in aligned if number > index), default=len(text))
            turn = self._find_turn(conversation, index, text, first, last) if first > before else None
            if turn is None:
                return None
            turns.append(turn)
            before = first
        return turns

    def _find_turn(self, conversation: Conversation, index: int, text: str, first: int, last: int) -> Turn | None:
        """The turn of message `index`, which lies in `text[first:last]`. Raises `WordsLeftOut`."""
        message, segment = conversation.messages[index], text[first:last]
        has_thought = self._check_written(conversation, index, segment)
        prompt = self._prompt_tail(conversation, index)
        before, after = self._around_plain_answer(conversation, index)
        start = first + self._shared(prompt, segment)
        if not has_thought:
            if not segment.startswith(prompt):
                start = max(start, first + self._shared(before, segment))
            start += len(self.empty_thought) if text.startswith(self.empty_thought, start) else 0
        ends = [text.rfind(mark, start, last) + len(mark) for mark in self.ends if mark in text[start:last]]
        if last == len(text):
            ends = [len(text.rstrip())]
        elif not ends and after and segment.endswith(after):
            ends = [last - len(after)]
        words = [part["text"].strip() for part in message["content"] if part["type"] == "text"]
        places = [text.rfind(word, start, last) for word in words]
        if not ends or -1 in places:
            return None
        span = (places[0], places[-1] + len(words[-1])) if places else (start, start)
        return Turn((start, max(ends)), span)

    def _check_written(self, conversation: Conversation, index: int, segment: str) -> bool:
        """Whether the thought of message `index` is written: some templates drop earlier ones.

        Raises `WordsLeftOut` where some of its words or calls are not.
        """
        message = conversation.messages[index]
        marked = _Marks()
        probe = {
            **message,
            "content": [
                text_part(marked.put(part["text"])) if part["type"] == "text" else part for part in message["content"]
            ],
        }
        if CALLS in message:
            probe[CALLS] = [
                {**call, "function": {**call["function"], "name": marked.put(call["function"]["name"])}}
                for call in message[CALLS]
            ]
        thought = PROBE.format(len(marked.texts))
        if THOUGHT in message:
            probe[THOUGHT] = thought
        messages = [probe if number == index else other for number, other in enumerate(conversation.messages)]
        written = self.template.try_render(replace(conversation, messages=messages))
        ids = {call["function"]["name"]: call.get("id", "") for call in message.get(CALLS, ())}
        for mark, words in marked.texts.items():
            is_in_id = words in ids and words in ids[words] and ids[words] in segment  # Kimi writes the id only
            if written and words.strip() and mark not in written and not is_in_id:
                raise WordsLeftOut(index, words)
        return thought in written

    def _prompt_tail(self, conversation: Conversation, index: int) -> str:
        """The generation prompt for message `index`, from the last text before it."""
        messages, _ = _mark_texts(conversation.messages[:index], OTHERS)
        return MARK.split(self.template.try_render(replace(conversation, messages=messages), **PROMPT))[-1]

    def _around_plain_answer(self, conversation: Conversation, index: int) -> tuple[str, str]:
        """What the template writes before and after message `index`, if that is an answer without thought and calls.

        Both go as far as the next text. Empty where the template takes no such answer there.
        """
        messages, texts = _mark_texts(conversation.messages, OTHERS)
        messages[index] = answer(PROBE.format(len(texts)))
        pieces = MARK.split(self.template.try_render(replace(conversation, messages=messages)))
        if str(len(texts)) not in pieces[1::2]:
            return "", ""
        place = 1 + 2 * pieces[1::2].index(str(len(texts)))
        return pieces[place - 1], pieces[place + 1]

    def _shared(self, one: str, other: str) -> int:
        """The number of characters that both texts begin with. An added token is the same as a whole or not at all."""
        tokens = self.split_tokens(one)
        return len("".join(tokens[: shared_start(tokens, self.split_tokens(other))]))
