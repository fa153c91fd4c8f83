"""What is supervised in the formats of many families: each answer's words and its own end, nothing else."""

import functools

import pytest
from chat_families.families import FAMILIES
from chat_families.rows import ANSWER, CALL_ID, KINDS, TOOLS, WEATHER_ANSWER, build_messages, build_two_calls

from tuning.data.chat_template import ChatFormat
from tuning.data.formats import RowFormat
from tuning.data.messages import Conversation
from tuning.errors import UserError

BY_NAME = {family.name: family for family in FAMILIES}
CASES = [(family.name, kind) for family in FAMILIES for kind in KINDS]
SUPPORTED = [(name, kind) for name, kind in CASES if BY_NAME[name].expected_of(kind) is not None]
ONE_CALL_A_TURN = ("gpt_oss", "llama_3_2_vision")
REFUSED = [case for case in CASES if case not in SUPPORTED and case[1] != "image"]


@functools.cache
def chat_of(name: str) -> ChatFormat:
    family = BY_NAME[name]
    return ChatFormat(
        family.build_processor(),
        date_string="01 Jan 2026",
        template_kwargs=family.template_kwargs,
        stop_tokens=list(family.stop_tokens),
    )


def read(kind: str, call_id: str = CALL_ID) -> Conversation:
    return read_messages(build_messages(kind, call_id), TOOLS if "tools" in kind or "agent" in kind else None)


def read_messages(messages: list[dict], tools: list[dict] | None) -> Conversation:
    row = {"messages": messages, "images": None, "tools": tools}
    return RowFormat(extra_columns=("tools",)).read(row, "row")


def supervised_texts(chat: ChatFormat, conversation: Conversation) -> list[str]:
    rendered = chat.render(conversation)
    return [chat.escaper.unescape_text(rendered.text[start:end]) for start, end in rendered.spans]


def test_there_are_at_least_25_templates_and_each_is_used():
    assert len({family.source for family in FAMILIES}) >= 25
    assert len(BY_NAME) == len(FAMILIES)


@pytest.mark.parametrize(("name", "kind"), SUPPORTED)
def test_supervised_text_is_words_and_end(name, kind):
    family = BY_NAME[name]
    assert supervised_texts(chat_of(name), read(kind, family.call_id)) == family.expected_of(kind)


@pytest.mark.parametrize(("name", "kind"), [case for case in SUPPORTED if case[1] in ("single", "multi", "system")])
def test_the_words_of_each_answer_are_found(name, kind):
    rendered = chat_of(name).render(read(kind))
    words = [message["content"] for message in build_messages(kind) if message["role"] == "assistant"]
    assert [rendered.text[start:end] for start, end in rendered.contents] == words


@pytest.mark.parametrize("name", [name for name, kind in SUPPORTED if kind == "tools" and name not in ONE_CALL_A_TURN])
def test_two_calls_in_one_turn_and_a_question_after_the_answer(name):
    family = BY_NAME[name]
    first, *answers = supervised_texts(chat_of(name), read_messages(build_two_calls(family.call_id), TOOLS))
    one_call, (answer, last_answer) = family.expected["tools"][0], family.expected["multi"]
    assert answers == [answer.replace(ANSWER, WEATHER_ANSWER), last_answer]
    assert first.startswith(one_call[: one_call.index("Paris")])
    assert first.endswith(one_call[-5:])
    assert first.count("Paris") == first.count("Rome") == 1
    assert "degrees" not in first


@pytest.mark.parametrize("name", ONE_CALL_A_TURN)
def test_two_calls_where_a_turn_has_one_are_refused(name):
    with pytest.raises(UserError, match="chat template"):
        chat_of(name).render(read_messages(build_two_calls(CALL_ID), TOOLS), "row 0")


@pytest.mark.parametrize("name", [name for name, kind in SUPPORTED if kind == "image"])
def test_an_image_is_the_image_token(name):
    chat = chat_of(name)
    assert chat.render(read("image")).text.count(chat.image_token) == 1


@pytest.mark.parametrize(("name", "kind"), REFUSED)
def test_a_row_without_a_place_in_the_template_is_refused(name, kind):
    chat = chat_of(name)
    with pytest.raises(UserError, match="chat template"):
        chat.render(read(kind), "row 0")


def test_a_call_whose_name_would_be_left_out_is_refused():
    with pytest.raises(UserError, match="chat template"):
        chat_of("kimi_k2_5").render(read("tools", CALL_ID), "row 0")
