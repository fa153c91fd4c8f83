"""Messages → text by the model's chat template, and where the assistant's answers are in it."""

import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from tuning.data.locate import OTHERS, PROMPT, TurnFinder, WordsLeftOut, align, find_left_out, written_forms
from tuning.data.messages import CALLS, ROLES, THOUGHT, Conversation, Message
from tuning.data.special_tokens import SpecialTokenEscaper
from tuning.data.template import CALL_ID, PROBE, RESERVED, Template, answer, ask, describe_template_error, text_part
from tuning.data.token_spans import Span, shared_start
from tuning.errors import UserError

THOUGHT_IN_WORDS = re.compile(r"\s*<think>(.*?)</think>\s*", re.DOTALL)


@dataclass(frozen=True)
class RenderedChat:
    """`text` as the template renders it, and the supervised spans, one for each answer.

    `contents` are the spans of the answers' own words, without the end of turn. `untrained`: the spans of answers that
    are context. Special tokens in a row's words are escaped: see `SpecialTokenEscaper`.
    """

    text: str
    spans: list[Span]
    contents: list[Span]
    untrained: Sequence[Span] = ()


class ChatFormat:
    """A chat template, and what it writes around an answer, found by rendering probe conversations once.

    - `lead`: the text between the generation prompt and an answer. The model has to write it.
    - `empty_thought`: the template writes this between the generation prompt and an answer without a thought. With
      `train_empty_thoughts` it is part of `lead`, otherwise it is context.
    - `ends`: what may end a turn, the longest first: the text after the last answer, after an earlier one, and
      `stop_tokens`, at which the model stops (`eos_token_id` of its generation config).
    - `end_of_turn`: the text after the last answer, without blanks. Where the template writes none, the model would
      never learn to stop. There the token that ends the earlier turns is added after the last answer, or the
      tokenizer's end token after every answer (`adds_end_token`).
    - `added_end`: the end token that training writes after an answer and the published template does not.
    - `writes_placeholders`: whether the template renders an image part as the processor's image token.
    """

    def __init__(
        self,
        processor: Any,
        *,
        date_string: str | None = None,
        template_kwargs: Mapping[str, Any] | None = None,
        stop_tokens: Sequence[str] = (),
        train_empty_thoughts: bool = False,
    ):
        check_variables(template_kwargs or {}, "chat_template_kwargs")
        self.tokenizer = getattr(processor, "tokenizer", processor)
        self.template = Template(processor, date_string=date_string, kwargs=template_kwargs or {})
        self.image_token = self.template.image_token
        self.escaper = SpecialTokenEscaper(self.tokenizer, self.template.source, self.image_token)
        self.lead = self.empty_thought = self.end_of_turn = self._marked_tail = ""
        self.adds_end_token = False
        self._probe_answer(train_empty_thoughts)
        earlier_end = self._find_earlier_end(stop_tokens)
        self.adds_end_token = not self.end_of_turn
        if self.adds_end_token:
            self.end_of_turn = earlier_end or self.tokenizer.eos_token or ""
            self.template.joined_roles |= {"assistant"}  # one end token for each answer, not for each part
        self.added_end = self.end_of_turn if self.adds_end_token else ""
        self.end_of_call = (self._find_end_of_call(stop_tokens) if self.adds_end_token else "") or self.end_of_turn
        self.ends = sorted({self.end_of_turn, earlier_end, *stop_tokens} - {""}, key=len, reverse=True)
        with_image = Conversation([{"role": "user", "content": [{"type": "image"}, text_part("q")]}, answer("a")])
        self.writes_placeholders = bool(self.image_token) and self.image_token in self.template.try_render(with_image)

    def render(self, conversation: Conversation, where: str = "") -> RenderedChat:
        """Render a conversation and locate the answers, with their end of turn, without blanks after it.

        The calls and thoughts that the assistant writes are part of its answer. Raises `UserError` where the template
        refuses the conversation or leaves out some of it.
        """
        self._check_support(conversation, where)
        conversation = self._prepare(conversation, where)
        messages = conversation.messages
        text, marked = self._render(conversation, where)
        if self.template.has_markers:
            self._check_words(conversation, text, where)
            return self._finish(text, self._marked_answers(text, marked))
        finish = self._finish_turns if is_rich(messages) else self._finish_answers
        rendered = finish(conversation, text, where)
        if rendered is None:
            raise not_located(messages, where)
        return rendered

    def render_prompt(self, conversation: Conversation, where: str = "") -> RenderedChat:
        """The text that asks the model for its next answer. It has no answers."""
        self._check_support(conversation, where)
        prepared = self._prepare(conversation, where)
        text, _ = self._render(prepared, where, **PROMPT)
        self._check_left_out(prepared, where, **PROMPT)
        if self.adds_end_token and any(message["role"] == "assistant" for message in conversation.messages):
            plain, _ = self._render(prepared, where)
            if text.startswith(plain):
                text = self.render(conversation, where).text + text[len(plain) :]
        return RenderedChat(text, [], [])

    def generation_prompt(self, messages: list[Message]) -> str:
        """The text of `render_prompt` for messages only."""
        return self.render_prompt(Conversation(messages)).text

    def find_owners(self, conversation: Conversation, chat: RenderedChat) -> list[int] | None:
        """The number of the answer (from 0) that each span belongs to, or None where that cannot be found out.

        A template with `{% generation %}` markers may mark a part of an answer, or several.
        """
        answers = [number for number, message in enumerate(conversation.messages) if message["role"] == "assistant"]
        if not self.template.has_markers:
            return list(range(len(answers)))
        if self.adds_end_token:  # the text is not the template's own
            return list(range(len(answers))) if len(chat.spans) == len(answers) else None
        prepared = self._prepare(conversation, "")
        aligned = align(self.template, prepared, self._render(prepared, "")[0], OTHERS)
        if aligned is None:
            return None
        starts = [max((end for index, (_, end) in aligned if index < number), default=0) for number in answers]
        return [sum(first <= start for first in starts) - 1 for start, _ in chat.spans]

    def count_placeholders(self, text: str) -> int | None:
        """The number of image placeholders in a rendered text, or None where the template writes something else."""
        return text.count(self.image_token) if self.writes_placeholders else None

    def encode(self, text: str) -> list[int]:
        """The token ids of a rendered text. An image is one placeholder."""
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def find_image_text(self) -> str:
        """What the template writes for an image, or "" if nothing."""
        question = ask(PROBE.format(0))
        with_image = {**question, "content": [{"type": "image"}, *question["content"]]}
        one, other = (self.template.try_render(Conversation([first, answer("a")])) for first in (question, with_image))
        return other[shared_start(one, other) :].partition(PROBE.format(0))[0].strip()

    # --- render ---

    def _prepare(self, conversation: Conversation, where: str) -> Conversation:
        escaped = self.escaper.escape(map(self._split_thought, conversation.messages), where)
        tools, kwargs = self.escaper.escape_value(conversation.tools), conversation.template_kwargs
        messages = [self.template.join_parts(message) for message in escaped]
        if not self.template.thought_key:  # the template ignores thoughts
            messages = [{key: value for key, value in message.items() if key != THOUGHT} for message in messages]
        return replace(conversation, messages=messages, tools=tools, template_kwargs=self.escaper.escape_value(kwargs))

    def _split_thought(self, message: Message) -> Message:
        """The message, with a thought in its words (`<think>…</think>`) as its thought if the template takes one."""
        content = message["content"]
        if not self.template.thought_key or message["role"] != "assistant" or THOUGHT in message or not content:
            return message
        found = THOUGHT_IN_WORDS.match(content[0].get("text", ""))
        if found is None or not self.template.mentions_thoughts:
            return message
        words = content[0]["text"][found.end() :]
        kept = [text_part(words), *content[1:]] if words else content[1:]
        return {**message, "content": kept, THOUGHT: found[1].strip()} if kept or CALLS in message else message

    def _render(self, conversation: Conversation, where: str, **options: Any) -> tuple[str, list[Span]]:
        rendered = self.template.attempt(conversation, **options)
        if rendered.error is not None:
            is_last_user = conversation.messages[-1]["role"] != "assistant"
            what = "fails to write a generation prompt" if options and is_last_user else "refuses this conversation"
            raise UserError(
                where=where,
                problem=f"the chat template {what}: {describe_template_error(rendered.error)}.",
                fix="Change the row or set another chat_template.",
                kind="refused by the chat template",
            ) from rendered.error
        assert rendered.value is not None
        return rendered.value

    def _check_support(self, conversation: Conversation, where: str) -> None:
        """Raise `UserError` where the row has tools or calls, and the template has no place for them.

        Also where `chat_template_kwargs` has a name that is ours.
        """
        check_variables(conversation.template_kwargs, f"{where}, field 'chat_template_kwargs'")
        template, messages = self.template, conversation.messages
        has_calls = any(CALLS in message or message["role"] == "tool" for message in messages)
        if (conversation.tools and not template.takes_tools) or (has_calls and not template.takes_calls):
            what = "tools" if conversation.tools and not template.takes_tools else "tool calls"
            raise UserError(
                where=where,
                problem=f"the row has {what}, and the chat template has no place for them.",
                fix="Set a chat_template that renders them, or drop the row.",
                kind=f"{what} without a place in the chat template",
            )

    def _check_left_out(self, conversation: Conversation, where: str, **options: Any) -> None:
        """Raise `UserError` where the template leaves out a text of the system, the user or a tool. Renders again."""
        if error := find_left_out(self.template, conversation, **options):
            raise left_out(conversation.messages[error.number], error, where)

    def _check_words(self, conversation: Conversation, text: str, where: str) -> None:
        """Raise `UserError` where words of a message do not occur in the rendered text."""
        for index, message in enumerate(conversation.messages):
            for words in [*(part.get("text", "") for part in message["content"]), *called(message)]:
                if any(form in text for form in written_forms(words, message["role"])):
                    continue
                if all(word in text for word in words.split()):
                    continue
                raise left_out(message, WordsLeftOut(index, words), where)

    # --- locate ---

    def _finish(self, text: str, answers: Iterable[Span]) -> RenderedChat:
        """Extend each answer from the end of the generation prompt to the end of its turn."""
        contents, turns = [*answers], list[Span]()
        for start, end in contents:
            if self.lead and text.endswith(self.lead, 0, start):
                start -= len(self.lead)
            turns.append((start, self._end_after(text, end)))
        return self._add_ends(text, turns, contents, [self.end_of_turn] * len(turns))

    def _finish_answers(self, conversation: Conversation, text: str, where: str) -> RenderedChat | None:
        """The rendered text with its answers, or None if they cannot be located."""
        aligned = align(self.template, conversation, text, ROLES)  # proves that no word is missing
        if aligned is None:
            self._check_left_out(conversation, where)
            self._check_words(conversation, text, where)
            aligned = align(self.template, conversation, text, ("assistant",))
        if aligned is None:
            return None
        spans: dict[int, Span] = {}
        for index, (start, end) in aligned:  # the text parts of one message are one answer
            if conversation.messages[index]["role"] == "assistant":
                spans[index] = (spans.get(index, (start, 0))[0], end)
        return self._finish(text, spans.values())

    def _finish_turns(self, conversation: Conversation, text: str, where: str) -> RenderedChat | None:
        """As `_finish_answers`, for an assistant that thinks or calls tools."""
        self._check_left_out(conversation, where)
        self._check_words(conversation, text, where)
        thought = "" if self.empty_thought == self.lead else self.empty_thought
        last_tokens = {self._split_tokens(end)[-1] for end in self.ends} & set(self.tokenizer.get_added_vocab())
        marks = [*self.ends, *last_tokens]  # the text before the last one may stand after words only (Cohere)
        try:
            turns = TurnFinder(self.template, marks, thought, self._split_tokens).find(conversation, text)
        except WordsLeftOut as error:
            raise left_out(conversation.messages[error.number], error, where) from None
        if turns is None:
            return None
        answers = [message for message in conversation.messages if message["role"] == "assistant"]
        ends = [self.end_of_call if CALLS in message else self.end_of_turn for message in answers]
        return self._add_ends(text, [turn.span for turn in turns], [turn.words for turn in turns], ends)

    def _end_after(self, text: str, end: int) -> int:
        """The end of a turn whose words end at `end`."""
        blanks = len(text[end:]) - len(text[end:].lstrip())
        found = next((mark for mark in self.ends if text.startswith(mark, end + blanks)), None)
        return end if found is None else end + blanks + len(found)

    def _add_ends(self, text: str, turns: list[Span], contents: list[Span], ends: Sequence[str]) -> RenderedChat:
        """Add its end token (of `ends`) after each answer that has none, if the template writes none."""
        if not self.adds_end_token:
            return RenderedChat(text, turns, contents)
        pieces, moved_turns, moved_contents, copied, added = [], list[Span](), list[Span](), 0, 0
        for (start, end), (first, last), own_end in zip(turns, contents, ends, strict=True):
            has_end = any(text.endswith(mark, start, end) for mark in self.ends)
            new = "" if has_end else own_end
            moved_contents.append((first + added, last + added))
            moved_turns.append((start + added, end + added + len(new)))
            pieces += [text[copied:end], new]
            copied, added = end, added + len(new)
        return RenderedChat("".join([*pieces, text[copied:]]), moved_turns, moved_contents)

    def _marked_answers(self, text: str, marked: Iterable[Span]) -> list[Span]:
        """The template's own `{% generation %}` spans, without the text that it writes after an answer."""
        return [
            (start, end - len(self._marked_tail) if text.endswith(self._marked_tail, start, end) else end)
            for start, end in marked
        ]

    # --- what the template writes around an answer ---

    def _probe_answer(self, train_empty_thoughts: bool) -> None:
        question, mark = ask("q"), PROBE.format(0)
        text, marked = self._render(Conversation([question, answer(mark)]), "chat_template")
        before, after = text.split(mark)
        prompt = self.generation_prompt([question])
        self.lead = before.removeprefix(prompt) if before.startswith(prompt) else ""
        self.end_of_turn = after.strip()
        self._marked_tail = text[text.index(mark) + len(mark) : marked[-1][1]] if marked else ""
        if self.lead.strip() and self._is_thought(prompt, self.lead, mark):
            self.empty_thought = self.lead
            self.lead = self.lead if train_empty_thoughts else ""

    def _is_thought(self, prompt: str, lead: str, mark: str) -> bool:
        """Whether `lead` is what the template writes around a thought, but without a thought."""
        if not self.template.thought_key:
            return False
        thought = PROBE.format(1)
        text = self.template.try_render(Conversation([ask("q"), {**answer(mark), THOUGHT: thought}]))
        opening, _, rest = text.removeprefix(prompt).partition(thought)
        return text.startswith(prompt) and "".join(lead.split()) == "".join((opening + rest.partition(mark)[0]).split())

    def _find_earlier_end(self, stop_tokens: Sequence[str]) -> str:
        """What the template writes after an answer that another turn follows; "" if it goes on with the next turn.

        It is what both the text up to the next question and the end of the last turn begin with. If they begin
        differently, it is the first token after the answer, if that ends a question, too, or is a stop token.
        """
        mark, other = PROBE.format(0), PROBE.format(1)
        text = self.template.try_render(Conversation([ask("q"), answer(mark), ask(other), answer("a")]))
        following = text.partition(mark)[2].partition(other)[0].strip()
        tokens, last = self._split_tokens(following), self._split_tokens(self.end_of_turn)
        if common := "".join(tokens[: shared_start(tokens, last)]).strip():
            return common
        first = tokens[0] if tokens and tokens[0] in self.tokenizer.get_added_vocab() else ""
        question = self.template.try_render(Conversation([ask(mark)])).partition(mark)[2].strip()
        ends_questions = bool(self.end_of_turn and first) and question.startswith(first)
        return first if first in stop_tokens or ends_questions else ""

    def _find_end_of_call(self, stop_tokens: Sequence[str]) -> str:
        """The stop token that begins the result of a call, where the template writes no end after the call."""
        if not self.template.takes_calls:
            return ""
        call = {"id": CALL_ID, "type": "function", "function": {"name": "f", "arguments": {"key": PROBE.format(0)}}}
        result = {"role": "tool", "content": [text_part(PROBE.format(1))], "tool_call_id": CALL_ID, "name": "f"}
        messages = [ask("q"), {"role": "assistant", "content": [], CALLS: [call]}, result, answer("a")]
        text = (
            self.template.try_render(Conversation(messages)).partition(PROBE.format(0))[2].partition(PROBE.format(1))[0]
        )
        return next((token for token in self._split_tokens(text) if token in stop_tokens), "")

    def _split_tokens(self, text: str) -> list[str]:
        """The text as its added tokens, and single characters between them."""
        added = sorted(self.tokenizer.get_added_vocab(), key=len, reverse=True)
        return re.findall("|".join([*map(re.escape, added), "."]), text, re.DOTALL)


def is_rich(messages: Iterable[Message]) -> bool:
    """Whether the assistant thinks or calls tools."""
    return any(CALLS in message or THOUGHT in message for message in messages)


def called(message: Message) -> list[str]:
    """The names of the functions that a message calls."""
    return [call["function"]["name"] for call in message.get(CALLS, ())]


def left_out(message: Message, error: WordsLeftOut, where: str) -> UserError:
    """The error of a row of which the template leaves out some words."""
    return UserError(
        where=f"{where}, message {error.number}",
        problem=f"the chat template leaves out words of this {message['role']} message: {error.words.strip()[:60]!r}.",
        fix="Change the row or set another chat_template.",
        kind="words left out by the chat template",
    )


def check_variables(kwargs: Mapping[str, Any], where: str) -> None:
    """Raise `UserError` for a name among variables for the template that the library sets itself."""
    for name in sorted(RESERVED & kwargs.keys()):
        raise UserError(
            where=where,
            problem=f"{name} is no variable for you to set: the library sets it.",
            fix="Remove it.",
            kind="reserved variable",
        )


def not_located(messages: Sequence[Message], where: str) -> UserError:
    """The error of a row whose answers are not found in its rendered text."""
    problem, fix = "the chat template rewrites the assistant's words, so they cannot be located.", "Set"
    is_answer = [message["role"] == "assistant" for message in messages if is_answer_or_text(message)]
    if is_rich(messages) and any(first and second for first, second in itertools.pairwise(is_answer)):
        problem = "no text stands between two turns of the assistant, so they cannot be told apart."
        fix = "Make one message of them, or set"
    return UserError(
        where=where,
        problem=problem,
        fix=f"{fix} a chat_template with {{% generation %}} markers.",
        kind="refused by the chat template",
    )


def is_answer_or_text(message: Message) -> bool:
    """Whether a message is the assistant's, or has a text."""
    return message["role"] == "assistant" or any(part.get("text", "").strip() for part in message["content"])
