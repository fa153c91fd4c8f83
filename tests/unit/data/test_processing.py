"""Processors that report nothing, insert text, give no offsets, choke on options, or rewrite what they are given."""

from dataclasses import replace

import pytest
import torch
from architectures.case import Case
from PIL import Image

from tuning.data.encode import IGNORED
from tuning.data.from_config import open_rows
from tuning.data.processing import listen
from tuning.data.prompts import ask
from tuning.data.sources import Row
from tuning.errors import UserError


def make(name: str, folder, **methods) -> Case:
    """An architecture without weights. `methods` replace those of its processor."""
    case = Case.make(name, folder, weights=False)
    case.processor.__class__ = type("OddProcessor", (type(case.processor),), methods)
    return case


def assert_labels(case: Case) -> None:
    for sample, row in zip(case.samples, case.rows, strict=True):
        supervised = [text.strip() for text in case.supervised_texts(sample)]
        assert supervised == [text.strip() for text in case.expected_answers(row)]


def rows_of(case: Case, *conversations: list[dict]) -> list[Row]:
    first = next(iter(open_rows(case.config).train))
    columns = [{"messages": messages, "images": first.columns["images"]} for messages in conversations]
    return [replace(first, columns=made) for made in columns]


def turn(question: str, answer: str, *, image: bool = False) -> list[dict]:
    content = [*([{"type": "image"}] if image else []), {"type": "text", "text": question}]
    return [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]


# --- labels ---


@pytest.mark.parametrize("name", ["idefics2", "nemotron_h_omni"])  # reports nothing, and has offsets of another text
def test_a_processor_that_reports_nothing(name, tmp_path):
    case = make(name, tmp_path)
    assert_labels(case)
    assert not case.encoder.row_processor.reports_all


@pytest.mark.parametrize("name", ["molmo2", "emu3"])
def test_a_processor_that_inserts_a_first_token(name, tmp_path):
    assert_labels(make(name, tmp_path))


def without_offsets(self, *args, **options):
    made = super(type(self), self).__call__(*args, **options)
    return {name: value for name, value in made.items() if name not in ("offset_mapping", "text_replacement_offsets")}


def strict(self, images=None, text=None, return_tensors=None):
    return super(type(self), self).__call__(images=images, text=text, return_tensors=return_tensors)


def choking(self, *args, **options):
    if "return_text_replacement_offsets" in options or "images_kwargs" in options:
        raise ValueError("unknown option")
    return super(type(self), self).__call__(*args, **options)


@pytest.mark.parametrize("name", ["llava", "gemma3", "qwen2_vl", "internvl"])
@pytest.mark.parametrize("call", [without_offsets, strict, choking])
def test_a_processor_that_knows_no_offsets(name, call, tmp_path):
    stock = make(name, tmp_path / "stock")
    case = make(name, tmp_path / "odd", __call__=call)
    assert_labels(case)
    for sample, expected in zip(case.samples, stock.samples, strict=True):
        assert all(torch.equal(sample.sequence[key], value) for key, value in expected.sequence.items())
        assert all(torch.equal(sample.images[key], value) for key, value in expected.images.items())


def in_capitals(self, *args, text=None, **options):
    return super(type(self), self).__call__(
        *args, text=[words.replace("circle", "CIRCLE") for words in text], **options
    )


def in_pieces(self, *args, text=None, **options):
    made = super(type(self), self).__call__(*args, text=text, **options)
    made["input_ids"] = [[number for number in made["input_ids"][0] if number > 5]]
    return made


@pytest.mark.parametrize("call", [in_capitals, in_pieces])
def test_a_processor_that_rewrites_a_text_is_refused(call, tmp_path):
    case = make("llava", tmp_path, __call__=call)
    with pytest.raises(UserError, match="cannot be located in what OddProcessor makes of a row") as refused:
        _ = case.samples
    assert "Choose another model." in str(refused.value)
    assert refused.value.where != "where"


def test_tensors_without_a_position_per_token_belong_to_the_images(tmp_path):
    case = make("video_llava", tmp_path)
    assert_labels(case)
    assert set(case.samples[0].images) == {"pixel_values_images"}


def test_a_token_type_that_the_model_needs_is_asked_for(tmp_path):
    sample = make("cosmos3_edge", tmp_path / "cosmos").samples[0]
    assert sample.sequence["mm_token_type_ids"].sum() > 0
    assert (
        "mm_token_type_ids" not in make("minimax_m3_vl", tmp_path / "minimax").samples[0].sequence
    )  # its model refuses it


def test_the_tokenizer_does_not_change(tmp_path):
    tokenizer = make("llava", tmp_path).processor.tokenizer
    listener, readings = listen(tokenizer)
    made = listener(["a text"], add_special_tokens=False)
    assert made == tokenizer(["a text"], add_special_tokens=False)
    assert [reading.text for reading in readings] == ["a text"]
    assert isinstance(listener, type(tokenizer))
    assert not hasattr(tokenizer, "readings")


# --- prompts ---


PROMPTED = ["paligemma", "chameleon"]


@pytest.mark.parametrize("name", PROMPTED)
def test_an_answer_stands_behind_the_whole_prompt(name, tmp_path):
    case = make(name, tmp_path)
    assert_labels(case)
    for row, sample in zip(open_rows(case.config).train, case.samples, strict=True):
        prompt = ask(row, case.encoder).sample.sequence["input_ids"]
        ids, labels = sample.sequence["input_ids"], sample.sequence["labels"]
        assert torch.equal(ids[: len(prompt)], prompt)
        assert (labels[: len(prompt)] == IGNORED).all()
        assert (labels[len(prompt) :] != IGNORED).all()
        if "token_type_ids" in sample.sequence:
            assert sample.sequence["token_type_ids"].tolist() == [0] * len(prompt) + [1] * (len(ids) - len(prompt))


@pytest.mark.parametrize("name", PROMPTED)
def test_of_several_answers_only_the_last_can_be_trained(name, tmp_path):
    case = make(name, tmp_path)
    messages = turn("How many?", "Two.", image=True) + turn("Is it dark?", "No.")
    (row,) = rows_of(case, messages)
    with pytest.raises(UserError, match="one prompt and one answer, and this row has 2 answers to train") as refused:
        case.encoder.encode(row)
    assert refused.value.kind == "several answers for a processor of prompts"
    sample = replace(case.encoder, train_on="last_turn").encode(row)
    assert case.supervised_texts(sample) == ["No." + case.family.style.end]
    prompt = ask(row, case.encoder).sample.sequence["input_ids"]
    assert torch.equal(prompt, sample.sequence["input_ids"][: len(prompt)])
    assert (sample.sequence["labels"][: len(prompt)] == IGNORED).all()


@pytest.mark.parametrize("name", PROMPTED)
def test_a_prompt_that_the_model_sees_both_ways_is_not_trained(name, tmp_path):
    case = make(name, tmp_path)
    with pytest.raises(UserError, match="assistant_only_loss"):
        replace(case.encoder, assistant_only_loss=False).encode(next(iter(open_rows(case.config).train)))


@pytest.mark.parametrize("name", PROMPTED)
def test_typed_control_tokens_and_long_answers(name, tmp_path):
    case = make(name, tmp_path)
    end = case.family.style.end
    (row,) = rows_of(case, turn(f"What is <image> or {end}?", f"A {end} and <image>.", image=True))
    sample = case.encoder.encode(row)
    assert case.supervised_texts(sample) == [f"A {end} and <image>.{end}"]
    (row,) = rows_of(case, turn("How many?", "There are three: one, two, three.", image=True))
    whole = len(case.encoder.encode(row).sequence["input_ids"])
    cut = replace(case.encoder, max_seq_length=whole - 2, overlong_rows="truncate_text").encode(row)
    assert len(cut.sequence["input_ids"]) == whole - 2
    assert case.supervised_texts(cut)[0].startswith("There are three")
    assert not case.supervised_texts(cut)[0].endswith(("three.", end))


def test_pictures_of_a_row_are_given_as_the_chat_template_of_transformers_gives_them(tmp_path):
    """LLaVA-OneVision's processor cuts a picture into tiles only where it is the only one of its row."""
    case = Case.make("llava_onevision", tmp_path, weights=False)
    pair = [Image.new("RGB", (96, 40)), Image.new("RGB", (40, 96))]
    question = case.encoder.row_processor.question(pair)
    stock = case.processor(text=[question], images=[pair], return_tensors="pt")
    ours = case.encoder.process_question(pair)
    assert ours["input_ids"].tolist() == stock["input_ids"].tolist()
    assert torch.equal(ours["pixel_values"], stock["pixel_values"])
