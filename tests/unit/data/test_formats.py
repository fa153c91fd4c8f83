import base64
import io
import json

import datasets
import pytest
from PIL import Image

from tuning.data.formats import RowFormat, describe_format, detect_format
from tuning.data.images import list_images, load_image
from tuning.data.messages import find_own_image, split_image_strings
from tuning.data.open_source import open_source
from tuning.errors import UserError

IMAGE = {"type": "image"}
PNG = io.BytesIO()
Image.new("RGB", (6, 4), "red").save(PNG, "PNG")
PNG = PNG.getvalue()
IN_BASE64 = base64.b64encode(PNG).decode()
URI = f"data:image/png;base64,{IN_BASE64}"


def text(words: str) -> dict:
    return {"type": "text", "text": words}


def asked(*parts, answer="a") -> list[dict]:
    return [{"role": "user", "content": list(parts)}, {"role": "assistant", "content": [text(answer)]}]


def chat(content, answer="a") -> list[dict]:
    return [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]


def llava(words: str, answer="a", human="human", gpt="gpt") -> list[dict]:
    return [{"from": human, "value": words}, {"from": gpt, "value": answer}]


def detect(rows, text_field="messages", image_field="images") -> RowFormat:
    names = list(dict.fromkeys(name for row in rows for name in row))
    full = [{name: row.get(name) for name in names} for row in rows]
    return detect_format(names, full, text_field=text_field, image_field=image_field, where="rows.json")


def read(rows, **fields):
    """The conversation of the first row, in the form that is detected in all."""
    return detect(rows, **fields).read(rows[0], "rows.json, row 0")


FORMS = {
    # name: (row, canonical messages, images, first trained message, its description)
    "documented": (
        {"messages": chat([IMAGE, text("q")]), "images": ["x.png"]},
        asked(IMAGE, text("q")),
        ["x.png"],
        0,
        None,
    ),
    "documented without images": ({"messages": chat("q"), "images": None}, asked(text("q")), [], 0, None),
    "image column named image": (
        {"messages": chat([IMAGE, text("q")]), "image": "x.png"},
        asked(IMAGE, text("q")),
        ["x.png"],
        0,
        "messages in 'messages', images in 'image'.",
    ),
    "image_url object": (
        {"messages": chat([text("q"), {"type": "image_url", "image_url": {"url": URI, "detail": "low"}}])},
        asked(text("q"), IMAGE),
        [URI],
        0,
        "messages in 'messages', images inside the messages, if any.",
    ),
    "image_url string": (
        {"messages": chat([{"type": "image_url", "image_url": "x.png"}, text("q")])},
        asked(IMAGE, text("q")),
        ["x.png"],
        0,
        "messages in 'messages', images inside the messages, if any.",
    ),
    **{
        f"part with {name}": (
            {"messages": chat([{"type": "image", name.split()[0]: value}, text("q")])},
            asked(IMAGE, text("q")),
            [image],
            0,
            "messages in 'messages', images inside the messages, if any.",
        )
        for name, value, image in [
            ("image", "x.png", "x.png"),
            ("path", "x.png", "x.png"),
            ("url", "https://example.org/x.png", "https://example.org/x.png"),
            ("base64", IN_BASE64, f"data:;base64,{IN_BASE64}"),
            ("base64 as URI", URI, URI),
        ]
    },
    "LLaVA": (
        {"id": "7", "image": "x.png", "conversations": llava("<image>\nq")},
        asked(IMAGE, text("q")),
        ["x.png"],
        0,
        "conversations with from and value in 'conversations', images in 'image',"
        " <image> in the text marks their places.",
    ),
    "ShareGPT": (
        {"images": ["x.png", "y.png"], "conversations": llava("<image><image>q", human="user", gpt="chatgpt")},
        asked(IMAGE, IMAGE, text("q")),
        ["x.png", "y.png"],
        0,
        "conversations with from and value in 'conversations', images in 'images',"
        " <image> in the text marks their places.",
    ),
    "conversations with role": (
        {"images": ["x.png"], "conversations": chat([IMAGE, text("q")])},
        asked(IMAGE, text("q")),
        ["x.png"],
        0,
        "conversations in 'conversations', images in 'images'.",
    ),
    "strings with marks": (
        {"messages": chat("<image>What is it?"), "images": ["x.png"]},
        asked(IMAGE, text("What is it?")),
        ["x.png"],
        0,
        "messages in 'messages', images in 'images', <image> in the text marks their places.",
    ),
    "prompt and completion": (
        {"prompt": "q", "completion": "a", "images": ["x.png", "y.png"]},
        asked(IMAGE, IMAGE, text("q")),
        ["x.png", "y.png"],
        1,
        "prompt and completion in 'prompt' and 'completion', images in 'images'.",
    ),
    "prompt and completion with marks": (
        {"prompt": "Look:\n<image>\nq", "completion": "a", "image": "x.png"},
        asked(text("Look:\n"), IMAGE, text("q")),
        ["x.png"],
        1,
        "prompt and completion in 'prompt' and 'completion', images in 'image',"
        " <image> in the text marks their places.",
    ),
    "prompt and completion as messages": (
        {
            "prompt": [{"role": "system", "content": "s"}, *chat("q0", "a0"), {"role": "user", "content": "q"}],
            "completion": [{"role": "assistant", "content": "a"}],
            "images": ["x.png"],
        },
        [
            {"role": "system", "content": [text("s")]},
            *asked(IMAGE, text("q0"), answer="a0"),
            *asked(text("q")),
        ],
        ["x.png"],
        4,
        "prompt and completion in 'prompt' and 'completion', images in 'images'.",
    ),
}


def context_before(first: int, messages: list[dict]) -> list[dict]:
    """The messages, where the answers before message `first` are not trained."""
    return [
        {**message, "weight": 0} if message["role"] == "assistant" and number < first else message
        for number, message in enumerate(messages)
    ]


@pytest.mark.parametrize(("row", "messages", "images", "first", "sentence"), FORMS.values(), ids=FORMS)
def test_each_form_is_detected_and_read(row, messages, images, first, sentence):
    format = detect([row])
    conversation = format.read(row, "rows.json, row 0")
    assert (conversation.messages, conversation.images) == (context_before(first, messages), images)
    assert describe_format(format, "messages", "images") == sentence


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".parquet"])
@pytest.mark.parametrize(("row", "messages", "images", "first", "sentence"), FORMS.values(), ids=FORMS)
def test_each_form_is_the_same_in_a_file(tmp_path, suffix, row, messages, images, first, sentence):
    """Arrow fills keys that are missing with None, and strings beside lists change a column's type."""
    file = tmp_path / f"rows{suffix}"
    if suffix == ".json":
        file.write_text(json.dumps([row, row]))
    elif suffix == ".jsonl":
        file.write_text(f"{json.dumps(row)}\n{json.dumps(row)}\n")
    else:
        (tmp_path / "rows.json").write_text(json.dumps([row, row]))
        datasets.load_dataset("json", data_files=[str(tmp_path / "rows.json")], split="train").to_parquet(file)
    stored = open_source(str(file), text_field="messages", image_field="images")[1]
    conversation = stored.format.read(stored.columns, stored.where)
    assert (conversation.messages, conversation.images) == (context_before(first, messages), images)
    assert describe_format(stored.format, "messages", "images") == sentence


# --- parts and marks ---


@pytest.mark.parametrize(
    ("part", "source"),
    [
        ({"type": "image", "text": None, "image_url": None}, None),
        ({"type": "image", "image": "", "path": None, "url": "", "base64": None}, None),
        ({"type": "image", "image": {"bytes": None, "path": None}}, None),
        ({"type": "image", "image": {"bytes": None, "path": None}, "path": "x.png"}, "x.png"),
        ({"type": "image_url", "image_url": {"url": None}}, None),
        ({"type": "image_url", "image_url": {"url": "x.png"}, "image": None}, "x.png"),
        ({"type": "image", "image": {"bytes": PNG, "path": None}}, {"bytes": PNG, "path": None}),
        ({"type": "image", "image": PNG}, PNG),
    ],
)
def test_what_a_part_brings(part, source):
    assert find_own_image(part) == source


def test_empty_keys_from_arrow_do_not_make_a_part_bring_its_image():
    part = {"type": "image", "text": None, "image_url": None}
    row = {"messages": chat([part, {**text("q"), "image_url": None}]), "images": ["x.png"]}
    assert read([row]).images == ["x.png"]
    with pytest.raises(UserError, match="there is no column 'images', only: messages"):
        detect([{"messages": row["messages"]}])


def test_parts_with_their_own_image_stand_between_those_of_the_column():
    parts = [IMAGE, {"type": "image", "path": "own.png"}, text("q"), IMAGE]
    row = {"messages": [*chat(parts), *chat([{"type": "image_url", "image_url": {"url": "last.png"}}])]}
    conversation = read([{**row, "images": ["1.png", "2.png"]}])
    assert conversation.images == ["1.png", "own.png", "2.png", "last.png"]
    assert conversation.messages[0]["content"] == [IMAGE, IMAGE, text("q"), IMAGE]


def test_images_without_a_part_stay_and_are_counted_at_the_end():
    conversation = read([{"messages": chat([{"type": "image", "path": "own.png"}, text("q")]), "images": ["1.png"]}])
    assert conversation.images == ["own.png", "1.png"]


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        ("q", [text("q")]),
        ("<image>", [IMAGE]),
        ("<image>\nq", [IMAGE, text("q")]),
        ("q\n<image>", [text("q"), IMAGE]),
        ("<image>q", [IMAGE, text("q")]),
        ("a\n<image>\nb", [text("a\n"), IMAGE, text("b")]),
        ("a<image>b", [text("a"), IMAGE, text("b")]),
        ("<image>\n\nq", [IMAGE, text("\nq")]),
        ("<image>\n<image>\nq", [IMAGE, IMAGE, text("q")]),
        ("<image><image>q", [IMAGE, IMAGE, text("q")]),
        ("a\n<image><image>\nb", [text("a"), IMAGE, IMAGE, text("b")]),
        ("<Image> <image >", [text("<Image> <image >")]),
    ],
)
def test_marks_in_text_take_one_line_break_with_them(words, parts):
    assert split_image_strings(text(words)) == parts


def test_marks_that_are_not_as_many_as_images_are_words():
    """A text may speak of `<image>`."""
    row = {"messages": chat([IMAGE, text("Write <image> in HTML.")]), "images": ["x.png"]}
    assert read([row]).messages[0]["content"] == [IMAGE, text("Write <image> in HTML.")]
    assert not detect([{"messages": chat("<image> and <image>"), "images": ["x.png"]}]).image_strings
    assert not detect([{"messages": chat("What is an <image>?"), "images": []}]).image_strings


def test_a_row_without_images_may_speak_of_marks_beside_rows_that_use_them():
    rows = [{"messages": chat("<image>q"), "images": ["x.png"]}, {"messages": chat("An <image>?"), "images": []}]
    assert detect(rows).image_strings


@pytest.mark.parametrize("role", ["gpt", "model", "bot", "chatgpt", "assistant"])
def test_names_of_the_assistant(role):
    row = {"conversations": [{"from": "system", "value": "s"}, *llava("q", gpt=role)], "image": None}
    assert [message["role"] for message in read([row]).messages] == ["system", "user", "assistant"]


def test_unknown_from_is_named():
    row = {"conversations": llava("q", human="alien"), "image": None}
    with pytest.raises(UserError, match="unknown role 'alien'") as caught:
        read([row])
    assert caught.value.where == "rows.json, row 0, field 'conversations', message 0"
    assert caught.value.field == "conversations"


# --- prompt and completion ---


@pytest.mark.parametrize(
    ("prompt", "completion", "field", "message"),
    [
        ("", "a", "prompt", "is empty"),
        ("q", None, "completion", "is empty"),
        ("q", [], "completion", "is empty"),
        (7, "a", "prompt", "expected text or messages, found int 7"),
        (chat("q"), [{"role": "user", "content": "more"}], "completion", "has no assistant turn"),
        ("q", " ", "completion", "the assistant's answer is empty"),
    ],
)
def test_wrong_prompt_or_completion_is_named(prompt, completion, field, message):
    row = {"prompt": prompt, "completion": completion, "images": None}
    with pytest.raises(UserError, match=message) as caught:
        read([row])
    assert caught.value.field == field
    assert f"'{field}'" in caught.value.where


# --- columns ---


def test_unknown_columns_list_those_there_are():
    with pytest.raises(UserError, match="there is no column 'messages', only: question, reply, images") as caught:
        detect([{"question": "q", "reply": "a", "images": None}])
    assert caught.value.where == "rows.json"
    assert caught.value.fix.endswith(
        ": vlm-tuning convert rows.json rows_converted.jsonl --question_column question --answer_column reply"
        " --image_column images"
    )
    with pytest.raises(UserError, match="there is no column 'images', only: messages, photo") as caught:
        detect([{"messages": chat([IMAGE, text("q")]), "photo": "x.png"}])
    assert caught.value.fix == "Set dataset_image_field photo."


def test_named_columns_are_never_replaced_by_others():
    row = {"conversations": llava("q"), "prompt": "q", "completion": "a", "image": "x.png"}
    with pytest.raises(UserError, match="there is no column 'chat'"):
        detect([row], text_field="chat")
    with pytest.raises(UserError, match="there is no column 'photo'"):
        detect([row], image_field="photo")


def test_named_columns_may_hold_another_form():
    format = detect([{"chat": llava("<image>q"), "photo": "x.png"}], text_field="chat", image_field="photo")
    assert format == RowFormat(("chat",), "photo", image_strings=True, name="conversations with from and value")


def test_the_messages_column_goes_before_others():
    assert detect([{"messages": chat("q"), "conversations": llava("q"), "images": None}]).text_fields == ("messages",)


@pytest.mark.parametrize("streaming", [False, True])
def test_images_inside_messages_are_not_decoded_when_a_row_is_read(tmp_path, streaming):
    value = datasets.Value("string")
    part = {"type": value, "text": value, "image": datasets.Image()}
    features = datasets.Features({"messages": datasets.List({"role": value, "content": datasets.List(part)})})
    messages = [
        {"role": "user", "content": [{"type": "image", "image": {"bytes": data}} for data in (PNG, b"broken")]},
        {"role": "assistant", "content": [text("a")]},
    ]
    datasets.Dataset.from_list([{"messages": messages}], features=features).to_parquet(tmp_path / "rows.parquet")
    file = str(tmp_path / "rows.parquet")
    source = open_source(file, text_field="messages", image_field="images", streaming=streaming)
    part = source.files[0]
    columns = next(iter(part.rows))
    good, broken = part.format.read(columns, "row 0").images
    assert good["bytes"] == PNG
    assert load_image(good, None, "row 0").size == (6, 4)
    with pytest.raises(UserError, match="cannot be read"):
        load_image(broken, None, "row 0")


@pytest.mark.parametrize("size", [8, 12])
def test_short_base64_text_is_no_file_name_too_long(size):
    """Without a slash, 256 to 1023 characters are more than a file's name may have."""
    stream = io.BytesIO()
    Image.new("L", (size, size), 7).save(stream, "PPM")  # long stretches without a slash
    stored = base64.b64encode(stream.getvalue() + b"a" * 240).decode()
    assert 255 < max(map(len, stored.split("/"))) < 1024
    assert load_image(stored, None, "row 0").size == (size, size)


def test_a_home_that_is_not_there_is_a_missing_file(tmp_path):
    with pytest.raises(UserError, match="there is no image file"):
        load_image("~no-such-person/x.png", tmp_path, "row 0")


@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
def test_answers_that_are_dates_stay_as_they_are_written(tmp_path, suffix):
    """Arrow would make them times."""
    rows = [{"prompt": "When?", "completion": f"2024-01-{day:02}", "images": [], "day": day} for day in range(1, 20)]
    file = tmp_path / f"rows{suffix}"
    file.write_text(json.dumps(rows) if suffix == ".json" else "\n".join(map(json.dumps, rows)))
    row = open_source(str(file), text_field="messages", image_field="images")[1]
    assert row.format.read(row.columns, row.where).messages == asked(text("When?"), answer="2024-01-02")


@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
def test_rows_far_on_may_be_of_another_type(tmp_path, suffix):
    """`datasets` decides on types by the first 10 MB, in which no row may have an image."""
    rows = [{"messages": chat("q" * 1000), "images": []} for _ in range(11_000)]
    rows.append({"messages": chat([IMAGE, text("q")]), "images": ["x.png"], "more": 1})
    file = tmp_path / f"rows{suffix}"
    file.write_text(json.dumps(rows) if suffix == ".json" else "\n".join(map(json.dumps, rows)))
    source = open_source(str(file), text_field="messages", image_field="images")
    first, last = (row.format.read(row.columns, row.where) for row in (source[0], source[11_000]))
    assert (first.messages, first.images) == (asked(text("q" * 1000)), [])
    assert (last.messages, last.images) == (asked(IMAGE, text("q")), ["x.png"])


def test_one_image_or_a_list_is_read_alike():
    assert list_images("x.png") == list_images(["x.png"])


# --- rows without a column of images ---

TEXT_ROWS = [{"messages": chat("q")}, {"conversations": llava("q")}, {"prompt": "q", "completion": "a"}]


@pytest.mark.parametrize("row", TEXT_ROWS)
def test_rows_that_need_no_image_need_no_column_of_images(row):
    found = detect([{**row, "id": 7}] * 3)
    assert found.image_field is None
    assert found.read(row, "row 0").images == []


@pytest.mark.parametrize(
    ("row", "fix"),
    [
        ({"messages": chat([IMAGE, text("q")])}, "Set dataset_image_field."),
        ({"messages": chat("<image>q")}, "Set dataset_image_field, or add a column 'images' that is empty"),
        ({"prompt": "<image>q", "completion": "a"}, "Set dataset_image_field, or add a column 'images' that is empty"),
        ({"prompt": "q", "completion": "a", "photo": "x.JPG"}, "Set dataset_image_field photo."),
        (
            {"prompt": "q", "completion": "a", "pixels": [{"bytes": PNG, "path": None}]},
            "Set dataset_image_field pixels.",
        ),
        ({"messages": [{**chat("q")[0], "images": ["x.png"]}, chat("q")[1]]}, "Put all images of a row into a column"),
    ],
)
def test_rows_that_need_an_image_are_refused_without_a_column_of_images(row, fix):
    with pytest.raises(UserError, match="image") as caught:
        detect([row] * 3)
    assert caught.value.fix.startswith(fix)


def test_a_rare_word_in_brackets_is_a_word():
    rows = [{"messages": chat("q")}, {"messages": chat("What does <image> do in SVG?")}, {"messages": chat("q")}]
    found = detect(rows)
    assert found.image_field is None
    assert not found.image_strings


def test_a_named_column_of_images_must_be_in_one_of_the_files(tmp_path):
    for name, row in {
        "a": {"prompt": "q", "completion": "a"},
        "b": {"prompt": "q", "completion": "a", "photo": "x"},
    }.items():
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(row))
    options = {"text_field": "messages", "image_field": "photo"}
    assert [file.format.image_field for file in open_source(str(tmp_path), **options).files] == [None, "photo"]
    with pytest.raises(UserError, match="there is no column 'photo', only: prompt, completion"):
        open_source(str(tmp_path / "a.jsonl"), **options)


@pytest.mark.parametrize(
    ("row", "command"),
    [
        (
            {"images": [], "user": "q", "assistant": "a"},
            "--question_column user --answer_column assistant --image_column images",
        ),
        ({"instruction": "q", "output": "a"}, "--question_column instruction --answer_column output"),
        (
            {"the question": "q", "gold_answers": "a", "id": 1},
            "--question_column 'the question' --answer_column gold_answers",
        ),
        (
            {"img": "x.png", "Query": "q", "Label": 1},
            "--question_column Query --answer_column Label --image_column img",
        ),
    ],
)
def test_columns_that_fit_no_format_name_the_command_that_helps(row, command):
    with pytest.raises(UserError) as caught:
        detect([row])
    assert caught.value.fix.endswith(f"vlm-tuning convert rows.json rows_converted.jsonl {command}")


def test_a_column_of_messages_under_another_name_is_named():
    with pytest.raises(UserError) as caught:
        detect([{"dialog": chat("q")}])
    assert caught.value.fix == "Set dataset_text_field dialog."


@pytest.mark.parametrize("padding", [True, False])
def test_base64_in_the_alphabet_of_addresses_is_read(padding):
    stream = io.BytesIO()
    Image.frombytes("RGB", (40, 40), bytes(range(256)) * 18 + bytes(192)).save(stream, "PNG")
    stored = base64.urlsafe_b64encode(stream.getvalue()).decode()
    assert "-" in stored or "_" in stored
    stored = stored if padding else stored.rstrip("=")
    for value in (stored, f"data:image/png;base64,{stored}"):
        assert load_image(value, None, "row 0").size == (40, 40)
