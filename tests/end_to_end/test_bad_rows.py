"""Every way a row can be wrong ends a run with one sentence that names file, row and field, and leaves nothing behind.

Each case is a data file whose second row is the bad one.
"""

import base64
import io
import json
import os
import random
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from tuning import sft_trainer

ROOT = Path(__file__).parents[2]
PART = {"type": "image"}
SUFFIXES = ("jsonl", "parquet")


@dataclass(frozen=True)
class Case:
    """A good row, a bad one, the field that is to blame, and what the message says. `options`: of the run."""

    good: dict[str, Any]
    bad: dict[str, Any]
    field: str
    says: str
    options: dict[str, Any] = field(default_factory=dict)
    suffixes: tuple[str, ...] = SUFFIXES


def text(words) -> dict:
    return {"type": "text", "text": words}


# --- conversations, in four forms ---


def in_parts(*turns, images=("good.png",)) -> dict:
    """A row of messages whose content is a list of parts; a turn is (role, content)."""
    shaped = [{"role": role, "content": [text(said)] if isinstance(said, str) else said} for role, said in turns]
    return {"messages": shaped, "images": list(images)}


def in_strings(*turns, images=()) -> dict:
    return {"messages": [{"role": role, "content": said} for role, said in turns], "images": list(images)}


def in_llava(*turns, images=("good.png",)) -> dict:
    return {"conversations": [{"from": role, "value": said} for role, said in turns], "images": list(images)}


def in_pair(prompt, completion, images=("good.png",)) -> dict:
    return {"prompt": prompt, "completion": completion, "images": list(images)}


ASKED = ("user", [PART, text("Which colour is it?")])
GOOD_PARTS = in_parts(ASKED, ("assistant", "Red."))
GOOD_STRINGS = in_strings(("user", "How many are there?"), ("assistant", "Three."))
GOOD_LLAVA = in_llava(("human", "<image>\nWhich colour is it?"), ("gpt", "Red."))
GOOD_PAIR = in_pair("<image>Which colour is it?", "Red.")
LONG = "Very much so. " * 40
SHORT_ROWS = {"max_seq_length": 60}
FEW_MESSAGES = {"max_messages_per_row": 3}
UNSYSTEMATIC = {  # a template that refuses system messages
    "chat_template": "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('No system role!') }}"
    "{% endif %}{{ m.role }}: {% for p in m.content %}{% if p.type == 'image' %}<image>{% else %}{{ p.text }}"
    "{% endif %}{% endfor %}</s>{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
}
JSON = ("jsonl",)  # Arrow's files hold one type a column

PARTS = {
    "messages are null": ({**GOOD_PARTS, "messages": None}, "expected a list of messages, found NoneType"),
    "no messages": (in_parts(), "expected a list of messages, found list []"),
    "a message is null": ({**GOOD_PARTS, "messages": [None]}, "message 0: expected an object with role and content"),
    "an unknown role": (in_parts(ASKED, ("bot", "Red.")), "message 1: unknown role 'bot'. Use one of system, user,"),
    "a role in capitals": (in_parts(ASKED, ("Assistant", "Red.")), "message 1: unknown role 'Assistant'"),
    "no role": (in_parts((None, "Which?"), ("assistant", "Red.")), "message 0: unknown role None"),
    "no content": (in_parts(("user", None), ("assistant", "Red.")), "message 0: content must be text or a list"),
    "empty content": (in_parts(("user", []), ("assistant", "Red.")), "message 0: the content is empty"),
    "a part is null": (in_parts(("user", [None]), ("assistant", "Red.")), "message 0, part 0: expected an object"),
    "an unknown type of part": (
        in_parts(("user", [text("What?"), {"type": "video"}]), ("assistant", "Red.")),
        "message 0, part 1: unknown part type 'video'. Use one of text, image, image_url.",
    ),
    "a part without type": (in_parts(("user", [{"text": "What?"}]), ("assistant", "Red.")), "unknown part type None"),
    "a text part without text": (
        in_parts(("user", [{"type": "text"}]), ("assistant", "Red.")),
        "message 0, part 0: a text part needs text, found NoneType",
    ),
    "an empty answer": (in_parts(ASKED, ("assistant", "")), "message 1: the assistant's answer is empty"),
    "an answer of blanks": (in_parts(ASKED, ("assistant", " \n ")), "message 1: the assistant's answer is empty"),
    "an answer that is an image": (
        in_parts(ASKED, ("assistant", [PART])),
        "message 1: the assistant's answer is empty",
    ),
    "one empty answer of two": (
        in_parts(ASKED, ("assistant", "Red."), ("user", "Sure?"), ("assistant", "")),
        "message 3: the assistant's answer is empty",
    ),
    "no assistant": (in_parts(ASKED), "has no assistant turn, so there is nothing to train"),
    "odd characters": (in_parts(ASKED, ("assistant", "Red\U000f0000.")), "the text has private-use characters"),
}
PARTS_OF_TWO_FIELDS = {
    "more images than parts": (
        in_parts(ASKED, ("assistant", "Red."), images=["good.png", "good.png"]),
        "have 1 image placeholders, but there are 2 images",
    ),
    "more parts than images": (
        in_parts(("user", [PART, PART, text("?")]), ("assistant", "Red.")),
        "have 2 image placeholders, but there are 1 images",
    ),
    "no image for a part": (in_parts(ASKED, ("assistant", "Red."), images=[]), "but there are 0 images"),
}
OF_ANOTHER_TYPE = {
    "messages are text": ({**GOOD_PARTS, "messages": "hello"}, "expected a list of messages, found str 'hello'"),
    "messages are a number": ({**GOOD_PARTS, "messages": 7}, "expected a list of messages, found int 7"),
    "messages are an object": ({**GOOD_PARTS, "messages": {"role": "user"}}, "expected a list of messages, found dict"),
    "messages are texts": ({**GOOD_PARTS, "messages": ["a", "b"]}, "message 0: expected an object with role"),
    "content is a number": ({**GOOD_PARTS, "messages": [{"role": "user", "content": 3}]}, "list of parts, found int 3"),
    "content is texts": (
        {**GOOD_PARTS, "messages": [{"role": "user", "content": ["q"]}]},
        "message 0, part 0: expected an object with a type, found str 'q'",
    ),
    "text is a number": (
        in_parts(("user", [text(7)]), ("assistant", "a")),
        "part 0: a text part needs text, found int 7",
    ),
    "role is a number": (in_parts((1, "q"), ("assistant", "a")), "message 0: unknown role 1"),
    "role is a list": (in_parts((["user"], "q"), ("assistant", "a")), "message 0: unknown role ['user']"),
    "from is a list": ({**GOOD_PARTS, "messages": [{"from": ["a"], "value": "b"}]}, "message 0: unknown role ['a']"),
}
STRINGS = {
    "an unknown role": (in_strings(("user", "q"), ("wizard", "a")), "message 1: unknown role 'wizard'"),
    "no role": (in_strings((None, "q"), ("assistant", "a")), "message 0: unknown role None"),
    "no content": (
        in_strings(("user", "q"), ("assistant", None)),
        "message 1: content must be text or a list of parts",
    ),
    "an empty answer": (in_strings(("user", "q"), ("assistant", "")), "message 1: the assistant's answer is empty"),
    "no assistant": (in_strings(("user", "q"), ("user", "a")), "has no assistant turn"),
    "no messages": (in_strings(), "expected a list of messages, found list []"),
}
LLAVA = {
    "an unknown role": (in_llava(("human", "q"), ("wizard", "a"), images=[]), "message 1: unknown role 'wizard'"),
    "no value": (in_llava(("human", None), ("gpt", "a"), images=[]), "message 0: content must be text"),
    "an empty answer": (in_llava(("human", "q"), ("gpt", ""), images=[]), "message 1: the assistant's answer is empty"),
    "no assistant": (in_llava(("human", "q"), images=[]), "has no assistant turn"),
    "no messages": (in_llava(images=[]), "expected a list of messages, found list []"),
}
LLAVA_OF_TWO_FIELDS = {
    "more images than marks": (
        in_llava(("human", "<image>q"), ("gpt", "a"), images=["good.png"] * 3),
        "have 1 image placeholders, but there are 3 images",
    ),
    "more marks than images": (in_llava(("human", "<image><image>q"), ("gpt", "a")), "have 2 image placeholders"),
}
PAIR = {
    "no prompt": (in_pair(None, "Red.", images=[]), "prompt", "field 'prompt': the field is empty"),
    "an empty prompt": (in_pair("", "Red.", images=[]), "prompt", "field 'prompt': the field is empty"),
    "no completion": (in_pair("q", None, images=[]), "completion", "field 'completion': the field is empty"),
    "an empty completion": (in_pair("q", "", images=[]), "completion", "field 'completion': the field is empty"),
    "a completion of blanks": (
        in_pair("q", "  ", images=[]),
        "completion",
        "message 1: the assistant's answer is empty",
    ),
}


def _conversation_cases():
    two_fields = "fields 'messages' and 'images'"
    yield from (
        (f"parts, {name}", Case(GOOD_PARTS, bad, "field 'messages'", says)) for name, (bad, says) in PARTS.items()
    )
    for name, (bad, says) in PARTS_OF_TWO_FIELDS.items():
        yield f"parts, {name}", Case(GOOD_PARTS, bad, two_fields, says)
    for name, (bad, says) in OF_ANOTHER_TYPE.items():
        yield f"parts, {name}", Case(GOOD_PARTS, bad, "field 'messages'", says, suffixes=JSON)
    for name, (bad, says) in STRINGS.items():
        yield f"strings, {name}", Case(GOOD_STRINGS, bad, "field 'messages'", says)
    for name, (bad, says) in LLAVA.items():
        yield f"llava, {name}", Case(GOOD_LLAVA, bad, "field 'conversations'", says)
    for name, (bad, says) in LLAVA_OF_TWO_FIELDS.items():
        yield f"llava, {name}", Case(GOOD_LLAVA, bad, "fields 'conversations' and 'images'", says)
    for name, (bad, blamed, says) in PAIR.items():
        yield f"pair, {name}", Case(GOOD_PAIR, bad, f"'{blamed}'", says)
    yield (
        "pair, more marks than images",
        Case(GOOD_PAIR, in_pair("<image><image>q", "a"), "fields 'prompt' and 'images'", "have 2 image placeholders"),
    )
    for format, good, make, asks, answers, name in (
        ("parts", GOOD_PARTS, in_parts, "user", "assistant", "messages"),
        ("strings", GOOD_STRINGS, in_strings, "user", "assistant", "messages"),
        ("llava", GOOD_LLAVA, in_llava, "human", "gpt", "conversations"),
    ):
        long = make((asks, "q"), (answers, LONG), images=[])
        many = make(*[(asks, "q"), (answers, "a")] * 2, images=[])
        ruled = make(("system", "Be brief."), (asks, "q"), (answers, "a"), images=[])
        blamed = f"field '{name}'"
        yield f"{format}, too long", Case(good, long, blamed, "tokens are more than max_seq_length 60", SHORT_ROWS)
        yield (
            f"{format}, too many messages",
            Case(good, many, blamed, "4 messages are more than max_messages_per_row 3", FEW_MESSAGES),
        )
        yield (
            f"{format}, refused by the template",
            Case(good, ruled, blamed, "the chat template refuses this conversation: No system role!", UNSYSTEMATIC),
        )
    yield (
        "pair, too long",
        Case(GOOD_PAIR, in_pair("q", LONG, images=[]), "field 'completion'", "max_seq_length 60", SHORT_ROWS),
    )


# --- images, as files and as stored bytes ---


def noise(width=64, height=64) -> Image.Image:
    """A picture that no codec makes small."""
    return Image.frombytes("RGB", (width, height), random.Random(0).randbytes(3 * width * height))


def encoded(codec: str, image: Image.Image) -> bytes:
    stream = io.BytesIO()
    image.save(stream, codec, **({"lossless": True} if codec == "WEBP" else {}))
    return stream.getvalue()


CODECS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
FEW_PIXELS = {"max_image_pixels": 2000}
FEW_BYTES = {"max_image_megabytes": 0.001}
BROKEN = {  # what is done to a file, and what is said of it
    "truncated": (lambda data: data[: len(data) // 2], "the image cannot be read: ", {}),
    "only a header": (lambda data: data[:12], "the image cannot be read: ", {}),
    "too many pixels": (lambda data: data, "has 64×64 pixels, more than max_image_pixels 2000", FEW_PIXELS),
    "too large a file": (lambda data: data, "MB, more than max_image_megabytes 0.001", FEW_BYTES),
}


def with_image(stored) -> dict:
    return in_parts(ASKED, ("assistant", "Red."), images=[stored])


def _image_cases():
    place = "field 'images', image 0"
    for codec in CODECS:
        whole = encoded(codec, noise())
        for name, (change, says, options) in BROKEN.items():
            data = change(whole)
            uri = f"data:image/{codec.lower()};base64," + base64.b64encode(data).decode()
            yield f"file, {codec}, {name}", Case(GOOD_PARTS, with_image({"file": data}), place, says, options, JSON)
            yield f"bytes, {codec}, {name}", Case(GOOD_PARTS, with_image(data), place, says, options, ("parquet",))
            if name == "truncated":
                yield f"data URI, {codec}, {name}", Case(GOOD_PARTS, with_image(uri), place, says, options, JSON)
    unknown = "the image cannot be read: it is not in a known image format"
    outside = "lies outside the folder"
    for name, stored, says in (
        ("a file of no bytes", {"file": b""}, unknown),
        ("a file of text", {"file": b"<html>404</html>"}, unknown),
        ("no such file", "none.png", "there is no image file"),
        ("no such file elsewhere", "/none/of/these.png", "there is no image file /none/of/these.png"),
        ("a folder", "pictures", "there is no image file"),
        ("no path", "", "expected an image, found "),
        ("out of the folder by dots", "../outside.png", outside),
        ("out of the folder by dots within", "pictures/../../outside.png", outside),
        ("out of the folder by an absolute path", "{outside}", outside),
        ("out of the folder by an address of a file", "file://{outside}", outside),
        ("out of the folder by a link", "link.png", outside),
        (
            "on the network",
            "http://localhost/a.png",
            "on the network: http://localhost/a.png. Download the images, or set",
        ),
        ("on the network, encrypted", "https://localhost/a.png", "or set allow_remote_images true"),
        ("a data URI that is not base64", "data:image/png;base64,%%%", unknown),
        ("a data URI without data", "data:image/png;base64,", unknown),
        ("a data URI of text", "data:text/plain;base64,aGVsbG8=", unknown),
        ("base64 of text", base64.b64encode(b"no picture " * 20).decode(), unknown),
        ("base64 with a fault", base64.b64encode(b"no picture " * 20).decode() + "%", "there is no image file"),
    ):
        yield name, Case(GOOD_PARTS, with_image(stored), place, says)
    for name, stored, says in (
        ("a number", 7, "expected an image, found int '7'"),
        ("a list", ["good.png"], "expected an image, found list"),
        ("an object", {"colour": "red"}, "expected an image, found dict"),
        ("nothing", None, "expected an image, found NoneType"),
    ):
        blamed = place if stored is not None else "images"
        yield f"an image that is {name}", Case(GOOD_PARTS, with_image(stored), blamed, says, suffixes=JSON)
    empty = with_image({"bytes": b"", "path": None})
    yield "an image of no bytes", Case(GOOD_PARTS, empty, place, "expected an image, found dict", suffixes=("parquet",))
    for name, path in (("dots", "../good.png"), ("an absolute path", "{outside}")):
        says = "lies outside image_folder"
        yield (
            f"out of image_folder by {name}",
            Case(with_image("inside.png"), with_image(path), place, says, {"image_folder": "pictures"}),
        )


CASES = dict(_conversation_cases()) | dict(_image_cases())
RUNS = [(name, suffix) for name, case in CASES.items() for suffix in case.suffixes]


@pytest.fixture
def folder(tmp_path):
    """A data folder with two good pictures, and one beside it that must not be read."""
    (tmp_path / "data" / "pictures").mkdir(parents=True)
    Image.new("RGB", (40, 40), "red").save(tmp_path / "data" / "good.png")
    Image.new("RGB", (40, 40), "red").save(tmp_path / "data" / "pictures" / "inside.png")
    Image.new("RGB", (40, 40), "red").save(tmp_path / "outside.png")
    (tmp_path / "data" / "link.png").symlink_to(tmp_path / "outside.png")
    return tmp_path / "data"


def write(case: Case, suffix: str, folder: Path) -> tuple[Path, dict[str, Any]]:
    """The data file of a case with its pictures, and the run's options with paths in them."""
    data = folder / f"rows.{suffix}"
    rows = [{**row, "images": [_place(stored, folder, suffix) for stored in row["images"]]} for row in _rows(case)]
    if suffix == "jsonl":
        data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    else:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), data)
    images = case.options.get("image_folder")
    # LLaVA-1.5 alone would take the first image and let the others go before it counts.
    place = {"image_folder": str(folder / images)} if images else {}
    return data, {"max_images_per_sample": 8, **case.options, **place}


def _rows(case: Case) -> list[dict]:
    return [case.good, case.bad, case.good]


def _place(stored: Any, folder: Path, suffix: str) -> Any:
    if isinstance(stored, dict) and isinstance(stored.get("file"), bytes):
        (folder / "broken.png").write_bytes(stored["file"])
        stored = "broken.png"
    if isinstance(stored, str):
        stored = stored.replace("{outside}", str(folder.parent / "outside.png"))
    if suffix == "parquet" and not isinstance(stored, dict):  # as `datasets` stores images
        is_path = isinstance(stored, str)
        return {"bytes": None if is_path else stored, "path": stored if is_path else None}
    return stored


def flags_of(options: dict[str, Any]) -> list[str]:
    return [f"--{name}={value}" for name, value in options.items()]


def assert_named(stderr: str, case: Case, data: Path) -> None:
    """One message, at the end; nothing but progress bars before it."""
    assert "Traceback" not in stderr
    message = stderr.splitlines()[-1]
    assert message.startswith(f"Error: {data}, row 1")
    assert case.field in message
    assert case.says in message
    assert stderr.count("Error: ") == 1


@pytest.mark.parametrize(("name", "suffix"), RUNS, ids=[f"{name} - {suffix}" for name, suffix in RUNS])
def test_a_bad_row_ends_the_run_in_one_sentence(name, suffix, folder, make_options, tmp_path, capsys):
    case = CASES[name]
    data, options = write(case, suffix, folder)
    before = sorted(tmp_path.rglob("*"))
    code = sft_trainer.main(flags_of(make_options("llava15", training_data_path=data, **options)))
    assert_named(capsys.readouterr().err, case, data)
    assert code == 1
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("name", ["out of the folder by an absolute path", "out of the folder by dots"])
def test_what_allows_an_image_elsewhere_is_said_and_works(name, folder, make_options, tmp_path, capsys):
    data, _ = write(CASES[name], "jsonl", folder)
    options = make_options("llava15", training_data_path=data, max_steps=1)
    assert sft_trainer.main(flags_of(options)) == 1
    message = capsys.readouterr().err.splitlines()[-1]
    assert "Set image_folder to a folder that contains all images, or set allow_outside_paths true." in message
    assert sft_trainer.main(flags_of({**options, "allow_outside_paths": True})) == 0
    above = {**options, "image_folder": tmp_path, "output_dir": tmp_path / "two"}
    if name.endswith("absolute path"):
        data.write_text(data.read_text().replace('"good.png"', '"data/good.png"'))
        assert sft_trainer.main(flags_of(above)) == 0


@pytest.mark.parametrize(
    "name",
    ["parts, an unknown role", "file, JPEG, truncated", "out of the folder by an absolute path"],
)
def test_a_command_ends_the_same_way(name, folder, make_options, tmp_path):
    case = CASES[name]
    data, options = write(case, "jsonl", folder)
    flags = flags_of(make_options("llava15", training_data_path=data, **options))
    script = str(ROOT / "tuning" / "sft_trainer.py")
    done = subprocess.run(
        [sys.executable, script, *flags], cwd=tmp_path, env=os.environ, capture_output=True, text=True
    )
    assert_named(done.stderr, case, data)
    assert done.returncode == 1
    assert not (tmp_path / "out").exists()
