"""The real tokenizer, template and image processor of Granite Vision 3.2, if `GRANITE_VISION_PROCESSOR` names them."""

import os

import pytest
from PIL import Image
from transformers import AutoConfig, AutoProcessor

from tuning.config.families import find_family
from tuning.data.chat_template import ChatFormat
from tuning.data.encode import IGNORED, Encoder
from tuning.data.sources import Row

FOLDER = os.environ.get("GRANITE_VISION_PROCESSOR")
pytestmark = pytest.mark.skipif(not FOLDER, reason="GRANITE_VISION_PROCESSOR is not set")


@pytest.fixture(scope="module")
def encoder():
    processor = AutoProcessor.from_pretrained(FOLDER)
    limit = find_family(AutoConfig.from_pretrained(FOLDER)).max_images
    return Encoder(processor, ChatFormat(processor), 131072, max_images=limit)


def supervised_text(encoder, row) -> str:
    labels = encoder.encode(Row(row, "real.jsonl", 0)).sequence["labels"]
    return encoder.processor.tokenizer.decode(labels[labels != IGNORED])


def user(*parts):
    return {
        "role": "user",
        "content": [{"type": "image"} if part is None else {"type": "text", "text": part} for part in parts],
    }


def assistant(*texts):
    return {"role": "assistant", "content": [{"type": "text", "text": text} for text in texts]}


def test_only_answers_and_end_tokens_are_trained(encoder):
    picture = Image.new("RGB", (800, 600), "teal")
    messages = [user(None, "What is it?"), assistant("A teal wall."), user("Sure?"), assistant("Yes, quite sure.")]
    expected = "A teal wall.<|end_of_text|>Yes, quite sure.<|end_of_text|>"
    assert supervised_text(encoder, {"messages": messages, "images": [picture]}) == expected


def test_parts_the_template_would_drop_are_joined(encoder):
    system = {
        "role": "system",
        "content": [{"type": "text", "text": "Be brief."}, {"type": "text", "text": "Be kind."}],
    }
    row = {"messages": [system, user("Hello?"), assistant("First.", "Second.")], "images": None}
    assert supervised_text(encoder, row) == "First.\nSecond.<|end_of_text|>"
    assert "Be kind." in encoder.processor.tokenizer.decode(encoder.encode(Row(row, "", 0)).sequence["input_ids"])


def test_the_end_token_is_trained_though_it_is_also_the_padding_token(encoder):
    tokenizer = encoder.processor.tokenizer
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    sample = encoder.encode(Row({"messages": [user("Hi"), assistant("Hello.")], "images": []}, "", 0))
    assert sample.sequence["labels"][-1] == tokenizer.eos_token_id


def test_image_tokens_are_as_many_as_the_processor_announces(encoder):
    picture = Image.new("RGB", (1024, 768))
    (announced,) = encoder.processor._get_num_multimodal_tokens(image_sizes=[(768, 1024)]).num_image_tokens
    assert encoder.count_image_tokens(picture) == announced


def test_one_image_a_row(encoder):
    pictures = [Image.new("RGB", (384, 384)), Image.new("RGB", (384, 384))]
    row = {"messages": [user(None, None, "Which?"), assistant("The first.")], "images": pictures}
    assert encoder.encode(Row(row, "", 0)).dropped_images == 1
