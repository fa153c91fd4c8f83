"""Rows of agents and reasoners: `check` shows as trained what the assistant writes, and names what has no effect."""

import json

import pytest
import torch
from transformers import AutoTokenizer

from tuning import cli, train
from tuning.config.parse import build_config
from tuning.data.encode import IGNORED
from tuning.data.from_config import open_data, open_rows
from tuning.model import load

END = "</s>"
# ChatML with tools, calls and thoughts. Its generation prompt opens a thought, or writes an empty one.
TEMPLATE = (
    "{% if tools %}[system]You may call {{ tools | tojson }}</s>\n{% endif %}"
    "{% for m in messages %}[{{ m.role }}]"
    "{% if m.role == 'assistant' %}<think>\n{{ m.reasoning_content or '' }}\n</think>\n\n{% endif %}"
    "{% if m.content is string %}{{ m.content }}{% else %}{% for p in m.content %}"
    "{% if p.type == 'image' %}<image>{% else %}{{ p.text }}{% endif %}{% endfor %}{% endif %}"
    "{% for c in m.tool_calls or [] %}"
    "<call>{{ c.function.name }} {{ c.function.arguments | tojson }}</call>{% endfor %}"
    "</s>\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]<think>\n"
    "{% if enable_thinking is defined and not enable_thinking %}{{ '\\n</think>\\n\\n' }}{% endif %}{% endif %}"
)
TOOL = {
    "type": "function",
    "function": {"name": "look", "description": "Look it up.", "parameters": {"type": "object"}},
}
CALL = {"id": "call00001", "type": "function", "function": {"name": "look", "arguments": '{"what": "its colour"}'}}
RESULT = {"role": "tool", "tool_call_id": "call00001", "name": "look", "content": '{"colour": "red"}'}


def ask(words: str) -> dict:
    return {"role": "user", "content": words}


def answer(words: str, **keys) -> dict:
    return {"role": "assistant", "content": words, **keys}


@pytest.fixture
def check(make_options, tmp_path, capsys):
    """`check` on rows; returns its exit code, check.json, and what it printed."""

    def run(rows, *, layout="llava16_mistral", template=TEMPLATE, **options):
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        made = make_options(layout, training_data_path=str(path), **options)
        made |= {"chat_template": template} if template else {}
        words = [f"--{name}={json.dumps(value) if isinstance(value, dict) else value}" for name, value in made.items()]
        code = cli.main(["check", *words])
        report = tmp_path / "out" / "check.json"
        return code, json.loads(report.read_text()) if report.exists() else {}, capsys.readouterr()

    return run


def trained(report: dict) -> list[list[str]]:
    """The trained texts of each row, without the blank that Mistral's template puts before an answer."""
    return [[text.removeprefix(" ") for text in sample["supervised_text"]] for sample in report["samples"]]


# --- weights ---


@pytest.mark.parametrize("key", [{"weight": 0}, {"weight": 0.0}, {"loss": False}, {"train": False}, {"train": 0}])
def test_an_answer_without_weight_is_context(check, key):
    row = {"messages": [ask("q"), answer("Bad.", **key), ask("q"), answer("Good.", weight=1)], "images": []}
    code, report, _ = check([row], template=None)
    assert (code, trained(report)) == (0, [["Good.</s>"]])
    assert "Bad." in report["samples"][0]["rendered_text"]


def test_weights_count_where_all_text_is_trained(check):
    row = {"messages": [ask("q"), answer("Bad.", weight=0), ask("Why?"), answer("Good.")], "images": []}
    _, report, _ = check([row], template=None, assistant_only_loss=False)
    text = "".join(trained(report)[0])
    assert "Why?" in text
    assert "Good." in text
    assert "Bad." not in text


def test_a_weight_between_is_an_error_of_the_row(check):
    row = {"messages": [ask("q"), answer("a", weight=0.5)], "images": []}
    code, report, _ = check([row], template=None)
    assert code == 1
    assert "row 0, field 'messages', message 1: the weight of an answer must be 0" in report["problems"][0]["message"]


def test_a_row_whose_answers_all_have_no_weight_is_an_error(check):
    code, report, _ = check([{"messages": [ask("q"), answer("a", weight=0)], "images": []}], template=None)
    assert code == 1
    assert "no token of this row would be trained" in report["problems"][0]["message"]


def test_the_last_turn_alone_can_be_trained(check):
    row = {"messages": [ask("q"), answer("One."), ask("q"), answer("Two.")], "images": []}
    assert trained(check([row], template=None)[1]) == [["One.</s>", "Two.</s>"]]
    assert trained(check([row], template=None, train_on="last_turn")[1]) == [["Two.</s>"]]


def test_last_turn_and_all_text_exclude_each_other(check):
    code, _, printed = check([], template=None, train_on="last_turn", assistant_only_loss=False)
    assert code == 1
    assert "train_on: last_turn does not go with assistant_only_loss false" in printed.err


# --- tools ---


@pytest.mark.parametrize("arguments", ['{"what": "its colour"}', {"what": "its colour"}])
def test_calls_are_trained_and_results_are_not(check, arguments):
    call = {**CALL, "function": {"name": "look", "arguments": arguments}}
    messages = [ask("Colour?"), answer("", tool_calls=[call]), RESULT, answer("Red.")]
    code, report, _ = check([{"messages": messages, "tools": [TOOL], "images": []}])
    written = '<call>look {"what": "its colour"}</call></s>'
    assert (code, trained(report)) == (0, [[written, "Red.</s>"]])
    assert "Look it up." in report["samples"][0]["rendered_text"]
    assert '{"colour": "red"}' in report["samples"][0]["rendered_text"]


def test_two_turns_in_a_row_of_which_one_calls_are_refused_with_the_reason(check):
    messages = [ask("Colour?"), answer("Let me look."), answer("", tool_calls=[CALL]), RESULT, answer("Red.")]
    code, report, _ = check([{"messages": messages, "images": []}])
    assert code == 1
    (problem,) = report["problems"]
    assert "no text stands between two turns of the assistant, so they cannot be told apart" in problem["message"]
    assert "Make one message of them, or set a chat_template" in problem["message"]


def test_tools_as_json_text_and_words_beside_a_call(check):
    messages = [ask("Colour?"), answer("Let me look.", tool_calls=json.dumps([CALL])), RESULT, answer("Red.")]
    _, report, _ = check([{"messages": messages, "tools": json.dumps([TOOL]), "images": []}])
    assert trained(report) == [['Let me look.<call>look {"what": "its colour"}</call></s>', "Red.</s>"]]
    assert "Look it up." in report["samples"][0]["rendered_text"]


def test_calls_of_sharegpt_files(check):
    turns = [
        {"from": "human", "value": "Colour?"},
        {"from": "function_call", "value": '{"name": "look", "arguments": {"what": "its colour"}}'},
        {"from": "observation", "value": "red"},
        {"from": "gpt", "value": "Red."},
    ]
    _, report, _ = check([{"conversations": turns, "tools": json.dumps([TOOL]), "system": "Be brief.", "images": []}])
    assert trained(report) == [['<call>look {"what": "its colour"}</call></s>', "Red.</s>"]]
    assert "[system]Be brief.</s>" in report["samples"][0]["rendered_text"]


def test_a_special_token_in_a_call_ends_nothing(check):
    call = {"name": "say", "arguments": {"words": f"Bye.{END}"}}
    code, report, _ = check([{"messages": [ask("q"), answer("", tool_calls=[call])], "images": []}])
    assert (code, trained(report)) == (0, [[f'<call>say {{"words": "Bye.{END}"}}</call>{END}']])


@pytest.mark.parametrize("part", ["tools", "calls", "result"])
def test_a_template_without_tools_refuses_the_row(check, part):
    messages = {
        "tools": [ask("q"), answer("a")],
        "calls": [ask("q"), answer("", tool_calls=[CALL])],
        "result": [ask("q"), answer("a"), RESULT, answer("b")],
    }[part]
    row = {"messages": messages, "images": []} | ({"tools": [TOOL]} if part == "tools" else {})
    code, report, _ = check([row], template=None)
    assert code == 1
    assert "has no place for them. Set a chat_template that renders them" in report["problems"][0]["message"]


# --- thoughts ---


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking"])
def test_thoughts_are_trained_as_the_template_writes_them(check, key):
    row = {"messages": [ask("q"), answer("Four.", **{key: "Two and two."}), ask("q"), answer("Five.")], "images": []}
    _, report, _ = check([row])
    assert trained(report) == [["Two and two.\n</think>\n\nFour.</s>", "Five.</s>"]]


def test_thoughts_that_a_template_ignores_are_named(check):
    rows = [{"messages": [ask("q"), answer("Four.", reasoning="Hm.")], "images": []}] * 3
    rows += [{"messages": [ask("q"), answer("Four.", refusal="No.")], "images": []}]
    code, report, _ = check(rows, template=None)
    assert code == 0
    assert report["warnings"][0] == (
        "The chat template does not use these keys of messages: reasoning_content (in 3 rows), refusal (in 1 row)."
    )


def test_an_empty_thought_is_context_unless_you_ask_for_it(check):
    row = {"messages": [ask("q"), answer("Four.")], "images": []}
    _, report, printed = check([row])
    assert trained(report) == [["Four.</s>"]]
    assert r"writes '\n</think>\n\n' before an answer without a thought. This is context and is not" in printed.out
    _, report, printed = check([row], train_empty_thoughts=True)
    assert trained(report) == [["\n</think>\n\nFour.</s>"]]
    assert "This is trained." in printed.out


def test_where_a_server_asks_otherwise_the_option_that_helps_is_named(check):
    row = {"messages": [ask("q"), answer("Four.")], "images": []}
    gap = "The prompt that a server writes is not the text that stands before an answer in training."
    _, report, _ = check([row])
    (warning,) = [text for text in report["warnings"] if text.startswith(gap)]
    assert r"</s>\n[assistant]<think>\n', and is trained after '" in warning
    assert r"</s>\n[assistant]<think>\n\n</think>\n\n'. With" in warning
    assert """With chat_template_kwargs '{"enable_thinking": false}' both are the same.""" in warning
    for thought, kwargs in (("Hm.", {}), ("", {"enable_thinking": False})):
        row = {"messages": [ask("q"), answer("Four.", reasoning_content=thought)], "images": []}
        _, report, _ = check([row], chat_template_kwargs=kwargs)
        assert not [text for text in report["warnings"] if text.startswith(gap)]


def test_variables_of_a_row_replace_those_of_the_run(check):
    row = {"messages": [ask("q"), answer("Four.")], "images": []}
    thinking = "{% if mood %}({{ mood }}){% endif %}" + TEMPLATE
    rows = [row, {**row, "chat_template_kwargs": {"mood": "calm"}}, {**row, "chat_template_kwargs": '{"mood": "sad"}'}]
    _, report, _ = check(rows, template=thinking, chat_template_kwargs={"mood": "glad"})
    assert [sample["rendered_text"][:6] for sample in report["samples"]] == ["(glad)", "(calm)", "(sad)["]


def test_a_variable_that_the_template_does_not_know_is_named(check):
    row = {"messages": [ask("q"), answer("Four.")], "images": []}
    _, _, printed = check([row], template=None, chat_template_kwargs={"enable_thinking": False})
    assert "Warning: the chat template does not use enable_thinking of chat_template_kwargs." in printed.out


# --- columns ---


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_columns_without_an_effect_are_named_with_their_rows(check, make_options, tmp_path, capsys, suffix):
    rows = [
        {"messages": [ask("q"), answer("a")], "images": [], "id": n, "history": ["x"] if n else None} for n in (0, 1)
    ]
    path = tmp_path / f"more.{suffix}"
    if suffix == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        import datasets

        datasets.Dataset.from_list(rows).to_parquet(path)
    train(make_options("llava16_mistral", training_data_path=str(path), max_steps=1))
    assert "Warning: These columns are not used: history (1 row), id (2 rows)." in capsys.readouterr().out


def test_a_system_column_becomes_the_system_message(check):
    row = {"messages": [ask("q"), answer("a")], "system": "You are a pirate.", "images": []}
    twice = {**row, "messages": [{"role": "system", "content": "You are a nurse."}, *row["messages"]]}
    code, report, _ = check([row, {**row, "system": None}, twice], template=None)
    assert "<<SYS>>\nYou are a pirate." in report["samples"][0]["rendered_text"]
    assert "<<SYS>>" not in report["samples"][1]["rendered_text"]
    assert code == 1
    assert "row 2, field 'system': the messages begin with another system message" in report["problems"][0]["message"]


# --- images ---


@pytest.mark.parametrize("layout", ["granite_vision", "llava15", "llava_next_vicuna"])
@pytest.mark.parametrize("where", ["answer", "system"])
def test_an_image_mark_typed_elsewhere_than_in_a_question_is_text(check, rows, layout, where):
    turns = [{"from": "human", "value": "<image>\nHow?"}, {"from": "gpt", "value": "So."}]
    words = "Write <img src='<image>'> here."
    if where == "answer":
        turns[1]["value"] = words
    else:
        turns.insert(0, {"from": "system", "value": words})
    row = {"conversations": turns, "images": [str(rows.parent / "0.png")]}
    code, report, _ = check([row], layout=layout, template=None, allow_outside_paths=True)
    assert code == 0
    assert ("src='<image>'> here." in trained(report)[0][0]) == (where == "answer")
    assert words in report["samples"][0]["rendered_text"]


@pytest.mark.parametrize("layout", ["granite_vision", "llava15", "llava_next_vicuna"])
@pytest.mark.parametrize(("marks", "images"), [(2, 1), (1, 2), (0, 2)])
def test_marks_and_images_are_counted_before_images_are_left_out(check, rows, layout, marks, images):
    parts = [*[{"type": "image"}] * marks, {"type": "text", "text": "q"}]
    pictures = [str(rows.parent / f"{number}.png") for number in range(images)]
    row = {"messages": [{"role": "user", "content": parts}, answer("a")], "images": pictures}
    code, report, _ = check([row], layout=layout, template=None, allow_outside_paths=True)
    assert code == 1
    assert f"have {marks} image placeholders, but there are {images} images" in report["problems"][0]["message"]


# --- the same in training, predict and chat ---


def test_training_reads_rows_as_check_does(check, make_options, tmp_path):
    messages = [ask("Colour?"), answer("", tool_calls=[CALL]), RESULT, answer("Red.", reasoning_content="Hm.")]
    rows = [{"messages": messages, "tools": [TOOL], "images": [], "chat_template_kwargs": {"enable_thinking": False}}]
    _, report, _ = check(rows)
    options = make_options("llava16_mistral", training_data_path=str(tmp_path / "rows.jsonl"), chat_template=TEMPLATE)
    config = build_config(options)
    model_config = load.load_config(config.model)
    processor = load.load_processor(config.model, model_config)
    tokens = load.read_tokens(config.model, processor, model_config)
    assert tokens.stop == [END]
    data = open_data(
        config, open_rows(config), processor, model_config, date_string="today", tokens=tokens, steps_done=0
    )
    sequence = data.train[0].sequence
    taught = processor.tokenizer.decode(sequence["input_ids"][sequence["labels"] != IGNORED])
    assert taught.replace(" ", "") == "".join(trained(report)[0]).replace(" ", "")
    result = train({**options, "max_steps": 1})
    assert torch.isfinite(torch.tensor(result.metrics["train_loss"]))
    assert AutoTokenizer.from_pretrained(result.model_dir) is not None


def test_predict_asks_as_a_server_does(make_options, models, tmp_path):
    path, output = tmp_path / "rows.jsonl", tmp_path / "answers.jsonl"
    messages = [ask("Colour?"), answer("", tool_calls=[CALL]), RESULT, answer("Red.", reasoning_content="Hm.")]
    path.write_text(json.dumps({"messages": messages, "tools": [TOOL], "images": []}) + "\n")
    words = ["--model_name_or_path", models["llava16_mistral"], "--data_path", path, "--output", output]
    words += [
        "--chat_template",
        TEMPLATE,
        "--max_new_tokens",
        2,
        "--chat_template_kwargs",
        '{"enable_thinking": false}',
    ]
    assert cli.main(["predict", *map(str, words)]) == 0
    (line,) = map(json.loads, output.read_text().splitlines())
    assert line["prompt"].startswith("[system]You may call [")
    assert line["prompt"].endswith('[tool]{"colour": "red"}</s>\n[assistant]<think>\n\n</think>\n\n')
    assert line["reference"] == "Red."


@pytest.mark.parametrize("arguments", ['{"what": null, "n": {"m": null}}', {"what": None, "n": {"m": None}}])
def test_a_null_that_is_meant_is_kept(check, arguments):
    call = {"type": "function", "function": {"name": "look", "arguments": arguments}}
    row = {"messages": [ask("q"), answer("", tool_calls=[call])], "tools": [TOOL], "images": []}
    _, report, _ = check([row, {"messages": [ask("q"), answer("a", tool_calls=None)], "images": []}])
    assert trained(report)[0] == ['<call>look {"what": null, "n": {"m": null}}</call></s>']


def test_marks_of_boxes_without_boxes_are_named(check):
    row = {"messages": [ask("Where?"), answer("At <bbox>.")], "images": []}
    _, report, _ = check([row], template=None)
    assert "1 row: the texts have <bbox> or <ref-object>, and there is no column objects." in report["warnings"][0]
