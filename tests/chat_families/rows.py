"""The rows that every family of chat templates gets."""

import json

QUESTION, OTHER_QUESTION = "What is in the picture?", "And how many are there?"
ANSWER, OTHER_ANSWER = "A red square on a white ground.", "There are three of them."
SYSTEM = "You answer in few words."
THOUGHT, OTHER_THOUGHT = "I look at the shapes first.", "I count the corners next."
WEATHER_QUESTION, WEATHER_ANSWER = "Will it rain in Paris?", "No, it stays dry for two days."
ARGUMENTS = {"city": "Paris", "days": 2}
CALL_ID = "a1b2c3d4e"  # nine letters and digits, as Mistral's templates demand
RESULT = '{"rain": "none", "degrees": 21}'
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "The weather of the next days.",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
                "required": ["city"],
            },
        },
    }
]


def _message(role: str, content, **keys) -> dict:
    return {"role": role, "content": content, **keys}


def _two_turns(*keys: dict) -> list[dict]:
    return [
        _message("user", QUESTION),
        _message("assistant", ANSWER, **keys[0]),
        _message("user", OTHER_QUESTION),
        _message("assistant", OTHER_ANSWER, **keys[1]),
    ]


def _call(call_id: str, arguments) -> dict:
    return {"id": call_id, "type": "function", "function": {"name": "get_weather", "arguments": arguments}}


def _agent(call_id: str, arguments, *keys: dict) -> list[dict]:
    return [
        _message("user", WEATHER_QUESTION),
        _message("assistant", "", tool_calls=[_call(call_id, arguments)], **keys[0]),
        _message("tool", RESULT, tool_call_id=call_id, name="get_weather"),
        _message("assistant", WEATHER_ANSWER, **keys[1]),
    ]


def build_two_calls(call_id: str) -> list[dict]:
    """An assistant that calls twice in one turn, answers, and is asked once more."""
    ids = [call_id, call_id[:-1] + "1"]
    calls = [_call(ids[0], ARGUMENTS), _call(ids[1], {**ARGUMENTS, "city": "Rome"})]
    return [
        _message("user", WEATHER_QUESTION),
        _message("assistant", "", tool_calls=calls),
        *(_message("tool", RESULT, tool_call_id=each, name="get_weather") for each in ids),
        _message("assistant", WEATHER_ANSWER),
        _message("user", OTHER_QUESTION),
        _message("assistant", OTHER_ANSWER),
    ]


THOUGHTS = ({"reasoning_content": THOUGHT}, {"reasoning_content": OTHER_THOUGHT})
SINGLE = [_message("user", QUESTION), _message("assistant", ANSWER)]
KINDS = ("single", "multi", "system", "tools", "tools_object", "reasoning", "thinking_agent", "image")


def build_messages(kind: str, call_id: str = CALL_ID) -> list[dict]:
    """The messages of a row. They are the same for every family, but for the form of a call's id."""
    return {
        "single": SINGLE,
        "multi": _two_turns({}, {}),
        "system": [_message("system", SYSTEM), *SINGLE],
        "tools": _agent(call_id, json.dumps(ARGUMENTS), {}, {}),
        "tools_object": _agent(call_id, ARGUMENTS, {}, {}),
        "reasoning": _two_turns(*THOUGHTS),
        "thinking_agent": _agent(call_id, ARGUMENTS, *THOUGHTS),
        "image": [_message("user", [{"type": "image"}, {"type": "text", "text": QUESTION}]), SINGLE[1]],
    }[kind]
