"""A model's chat template: the shape in which it takes messages, and rendering them."""

import json
import re
from collections.abc import Collection, Mapping, Sequence
from datetime import date
from typing import Any

import jinja2
from transformers.utils.chat_template_utils import render_jinja_template

from tuning.data.messages import CALLS, THOUGHT, THOUGHT_KEYS, WEIGHT, Conversation, Message
from tuning.data.token_spans import Span
from tuning.errors import Attempt, UserError, describe_failure, first_line, try_optional

GENERATION_MARKER = re.compile(r"\{%-?\s*generation\s*-?%\}")
PROBE = "\ue000probe{}\ue001"  # private-use characters: no template looks for them and no data has them
MARK = re.compile(PROBE.format(r"(\d+)"))
RESERVED = {  # what render_jinja_template and the template get from us
    *("messages", "tools", "documents", "conversations", "chat_template", "add_generation_prompt"),
    *("continue_final_message", "return_assistant_tokens_mask", "generation_indices"),
}
CALL_ID = "call00001"  # Mistral's templates demand nine letters and digits
PRINTED_PARTS = re.compile(r"""['"]type['"]\s*:\s*['"](text|image)['"]""")  # a list of parts that was written as it is


class Template:
    """A chat template and the shape in which it takes messages, found by rendering short conversations once.

    - `string_roles`: it takes the content of these roles only as a plain string. There an image is its image token.
      `string_roles_with_tools`: more such roles in a row that has tools (Llama 3.2).
    - `joined_roles`: it renders only some text parts of these roles, so they are joined before rendering.
    - `thought_key`: the key under which it takes an assistant's thought; "" where it takes none.
    - `takes_calls`, `takes_tools`: whether it renders an assistant's tool calls, and the tools of a row.
    - `calls_as_text`: it takes the arguments of a call as JSON text, as OpenAI's API gives them.
    """

    def __init__(self, processor: Any, *, date_string: str | None, kwargs: Mapping[str, Any]):
        tokenizer = getattr(processor, "tokenizer", processor)
        self.source = choose_template(processor, tokenizer)
        self.image_token: str = getattr(processor, "image_token", None) or ""
        self.has_markers = bool(GENERATION_MARKER.search(self.source))
        self._variables = {
            **tokenizer.special_tokens_map,
            "date_string": date_string or date.today().strftime("%d %b %Y"),
            **kwargs,
        }
        self.string_roles: frozenset[str] = frozenset()
        self.string_roles_with_tools: frozenset[str] = frozenset()
        self.joined_roles: frozenset[str] = frozenset()
        self.thought_key, self.calls_as_text = "", False
        self._check_answer()
        self._probe_contents()
        self.takes_calls = self._probe_calls()
        if self.takes_calls:
            self._probe_role("tool")
        self.takes_tools = self._probe_tools()
        for key in THOUGHT_KEYS:
            thinking = {**answer("a"), key: PROBE.format(0)}
            if not self.thought_key and PROBE.format(0) in self.try_render(Conversation([ask("q"), thinking])):
                self.thought_key = key

    def render(self, conversation: Conversation, **options: Any) -> tuple[str, list[Span]]:
        """The rendered text, and the spans of the template's `{% generation %}` blocks if it has some.

        Raises whatever the template raises.
        """
        if self.has_markers:
            options["return_assistant_tokens_mask"] = True
        string_roles = self.string_roles | self.string_roles_with_tools if conversation.tools else self.string_roles
        rendered, marked = render_jinja_template(
            conversations=[[self._shape(message, string_roles) for message in conversation.messages]],
            tools=conversation.tools,
            chat_template=self.source,
            **{**self._variables, **conversation.template_kwargs, **options},
        )
        return rendered[0], marked[0] if self.has_markers else []

    def attempt(self, conversation: Conversation, **options: Any) -> Attempt[tuple[str, list[Span]]]:
        """As `render`, but returns the template's error."""
        return try_optional(lambda: self.render(conversation, **options))

    def try_render(self, conversation: Conversation, **options: Any) -> str:
        """The rendered text, or "" where the template does not take the messages."""
        text = (self.attempt(conversation, **options).value or ("", []))[0]
        return "" if PRINTED_PARTS.search(text) else text

    @property
    def mentions_thoughts(self) -> bool:
        """Whether it has the tag that ends a thought."""
        return "</think>" in self.source

    def mentions(self, name: str) -> bool:
        """Whether the template has this word."""
        return re.search(rf"\b{re.escape(name)}\b", self.source) is not None

    def join_parts(self, message: Message) -> Message:
        """The message with one text part where the template would leave out the others."""
        texts = [part for part in message["content"] if part["type"] == "text"]
        if len(texts) < 2 or message["role"] not in self.joined_roles:
            return message
        joined = text_part("\n".join(part["text"] for part in texts))
        images = [part for part in message["content"] if part["type"] != "text"]
        return {**message, "content": [*images, joined]}

    def _shape(self, message: Message, string_roles: Collection[str]) -> Message:
        """The message as the template takes it."""
        as_string = message["role"] in string_roles or not message["content"]
        if len(message) == 2 and not as_string:
            return message
        shaped = {name: value for name, value in message.items() if name not in (WEIGHT, THOUGHT)}
        if THOUGHT in message:
            shaped[self.thought_key or THOUGHT] = message[THOUGHT]
        if CALLS in message and self.calls_as_text:
            shaped[CALLS] = [
                {**call, "function": {**call["function"], "arguments": _to_json(call["function"]["arguments"])}}
                for call in message[CALLS]
            ]
        if as_string:
            shaped["content"] = self.content_string(message)
        return shaped

    def content_string(self, message: Message) -> str:
        """The content as one string, a line for each part. An image is the image token, as vLLM writes it."""
        return "\n".join(part.get("text", self.image_token) for part in message["content"])

    # --- what the template takes ---

    def _check_answer(self) -> None:
        """Raise `UserError` with the template's own error where it cannot render the simplest conversation."""
        mark = PROBE.format(0)
        conversation = Conversation([ask("q"), answer(mark)])
        rendered = self.attempt(conversation)
        as_strings = rendered
        if mark not in (rendered.value or ("",))[0]:
            self.string_roles = frozenset(("user", "assistant"))
            as_strings = self.attempt(conversation)
            self.string_roles = frozenset()
        if mark in (as_strings.value or ("",))[0]:
            return
        reason = f": {describe_template_error(rendered.error)}" if rendered.error else ""
        raise UserError(
            where="chat_template",
            problem=f"the chat template does not render an assistant's answer{reason}.",
            fix="Correct it, or set another chat_template.",
        )

    def _probe_contents(self) -> None:
        for role in ("user", "assistant", "system"):
            self._probe_role(role)

    def _probe_role(self, role: str) -> None:
        """Find out how the template takes the content of a role. The result of a tool is a string wherever it can."""
        first, second = PROBE.format(1), PROBE.format(2)
        probe = Conversation(_conversation_around(role, [text_part(first), text_part(second)]))
        if role == "tool":
            self.string_roles |= {role}
            if second in self.try_render(probe):
                return
            self.string_roles -= {role}
        text = self.try_render(probe)
        if first not in text:
            self.string_roles |= {role}
        elif second not in text:
            self.joined_roles |= {role}

    def _probe_calls(self) -> bool:
        """Whether the template writes an assistant's calls, and find out how it takes their arguments."""
        name, value = PROBE.format(1), PROBE.format(2)
        call = {"id": CALL_ID, "type": "function", "function": {"name": name, "arguments": {"key": value}}}
        probe = Conversation([ask("q"), {"role": "assistant", "content": [], CALLS: [call]}])
        for self.calls_as_text in (False, True):
            text = self.try_render(probe)
            if (name in text or CALL_ID in text) and value in text and f'\\"{value}' not in text:
                return True
        self.calls_as_text = False
        return False

    def _probe_tools(self) -> bool:
        """Whether the template writes the tools of a row, if need be with all contents as strings."""
        parameters = {"type": "object", "properties": {"key": {"type": "string", "description": "d"}}}
        function = {"name": PROBE.format(0), "description": "d", "parameters": parameters}
        probe = Conversation([ask("q"), answer("a")], tools=[{"type": "function", "function": function}])
        for roles in (frozenset[str](), frozenset(("system", "user", "assistant"))):
            self.string_roles_with_tools = roles
            if PROBE.format(0) in self.try_render(probe):
                return True
        self.string_roles_with_tools = frozenset()
        return False


def choose_template(processor: Any, tokenizer: Any) -> str:
    """The chat template of a processor, or of its tokenizer: the default one where there are several by name."""
    found = getattr(processor, "chat_template", None) or getattr(tokenizer, "chat_template", None)
    if isinstance(found, Mapping) and isinstance(found.get("default"), str):
        return found["default"]
    if isinstance(found, str):
        return found
    problem, fix = "the model has no chat template.", "Set chat_template to a Jinja file or to its text."
    if isinstance(found, Mapping):
        problem = f"the model has the chat templates {', '.join(map(str, found))}, and none is the default."
        fix = "Set chat_template to the file of one of them."
    raise UserError(where="chat_template", problem=problem, fix=fix)


def describe_template_error(error: Exception) -> str:
    """A template's error in one line, with the line of the template where Jinja names one."""
    line = getattr(error, "lineno", None)
    reason = first_line(error) if isinstance(error, jinja2.TemplateError) else describe_failure(error)
    return reason + (f" (line {line} of the template)" if line else "")


def _to_json(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def text_part(text: str) -> dict[str, str]:
    return {"type": "text", "text": text}


def ask(text: str) -> Message:
    """A user's message."""
    return {"role": "user", "content": [text_part(text)]}


def answer(text: str) -> Message:
    """An assistant's message."""
    return {"role": "assistant", "content": [text_part(text)]}


def _conversation_around(role: str, parts: Sequence[dict]) -> list[Message]:
    """The shortest ordinary conversation with a message of `role` that has `parts`."""
    question, reply, message = ask("q"), answer("a"), {"role": role, "content": list(parts)}
    call = {"id": CALL_ID, "type": "function", "function": {"name": "f", "arguments": {"a": "b"}}}
    called = {"role": "assistant", "content": [], CALLS: [call]}
    result = {**message, "tool_call_id": CALL_ID, "name": "f"}
    return {
        "system": [message, question, reply],
        "user": [message, reply],
        "assistant": [question, message],
        "tool": [question, called, result, reply],
    }[role]
