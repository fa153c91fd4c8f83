import base64
import io

import numpy as np
import pytest
from PIL import Image

from tuning.data.images import list_images, load_image
from tuning.data.messages import count_images, keep_first_images, read_messages
from tuning.errors import UserError

WHERE = "rows.json, row 3"
USER = {"role": "user", "content": "q"}
ANSWER = {"role": "assistant", "content": "a"}
IMAGE = {"type": "image"}


def text(words) -> dict:
    return {"type": "text", "text": words}


# --- messages ---


@pytest.mark.parametrize(
    ("messages", "place", "message"),
    [
        ("hello", "", "expected a list of messages, found str 'hello'"),
        (None, "", "expected a list of messages, found NoneType"),
        ([], "", "expected a list of messages, found list"),
        ({"role": "user"}, "", "expected a list of messages, found dict"),
        ([USER, "hello"], ", message 1", "expected an object with role and content, found str"),
        ([USER, {"role": "bot", "content": "a"}], ", message 1", "unknown role 'bot'"),
        ([{"content": "q"}, ANSWER], ", message 0", "unknown role None"),
        ([{"role": "user", "content": None}, ANSWER], ", message 0", "content must be text or a list of parts"),
        ([{"role": "user", "content": 3}, ANSWER], ", message 0", "content must be text or a list of parts, found int"),
        ([{"role": "user", "content": []}, ANSWER], ", message 0", "content is empty"),
        ([{"role": "user", "content": ["q"]}, ANSWER], ", message 0, part 0", "expected an object with a type"),
        (
            [{"role": "user", "content": [text("q"), {"type": "video"}]}, ANSWER],
            ", message 0, part 1",
            "unknown part type 'video'",
        ),
        ([{"role": "user", "content": [{"text": "q"}]}, ANSWER], ", message 0, part 0", "unknown part type None"),
        ([{"role": "user", "content": [{"type": "text"}]}, ANSWER], ", message 0, part 0", "a text part needs text"),
        ([{"role": "user", "content": [IMAGE, text(7)]}, ANSWER], ", message 0, part 1", "needs text, found int 7"),
        ([USER], "", "has no assistant turn"),
        ([USER, {"role": "assistant", "content": " \n"}], ", message 1", "the assistant's answer is empty"),
        ([USER, ANSWER, {"role": "assistant", "content": []}], ", message 2", "the assistant's answer is empty"),
        ([USER, {"role": "assistant", "content": [IMAGE]}], ", message 1", "the assistant's answer is empty"),
    ],
)
def test_message_that_cannot_be_trained_is_named(messages, place, message):
    with pytest.raises(UserError, match=message) as caught:
        read_messages(messages, WHERE)
    assert caught.value.where == WHERE + place


def test_long_wrong_value_is_shortened_in_the_message():
    with pytest.raises(UserError) as caught:
        read_messages("x" * 5000, WHERE)
    assert len(str(caught.value)) < 200


def test_text_content_becomes_one_part():
    assert read_messages([USER, ANSWER], WHERE) == [
        {"role": "user", "content": [text("q")]},
        {"role": "assistant", "content": [text("a")]},
    ]


def test_empty_values_and_unknown_keys_of_parts_are_dropped():
    messages = [
        {
            "role": "user",
            "name": "Ann",
            "content": ({"type": "image", "text": None, "url": None}, {**text("q"), "image": None, "index": 0}),
        },
        {"role": "assistant", "content": [{**text("a"), "weight": 1.0}], "tool_calls": None},
    ]
    assert read_messages(messages, WHERE) == [
        {"role": "user", "content": [IMAGE, text("q")], "name": "Ann"},
        {"role": "assistant", "content": [text("a")]},
    ]


def test_first_images_are_kept_and_all_text():
    messages = read_messages(
        [
            {"role": "user", "content": [IMAGE, text("one"), IMAGE, text("two")]},
            ANSWER,
            {"role": "user", "content": [text("three"), IMAGE]},
            ANSWER,
        ],
        WHERE,
    )
    assert count_images(messages) == 3
    shortened = keep_first_images(messages, 1)
    assert shortened[0]["content"] == [IMAGE, text("one"), text("two")]
    assert shortened[2]["content"] == [text("three")]
    assert count_images(messages) == 3


# --- images ---


def gradient(width=24, height=16) -> Image.Image:
    return Image.fromarray(np.arange(width * height * 3, dtype=np.uint8).reshape(height, width, 3))


def encoded(image: Image.Image, kind="PNG", **options) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def in_base64(data: bytes) -> str:
    return base64.b64encode(data).decode()


@pytest.mark.parametrize("value", [None, []])
def test_no_image_is_an_empty_list(value):
    assert list_images(value) == []


def test_one_image_or_several_become_a_list():
    assert list_images("a.png") == ["a.png"]
    assert list_images({"bytes": b"1", "path": None}) == [{"bytes": b"1", "path": None}]
    assert list_images(("a.png", "b.png")) == ["a.png", "b.png"]


@pytest.mark.parametrize(
    "stored",
    [
        lambda file: Image.open(file),
        lambda file: gradient(),
        lambda file: {"bytes": file.read_bytes(), "path": None},
        lambda file: {"bytes": file.read_bytes(), "path": "elsewhere.png"},
        lambda file: {"bytes": None, "path": "picture.png"},
        lambda file: {"bytes": None, "path": str(file)},
        lambda file: file.read_bytes(),
        lambda file: "picture.png",
        lambda file: str(file),
        lambda file: "data:image/png;base64," + in_base64(file.read_bytes()),
        lambda file: in_base64(file.read_bytes()),
    ],
    ids=[
        "opened",
        "made",
        "bytes",
        "bytes before path",
        "relative path in dict",
        "absolute path in dict",
        "bare bytes",
        "relative path",
        "absolute path",
        "data URI",
        "base64",
    ],
)
def test_every_stored_form_gives_the_same_picture(tmp_path, stored):
    file = tmp_path / "picture.png"
    gradient().save(file)
    image = load_image(stored(file), tmp_path, WHERE)
    assert image.mode == "RGB"
    assert np.array_equal(np.asarray(image), np.asarray(gradient()))


@pytest.mark.parametrize(
    ("stored", "message"),
    [
        ("none.png", "there is no image file .*none.png"),
        ({"bytes": None, "path": "none.png"}, "there is no image file .*none.png"),
        ("/none/of/these.png", "there is no image file /none/of/these.png"),
        ("x" * 5001, "there is no image file"),
        (b"not an image", "the image cannot be read: it is not in a known image format"),
        ({"bytes": b"not an image"}, "it is not in a known image format"),
        ({"bytes": None, "path": None}, "expected an image, found dict"),
        ("data:image/png;base64,%%%", "the image cannot be read"),
        ("", "expected an image, found str"),
        (7, "expected an image, found int"),
        (encoded(gradient(200, 200))[:400], "the image cannot be read"),
        (encoded(gradient(200, 200), "JPEG")[:2000], "the image cannot be read"),
    ],
    ids=[
        "no file",
        "no file in dict",
        "no absolute file",
        "long text",
        "broken bytes",
        "broken bytes in dict",
        "empty dict",
        "broken URI",
        "empty text",
        "number",
        "truncated PNG",
        "truncated JPEG",
    ],
)
def test_image_that_cannot_be_read_is_named(tmp_path, stored, message):
    with pytest.raises(UserError, match=message) as caught:
        load_image(stored, tmp_path, f"{WHERE}, image 0")
    assert caught.value.where == f"{WHERE}, image 0"
    assert len(str(caught.value)) < 1000


def test_folder_and_truncated_file_are_not_images(tmp_path):
    (tmp_path / "half.png").write_bytes(encoded(gradient(200, 200))[:300])
    for name in ("half.png", "."):
        with pytest.raises(UserError) as caught:
            load_image(name, tmp_path, WHERE)
        assert caught.value.where == WHERE


def test_camera_orientation_is_applied():
    stored = gradient(24, 16)
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90° clockwise to show
    image = load_image(encoded(stored, exif=exif), None, WHERE)
    assert image.size == (16, 24)
    assert np.array_equal(np.asarray(image), np.rot90(np.asarray(stored), -1))


def test_transparent_pictures_lie_on_white():
    picture = Image.new("RGBA", (2, 1), (255, 0, 0, 255))
    picture.putpixel((1, 0), (255, 0, 0, 0))
    image = load_image(encoded(picture), None, WHERE)
    assert [image.getpixel((x, 0)) for x in (0, 1)] == [(255, 0, 0), (255, 255, 255)]


def test_palette_with_a_transparent_colour_lies_on_white():
    picture = Image.new("P", (2, 1), 0)
    picture.putpalette([0, 0, 255, 0, 128, 0])
    picture.putpixel((1, 0), 1)
    image = load_image(encoded(picture, transparency=1), None, WHERE)
    assert [image.getpixel((x, 0)) for x in (0, 1)] == [(0, 0, 255), (255, 255, 255)]
    plain = load_image(encoded(picture), None, WHERE)
    assert plain.getpixel((1, 0)) == (0, 128, 0)


@pytest.mark.parametrize(
    ("mode", "color", "shown"),
    [
        ("L", 128, (128,) * 3),
        ("LA", (128, 0), (255,) * 3),
        ("1", 1, (255,) * 3),
        ("CMYK", (0, 255, 255, 0), (255, 0, 0)),
    ],
)
def test_other_modes_become_rgb(mode, color, shown):
    picture = Image.new(mode, (2, 2), color)
    image = load_image(encoded(picture, "TIFF"), None, WHERE)
    assert (image.mode, image.getpixel((0, 0))) == ("RGB", shown)
