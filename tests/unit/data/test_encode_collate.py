import dataclasses
import functools
import json

import datasets
import pytest
import torch
from PIL import Image
from tiny_models import LAYOUTS, build_model, build_processor
from torch.utils.data import DataLoader

from tuning.data.chat_template import ChatFormat
from tuning.data.collator import probe_collator
from tuning.data.dataset import EncodedRows
from tuning.data.encode import IGNORED, Encoder, Sample
from tuning.data.image_joins import pad_to_largest
from tuning.data.open_source import open_source
from tuning.data.sources import Row
from tuning.errors import UserError
from tuning.model.mllama import patch_mllama_cross_attention

IMAGE = {"type": "image"}
NOT_FOR_THE_MODEL = ("labels", "info")


def text(words: str) -> dict:
    return {"type": "text", "text": words}


def messages_of(images: int, question="What is in the picture?", answer="A red square.") -> list[dict]:
    return [
        {"role": "user", "content": [*[IMAGE] * images, text(question)]},
        {"role": "assistant", "content": [text(answer)]},
    ]


def picture(width=40, height=32, color="teal") -> Image.Image:
    image = Image.linear_gradient("L").resize((width, height)).convert("RGB")
    return Image.blend(image, Image.new("RGB", image.size, color), 0.5)


def row_of(messages, images, where="rows.json") -> Row:
    return Row({"messages": messages, "images": images}, where, 0)


@functools.cache
def encoder_of(layout: str) -> Encoder:
    processor = build_processor(layout)
    chat = ChatFormat(processor, date_string="01 Jan 2026")
    return Encoder(processor, chat, max_seq_length=2048)


def variant(layout: str, **changes) -> Encoder:
    encoder = encoder_of(layout)
    settable = {entry.name: getattr(encoder, entry.name) for entry in dataclasses.fields(encoder) if entry.init}
    return Encoder(**{**settable, **changes})


# --- encoding ---


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("parts", "images"), [(1, 0), (0, 1), (2, 1), (1, 2)])
def test_placeholders_and_images_must_be_equally_many(layout, parts, images):
    with pytest.raises(UserError, match=f"have {parts} image placeholders, but there are {images} images") as caught:
        encoder_of(layout).encode(row_of(messages_of(parts), [picture()] * images))
    assert caught.value.where == "rows.json, row 0, fields 'messages' and 'images'"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_control_tokens_typed_in_a_text_are_text(layout):
    """The image token in a question shifts no image, and an end token in an answer ends nothing."""
    encoder = encoder_of(layout)
    tokenizer, token = encoder.processor.tokenizer, encoder.processor.image_token
    question, answer = f"What does {token} mean? {token}", f"It says {token} and {tokenizer.eos_token}here."
    sample = encoder.encode(row_of(messages_of(1, question=question, answer=answer), [picture()]))
    plain = encoder.encode(row_of(messages_of(1, question="What?", answer="It."), [picture()]))
    ids, labels = sample.sequence["input_ids"], sample.sequence["labels"]
    image_id = tokenizer.convert_tokens_to_ids(token)
    assert (ids == image_id).sum() == (plain.sequence["input_ids"] == image_id).sum()
    assert (labels == tokenizer.eos_token_id).sum() == 1
    assert answer in tokenizer.decode(labels[labels != IGNORED])
    assert question in tokenizer.decode(ids)
    assert ids.max() < len(tokenizer)


def test_broken_image_is_named_by_row_field_and_number():
    with pytest.raises(UserError, match="cannot be read") as caught:
        encoder_of("llava15").encode(row_of(messages_of(2), [picture(), b"broken"]))
    assert caught.value.where == "rows.json, row 0, field 'images', image 1"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_only_the_first_image_is_used_where_the_model_takes_one(layout):
    encoder = variant(layout, max_images=1)
    images = [picture(), picture(64, 32, "red"), picture(32, 64, "blue")]
    sample = encoder.encode(row_of(messages_of(3), images))
    alone = encoder.encode(row_of(messages_of(1), images[:1]))
    assert (sample.dropped_images, alone.dropped_images) == (2, 0)
    for name, tensor in {**alone.sequence, **alone.images}.items():
        assert torch.equal({**sample.sequence, **sample.images}[name], tensor)


def test_images_beyond_the_limit_are_not_opened():
    encoder = variant("llava15", max_images=1)
    assert encoder.encode(row_of(messages_of(2), [picture(), b"broken"])).dropped_images == 1


@pytest.mark.parametrize("layout", LAYOUTS)
def test_longest_allowed_row_is_kept_and_a_longer_one_refused(layout):
    row = row_of(messages_of(1), [picture()])
    length = len(encoder_of(layout).encode(row).sequence["input_ids"])
    assert len(variant(layout, max_seq_length=length).encode(row).sequence["input_ids"]) == length
    with pytest.raises(UserError, match=f"{length} tokens are more than max_seq_length {length - 1}") as caught:
        variant(layout, max_seq_length=length - 1).encode(row)
    assert caught.value.where == "rows.json, row 0, field 'messages'"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_overlong_row_can_be_dropped_and_says_why(layout):
    sample = variant(layout, max_seq_length=5, overlong_rows="drop").encode(row_of(messages_of(1), [picture()]))
    assert sample.sequence["labels"].tolist() == [IGNORED]
    assert sample.sequence["attention_mask"].tolist() == [1]
    assert sample.images == {}
    assert sample.skipped.reason.startswith("rows.json, row 0, field 'messages': ")
    assert "tokens are more than max_seq_length 5." in sample.skipped.reason


@pytest.mark.parametrize("layout", LAYOUTS)
def test_all_text_is_trained_on_request_but_no_image_token(layout):
    encoder = variant(layout, assistant_only_loss=False)
    sample = encoder.encode(row_of(messages_of(2), [picture(), picture(32, 80)]))
    ids, labels = sample.sequence["input_ids"], sample.sequence["labels"]
    untrained = ids == encoder.processor.image_token_id
    assert untrained.sum() >= 2
    untrained[0] = True
    assert torch.equal(labels, torch.where(untrained, IGNORED, ids))


def test_padding_is_not_trained_when_all_text_is():
    encoder = variant("granite_vision", assistant_only_loss=False)
    rows = [row_of(messages_of(0), []), row_of(messages_of(0, answer="No."), [])]
    batch = probe_collator(encoder.processor)([encoder.encode(row) for row in rows])
    padding = batch["attention_mask"] == 0
    assert padding.any()
    assert (batch["labels"][padding] == IGNORED).all()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_text_begins_with_one_bos_token_at_most(layout):
    encoder = encoder_of(layout)
    bos = encoder.processor.tokenizer.bos_token_id
    if layout == "granite_vision":  # its end token is also its bos token
        return
    ids = encoder.encode(row_of(messages_of(1), [picture()])).sequence["input_ids"].tolist()
    assert ids.index(bos) == 0
    assert ids.count(bos) == 1


@pytest.mark.parametrize("layout", LAYOUTS)
def test_image_tokens_of_a_picture_are_counted(layout):
    encoder = encoder_of(layout)
    ids = encoder.encode(row_of(messages_of(1), [picture(64, 48)])).sequence["input_ids"]
    assert encoder.count_image_tokens(picture(64, 48)) == (ids == encoder.processor.image_token_id).sum()


# --- batches ---


def mixed_rows() -> list[Row]:
    one, two, three = picture(40, 32), picture(64, 32, "red"), picture(32, 90, "blue")
    return [
        row_of(messages_of(0, question="How many are there?", answer="Three."), None, "0"),
        row_of(messages_of(1), one, "1"),
        row_of(messages_of(2, answer="A blue circle below a red square."), [two, three], "2"),
    ]


@functools.cache
def model_of(layout: str):
    model = build_model(layout).eval()
    patch_mllama_cross_attention(model)
    return model


@torch.no_grad()
def logits_of(layout: str, batch: dict) -> torch.Tensor:
    inputs = {name: value for name, value in batch.items() if name not in NOT_FOR_THE_MODEL}
    return model_of(layout)(**inputs).logits


@pytest.mark.parametrize(
    ("layout", "order"),
    [(layout, order) for layout in LAYOUTS for order in ((0, 1, 2), (2, 1, 0), (1, 2), (0, 1), (2, 0), (1, 0, 1))],
)
def test_row_in_a_batch_gives_the_logits_it_gives_alone(layout, order):
    encoder, rows = encoder_of(layout), mixed_rows()
    samples = [encoder.encode(rows[number]) for number in order]
    collate = probe_collator(encoder.processor)
    together = logits_of(layout, collate(samples))
    for position, sample in enumerate(samples):
        alone = logits_of(layout, collate([sample]))[0]
        assert torch.allclose(together[position, : len(alone)], alone, atol=1e-4), f"row {order[position]}"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_batch_is_padded_on_the_right_and_keeps_every_sample(layout):
    encoder = encoder_of(layout)
    samples = [encoder.encode(row) for row in mixed_rows()]
    batch = probe_collator(encoder.processor)(samples)
    pad = encoder.processor.tokenizer.pad_token_id
    width = max(len(sample.sequence["input_ids"]) for sample in samples)
    for position, sample in enumerate(samples):
        length = len(sample.sequence["input_ids"])
        for name, fill in (("input_ids", pad), ("attention_mask", 0), ("labels", IGNORED)):
            assert batch[name].shape == (3, width)
            assert torch.equal(batch[name][position, :length], sample.sequence[name])
            assert (batch[name][position, length:] == fill).all()


def test_mllama_rows_without_image_see_none():
    encoder = encoder_of("mllama")
    samples = [encoder.encode(row) for row in mixed_rows()]
    mask = probe_collator(encoder.processor)(samples)["cross_attention_mask"]
    width = max(len(sample.sequence["input_ids"]) for sample in samples)
    assert mask.shape == (3, width, 2, 4)
    assert not mask[0].any()
    for position in (1, 2):
        own = samples[position].sequence["cross_attention_mask"]
        length, images, tiles = own.shape
        assert torch.equal(mask[position, :length, :images, :tiles], own)
        assert own.any()
        assert mask[position].sum() == own.sum()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_batch_of_text_only_has_no_image_tensors(layout):
    encoder = encoder_of(layout)
    batch = probe_collator(encoder.processor)([encoder.encode(mixed_rows()[0])] * 2)
    assert not encoder.image_names & set(batch)
    assert torch.isfinite(logits_of(layout, batch)).all()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_info_counts_what_is_in_the_batch(layout):
    encoder = variant(layout, max_images=1, max_seq_length=700, overlong_rows="drop")
    rows = [*mixed_rows(), row_of(messages_of(0, question="long " * 800), [], "3")]
    samples = [encoder.encode(row) for row in rows]
    batch = probe_collator(encoder.processor)(samples)
    info = batch["info"]
    assert info.rows == [f"{number}, row 0" for number in range(4)]
    assert info.tokens == batch["attention_mask"].sum()
    assert info.supervised_tokens == (batch["labels"] != IGNORED).sum()
    assert info.dropped_images == 1
    assert info.error is None
    assert list(info.skipped) == ["3, row 0"]
    assert "more than max_seq_length 700" in info.skipped["3, row 0"].reason


def test_error_among_the_samples_ends_the_batch():
    encoder = encoder_of("llava15")
    error = UserError(where="row 7", problem="is broken.")
    batch = probe_collator(encoder.processor)([encoder.encode(mixed_rows()[0]), error])
    assert list(batch) == ["info"]
    assert batch["info"].error is error


def test_every_dimension_is_padded_at_its_end():
    small, large = torch.ones(1, 2, 1), torch.ones(2, 1, 3)
    padded = pad_to_largest([small, large], 7)
    assert [tuple(tensor.shape) for tensor in padded] == [(2, 2, 3)] * 2
    assert padded[0][0, :, 0].tolist() == [1, 1]
    assert (padded[0] == 7).sum() == 10
    assert [len(tensor) for tensor in pad_to_largest([small, large], 0, keep=0)] == [1, 2]


@pytest.mark.parametrize(("layout", "nested"), [("llava15", False), ("granite_vision", False), ("mllama", True)])
def test_collator_finds_how_a_processor_joins_images(layout, nested):
    collator = probe_collator(encoder_of(layout).processor)
    assert collator.nested_images is nested
    assert bool(collator.image_layout.blank) is nested


# --- through worker processes ---


def test_samples_and_errors_come_through_a_worker_process(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    picture().save(tmp_path / "a.png")
    rows = [{"messages": messages_of(1), "images": ["a.png"]}, {"messages": messages_of(1), "images": ["none.png"]}]
    file = tmp_path / "rows.json"
    file.write_text(json.dumps(rows), encoding="utf-8")
    encoder = encoder_of("mllama")
    encoded = EncodedRows(open_source(str(file), text_field="messages", image_field="images"), encoder)
    samples = [batch[0] for batch in DataLoader(encoded, batch_size=1, num_workers=1, collate_fn=list)]
    assert isinstance(samples[0], Sample)
    here = encoder.encode(encoded.source[0])
    assert torch.equal(samples[0].sequence["labels"], here.sequence["labels"])
    assert torch.equal(samples[0].images["pixel_values"], here.images["pixel_values"])
    assert isinstance(samples[1], UserError)
    assert samples[1].where == f"{file}, row 1, field 'images', image 0"
    assert str(samples[1]) == str(encoded[1])

    batches = list(DataLoader(encoded, batch_size=1, num_workers=1, collate_fn=probe_collator(encoder.processor)))
    assert batches[0]["info"].rows == [f"{file}, row 0"]
    assert "there is no image file" in str(batches[1]["info"].error)


def test_a_control_token_spread_over_two_parts_is_refused():
    messages = messages_of(0)
    messages[1]["content"] = [text("ab<|eot"), text("_id|>cd")]
    with pytest.raises(UserError, match="is spread over two text parts") as caught:
        encoder_of("mllama").encode(row_of(messages, None))
    assert caught.value.where == "rows.json, row 0, field 'messages', message 1"


def test_an_image_within_an_answer_is_never_cut():
    template = (
        "{% for m in messages %}{{ m['role'] }}: {% for p in m['content'] %}{% if p['type'] == 'image' %}<image>"
        "{% else %}{{ p['text'] }}{% endif %}{% endfor %}</s>{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    )
    processor = build_processor("llava15")
    processor.chat_template = template
    question = {"role": "user", "content": [text("Draw it.")]}
    row = row_of([question, {"role": "assistant", "content": [text("Here it is "), IMAGE, text("ab")]}], [picture()])
    whole = Encoder(processor, ChatFormat(processor), max_seq_length=999).encode(row).sequence["input_ids"]
    for fewer in (1, 3, 5):
        limit = len(whole) - fewer
        encoder = Encoder(processor, ChatFormat(processor), max_seq_length=limit, overlong_rows="truncate_text")
        cut = encoder.encode(row).sequence["input_ids"]
        assert len(cut) == limit
        assert (cut == encoder.image_token_id).sum() == (whole == encoder.image_token_id).sum()
