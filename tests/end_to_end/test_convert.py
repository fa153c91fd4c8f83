"""`vlm-tuning convert`: what is trained stays what it was, images stay the same bytes, and nothing is left half."""

import base64
import http.server
import io
import json
import threading
from dataclasses import fields

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from pyarrow import parquet
from tiny_models import build_processor

from tuning import cli
from tuning.commands import convert
from tuning.data.chat_template import ChatFormat
from tuning.data.encode import Encoder
from tuning.data.images import ImageRules
from tuning.data.open_source import open_source
from tuning.data.sources import Source

IMAGE = {"type": "image"}
SUFFIXES = (".jsonl", ".parquet")


def text(words: str) -> dict:
    return {"type": "text", "text": words}


def chat(content, answer="It is red.") -> list[dict]:
    return [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]


def llava(words: str, answer="It is red.") -> list[dict]:
    return [{"from": "human", "value": words}, {"from": "gpt", "value": answer}]


def picture(seed: int, kind: str, **options) -> bytes:
    """Noise, so that no two pictures and no second encoding of one are the same."""
    pixels = np.random.default_rng(seed).integers(0, 255, (24 + 8 * seed, 40, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, kind, **options)
    return stream.getvalue()


def turned() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return picture(1, "JPEG", quality=60, exif=exif)


PICTURES = {"a.jpg": turned(), "b.png": picture(2, "PNG"), "c.webp": picture(3, "WEBP"), "liar.png": picture(4, "GIF")}
A, B, C, LIAR = PICTURES
IN_BASE64 = {name: base64.b64encode(data).decode() for name, data in PICTURES.items()}

FORMS = {
    "documented": [
        {"messages": chat([IMAGE, text("Which?"), IMAGE]), "images": [A, B]},
        {"messages": [{"role": "system", "content": "Be brief."}, *chat("No image.")], "images": []},
    ],
    "without any image": [{"messages": chat("Which? <image>"), "images": []}],
    "one image, not a list": [{"messages": chat([IMAGE, text("Which?")]), "image": LIAR}],
    "image_url": [
        {"messages": chat([text("Which?"), {"type": "image_url", "image_url": {"url": url}}])}
        for url in (f"data:image/jpeg;base64,{IN_BASE64[A]}", B)
    ],
    "images inside and beside": [
        {"messages": chat([IMAGE, {"type": "image", "path": B}, text("Which?"), IMAGE]), "images": [A, C]}
    ],
    "base64": [{"messages": chat([{"type": "image", "base64": IN_BASE64[C]}, text("Which?")])}],
    "LLaVA": [
        {"image": A, "conversations": [*llava("<image>\nWhich?"), *llava("And now?", "It is blue.")]},
        {"image": None, "conversations": llava("Which?")},
    ],
    "ShareGPT": [{"images": [A, B], "conversations": llava("<image>One.\n<image>\nTwo.")}],
    "strings with marks": [
        {"messages": chat("<image>What is it?"), "images": [A]},
        {"messages": chat("<image>\n<image>\nDiffer?"), "images": [B, C]},
    ],
    "prompt and completion": [
        {"prompt": "Which?", "completion": "It is red.", "images": [A, B]},
        {"prompt": "Why?", "completion": "Because.", "images": []},
    ],
    "prompt and completion as messages": [
        {
            "prompt": [{"role": "system", "content": "s"}, {"role": "user", "content": [IMAGE, text("Which?")]}],
            "completion": [{"role": "assistant", "content": "Red."}, *chat("Sure?", "Yes.")],
            "images": [A],
        }
    ],
}


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    processor = build_processor("granite_vision")
    return Encoder(processor, ChatFormat(processor, date_string="01 Jan 2026"), max_seq_length=2048)


@pytest.fixture
def folder(tmp_path):
    """A folder with the pictures; `out` is another one beside it."""
    (tmp_path / "data").mkdir()
    (tmp_path / "out").mkdir()
    for name, data in PICTURES.items():
        (tmp_path / "data" / name).write_bytes(data)
    return tmp_path / "data"


def write_rows(file, rows):
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def run(*words, expect=0) -> None:
    assert cli.main(["convert", *map(str, words)]) == expect


def open_rows(path) -> Source:
    return open_source(str(path), text_field="messages", image_field="images")


def stored_images(file) -> list[list[bytes]]:
    """The encoded images of every row, whichever way they are stored."""
    return [
        [
            (file.parent / image).read_bytes() if isinstance(image, str) else image["bytes"]
            for image in row.columns["images"]
        ]
        for row in open_rows(file)
    ]


def assert_trained_alike(encoder, before, after) -> None:
    before, after = open_rows(before), open_rows(after)
    assert len(before) == len(after)
    for one, other in zip(before, after, strict=True):
        first, second = encoder.encode(one), encoder.encode(other)
        expected, found = ({**sample.sequence, **sample.images} for sample in (first, second))
        assert expected.keys() == found.keys()
        for name, tensor in expected.items():
            assert torch.equal(tensor, found[name]), name


def entries(folder) -> set[str]:
    return {path.name for path in folder.iterdir()}


# --- every form ---


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("rows", FORMS.values(), ids=FORMS)
def test_every_form_is_trained_as_before(encoder, folder, suffix, rows):
    before = write_rows(folder / "rows.jsonl", rows)
    after = folder.parent / "out" / f"rows{suffix}"
    run(before, after)
    assert_trained_alike(encoder, before, after)
    for row in open_rows(after):
        assert set(row.columns) == {"messages", "images"}
        assert all(part["type"] in ("text", "image") for m in row.columns["messages"] for part in m["content"])
        assert row.format.name == "messages"
        assert not row.format.image_strings


@pytest.mark.parametrize("before_suffix", SUFFIXES)
@pytest.mark.parametrize("after_suffix", SUFFIXES)
def test_what_was_converted_converts_again(encoder, folder, before_suffix, after_suffix):
    rows = write_rows(folder / "rows.jsonl", FORMS["images inside and beside"] * 3)
    once, twice = folder.parent / "out" / f"once{before_suffix}", folder.parent / "out" / f"twice{after_suffix}"
    run(rows, once)
    run(once, twice)
    assert_trained_alike(encoder, rows, twice)
    assert stored_images(twice) == [[PICTURES[name] for name in (A, B, C)]] * 3


def test_a_folder_of_forms_becomes_one_file(encoder, folder, capsys):
    for name in ("LLaVA", "ShareGPT", "documented"):
        write_rows(folder / f"{name}.jsonl", FORMS[name])
    after = folder.parent / "out" / "rows.jsonl"
    run(folder, after)
    assert_trained_alike(encoder, folder, after)
    said = capsys.readouterr().out
    assert said.count("Rows: conversations with from and value in 'conversations', images in 'image',") == 1
    assert "Rows: in the documented format already." in said
    assert f"5 rows written to {after}." in said


# --- images ---


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_images_keep_their_bytes(folder, suffix):
    before = write_rows(folder / "rows.jsonl", [{"messages": chat([IMAGE] * 4), "images": list(PICTURES)}])
    after = folder.parent / "out" / f"rows{suffix}"
    run(before, after)
    assert stored_images(after) == [list(PICTURES.values())]


def test_copies_are_named_by_row_and_number_and_what_they_are(folder):
    rows = [{"messages": chat("q"), "images": []}, {"messages": chat([IMAGE] * 4), "images": list(PICTURES)}]
    after = folder.parent / "out" / "rows.jsonl"
    run(write_rows(folder / "rows.jsonl", rows), after)
    names = ["1_0.jpeg", "1_1.png", "1_2.webp", "1_3.gif"]
    assert json.loads(after.read_text().splitlines()[1])["images"] == [f"rows_images/{name}" for name in names]
    assert entries(after.parent) == {"rows.jsonl", "rows_images"}
    assert entries(after.parent / "rows_images") == set(names)


def test_files_below_the_folder_of_out_stay_where_they_are(folder, encoder):
    (folder / "deep").mkdir()
    (folder / "deep" / "d.png").write_bytes(PICTURES[B])
    rows = [{"messages": chat([IMAGE] * 3), "images": ["deep/d.png", str(folder / A), f"data:;base64,{IN_BASE64[B]}"]}]
    before, after = write_rows(folder / "rows.jsonl", rows), folder / "after.jsonl"
    run(before, after)
    assert json.loads(after.read_text())["images"] == ["deep/d.png", A, "after_images/0_2.png"]
    assert_trained_alike(encoder, before, after)


def test_no_folder_of_images_where_none_is_copied(folder):
    run(write_rows(folder / "rows.jsonl", FORMS["documented"]), folder / "after.jsonl")
    assert entries(folder) == {*PICTURES, "rows.jsonl", "after.jsonl"}


def test_a_link_out_of_the_folder_is_copied(folder):
    """Training would refuse to follow it."""
    out = folder.parent / "out"
    (out / "link.png").symlink_to(folder / B)
    rows = write_rows(out / "rows.jsonl", [{"messages": chat([IMAGE, text("q")]), "images": ["link.png"]}])
    run(rows, out / "after.jsonl", expect=1)
    run(rows, out / "after.jsonl", "--allow_outside_paths", "true")
    assert json.loads((out / "after.jsonl").read_text())["images"] == ["after_images/0_0.png"]


def test_stored_bytes_become_files_and_files_become_bytes(folder, encoder):
    run(write_rows(folder / "rows.jsonl", FORMS["documented"]), folder / "rows.parquet")
    run(folder / "rows.parquet", folder.parent / "out" / "rows.jsonl")
    assert stored_images(folder / "rows.parquet") == [[PICTURES[A], PICTURES[B]], []]
    assert stored_images(folder.parent / "out" / "rows.jsonl") == [[PICTURES[A], PICTURES[B]], []]
    assert_trained_alike(encoder, folder / "rows.parquet", folder.parent / "out" / "rows.jsonl")


def test_image_options_are_heeded(folder):
    rows = write_rows(folder.parent / "rows.jsonl", [{"chat": chat([IMAGE, text("q")]), "photo": A}])
    out, fields = folder.parent / "out", ["--dataset_text_field", "chat", "--dataset_image_field=photo"]
    run(rows, out / "0.parquet", *fields, expect=1)
    run(rows, out / "1.parquet", *fields, "--image_folder", folder)
    run(rows, out / "2.parquet", *fields, "--image_folder", folder, "--max_image_megabytes", "0.0001", expect=1)
    run(rows, out / "3.parquet", *fields, "--image_folder", folder, "--max_image_pixels", "99", expect=1)
    write_rows(folder.parent / "rows.jsonl", [{"chat": chat([IMAGE, text("q")]), "photo": f"../data/{A}"}])
    run(rows, out / "4.parquet", *fields, expect=1)
    run(rows, out / "5.parquet", *fields, "--image_folder", out, "--allow_outside_paths", "true")
    assert entries(out) == {"1.parquet", "5.parquet"}


def test_remote_images_are_fetched_once_allowed(folder):
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.end_headers()
            self.wfile.write(PICTURES[C])

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}/picture"
    rows = [{"messages": chat([{"type": "image_url", "image_url": {"url": url}}, text("q")])}]
    before, after = write_rows(folder / "rows.jsonl", rows), folder.parent / "out" / "rows.jsonl"
    try:
        run(before, after, expect=1)
        run(before, after, "--allow_remote_images", "true")
    finally:
        server.shutdown()
        server.server_close()
    assert (after.parent / "rows_images" / "0_0.webp").read_bytes() == PICTURES[C]


# --- parquet ---


def test_parquet_is_read_by_datasets_as_messages_and_images(folder):
    after = folder.parent / "out" / "rows.parquet"
    run(write_rows(folder / "rows.jsonl", FORMS["documented"]), after)
    rows = datasets.load_dataset("parquet", data_files=[str(after)], split="train")
    assert rows.features == convert.FEATURES
    assert [image.size for image in rows[0]["images"]] == [(32, 40), (40, 40)]  # `datasets` turns them too
    system = {name: value for name, value in rows[1]["messages"][0].items() if value is not None}
    assert system == {
        "role": "system",
        "content": [text("Be brief.")],
    }  # the other keys are for tool calls and the like


@pytest.mark.parametrize(("limit", "value"), [("CHUNK_ROWS", 4), ("CHUNK_BYTES", 4 * len(PICTURES[B]))])
def test_parquet_is_written_in_groups(folder, monkeypatch, limit, value):
    monkeypatch.setattr(convert, limit, value)
    after = folder.parent / "out" / "rows.parquet"
    rows = [{"messages": chat([IMAGE, text(f"Number {n}?")]), "images": [B]} for n in range(10)]
    run(write_rows(folder / "rows.jsonl", rows), after)
    metadata = parquet.ParquetFile(after).metadata
    assert [metadata.row_group(n).num_rows for n in range(metadata.num_row_groups)] == [4, 4, 2]
    asked = [row.columns["messages"][0]["content"][1]["text"] for row in open_rows(after)]
    assert asked == [f"Number {n}?" for n in range(10)]


# --- errors ---

GOOD = {"messages": chat([IMAGE, text("q")]), "images": [A]}
BAD = {
    "role": ({"messages": [{"role": "wizard", "content": "q"}], "images": []}, "field 'messages', message 0: unknown"),
    "missing image": ({**GOOD, "images": ["none.png"]}, "field 'images', image 0: there is no image file"),
    "broken image": ({**GOOD, "images": ["rows.jsonl"]}, "field 'images', image 0: the image cannot be read"),
    "too many images": (
        {**GOOD, "images": [A, B]},
        "fields 'messages' and 'images': the messages have 1 image placeholders, but there are 2 images",
    ),
    "image elsewhere": ({**GOOD, "images": ["../outside.png"]}, "lies outside the folder"),
}


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize(("row", "message"), BAD.values(), ids=BAD)
def test_a_bad_row_is_named_and_nothing_is_left(folder, capsys, suffix, row, message):
    (folder.parent / "outside.png").write_bytes(PICTURES[B])
    before = write_rows(folder / "rows.jsonl", [GOOD, GOOD, row])
    run(before, folder.parent / "out" / f"rows{suffix}", expect=1)
    error = capsys.readouterr().err
    assert f"Error: {before}, row 2" in error
    assert message in error
    assert "Traceback" not in error
    assert entries(folder.parent / "out") == set()


@pytest.mark.parametrize("failure", [KeyboardInterrupt, OSError(28, "No space left on device"), RuntimeError("bug")])
@pytest.mark.parametrize("suffix", SUFFIXES)
def test_nothing_is_left_of_a_run_that_is_broken_off(folder, monkeypatch, capsys, suffix, failure):
    class Kind(convert.WRITERS[suffix]):
        def finish(self):
            raise failure

    monkeypatch.setitem(convert.WRITERS, suffix, Kind)
    before = write_rows(folder / "rows.jsonl", FORMS["base64"])
    code = {KeyboardInterrupt: 130, OSError: 1}.get(failure if isinstance(failure, type) else type(failure), 203)
    run(before, folder.parent / "out" / f"rows{suffix}", expect=code)
    assert entries(folder.parent / "out") == set()
    if code == 1:
        assert "cannot be written: No space left on device" in capsys.readouterr().err


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_out_is_never_overwritten(folder, capsys, suffix):
    before, after = write_rows(folder / "rows.jsonl", FORMS["base64"]), folder.parent / "out" / f"rows{suffix}"
    after.write_text("precious")
    run(before, after, expect=1)
    assert "this path exists already" in capsys.readouterr().err
    assert after.read_text() == "precious"
    assert entries(after.parent) == {after.name}
    run(before, before, expect=1)


def test_a_folder_of_images_is_never_mixed_with_another(folder, capsys):
    before, after = write_rows(folder / "rows.jsonl", FORMS["base64"]), folder.parent / "out" / "rows.jsonl"
    (after.parent / "rows_images").mkdir()
    run(before, after, expect=1)
    assert f"{after.parent / 'rows_images'}: this path exists already" in capsys.readouterr().err
    assert entries(after.parent) == {"rows_images"}
    assert entries(after.parent / "rows_images") == set()


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_the_answers_of_a_prompt_stay_context(folder, suffix):
    row = {"prompt": [*chat("q"), {"role": "user", "content": "Sure?"}], "completion": "Yes.", "images": []}
    before, after = write_rows(folder / "rows.jsonl", [row]), folder.parent / "out" / f"rows{suffix}"
    run(before, after)
    (old,), (new,) = (
        [read.format.read(read.columns, "row").messages for read in open_rows(path)] for path in (before, after)
    )
    assert [message.get("weight") for message in new] == [None, 0, None, None]
    assert new == old


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_calls_thoughts_tools_and_variables_are_converted(folder, suffix):
    call = {"id": "call00001", "type": "function", "function": {"name": "look", "arguments": {"what": ["it"], "n": 2}}}
    messages = [
        {"role": "user", "content": "Which?"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "red", "tool_call_id": "call00001", "name": "look"},
        {"role": "assistant", "content": "Red.", "reasoning_content": "Hm."},
    ]
    tools = [{"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}]
    row = {"messages": messages, "images": [], "tools": tools, "chat_template_kwargs": {"enable_thinking": False}}
    plain = {"messages": chat("q"), "images": []}
    before, after = write_rows(folder / "rows.jsonl", [row, plain]), folder.parent / "out" / f"rows{suffix}"
    run(before, after)
    old, new = ([read.format.read(read.columns, "row") for read in open_rows(path)] for path in (before, after))
    assert new == old
    assert new[0].tools == tools
    assert new[0].messages[1]["tool_calls"] == [call]


def test_a_key_without_a_place_in_parquet_is_refused(folder, capsys):
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "refusal": "No."}]
    before = write_rows(folder / "rows.jsonl", [{"messages": messages, "images": []}])
    run(before, folder.parent / "out" / "rows.parquet", expect=1)
    assert (
        "messages have the key 'refusal', for which .parquet has no column here. Write a .jsonl"
        in capsys.readouterr().err
    )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "2 problems:\n  - IN: is required\n  - OUT: is required"),
        (["rows.jsonl"], "OUT: is required"),
        (["rows.jsonl", "out.csv"], "cannot write .csv files. Use .jsonl or .parquet."),
        (["rows.jsonl", "out"], "cannot write this kind of files"),
        (["none.jsonl", "out.jsonl"], "data_path: none.jsonl does not exist"),
        (["rows.jsonl", "none/out.jsonl"], "cannot be written: No such file or directory"),
        (["rows.jsonl", "out.jsonl", "--allow_outside_paths", "maybe"], "expected true or false, got 'maybe'"),
        (["rows.jsonl", "out.jsonl", "--max_image_megabytes", "many"], "expected a number, got 'many'"),
        (["rows.jsonl", "out.jsonl", "--model_name_or_path", "x"], "model_name_or_path: unknown option"),
        (["rows.jsonl", "out.jsonl", "more.jsonl"], "'more.jsonl' is neither a flag nor the value of one"),
        (["--dataset_image_field", "photo", "rows.jsonl", "out.jsonl"], "there is no column 'photo'"),
    ],
)
def test_wrong_words_are_the_users_to_mend(folder, monkeypatch, capsys, words, message):
    monkeypatch.chdir(folder)
    write_rows(folder / "rows.jsonl", [GOOD])
    before = entries(folder)
    run(*words, expect=1)
    error = capsys.readouterr().err
    assert "\nError: " in f"\n{error}"
    assert "Traceback" not in error
    assert message in error
    assert entries(folder) == before


def test_help_lists_every_option(capsys):
    run("--help")
    text = capsys.readouterr().out
    assert text.startswith("usage: vlm-tuning convert IN OUT")
    names = {entry.name for entry in fields(convert.ConvertArguments)} - {"data_path", "output"}
    assert names
    assert all(f"--{name} " in text for name in names)
    assert "  IN " in text
    assert "  OUT " in text


def test_rules_default_to_those_of_training():
    assert ImageRules() == convert.image_rules(convert.ConvertArguments())
