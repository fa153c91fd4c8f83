"""A template that ends no answer gets one that ends them as training does. Any other stays as it is."""

import copy

import pytest
from chat_families.families import FAMILIES
from tiny_models import VICUNA_TEMPLATE, build_processor

from tuning.data.answer_ends import open_chat, render_probes
from tuning.data.chat_template import ChatFormat


@pytest.mark.parametrize("layout", ["llava15", "llava_next_vicuna"])
def test_the_saved_template_renders_what_training_rendered(layout):
    processor = build_processor(layout)
    before = render_probes(ChatFormat(processor))
    chat = open_chat(processor)
    assert chat.added_end == "</s>"
    assert not chat.adds_end_token
    assert processor.chat_template.endswith(VICUNA_TEMPLATE)
    assert processor.tokenizer.chat_template == processor.chat_template
    assert render_probes(chat) == before
    assert all(before)
    again = open_chat(processor)  # as whoever loads the saved model
    assert (again.added_end, again.adds_end_token) == ("", False)
    assert render_probes(again) == before


def test_transformers_renders_chats_of_several_turns_with_ends():
    processor = build_processor("llava15")
    open_chat(processor)
    question, more = ({"role": "user", "content": [{"type": "text", "text": word}]} for word in ("Who?", "And?"))
    parts = [{"type": "text", "text": "He."}, {"type": "text", "text": "She."}]
    for content in (parts, [parts[0], {"type": "text", "text": "She.</s>"}]):
        chat = [question, {"role": "assistant", "content": content, "name": "kept"}, more]
        text = processor.apply_chat_template(chat, add_generation_prompt=True)
        assert text == "USER: Who? ASSISTANT: He.\nShe.</s> USER: And? ASSISTANT:"
    template = "{% for message in messages %}{{ message['content'] or '-' }} {% endfor %}"
    processor.chat_template = processor.tokenizer.chat_template = template
    open_chat(processor)
    chat = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "He."}]
    chat += [{"role": "assistant", "content": None}, {"role": "assistant", "content": ""}]
    assert processor.apply_chat_template(chat) == "Who? He.</s> - - "


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_every_family_renders_as_before(family):
    processor = family.build_processor()
    settings = {"stop_tokens": family.stop_tokens, "template_kwargs": family.template_kwargs}
    published = copy.copy(processor)
    chat, before = open_chat(processor, **settings), ChatFormat(published, **settings)
    assert render_probes(chat) == render_probes(before)
    assert chat.added_end == before.added_end
    if before.end_of_turn and not before.adds_end_token:
        assert processor.chat_template == family.source


NOT_EDITED = {
    "leaves the end out": VICUNA_TEMPLATE.replace("part['text'] + ' '", "part['text'].replace('</s>', '') + ' '", 1),
    "trims answers": VICUNA_TEMPLATE.replace("part['text'] + ' '", "part['text'] | trim + ' '", 1),
    "writes calls": VICUNA_TEMPLATE.replace(
        "{%- endfor %}\n{%- if add", "{{ message.tool_calls | tojson if message.tool_calls }}{%- endfor %}\n{%- if add"
    ),
    "writes thoughts": VICUNA_TEMPLATE.replace(
        "{%- endfor %}\n{%- if add", "{{ message.thinking }}{%- endfor %}\n{%- if add"
    ),
}


@pytest.mark.parametrize("name", NOT_EDITED)
def test_a_template_in_which_an_end_would_not_be_where_training_has_it_stays(name):
    processor, template = build_processor("llava15"), NOT_EDITED[name]
    assert template != VICUNA_TEMPLATE
    processor.chat_template = processor.tokenizer.chat_template = template
    chat = open_chat(processor)
    assert chat.adds_end_token
    assert chat.added_end == "</s>"
    assert processor.chat_template == processor.tokenizer.chat_template == template
