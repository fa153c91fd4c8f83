"""What is supervised in the formats of many families: each answer's words and its own end, nothing else."""

import functools

import pytest
from chat_families.families import FAMILIES, ROWS, TOOLS, Family

from tuning.data.chat_template import ChatFormat
from tuning.data.formats import RowFormat
from tuning.data.messages import Conversation
from tuning.errors import UserError

BY_NAME = {family.name: family for family in FAMILIES}
CASES = [(family.name, kind) for family in FAMILIES for kind in ROWS]
SUPPORTED = [(name, kind) for name, kind in CASES if BY_NAME[name].expected_of(kind) is not None]
REFUSED = [case for case in CASES if case not in SUPPORTED and case[1] != "image"]


@functools.cache
def chat_of(name: str) -> ChatFormat:
    family: Family = BY_NAME[name]
    return ChatFormat(
        family.build_processor(),
        date_string="01 Jan 2026",
        template_kwargs=family.template_kwargs,
        stop_tokens=list(family.stop_tokens),
    )


def read(kind: str) -> Conversation:
    tools = TOOLS if kind.startswith("tools") else None
    row = {"messages": ROWS[kind], "images": None, "tools": tools}
    return RowFormat(extra_columns=("tools",)).read(row, "row")


def test_there_are_at_least_25_templates_and_each_is_used():
    assert len({family.source for family in FAMILIES}) >= 25
    assert len(BY_NAME) == len(FAMILIES)


@pytest.mark.parametrize(("name", "kind"), SUPPORTED)
def test_supervised_text_is_words_and_end(name, kind):
    chat = chat_of(name)
    rendered = chat.render(read(kind))
    supervised = [chat.escaper.unescape_text(rendered.text[start:end]) for start, end in rendered.spans]
    assert supervised == BY_NAME[name].expected_of(kind)


@pytest.mark.parametrize(("name", "kind"), [case for case in SUPPORTED if case[1] in ("single", "multi", "system")])
def test_the_words_of_each_answer_are_found(name, kind):
    rendered = chat_of(name).render(read(kind))
    words = [message["content"] for message in ROWS[kind] if message["role"] == "assistant"]
    assert [rendered.text[start:end] for start, end in rendered.contents] == words


@pytest.mark.parametrize("name", [name for name, kind in SUPPORTED if kind == "image"])
def test_an_image_is_the_image_token(name):
    chat = chat_of(name)
    assert chat.render(read("image")).text.count(chat.image_token) == 1


@pytest.mark.parametrize(("name", "kind"), REFUSED)
def test_a_row_without_a_place_in_the_template_is_refused(name, kind):
    chat = chat_of(name)
    with pytest.raises(UserError, match="chat template"):
        chat.render(read(kind), "row 0")
