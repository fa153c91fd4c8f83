"""What a chat template takes is found by rendering, and what it cannot do is an error with the template's own words."""

import pytest
from PIL import Image
from tiny_models import build_processor

from tuning.config.options import DataArguments, ModelSource
from tuning.data.chat_template import ChatFormat
from tuning.data.from_config import make_encoder
from tuning.data.messages import Conversation
from tuning.data.sources import Row
from tuning.errors import UserError
from tuning.model.load import load_config

IMAGE = {"type": "image"}
STRINGS = (
    "{% for m in messages %}{{ m.role.upper() + ': ' + m.content + ('</s>' if m.role == 'assistant' else ' ') }}"
    "{% endfor %}{% if add_generation_prompt %}ASSISTANT: {% endif %}"
)


def text(words: str) -> dict:
    return {"type": "text", "text": words}


def with_template(template, layout: str = "llava15"):
    processor = build_processor(layout)
    processor.chat_template = template
    return processor


def encoder_of(template, models, layout: str = "llava15"):
    config = load_config(ModelSource(str(models[layout])))
    return make_encoder(DataArguments(max_images_per_sample=2), with_template(template, layout), config, "today")


def test_images_in_a_template_of_strings_are_image_tokens(models):
    encoder = encoder_of(STRINGS, models)
    question = {"role": "user", "content": [IMAGE, text("What?"), IMAGE, text("And this?")]}
    row = {"messages": [question, {"role": "assistant", "content": "It."}], "images": [Image.new("RGB", (40, 40))] * 2}
    prepared = encoder.prepare(Row(row, "rows.json", 0))
    assert prepared.chat.text == "USER: <image>\nWhat?\n<image>\nAnd this? ASSISTANT: It.</s>"
    assert [prepared.chat.text[start:end] for start, end in prepared.chat.spans] == ["It.</s>"]
    ids = encoder.encode(Row(row, "rows.json", 0)).sequence["input_ids"]
    assert (ids == encoder.image_token_id).sum() == 2 * 16


def test_an_image_token_typed_in_a_template_of_strings_is_no_image(models):
    encoder = encoder_of(STRINGS, models)
    row = {"messages": [{"role": "user", "content": "<image> q"}, {"role": "assistant", "content": "a"}], "images": []}
    ids = encoder.encode(Row(row, "rows.json", 0)).sequence["input_ids"]
    assert (ids == encoder.image_token_id).sum() == 0


@pytest.mark.parametrize(
    ("token", "written"), [("<|picture|>", "'<|picture|>'"), ("<img>", "'<img>'"), ("", "nothing")]
)
@pytest.mark.parametrize("layout", ["llava15", "granite_vision"])
def test_another_image_token_than_the_processors_is_an_error_that_names_both(models, layout, token, written):
    template = (
        "{% for m in messages %}{{ m.role }}: {% for p in m.content %}{% if p.type == 'image' %}"
        + token
        + "{% else %}{{ p.text }}{% endif %}{% endfor %}</s>\n{% endfor %}"
    )
    with pytest.raises(UserError, match=f"writes {written} for an image, and the processor reads '<image>'") as caught:
        encoder_of(template, models, layout)
    assert caught.value.where == "chat_template"


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{% for m in messages %}{{ m.content }}", r"Unexpected end of template.*\(line 1 of the template\)"),
        ("{% for m in messages %}\n{{ m.role }\n{% endfor %}", r"unexpected '}'.*\(line 2 of the template\)"),
        ("{% for m in messages %}{{ m['contents']['x'] }}{% endfor %}", "has no attribute 'contents'"),
        ("{{ 1 / 0 }}", "ZeroDivisionError: division by zero"),
        ("{{ raise_exception('Only one turn, please.') }}", r"Only one turn, please\."),
        ("{{ messages | nosuchfilter }}", "No filter named 'nosuchfilter'"),
        ("{{ nosuchfunction(1) }}", "'nosuchfunction' is undefined"),
        ("{% for m in messages %}{{ m.role }}{% endfor %}", r"\. Correct it"),
    ],
)
def test_the_error_of_a_template_is_shown(template, words):
    with pytest.raises(UserError, match=f"does not render an assistant's answer.*{words}") as caught:
        ChatFormat(with_template(template))
    assert "Traceback" not in str(caught.value)


def test_the_default_of_several_named_templates_is_used():
    chat = ChatFormat(with_template({"default": STRINGS, "tool_use": "{{ tools }}", "rag": "{{ documents }}"}))
    conversation = Conversation(
        [{"role": "user", "content": [text("q")]}, {"role": "assistant", "content": [text("a")]}]
    )
    assert chat.render(conversation).text == "USER: q ASSISTANT: a</s>"


def test_named_templates_without_a_default_are_listed():
    with pytest.raises(UserError, match=r"has the chat templates rag, tool_use, and none is the default\."):
        ChatFormat(with_template({"rag": "{{ documents }}", "tool_use": "{{ tools }}"}))


@pytest.mark.parametrize(
    ("written", "as_text"), [("c.function.arguments | tojson", False), ("'JSON ' + c.function.arguments", True)]
)
def test_arguments_are_given_as_the_template_takes_them(written, as_text):
    template = (
        "{% for m in messages %}{{ m.role }}:{{ m.content }}{% for c in m.tool_calls or [] %}"
        "{{ c.function.name }} {{ " + written + " }}{% endfor %}</s>{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    chat = ChatFormat(with_template(template))
    assert chat.template.takes_calls
    assert chat.template.calls_as_text == as_text
    call = {"type": "function", "function": {"name": "f", "arguments": {"größe": [1, 2.5], "leer": ""}}}
    messages = [{"role": "user", "content": [text("q")]}, {"role": "assistant", "content": [], "tool_calls": [call]}]
    rendered = chat.render(Conversation(messages))
    prefix = "JSON " if as_text else ""
    spans = [rendered.text[start:end] for start, end in rendered.spans]
    assert spans == ["f " + prefix + '{"größe": [1, 2.5], "leer": ""}</s>']
