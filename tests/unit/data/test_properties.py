"""What holds for any conversation in any layout: exactly the answers are trained, and images keep their places."""

import functools

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image
from tiny_models import LAYOUTS, build_processor

from tuning.data.chat_template import ChatFormat
from tuning.data.encode import IGNORED, Encoder, Sample
from tuning.data.messages import Conversation, count_images
from tuning.data.sources import Row

IMAGE = {"type": "image"}
PICTURE = Image.new("RGB", (40, 32), "teal")
END = dict.fromkeys(LAYOUTS, "</s>") | {"granite_vision": "<|end_of_text|>", "mllama": "<|eot_id|>"}
CONTROLS = [
    *("<image>", "<|image|>", "</s>", "<s>", "<pad>", "<unk>", "<|end_of_text|>", "<|assistant|>", "<|user|>"),
    *("<|eot_id|>", "<|begin_of_text|>", "<|start_header_id|>", "[INST]", "ASSISTANT:", "USER: ", "{{ message }}"),
]

# Not drawn: surrogates, which are no text, and private-use characters, some of which are refused (ControlTokens).
LETTERS = st.characters(exclude_categories=["Cs", "Co"])
BLANKS = st.sampled_from(["", "", " ", "\n", "  \n\t ", "\n\n"])
PIECES = st.one_of(st.text(LETTERS, max_size=12), st.sampled_from(CONTROLS), BLANKS)
WORDS = st.lists(PIECES, min_size=1, max_size=5).map("".join)
ANSWERS = WORDS.filter(lambda words: words.strip())
QUESTIONS = st.lists(st.just(IMAGE), max_size=2)
TURNS = st.lists(st.tuples(QUESTIONS, WORDS, ANSWERS), min_size=1, max_size=4)
TYPED = [
    ([IMAGE], "What does <image> mean? </s>", " It is <image>, <|eot_id|></s> and\n"),
    ([], " ", "🙂 漢\n\nASSISTANT: é"),
]

any_conversation = functools.partial(settings, max_examples=40, deadline=None, derandomize=True, database=None)


def text(words: str) -> dict:
    return {"type": "text", "text": words}


def messages_of(turns, system: str | None = None) -> list[dict]:
    messages = [{"role": "system", "content": [text(system)]}] if system else []
    for images, question, answer in turns:
        messages.append({"role": "user", "content": [*images, text(question)]})
        messages.append({"role": "assistant", "content": [text(answer)]})
    return messages


@functools.cache
def encoder_of(layout: str) -> Encoder:
    processor = build_processor(layout)
    return Encoder(processor, ChatFormat(processor, date_string="01 Jan 2026"), max_seq_length=1 << 20)


def encode(layout: str, messages: list[dict]) -> Sample:
    images = [PICTURE] * count_images(messages)
    return encoder_of(layout).encode(Row({"messages": messages, "images": images}, "rows.json", 0))


def trained_ids(sample: Sample) -> list[list[int]]:
    """The ids of each run of trained tokens; every label is the id at its position."""
    ids, labels = sample.sequence["input_ids"].tolist(), sample.sequence["labels"].tolist()
    runs, before = list[list[int]](), IGNORED
    for token, label in zip(ids, labels, strict=True):
        assert label in (IGNORED, token)
        if label != IGNORED:
            if before == IGNORED:
                runs.append([])
            runs[-1].append(label)
        before = label
    return runs


@pytest.mark.parametrize("layout", LAYOUTS)
@any_conversation()
@given(turns=TURNS)
@example(turns=TYPED)
def test_spans_hold_each_answer_and_its_end_of_turn(layout, turns):
    chat = encoder_of(layout).chat
    rendered = chat.render(Conversation(messages_of(turns)))
    assert len(rendered.spans) == len(turns)
    reached = 0
    for (_, _, answer), content, span in zip(turns, rendered.contents, rendered.spans, strict=True):
        assert chat.escaper.unescape_text(rendered.text[slice(*content)]) == answer
        whole = rendered.text[slice(*span)]
        assert whole.endswith(END[layout])
        assert chat.escaper.unescape_text(whole.removesuffix(END[layout])).strip() == answer.strip()
        assert reached <= span[0] <= content[0] < content[1] <= span[1] <= len(rendered.text)
        reached = span[1]


@pytest.mark.parametrize("layout", LAYOUTS)
@any_conversation()
@given(turns=TURNS)
@example(turns=TYPED)
def test_each_answer_is_trained_with_one_end_token_and_nothing_else(layout, turns):
    encoder = encoder_of(layout)
    tokenizer = encoder.processor.tokenizer
    runs = trained_ids(encode(layout, messages_of(turns)))
    assert len(runs) == len(turns)
    for run, (_, _, answer) in zip(runs, turns, strict=True):
        assert run[-1] == tokenizer.convert_tokens_to_ids(END[layout])
        assert not set(run[:-1]) & set(tokenizer.all_special_ids)  # what was typed is text
        written = tokenizer.decode(run[:-1], clean_up_tokenization_spaces=False)
        assert written.strip() == answer.strip()  # some templates put a blank before an answer


@pytest.mark.parametrize("layout", LAYOUTS)
@any_conversation()
@given(turns=TURNS)
@example(turns=TYPED)
def test_typed_control_tokens_move_no_image(layout, turns):
    encoder = encoder_of(layout)
    messages = messages_of(turns)
    sample = encode(layout, messages)
    ids = sample.sequence["input_ids"]
    found = int((ids == encoder.processor.image_token_id).sum())
    assert found == count_images(messages) * encoder.count_image_tokens(PICTURE)
    assert bool(sample.images) == (count_images(messages) > 0)
    assert not ((ids == encoder.processor.image_token_id) & (sample.sequence["labels"] != IGNORED)).any()
    assert ids.max() < len(encoder.processor.tokenizer)


@pytest.mark.parametrize("layout", LAYOUTS)
@any_conversation()
@given(turns=TURNS, system=WORDS.filter(str.strip))
def test_a_system_message_changes_nothing_of_what_is_trained(layout, turns, system):
    turns = [([], question, answer) for _, question, answer in turns]  # Llama 3.2 takes none beside images
    assert trained_ids(encode(layout, messages_of(turns, system))) == trained_ids(encode(layout, messages_of(turns)))


@pytest.mark.parametrize("layout", LAYOUTS)
@any_conversation(max_examples=20)
@given(turns=TURNS, share=st.floats(0.1, 1))
def test_a_row_that_is_cut_keeps_the_beginnings_of_its_answers(layout, turns, share):
    whole = encode(layout, messages_of(turns))
    runs = trained_ids(whole)
    # Beside its end token and the one that it keeps, an answer may begin with a blank that the template wrote.
    excess = round(share * sum(max(0, len(run) - 3) for run in runs))
    encoder = encoder_of(layout)
    limit = len(whole.sequence["input_ids"]) - excess
    cutting = Encoder(encoder.processor, encoder.chat, max_seq_length=limit, overlong_rows="truncate_text")
    messages = messages_of(turns)
    cut = cutting.encode(Row({"messages": messages, "images": [PICTURE] * count_images(messages)}, "rows.json", 0))
    assert len(cut.sequence["input_ids"]) <= limit
    kept = trained_ids(cut)
    assert len(kept) == len(runs)
    assert all(run[: len(beginning)] == beginning for run, beginning in zip(runs, kept, strict=True))
