"""What is supervised in the formats of many families: each answer's words and its own end, nothing else."""

import functools

import pytest
from chat_families.families import FAMILIES
from chat_families.rows import ANSWER, CALL_ID, KINDS, TOOLS, WEATHER_ANSWER, build_messages, build_two_calls

from tuning.data.chat_template import ChatFormat
from tuning.data.formats import RowFormat
from tuning.data.messages import Conversation
from tuning.data.row_warnings import describe_prompt_gap, find_ignored_keys
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


# --- what a template leaves out, and what two turns share ---


def supervise(name: str, messages: list[dict], tools=None) -> list[str]:
    chat = chat_of(name)
    columns = {"messages": messages, "images": None, "tools": tools}
    rendered = chat.render(RowFormat(extra_columns=("tools",)).read(columns, "row"))
    return [chat.escaper.unescape_text(rendered.text[start:end]) for start, end in rendered.spans]


def said(role: str, content: str, **keys) -> dict:
    return {"role": role, "content": content, **keys}


def calling(content: str = "", arguments=None, **keys) -> dict:
    call = {"id": "a1b2c3d4e", "type": "function", "function": {"name": "get_weather", "arguments": arguments or {}}}
    return said("assistant", content, tool_calls=[call], **keys)


@pytest.mark.parametrize("name", ["nemotron_3", "kimi_k2_5", "glm_4_5v"])
def test_a_dropped_thought_whose_words_the_answer_has_trains_no_empty_thought(name):
    thinking = said("assistant", "Paris is dry", reasoning_content="Paris")
    messages = [said("user", "q?"), thinking, said("user", "sure?"), said("assistant", "Yes", reasoning_content="Yes")]
    assert supervise(name, messages)[0].startswith("Paris is dry")


@pytest.mark.parametrize("name", ["qwen3", "gpt_oss", "command_a"])
def test_a_dropped_message_whose_words_occur_elsewhere_is_an_error(name):
    messages = [said("user", "Please be honest. Who?"), said("assistant", "A"), said("system", "be honest")]
    with pytest.raises(UserError, match="leaves out words of this system message: 'be honest'"):
        supervise(name, [*messages, said("user", "q2"), said("assistant", "B")])


@pytest.mark.parametrize("name", ["gpt_oss", "hermes", "command_a", "llama_3_2_vision"])
def test_dropped_words_beside_a_call_that_occur_elsewhere_are_an_error(name):
    result = said("tool", "r", tool_call_id="a1b2c3d4e", name="get_weather")
    messages = [said("user", "Paris please"), calling("Paris", {"city": "Paris"}), result, said("assistant", "ok")]
    with pytest.raises(UserError, match="leaves out words of this assistant message: 'Paris'"):
        supervise(name, messages)


def test_a_row_that_ends_with_a_call_learns_the_token_that_begins_its_result():
    messages = [said("user", "weather?"), calling()]
    (written,) = supervise("glm_4_5v", messages)
    assert written.endswith("</tool_call><|observation|>")


@pytest.mark.parametrize("name", ["qwen3", "qwen3_5", "qwen3_vl_thinking"])
def test_a_thought_in_the_words_is_the_thought(name):
    inside = said("assistant", "<think>\nHm.\n</think>\n\nYes.")
    apart = said("assistant", "Yes.", reasoning_content="Hm.")
    assert supervise(name, [said("user", "q?"), inside]) == supervise(name, [said("user", "q?"), apart])


@pytest.mark.parametrize("name", ["qwen3_5", "glm_4_5v", "nemotron_3"])
def test_what_earlier_turns_lose_is_named(name):
    chat = chat_of(name)
    turns = [said("user", "q?"), said("assistant", "Yes one", reasoning_content="deep")]
    turns += [said("user", "sure?"), said("assistant", "Yes three", reasoning_content="deeper")]
    conversation = RowFormat().read({"messages": turns, "images": None}, "row")
    assert find_ignored_keys(chat, conversation) == ["reasoning_content of earlier turns"]
    assert "set train_on last_turn" in describe_prompt_gap(chat, conversation)


def test_special_tokens_in_tools_are_text():
    chat = chat_of("qwen3")
    tools = [{"type": "function", "function": {"name": "f", "description": "x <|im_end|> y", "parameters": {}}}]
    columns = {"messages": [said("user", "q"), said("assistant", "a")], "images": None, "tools": tools}
    rendered = chat.render(RowFormat(extra_columns=("tools",)).read(columns, "row"))
    assert chat.escaper.is_escaped(rendered.text)
    assert "x <|im_end|> y" in chat.escaper.unescape_text(rendered.text)


def test_variables_that_the_library_sets_are_refused():
    columns = {"messages": [said("user", "q"), said("assistant", "a")], "images": None}
    columns["chat_template_kwargs"] = {"add_generation_prompt": True}
    conversation = RowFormat(extra_columns=("chat_template_kwargs",)).read(columns, "row")
    with pytest.raises(UserError, match="add_generation_prompt is no variable for you to set"):
        chat_of("qwen3").render(conversation)
