"""overlong_rows truncate_text: answers get shorter, from the last one's end; images and all other text stay."""

import functools

import pytest
import torch
from PIL import Image
from tiny_models import LAYOUTS, build_processor

from tuning.data.chat_template import ChatFormat
from tuning.data.collator import probe_collator, take_info
from tuning.data.encode import IGNORED, Encoder, Sample
from tuning.data.sources import Row
from tuning.errors import UserError

IMAGE = {"type": "image"}
ANSWER = "It is a red square on a white ground, and there is a blue circle below it."
EMOJI = "🙂漢é🙂字🙂ß🙂🙂漢🙂"


def text(words: str) -> dict:
    return {"type": "text", "text": words}


def row_of(*answers: str, images: int = 1) -> Row:
    messages = []
    for number, answer in enumerate(answers):
        shown = [IMAGE] * images if number == 0 else []
        messages.append({"role": "user", "content": [*shown, text(f"What is it, {number}?")]})
        messages.append({"role": "assistant", "content": [text(answer)]})
    pictures = [Image.linear_gradient("L").resize((40 + 20 * number, 32)) for number in range(images)]
    return Row({"messages": messages, "images": pictures}, "rows.json", 7)


@functools.cache
def parts_of(layout: str):
    processor = build_processor(layout)
    return processor, ChatFormat(processor, date_string="01 Jan 2026")


def encode(layout: str, row: Row, limit: int = 4096, **options) -> Sample:
    return Encoder(*parts_of(layout), max_seq_length=limit, overlong_rows="truncate_text", **options).encode(row)


def ids_of(sample: Sample) -> list[int]:
    return sample.sequence["input_ids"].tolist()


def stretches_of(sample: Sample) -> list[list[int]]:
    """The trained token ids of each answer: runs of labels."""
    stretches, before = list[list[int]](), IGNORED
    for label in sample.sequence["labels"].tolist():
        if label != IGNORED:
            if before == IGNORED:
                stretches.append([])
            stretches[-1].append(label)
        before = label
    return stretches


def decode(layout: str, ids: list[int]) -> str:
    return parts_of(layout)[0].tokenizer.decode(ids, clean_up_tokenization_spaces=False)


def end_ids(layout: str) -> list[int]:
    processor, chat = parts_of(layout)
    return processor.tokenizer.encode(chat.end_of_turn, add_special_tokens=False)[-1:]


def words_of(layout: str, stretch: list[int]) -> list[int]:
    """A whole answer's trained tokens without its end of turn."""
    assert stretch[-1:] == end_ids(layout)
    return stretch[:-1]


def assert_image_is_whole(layout: str, cut: Sample, whole: Sample) -> None:
    token = parts_of(layout)[0].image_token_id
    assert ids_of(cut).count(token) == ids_of(whole).count(token) > 0
    assert cut.images.keys() == whole.images.keys()
    assert all(torch.equal(cut.images[name], tensor) for name, tensor in whole.images.items())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_answer_is_cut_at_its_end_to_the_very_length(layout):
    whole = encode(layout, row_of(ANSWER))
    (stretch,) = stretches_of(whole)
    words, length = words_of(layout, stretch), len(ids_of(whole))
    start = ids_of(whole).index(words[0], length - len(words) - 4)
    for excess in (1, 2, 5, len(words) - 2):
        cut = encode(layout, row_of(ANSWER), length - excess)
        assert len(ids_of(cut)) == length - excess
        assert cut.cut_tokens == excess
        assert stretches_of(cut) == [words[: len(words) - excess]]  # and no end token: the answer is not over
        kept = [n for n in range(length) if not start + len(words) - excess <= n < start + len(words)]
        assert ids_of(cut) == [ids_of(whole)[n] for n in kept]
        assert_image_is_whole(layout, cut, whole)
        assert ANSWER.startswith(decode(layout, stretches_of(cut)[0]).strip())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_row_that_fits_is_not_touched(layout):
    whole = encode(layout, row_of(ANSWER))
    fitting = encode(layout, row_of(ANSWER), len(ids_of(whole)))
    assert fitting.cut_tokens == 0
    for name, tensor in {**whole.sequence, **whole.images}.items():
        assert torch.equal({**fitting.sequence, **fitting.images}[name], tensor)
    assert stretches_of(fitting)[0][-1:] == end_ids(layout)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_last_answer_is_cut_first_and_each_keeps_a_token(layout):
    row = row_of("Yes, a cat.", "No, three of them.", ANSWER)
    whole = encode(layout, row)
    answers = [words_of(layout, stretch) for stretch in stretches_of(whole)]
    sizes = [len(answer) for answer in answers]
    length, end = len(ids_of(whole)), end_ids(layout)

    some = stretches_of(encode(layout, row, length - 3))
    assert some == [answers[0] + end, answers[1] + end, answers[2][:-3]]

    most = sizes[2] - 1 + 2
    some = stretches_of(encode(layout, row, length - most))
    assert some == [answers[0] + end, answers[1][:-2], answers[2][:1]]

    all_of_it = sum(sizes) - 3
    some = encode(layout, row, length - all_of_it)
    assert stretches_of(some) == [answer[:1] for answer in answers]
    assert len(ids_of(some)) == length - all_of_it
    assert_image_is_whole(layout, some, whole)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_row_too_long_without_its_answers_is_an_error(layout):
    row = row_of("Yes, a cat.", "No, three of them.")
    whole = encode(layout, row)
    shortest = len(ids_of(whole)) - sum(len(words_of(layout, s)) - 1 for s in stretches_of(whole))
    assert len(ids_of(encode(layout, row, shortest))) == shortest
    with pytest.raises(UserError) as caught:
        encode(layout, row, shortest - 1)
    assert caught.value.where == "rows.json, row 7, field 'messages'"
    assert (caught.value.kind, caught.value.field) == ("too long", "messages")
    assert f"{len(ids_of(whole))} tokens are more than max_seq_length {shortest - 1}" in str(caught.value)
    assert "Raise max_seq_length: the row is too long even without its answers." in str(caught.value)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_no_character_is_cut_in_two(layout):
    """A character of several tokens goes as a whole, even where the row is then shorter than it might be."""
    row = row_of(EMOJI)
    whole = encode(layout, row)
    words = words_of(layout, stretches_of(whole)[0])
    length = len(ids_of(whole))
    assert len(words) > len(EMOJI)  # else this shows nothing
    shorter = 0
    for limit in range(length - len(words) + 6, length):
        cut = encode(layout, row, limit)
        kept = decode(layout, stretches_of(cut)[0]).strip()
        assert "\ufffd" not in kept
        assert EMOJI.startswith(kept)
        assert limit - 4 < len(ids_of(cut)) <= limit
        assert_image_is_whole(layout, cut, whole)
        shorter += len(ids_of(cut)) < limit
    assert shorter > 0


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_cut_that_needs_only_part_of_a_character_takes_no_other_answer(layout):
    """What a whole character freed beyond the excess is not taken from the answer before it."""
    row = row_of("Yes, a cat.", EMOJI)
    whole = encode(layout, row)
    first, last = (words_of(layout, stretch) for stretch in stretches_of(whole))
    cut = stretches_of(encode(layout, row, len(ids_of(whole)) - 1))
    assert cut[0] == first + end_ids(layout)
    assert cut[1] == last[: len(cut[1])]
    assert len(last) - 4 <= len(cut[1]) < len(last)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_control_tokens_typed_in_an_answer_can_be_cut(layout):
    processor, _ = parts_of(layout)
    answer = f"It says {processor.image_token} and {processor.tokenizer.eos_token} and so on and on."
    row = row_of(answer)
    whole = encode(layout, row)
    words, length = words_of(layout, stretches_of(whole)[0]), len(ids_of(whole))
    for excess in range(1, len(words)):
        cut = encode(layout, row, length - excess)
        (kept,) = stretches_of(cut)
        assert kept == words[: len(kept)]
        assert len(ids_of(cut)) <= length - excess
        assert_image_is_whole(layout, cut, whole)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_everything_with_a_position_per_token_gets_shorter(layout):
    row = row_of(ANSWER, images=2)
    whole = encode(layout, row)
    cut = encode(layout, row, len(ids_of(whole)) - 5)
    assert cut.sequence.keys() == whole.sequence.keys()
    assert {len(tensor) for tensor in cut.sequence.values()} == {len(ids_of(cut))}
    assert cut.sequence["attention_mask"].all()
    if layout == "mllama":
        mask, before = cut.sequence["cross_attention_mask"], whole.sequence["cross_attention_mask"]
        assert torch.equal(mask, torch.cat([before[:-6], before[-1:]]))  # only the end token follows the answer
        assert mask[-1].any()
    batch = probe_collator(parts_of(layout)[0])([cut, whole])
    assert take_info(batch).cut == ["rows.json, row 7"]
    assert len({batch[name].shape[:2] for name in cut.sequence}) == 1


@pytest.mark.parametrize("layout", LAYOUTS)
def test_with_loss_on_all_text_the_cut_answers_end_token_is_still_not_trained(layout):
    row = row_of("Yes, a cat.", ANSWER)
    whole = encode(layout, row, assistant_only_loss=False)
    cut = encode(layout, row, len(ids_of(whole)) - 3, assistant_only_loss=False)
    before, after = ((sample.sequence["labels"] == end_ids(layout)[0]).sum() for sample in (whole, cut))
    assert after == before - 1
