"""Let a chat template end answers as training does, so that whatever renders it later asks as training asked."""

import json
from typing import Any

from tuning.data.chat_template import ChatFormat, RenderedChat
from tuning.data.messages import Conversation, Message
from tuning.data.template import answer, ask, text_part
from tuning.errors import UserError, try_optional

ENDS_ANSWERS = """\
{#- Training ends every answer with END, which the published template below does not write. -#}
{%- set ended = namespace(messages=[]) -%}
{%- for message in messages -%}
{%- set content = message['content'] or '' if message['role'] == 'assistant' else '' -%}
{%- if content is string -%}
{%- set new = content + END if content and not content.rstrip().endswith(END) else message['content'] -%}
{%- else -%}
{%- set text = content | selectattr('type', 'equalto', 'text') | map(attribute='text') | join('\\n') -%}
{%- set text = text if text.rstrip().endswith(END) else text + END -%}
{%- set new = (content | rejectattr('type', 'equalto', 'text') | list) + [{'type': 'text', 'text': text}] -%}
{%- endif -%}
{%- set ended.messages = ended.messages + [dict(message, content=new)] -%}
{%- endfor -%}
{%- set messages = ended.messages %}
"""
"""Written before a template. Several text parts of an answer become one, with one end."""


def open_chat(processor: Any, **settings: Any) -> ChatFormat:
    """The chat format of a processor. `settings`: those of `ChatFormat`.

    Where the processor's template ends no answer, not even one that a question follows, training adds the tokenizer's
    end token. The processor gets a template then that writes it, if that one renders probe conversations as training
    does: a model that was trained with ends must see them in every chat, and a server knows the saved template only.
    """
    chat = ChatFormat(processor, **settings)
    published = getattr(processor, "chat_template", None)
    more_than_words = chat.template.takes_calls or chat.template.thought_key  # which the end must follow, too
    if not chat.adds_end_token or more_than_words or not isinstance(published, str):
        return chat
    end = json.dumps(chat.end_of_turn, ensure_ascii=False)
    template = ENDS_ANSWERS.replace("END", end) + published
    processor.chat_template = processor.tokenizer.chat_template = template
    attempt = try_optional(lambda: ChatFormat(processor, **settings), catch_user_errors=True)
    edited = attempt.value
    if edited is None or edited.adds_end_token or render_probes(edited) != render_probes(chat):
        processor.chat_template = processor.tokenizer.chat_template = published
        return chat
    edited.added_end = chat.end_of_turn
    return edited


def render_probes(chat: ChatFormat) -> list[RenderedChat | None]:
    """Conversations of one and several turns with their answers, and the prompt after them. None: not rendered."""

    def render(messages: list[Message]) -> RenderedChat | None:
        try:
            return chat.render(Conversation(messages))
        except UserError:
            return None

    image: Message = {"role": "user", "content": [{"type": "image"}, text_part("What is it?")]}
    parts: Message = {"role": "assistant", "content": [text_part("One."), text_part("Two.")]}
    turns = [image, answer("A cat."), ask("And?"), parts, ask("More?"), answer(" No. \n")]
    system: Message = {"role": "system", "content": [text_part("Be brief.")]}
    prompt = try_optional(lambda: chat.render_prompt(Conversation(turns[:-1])), catch_user_errors=True).value
    return [render(turns[:2]), render(turns), render([system, *turns]), prompt]
