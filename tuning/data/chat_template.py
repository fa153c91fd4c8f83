"""Messages → text by the model's chat template, and where the assistant's answers are in it."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import date
from typing import Any

import jinja2
from transformers.utils.chat_template_utils import render_jinja_template

from tuning.data.messages import ROLES, Message
from tuning.data.special_tokens import SpecialTokenEscaper
from tuning.data.token_spans import Span
from tuning.errors import UserError

GENERATION_MARKER = re.compile(r"\{%-?\s*generation\s*-?%\}")
PROBE = "\ue000probe{}\ue001"  # private-use characters: no template looks for them and no data has them
MARK = re.compile(PROBE.format(r"(\d+)"))


@dataclass(frozen=True)
class RenderedChat:
    """`text` as the template renders it, and the supervised spans, one for each answer.

    `contents` are the spans of the answers' own words, without the end of turn. Special tokens in a row's words are
    escaped: see `SpecialTokenEscaper`.
    """

    text: str
    spans: list[Span]
    contents: list[Span]


class ChatFormat:
    """A chat template and how it renders messages, found by rendering probe conversations once.

    - `string_roles`: the template takes the content of these roles only as a plain string.
    - `joined_roles`: the template renders only some text parts of these roles, so they are joined before rendering.
    - `lead`: the text between the generation prompt and an answer. The model has to write it.
    - `end_of_turn`: the text after an answer, without blanks. Where the template writes none, the model would never
      learn to stop. There the tokenizer's end token is added after every answer (`adds_end_token`).
    - `writes_placeholders`: whether the template renders an image part as the processor's image token.
    """

    def __init__(self, processor: Any, *, date_string: str | None = None):
        tokenizer = getattr(processor, "tokenizer", processor)
        self.template = getattr(processor, "chat_template", None) or getattr(tokenizer, "chat_template", None)
        if not isinstance(self.template, str):
            raise UserError(
                problem="the model has no chat template.", fix="Set chat_template to a Jinja file or to its text."
            )
        self.image_token: str = getattr(processor, "image_token", None) or ""
        self.end_of_turn = ""
        self.has_markers = bool(GENERATION_MARKER.search(self.template))
        self.tokenizer = tokenizer
        self.escaper = SpecialTokenEscaper(tokenizer, self.template, self.image_token)
        self._variables = dict(tokenizer.special_tokens_map)
        self._variables["date_string"] = date_string or date.today().strftime("%d %b %Y")
        self.string_roles: frozenset[str] = frozenset()
        self.joined_roles: frozenset[str] = frozenset()
        self._probe_content()
        self._probe_answer()
        self.adds_end_token = not self.end_of_turn
        if self.adds_end_token:
            self.end_of_turn = tokenizer.eos_token or ""
            self.joined_roles |= {"assistant"}  # one end token for each answer, not for each part
        self.writes_placeholders = bool(self.image_token) and self.image_token in self._try_render(
            [{"role": "user", "content": [{"type": "image"}, _text(PROBE.format(0))]}, _message("assistant", "a")]
        )

    def render(self, messages: list[Message], where: str = "") -> RenderedChat:
        """Render a conversation and locate the answers, with their end of turn, without blanks after it.

        Raises `UserError` where the template refuses the conversation or leaves out some of its words.
        """
        messages = [self._join_parts(message) for message in self.escaper.escape(messages, where)]
        try:
            text, marked = self._render(messages)
        except (jinja2.TemplateError, TypeError, ValueError) as error:
            raise UserError(
                where=where,
                problem=f"the chat template refuses this conversation: {error}",
                fix="Change the row or set another chat_template.",
                kind="refused by the chat template",
            ) from error
        answers = None if self.has_markers else self._locate(messages, text, ROLES)  # proves that no word is missing
        if answers is None:
            self._check_words(messages, text, where)
            answers = self._marked_answers(text, marked) if self.has_markers else self._locate(messages, text)
        if answers is None:
            raise UserError(
                where=where,
                problem="the chat template rewrites the assistant's words, so they cannot be located.",
                fix="Set a chat_template with {% generation %} markers.",
                kind="refused by the chat template",
            )
        return self._finish(text, answers)

    def generation_prompt(self, messages: list[Message]) -> str:
        """The text that asks the model for its next answer."""
        joined = [self._join_parts(message) for message in messages]
        try:
            return self._render(joined, add_generation_prompt=True)[0]
        except (jinja2.TemplateError, TypeError, ValueError) as error:
            raise UserError(
                problem=f"the chat template fails to write a generation prompt: {error}",
                fix="Set another chat_template.",
            ) from error

    def count_placeholders(self, text: str) -> int | None:
        """The number of image placeholders in a rendered text, or None where the template writes something else."""
        return text.count(self.image_token) if self.writes_placeholders else None

    def find_split_prompt(self) -> str:
        """The end of the generation prompt, where the tokenizer joins it with an answer's first word, or ""."""
        question = _message("user", "Why?")
        prompt = self.generation_prompt([question])
        asked = self._encode(prompt)
        for words in ("It is.", "The", "Yes.", "1"):
            whole = self.render([question, _message("assistant", words)]).text
            if whole.startswith(prompt) and self._encode(whole)[: len(asked)] != asked:
                return prompt[-1:]
        return ""

    def _encode(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def _finish(self, text: str, answers: Iterable[Span]) -> RenderedChat:
        """Extend each answer from the end of the generation prompt to the end of its turn."""
        pieces, spans, contents, copied, added = [], list[Span](), list[Span](), 0, 0
        for start, end in answers:
            contents.append((start + added, end + added))
            if self.lead and text.endswith(self.lead, 0, start):
                start -= len(self.lead)
            if self.adds_end_token:
                pieces += [text[copied:end], self.end_of_turn]
                copied = end
                spans.append((start + added, end + added + len(self.end_of_turn)))
                added += len(self.end_of_turn)
                continue
            blanks = len(text[end:]) - len(text[end:].lstrip())
            if text.startswith(self.end_of_turn, end + blanks):
                end += blanks + len(self.end_of_turn)
            spans.append((start, end))
        return RenderedChat("".join([*pieces, text[copied:]]), spans, contents)

    def _marked_answers(self, text: str, marked: Iterable[Span]) -> list[Span]:
        """The template's own `{% generation %}` spans, without the text that it writes after an answer."""
        return [
            (start, end - len(self._marked_tail) if text.endswith(self._marked_tail, start, end) else end)
            for start, end in marked
        ]

    def _locate(self, messages: list[Message], text: str, roles: Iterable[str] = ("assistant",)) -> list[Span] | None:
        """Find the answers by rendering again with every text of `roles` replaced by a unique mark.

        The text between the marks is what the template adds. With the texts put back in the place of the marks it must
        equal `text`, otherwise the result is None. Unlike rendering prefixes, this needs two renderings for any number
        of turns, and works for templates that write a turn differently where others follow.
        """
        marked, texts = [], list[tuple[int, str]]()
        for index, message in enumerate(messages):
            parts = list(message["content"])
            for number, part in enumerate(parts):
                if message["role"] in roles and part["type"] == "text":
                    parts[number] = _text(PROBE.format(len(texts)))
                    texts.append((index, part["text"]))
            marked.append({**message, "content": parts})
        pieces = MARK.split(self._render(marked)[0])  # text, number of a mark, text, number, …, text
        if pieces[1::2] != [str(number) for number in range(len(texts))] or not text.startswith(pieces[0]):
            return None
        spans: dict[int, Span] = {}
        position = len(pieces[0])
        for (index, words), piece in zip(texts, pieces[2::2], strict=True):
            forms = (format for format in (words, words.strip()) if text.startswith(format + piece, position))
            written = next(forms, None)
            if written is None:
                return None
            if messages[index]["role"] == "assistant":
                start = spans.get(index, (position, 0))[0]  # the text parts of one message are one answer
                spans[index] = (start, position + len(written))
            position += len(written) + len(piece)
        return list(spans.values()) if position == len(text) else None

    def _check_words(self, messages: list[Message], text: str, where: str) -> None:
        for index, message in enumerate(messages):
            for part in message["content"]:
                words = part.get("text", "")
                if words.strip() in text or all(word in text for word in words.split()):
                    continue
                raise UserError(
                    where=f"{where}, message {index}",
                    problem=(
                        f"the chat template leaves out words of this {message['role']} message: {words.strip()[:60]!r}."
                    ),
                    fix="Change the row or set another chat_template.",
                    kind="words left out by the chat template",
                )

    def _join_parts(self, message: Message) -> Message:
        texts = [part for part in message["content"] if part["type"] == "text"]
        if len(texts) < 2 or message["role"] not in self.joined_roles | self.string_roles:
            return message
        joined = _text("\n".join(part["text"] for part in texts))
        images = [part for part in message["content"] if part["type"] != "text"]
        return {**message, "content": [*images, joined]}

    def _render(self, messages: list[Message], **options) -> tuple[str, list[Span]]:
        shaped = [
            {**message, "content": message["content"][0]["text"]}
            if message["role"] in self.string_roles and message["content"][0]["type"] == "text"
            else message
            for message in messages
        ]
        markers = {"return_assistant_tokens_mask": True} if self.has_markers else {}
        rendered, marked = render_jinja_template(
            conversations=[shaped], chat_template=self.template, **markers, **options, **self._variables
        )
        return rendered[0], marked[0] if self.has_markers else []

    def _try_render(self, messages: list[Message]) -> str:
        """The rendered text, or "" where the template does not take the messages."""
        try:
            text = self._render(messages)[0]
        except (jinja2.TemplateError, TypeError, ValueError, KeyError, IndexError):
            return ""
        return "" if re.search(r"""['"]type['"]\s*:""", text) else text  # the list of parts, printed as it is

    def _probe_content(self) -> None:
        for role in ("user", "assistant", "system"):
            parts = [_text(PROBE.format(1)), _text(PROBE.format(2))]
            probe = _conversation_around(role, parts)
            text = self._try_render(probe)
            if parts[0]["text"] not in text:
                self.string_roles |= {role}
            elif parts[1]["text"] not in text:
                self.joined_roles |= {role}

    def _probe_answer(self) -> None:
        question, mark = _message("user", "q"), PROBE.format(0)
        if mark not in self._try_render([question, _message("assistant", mark)]):
            raise UserError(
                problem="the chat template does not render an assistant's answer.", fix="Set another chat_template."
            )
        text, marked = self._render([question, _message("assistant", mark)])
        before, after = text.split(mark)
        prompt = self.generation_prompt([question])
        self.lead = before.removeprefix(prompt) if before.startswith(prompt) else ""
        self.end_of_turn = after.strip()
        self._marked_tail = text[text.index(mark) + len(mark) : marked[-1][1]] if marked else ""


def _text(text: str) -> dict[str, str]:
    return {"type": "text", "text": text}


def _message(role: str, text: str) -> Message:
    return {"role": role, "content": [_text(text)]}


def _conversation_around(role: str, parts: list[dict]) -> list[Message]:
    """The shortest ordinary conversation with a message of `role` that has `parts`."""
    question, answer, message = _message("user", "q"), _message("assistant", "a"), {"role": role, "content": parts}
    return {"system": [message, question, answer], "user": [message, answer], "assistant": [question, message]}[role]
