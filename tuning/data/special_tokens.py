"""Special tokens typed in the text of a row: the model reads them as text."""

import copy
import functools
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from transformers import AddedToken

from tuning.data.grounding import split_written
from tuning.data.messages import Message
from tuning.errors import UserError

FIRST_STAND_IN = 0xF0000  # Supplementary Private Use Area-A: no written text uses these


class SpecialTokenEscaper:
    """Escapes strings that the tokenizer would read as special tokens, and other added tokens that the template writes.

    Without it, a user who types `<image>` or `</s>` would shift images or end a turn. `escape` puts one stand-in
    character in the place of each string before the template is rendered. `escaped_tokenizer` has a token for each
    stand-in, and `unescape` replaces that token by the ids of the string as plain text.

    In answers only special tokens are escaped: others (`<think>`, `<tool_call>`) are for the model to learn. What
    `write_objects` wrote is not escaped: its tokens are meant.
    """

    def __init__(self, tokenizer: Any, template: str, image_token: str):
        added = tokenizer.added_tokens_decoder.values()
        special = {token.content for token in added if token.special} | {image_token}
        written = {token.content for token in added if token.content in template}
        strings = sorted({text for text in special | written if text.strip()}, key=lambda text: (-len(text), text))
        self.tokenizer = tokenizer
        self.stand_ins = {text: chr(FIRST_STAND_IN + number) for number, text in enumerate(strings)}
        self._strings = {stand_in: text for text, stand_in in self.stand_ins.items()}
        self._typed = _any_of(strings)
        self._typed_in_answers = _any_of([text for text in strings if text in special])
        self._escaped = re.compile(f"[{chr(FIRST_STAND_IN)}-{chr(FIRST_STAND_IN + max(len(strings) - 1, 0))}]")

    def escape(self, messages: Iterable[Message], where: str = "") -> list[Message]:
        """The messages with stand-ins. Raises `UserError` where a text already has a stand-in's character."""
        messages = list(messages)
        texts = [part["text"] for message in messages for part in message["content"] if part["type"] == "text"]
        texts += [text for message in messages for text in _texts_of(_written(message))]
        if any(self._escaped.search(text) for text in texts):
            raise UserError(
                where=where,
                problem=f"the text has private-use characters from U+{FIRST_STAND_IN:X} on.",
                fix="Remove them.",
                kind="odd characters",
            )
        if not self._typed.search("".join(texts)):
            return messages
        return [self._escape_message(message, f"{where}, message {index}") for index, message in enumerate(messages)]

    def _escape_message(self, message: Message, where: str) -> Message:
        typed = self._typed_in_answers if message["role"] == "assistant" else self._typed
        parts, joined = [], ""
        for part in message["content"]:
            if part["type"] == "text":
                pieces = [
                    (text if is_written else typed.sub(lambda found: self.stand_ins[found[0]], text), is_written)
                    for text, is_written in split_written(part)
                ]
                part = {"type": "text", "text": "".join(text for text, _ in pieces)}
                joined += "".join("\0" if is_written else text for text, is_written in pieces)
            else:
                joined = ""
            if found := typed.search(joined):  # what is left can only span two parts
                raise UserError(
                    where=where,
                    problem=f"{found[0]} is spread over two text parts.",
                    fix="Make one text of the parts.",
                    kind="control token across parts",
                )
            parts.append(part)
        return {**message, "content": parts, **self._escape_value(_written(message), typed)}

    def _escape_value(self, value: Any, typed: re.Pattern) -> Any:
        """The value with stand-ins in every text in it."""
        if isinstance(value, str):
            return typed.sub(lambda found: self.stand_ins[found[0]], value)
        if isinstance(value, dict):
            return {self._escape_value(name, typed): self._escape_value(inner, typed) for name, inner in value.items()}
        return [self._escape_value(inner, typed) for inner in value] if isinstance(value, list) else value

    def escape_value(self, value: Any) -> Any:
        """A JSON value with stand-ins in every text, such as the tools of a row."""
        return self._escape_value(value, self._typed) if value else value

    def as_decoded(self, message: Message) -> Message:
        """The message as a decoded answer has it: without the special tokens that `write_objects` wrote."""
        parts = []
        for part in message["content"]:
            if part["type"] == "text":
                pieces = split_written(part)
                words = (self._typed_in_answers.sub("", text) if is_written else text for text, is_written in pieces)
                part = {"type": "text", "text": "".join(words)}
            parts.append(part)
        return {**message, "content": parts}

    def unescape_text(self, text: str) -> str:
        """The text with the original strings in place of their stand-ins."""
        return self._escaped.sub(lambda found: self._strings[found[0]], text)

    def is_escaped(self, text: str) -> bool:
        """Whether the text has a stand-in."""
        return self._escaped.search(text) is not None

    @functools.cached_property
    def escaped_tokenizer(self) -> Any:
        """A copy of the tokenizer with a token for each stand-in. The original, which is saved, does not change."""
        tokenizer = copy.deepcopy(self.tokenizer)
        tokenizer.add_tokens([AddedToken(stand_in, normalized=False, special=True) for stand_in in self._strings])
        return tokenizer

    def unescape(self, inputs: dict[str, Any], text: str) -> dict[str, Any]:
        """Replace each stand-in's token in a processor's output for one row, of `text`, by the tokens of its string.

        Every other tensor with a position per token, `[1, T, …]`, repeats its value for them. So do character offsets.
        """
        ids, offsets = inputs["input_ids"][0].tolist(), inputs["offset_mapping"][0].tolist()
        typed = (found.end() for found in self._escaped.finditer(text))
        tokens, places, spans = list[int](), list[int](), list[list[int]]()  # of each new token, and where it was
        place = 0
        while place < len(ids):
            plain = self._plain_ids.get(ids[place], [ids[place]])
            tokens, places, spans = tokens + plain, places + [place] * len(plain), spans + [offsets[place]] * len(plain)
            is_stand_in, place = ids[place] in self._plain_ids, place + 1
            if is_stand_in:
                start, end = next(typed), self._end_of_words(ids, place)
                if self._adds_blanks and end > place:
                    first, last = offsets[place - 1][1], offsets[end - 1][1]
                    words = self._encode_words(text[start : start + last - first])
                    tokens += [token for token, _ in words]
                    places += [place] * len(words)
                    spans += [[first + begin, first + stop] for _, (begin, stop) in words]
                    place = end
        repeated = {
            name: value[:, places] if torch.is_tensor(value) and value.shape[:2] == (1, len(ids)) else value
            for name, value in inputs.items()
        }
        return repeated | {"input_ids": torch.tensor([tokens]), "offset_mapping": torch.tensor([spans])}

    def _end_of_words(self, ids: Sequence[int], start: int) -> int:
        """The number of the first added token from `start` on."""
        return next((place for place in range(start, len(ids)) if ids[place] in self._added_ids), len(ids))

    @functools.cached_property
    def _added_ids(self) -> frozenset[int]:
        return frozenset(self.escaped_tokenizer.added_tokens_decoder)

    @functools.cached_property
    def _adds_blanks(self) -> bool:
        """Whether the tokenizer adds a blank to the words after a special token, as Llama 2's does."""
        encode = functools.partial(self.escaped_tokenizer.encode, add_special_tokens=False)
        return bool(self._strings) and encode(f"{next(iter(self._strings))}b")[1:] != self._encode_after_line_break("b")

    def _encode_words(self, words: str) -> list[tuple[int, tuple[int, int]]]:
        """The ids and character offsets of `words`, without the blank that the tokenizer adds before a text."""
        encode = functools.partial(self.tokenizer, add_special_tokens=False, return_offsets_mapping=True)
        made, skipped = encode(f"\n{words}"), len(encode("\n")["input_ids"])
        return [
            (token, (begin - 1, end - 1))
            for token, (begin, end) in zip(made["input_ids"][skipped:], made["offset_mapping"][skipped:], strict=True)
        ]

    @functools.cached_property
    def _plain_ids(self) -> dict[int, list[int]]:
        return {
            self.escaped_tokenizer.convert_tokens_to_ids(stand_in): self._encode_plainly(text)
            for stand_in, text in self._strings.items()
        }

    def _encode_plainly(self, text: str) -> list[int]:
        """The ids of `text` without a special token. Splits the text where the tokenizer insists on one."""
        special = self.tokenizer.convert_tokens_to_ids(text)
        ids = self._encode_after_line_break(text)
        return ids if special not in ids else self._encode_after_line_break(text[:1], text[1:])

    def _encode_after_line_break(self, *pieces: str) -> list[int]:
        """The ids of `pieces`, each encoded after a line break and without it.

        Some tokenizers add a blank before the first word of a text: here it goes before the line break.
        """
        ids = []
        for piece in pieces:
            encode = functools.partial(self.tokenizer.encode, add_special_tokens=False, split_special_tokens=True)
            start, whole = encode("\n"), encode(f"\n{piece}")
            ids += whole[len(start) :] if whole[: len(start)] == start else encode(piece)
        return ids


def _written(message: Message) -> dict[str, Any]:
    """What a message has besides its content and its role: the template may write it."""
    return {name: value for name, value in message.items() if name not in ("role", "content")}


def _texts_of(value: Any) -> Iterator[str]:
    """Every text in a JSON value, but not the names of its fields."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _texts_of(inner)


def _any_of(strings: Sequence[str]) -> re.Pattern:
    return re.compile("|".join(map(re.escape, strings)) or r"(?!)")
