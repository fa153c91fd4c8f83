"""The column `objects`: every format, every error, and coordinates in the picture that the processor really makes."""

import json
import math

import numpy as np
import pytest
from grounding_models import BOX_TOKENS, FAMILIES, LOCATIONS, build_config, build_processor
from PIL import Image
from tiny_models import build_processor as build_layout

from tuning.boxes import find_places
from tuning.checking.report import SUPERVISED, show_row
from tuning.config.box_formats import BOX_FORMATS
from tuning.config.families import find_family
from tuning.config.options import RowArguments
from tuning.data.chat_template import ChatFormat
from tuning.data.encode import Encoder
from tuning.data.formats import RowFormat
from tuning.data.from_config import make_encoder
from tuning.data.grounding import write_objects
from tuning.data.messages import Conversation
from tuning.data.prompts import ANY_BOX, ask, right_answers
from tuning.data.resized_size import ResizedSize
from tuning.data.row_lengths import RowMeter
from tuning.data.sources import Row
from tuning.errors import UserError

SIZE = (500, 300)
BOX = [50, 30, 250, 285]
FORMAT = RowFormat(extra_columns=("objects",))


def turn(role: str, *texts: str, images: int = 0) -> dict:
    return {"role": role, "content": [{"type": "image"}] * images + [{"type": "text", "text": text} for text in texts]}


def write(objects, question="Where?", answer="<bbox>", *, format="norm1000", images=(SIZE,), **settings):
    """The texts of a question and its answer, filled, and the boxes."""
    conversation = Conversation(
        [turn("user", question, images=len(images)), turn("assistant", answer)], [None] * len(images), objects=objects
    )
    grounded = write_objects(
        conversation,
        "rows.jsonl, row 7, field 'objects'",
        format=BOX_FORMATS[format] if format else None,
        measure=images.__getitem__,
        resize=settings.pop("resize", lambda size, where: (size[0] * 2, size[1] * 3)),
        **settings,
    )
    texts = [message["content"][-1]["text"] for message in grounded.conversation.messages]
    return *texts, grounded.boxes


@pytest.mark.parametrize(
    ("format", "box", "point"),
    [
        ("norm1", "[0.100, 0.100, 0.500, 0.950]", "[0.100, 0.950]"),
        ("norm1000", "[100, 100, 500, 950]", "[100, 950]"),
        ("pixels", "[50, 30, 250, 285]", "[50, 285]"),
        ("resized_pixels", "[100, 90, 500, 855]", "[100, 855]"),
        ("qwen2_vl", "<|box_start|>(100,100),(500,950)<|box_end|>", "<|box_start|>(100,950)<|box_end|>"),
        ("internvl", "<box>[[100, 100, 500, 950]]</box>", "<box>[[100, 950]]</box>"),
        ("paligemma", "<loc0102><loc0102><loc0972><loc0512>", "<loc0972><loc0102>"),
    ],
)
def test_a_format_writes_boxes_and_points_that_are_read_back(format, box, point):
    scale = {"norm1": (1, 1), "pixels": SIZE, "resized_pixels": (1000, 900), "paligemma": (1023, 1023)}
    for number, objects in enumerate(({"bbox": [BOX]}, {"bbox": [[0.1, 0.1, 0.5, 0.95]], "bbox_type": "norm1"})):
        _, answer, (written,) = write(objects, format=format)
        assert answer == box, number
        assert written.place == pytest.approx((0.1, 0.1, 0.5, 0.95))
        assert written.scale == scale.get(format, (1000, 1000))
        (read,) = find_places(answer)
        shares = [coordinate / written.scale[index % 2] for index, coordinate in enumerate(read)]
        assert shares == pytest.approx(written.place, abs=1e-3)
    assert write({"bbox": [[50, 285]]}, format=format)[1] == point
    assert set(BOX_FORMATS) >= {format}


def test_every_format_is_tested_above():
    (mark,) = test_a_format_writes_boxes_and_points_that_are_read_back.pytestmark
    assert [row[0] for row in mark.args[1]] == list(BOX_FORMATS)


def test_marks_are_filled_in_order_in_questions_and_answers():
    objects = {"ref": ["a <bbox> sign", "the cat"], "bbox": [[0, 0, 500, 300], BOX, [5, 3]], "bbox_type": None}
    question, answer, boxes = write(objects, "Is <ref-object> at <bbox>?", "<bbox>, <bbox>: <ref-object>")
    assert question == "Is a <bbox> sign at [0, 0, 1000, 1000]?"  # a mark in a reference is a word
    assert answer == "[100, 100, 500, 950], [10, 10]: the cat"
    assert [box.image for box in boxes] == [0, 0, 0]
    question, answer, _ = write(objects, "<ref-object><bbox>", "<bbox><bbox><ref-object>", format="internvl")
    assert question == "<ref>a <bbox> sign</ref><box>[[0, 0, 1000, 1000]]</box>"
    assert answer.endswith("<ref>the cat</ref>")


def test_each_box_is_on_its_own_image():
    objects = {"bbox": [[10, 10, 20, 20], [10, 10, 20, 20]], "image_id": [1, 0]}
    _, answer, boxes = write(objects, answer="<bbox> <bbox>", images=[(100, 100), (200, 40)])
    assert answer == "[50, 250, 100, 500] [100, 100, 200, 200]"
    assert [box.image for box in boxes] == [1, 0]


def test_thoughts_and_tool_calls_are_filled_too():
    call = {"type": "function", "function": {"name": "click", "arguments": {"at": ["<bbox>"]}}}
    answer = {**turn("assistant", "At <bbox>."), "reasoning_content": "It is <bbox>.", "tool_calls": [call]}
    objects = {"bbox": [[0, 0], [50, 30], [500, 300]]}
    conversation = Conversation([turn("user", "Click.", images=1), answer], [None], objects=objects)
    settings = {"format": BOX_FORMATS["norm1000"], "measure": lambda number: SIZE, "resize": lambda size, where: size}
    filled = write_objects(conversation, "here", **settings).conversation.messages[1]
    assert filled["reasoning_content"] == "It is [0, 0]."
    assert filled["content"][0]["text"] == "At [100, 100]."
    assert filled["tool_calls"][0]["function"]["arguments"] == {"at": ["[1000, 1000]"]}


def test_objects_may_be_json_text_and_have_the_nulls_of_arrow():
    assert write(json.dumps({"bbox": [BOX]}))[1] == "[100, 100, 500, 950]"
    assert write({"bbox": [BOX], "ref": None, "bbox_type": None, "image_id": None})[1] == "[100, 100, 500, 950]"
    assert write({"bbox": [BOX], "ref": [], "image_id": []})[1] == "[100, 100, 500, 950]"


def test_float32_noise_at_the_edge_is_clipped():
    edge = float(np.float32(0.1) * np.float32(10))
    noisy = math.nextafter(500.0, 501.0)
    assert write({"bbox": [[0, -1e-9, noisy, 300]]})[1] == "[0, 0, 1000, 1000]"
    assert write({"bbox": [[0, 0, edge, 1.0000001]], "bbox_type": "norm1"})[1] == "[0, 0, 1000, 1000]"


@pytest.mark.parametrize("objects", [{"bbox": [BOX], "category": [3]}, ["a chair"], "a chair", None, {}, {"bbox": []}])
def test_a_row_without_marks_may_have_other_objects_or_none(objects):
    assert write(objects, answer="Left.")[1] == "Left."


@pytest.mark.parametrize(
    ("objects", "kind", "words"),
    [
        ({"bbox": [[50, 30, 501, 285]]}, "box outside the image", "lies outside the picture (500×300 pixels)"),
        ({"bbox": [[-1, 30, 50, 285]]}, "box outside the image", "row 7, field 'objects', box 0"),
        ({"bbox": [[50, 301]]}, "box outside the image", "[50.0, 301.0]"),
        (
            {"bbox": [[0, 0, 1.5, 1]], "bbox_type": "norm1"},
            "box outside the image",
            "0 to 1, because bbox_type is norm1",
        ),
        ({"bbox": [[250, 30, 50, 285]]}, "box that ends before it begins", "x1 ≤ x2"),
        ({"bbox": [[50, 285, 250, 30]]}, "box that ends before it begins", "[50, 285, 250, 30]"),
        (None, "marks and objects differ", "<bbox> stands 1 times in the texts, but the number of boxes is 0"),
        ({"ref": ["a"], "bbox": []}, "marks and objects differ", "the number of boxes is 0"),
        ({"bbox": [BOX, BOX]}, "marks and objects differ", "the number of boxes is 2"),
        ({"bbox": [BOX], "ref": ["cat"]}, "marks and objects differ", "<ref-object> stands 0 times"),
        ({"bbox": [BOX], "image_id": [1]}, "box without an image", "there is no image 1, only 1 (from 0)"),
        ({"bbox": [BOX], "image_id": [-1]}, "box without an image", "there is no image -1"),
        ({"bbox": [BOX], "image_id": [0, 0]}, "malformed objects", "image_id has 2 entries"),
        ({"bbox": [BOX], "image_id": ["0"]}, "malformed objects", "whole numbers"),
        ({"bbox": BOX}, "malformed objects", "expected [x1, y1, x2, y2] or a point"),
        ({"bbox": [[1, 2, 3]]}, "malformed objects", "found [1, 2, 3]"),
        ({"bbox": [["1", 2, 3, 4]]}, "malformed objects", "found ['1', 2, 3, 4]"),
        ({"bbox": [[True, 2, 3, 4]]}, "malformed objects", "found [True"),
        ({"bbox": [[math.nan, 2, 3, 4]]}, "malformed objects", "NaN or infinite"),
        ({"bbox": [[1, 2, math.inf, 4]]}, "malformed objects", "NaN or infinite"),
        ({"bbox": "1, 2, 3, 4"}, "malformed objects", "bbox must be a list of boxes"),
        ({"bbox": [BOX], "ref": "cat"}, "malformed objects", "ref must be a list of texts"),
        ({"bbox": [BOX], "ref": [3]}, "malformed objects", "ref must be a list of texts"),
        ({"bbox": [BOX], "bbox_type": "norm1000"}, "malformed objects", "bbox_type must be real or norm1"),
        ([BOX], "malformed objects", "expected an object with bbox and ref"),
        ("BOX", "malformed objects", "expected an object with bbox and ref"),
    ],
)
def test_a_bad_row_is_an_error_that_names_the_box(objects, kind, words):
    with pytest.raises(UserError) as caught:
        write(objects)
    assert caught.value.kind == kind
    assert caught.value.field == "objects"
    assert words in str(caught.value)
    assert str(caught.value).startswith("rows.jsonl, row 7, field 'objects'")


def test_boxes_without_marks_are_an_error():
    with pytest.raises(UserError, match="<bbox> stands 0 times in the texts, but the number of boxes is 1"):
        write({"bbox": [BOX]}, answer="Left.")


def test_a_box_on_an_image_that_the_model_does_not_see_is_an_error():
    objects = {"bbox": [BOX, BOX], "image_id": [0, 1]}
    with pytest.raises(UserError, match=r"box 1: image 1 is left out, because the model takes 1 per row"):
        write(objects, answer="<bbox><bbox>", images=[SIZE, SIZE], max_images=1)
    with pytest.raises(UserError, match=r"there is no image 0, only 0"):
        write({"bbox": [BOX]}, images=[])


def test_a_model_of_another_family_needs_bbox_format():
    with pytest.raises(UserError, match="Set bbox_format to one of norm1, norm1000, pixels"):
        write({"bbox": [BOX]}, format=None)
    assert write({"bbox": [[0, 0, 1, 1]], "category": [3]}, answer="Left.", format=None)[1] == "Left."


# --- real processors ---


def row_of(objects, question, answer, *sizes) -> Row:
    messages = [turn("user", question, images=len(sizes)), turn("assistant", answer)]
    images = [Image.new("RGB", size, "teal") for size in sizes]
    return Row({"messages": messages, "images": images, "objects": objects}, "rows.jsonl", 7, format=FORMAT)


@pytest.fixture(scope="module")
def encoders():
    return {
        family: make_encoder(RowArguments(), build_processor(family), build_config(family), "28 Nov 2026")
        for family in FAMILIES
    }


SIZES = [(640, 480), (1920, 1080), (4000, 3000), (57, 41), (28, 2800), (333, 1000), (1003, 999)]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_coordinates_are_in_the_picture_that_the_processor_makes(encoders, family, size):
    encoder, (width, height) = encoders[family], size
    box = [width * 0.25, height * 0.125, width, height * 0.75]
    sample = encoder.encode(row_of({"bbox": [box]}, "Where?", "<bbox>", size))
    if family == "PaliGemma":
        made = sample.images["pixel_values"].shape[-1], sample.images["pixel_values"].shape[-2]
        assert made == (224, 224)
    else:
        _, rows, columns = sample.images["image_grid_thw"][0].tolist()
        patch = encoder.processor.image_processor.patch_size
        made = columns * patch, rows * patch
    assert ResizedSize(encoder.processor.image_processor)(size) == made
    scale = {"Qwen2VL": (1000, 1000), "Qwen2_5_VL": made, "Qwen3VL": (1000, 1000), "PaliGemma": (1023, 1023)}[family]
    expected = [round(share * scale[index % 2]) for index, share in enumerate((0.25, 0.125, 1, 0.75))]
    text = encoder.processor.tokenizer.decode(sample.sequence["input_ids"])
    assert [list(place) for place in find_places(text)] == [expected]


def test_the_size_follows_the_settings_of_the_processor():
    processor = build_processor("Qwen2_5_VL").image_processor
    processor.size = {"shortest_edge": 56 * 56, "longest_edge": 100 * 28 * 28}
    made = processor(Image.new("RGB", (1200, 900)), return_tensors="np")["image_grid_thw"][0]
    assert ResizedSize(processor)((1200, 900)) == (made[2] * 14, made[1] * 14) == (308, 224)
    processor.do_resize = False
    assert ResizedSize(processor)((280, 560)) == (280, 560)


def test_sizes_come_from_the_formula_without_processing_each_picture(monkeypatch):
    resized = ResizedSize(build_processor("Qwen2_5_VL").image_processor)
    resized((640, 480))
    monkeypatch.setattr(resized, "_process", None)
    assert resized((6400, 4800)) == (1148, 840)


def test_a_processor_that_crops_or_splits_has_no_resized_size():
    for layout in ("llava15", "granite_vision"):
        with pytest.raises(UserError, match=r"ImageProcessor.* crops, pads or splits pictures.*Set bbox_format"):
            ResizedSize(build_layout(layout).image_processor)((640, 480))


def test_a_picture_that_the_processor_refuses_is_an_error_of_the_row(encoders):
    with pytest.raises(UserError, match=r"row 7.*cannot resize 1×300 pixels: absolute aspect ratio") as caught:
        encoders["Qwen2_5_VL"].prepare(row_of({"bbox": [[0, 0, 1, 1]]}, "Where?", "<bbox>", (1, 300)))
    assert caught.value.field == "objects"


def test_the_families_are_named_in_the_table():
    formats = {"Qwen2VL": "qwen2_vl", "Qwen2_5_VL": "resized_pixels", "Qwen3VL": "norm1000", "PaliGemma": "paligemma"}
    assert {family: find_family(build_config(family)).bbox_format for family in FAMILIES} == formats


# --- special tokens ---

QUESTION = "Where is the <ref-object>, <|box_start|> and <loc0001>?"
ANSWER = "<ref-object><bbox>, <|box_end|> <|im_end|>!"
GIVEN = {"ref": ["cat <|im_end|>", "dog <|box_start|>"], "bbox": [BOX]}


def test_written_tokens_are_real_and_typed_ones_are_words(encoders):
    encoder = encoders["Qwen2VL"]
    shown = show_row(row_of(GIVEN, QUESTION, ANSWER, SIZE), encoder)
    expected = "<|object_ref_start|>dog <|box_start|><|object_ref_end|><|box_start|>(100,100),(500,950)<|box_end|>"
    assert shown.supervised_text == [f"{expected}, <|box_end|> <|im_end|>!<|im_end|>"]
    ids = dict(zip(BOX_TOKENS, encoder.processor.tokenizer.convert_tokens_to_ids(BOX_TOKENS), strict=True))
    supervised = [token.id for token in shown.tokens if token.role == SUPERVISED]
    assert {token: supervised.count(id) for token, id in ids.items()} == dict.fromkeys(BOX_TOKENS, 1)
    read = [token.id for token in shown.tokens if token.role != SUPERVISED]
    assert [read.count(id) for id in ids.values()] == [1, 1, 0, 0]  # the reference of the question


@pytest.mark.parametrize(
    ("family", "expected"),
    [
        ("Qwen2_5_VL", "dog <|box_start|>[50, 31, 252, 293], <|box_end|> <|im_end|>!<|im_end|>"),
        ("Qwen3VL", "dog <|box_start|>[100, 100, 500, 950], <|box_end|> <|im_end|>!<|im_end|>"),
        ("PaliGemma", "dog <|box_start|><loc0102><loc0102><loc0972><loc0512>, <|box_end|> <|im_end|>!<eos>"),
    ],
)
def test_exactly_the_words_and_boxes_of_an_answer_are_trained(encoders, family, expected):
    shown = show_row(row_of(GIVEN, QUESTION, ANSWER, SIZE), encoders[family])
    assert shown.supervised_text == [expected]
    assert [box.place for box in shown.boxes] == [pytest.approx((0.1, 0.1, 0.5, 0.95))]


def test_locations_of_paligemma_are_tokens(encoders):
    tokenizer = encoders["PaliGemma"].processor.tokenizer
    sample = encoders["PaliGemma"].encode(row_of({"bbox": [BOX]}, "detect cat", "<bbox> cat", SIZE))
    ids = sample.sequence["input_ids"].tolist()
    locations = set(tokenizer.convert_tokens_to_ids(LOCATIONS))
    assert tokenizer.decode([id for id in ids if id in locations]) == "<loc0102><loc0102><loc0972><loc0512>"


@pytest.mark.parametrize("family", FAMILIES)
def test_lengths_are_measured_with_boxes(encoders, family):
    encoder = encoders[family]
    rows = [row_of(GIVEN, QUESTION, ANSWER, SIZE), row_of({"bbox": [BOX, [1, 2]]}, "<bbox>", "It is <bbox>", SIZE)]
    lengths = [len(encoder.encode(row).sequence["input_ids"]) for row in rows]
    measured = [tokens for tokens, _ in RowMeter(encoder).sizes(rows)]
    assert measured == (lengths if family != "PaliGemma" else pytest.approx(lengths, abs=2))


def test_a_bad_box_is_a_bad_row_for_the_meter(encoders):
    (measured,) = RowMeter(encoders["Qwen3VL"]).measure([row_of({"bbox": [[0, 0, 600, 1]]}, "a", "<bbox>", SIZE)])
    assert measured.error.kind == "box outside the image"


def test_a_row_without_objects_opens_no_image_for_them(encoders, monkeypatch):
    monkeypatch.setattr("tuning.data.grounding.measure_image", None)
    encoder = encoders["Qwen3VL"]
    encoder.prepare(row_of(None, "Where?", "Left.", SIZE))
    plain = row_of(None, "What does <bbox> mean in HTML?", "<bbox>", SIZE)
    plain = Row({name: plain.columns[name] for name in ("messages", "images")}, "rows.jsonl", 0)
    assert encoder.prepare(plain).boxes == ()


# --- questions ---


def test_a_question_has_the_boxes_and_a_reference_as_a_model_answers(encoders):
    row = row_of({"ref": ["cat"], "bbox": [BOX, BOX]}, "Is <bbox> a <ref-object>?", "It is at <bbox>.", SIZE)
    question = ask(row, encoders["Qwen2VL"])
    assert "<|box_start|>(100,100),(500,950)<|box_end|>" in question.prompt
    assert question.reference == "It is at (100,100),(500,950)."  # answers are decoded without special tokens
    assert len(question.boxes) == 2
    assert ask(row, encoders["Qwen3VL"]).reference == "It is at [100, 100, 500, 950]."
    assert list(right_answers([row])) == [("rows.jsonl, row 7", f"It is at {ANY_BOX}.")]


def test_a_typed_token_of_an_answer_stays_in_its_reference(encoders):
    question = ask(row_of(GIVEN, QUESTION, ANSWER, SIZE), encoders["Qwen2VL"])
    assert question.reference == "dog <|box_start|>(100,100),(500,950), <|box_end|> <|im_end|>!"


def test_bbox_format_replaces_that_of_the_family():
    processor, config = build_processor("Qwen2_5_VL"), build_config("Qwen2_5_VL")
    encoder = make_encoder(RowArguments(bbox_format="norm1000"), processor, config, None)
    assert "[100, 100, 500, 950]" in encoder.prepare(row_of({"bbox": [BOX]}, "a", "<bbox>", SIZE)).chat.text
    other = Encoder(processor, ChatFormat(processor), 4096)
    with pytest.raises(UserError, match="how this model writes boxes is not known"):
        other.prepare(row_of({"bbox": [BOX]}, "a", "<bbox>", SIZE))
