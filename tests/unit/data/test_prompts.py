"""Questions: a row's prompt is what training puts before its last answer, and a batch answers as each row alone."""

import json

import pytest
import torch
from tiny_models import LAYOUTS

from tuning.config.options import ModelSource, RowArguments
from tuning.data.collator import probe_collator
from tuning.data.from_config import make_encoder, open_path
from tuning.data.prompts import ask, join_on_the_right
from tuning.model.answering import load_answering
from tuning.model.generate import generate_texts

IMAGE = {"type": "image"}


def user(*parts):
    return {"role": "user", "content": [part if isinstance(part, dict) else text(part) for part in parts]}


def text(words):
    return {"type": "text", "text": words}


def assistant(words):
    return {"role": "assistant", "content": [text(words)]}


TURNS = [user(IMAGE, "What is it?"), assistant("A cat."), user("And its colour?"), assistant("Red, of course.")]


@pytest.fixture
def setting(models, rows):
    """Layout → a loaded model and the encoder of its rows."""

    def make(layout: str):
        loaded = load_answering(ModelSource(str(models[layout])), device="cpu")
        encoder = make_encoder(RowArguments(), loaded.processor, loaded.config, "24 Nov 2026")
        return loaded, encoder

    return make


@pytest.fixture
def open_rows(rows):
    def open_lines(*conversations):
        path = rows.with_name("questions.jsonl")
        lines = [{"messages": messages, "images": images} for messages, images in conversations]
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        return open_path(RowArguments(), str(path), None)

    return open_lines


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_prompt_is_the_trained_text_up_to_the_last_answer(setting, open_rows, layout):
    _, encoder = setting(layout)
    row = open_rows((TURNS, ["0.png"]))[0]
    question, trained = ask(row, encoder), encoder.prepare(row).chat
    assert question.prompt == trained.text[: trained.spans[-1][0]]
    assert question.reference == "Red, of course."
    assert question.text == "And its colour?"
    first = ask(open_rows((TURNS[:2], ["0.png"]))[0], encoder)
    assert first.prompt == encoder.chat.generation_prompt(TURNS[:1])  # what a server writes


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_answer_does_not_show_in_the_prompt_and_may_be_missing(setting, open_rows, layout):
    _, encoder = setting(layout)
    with_answer, without = (ask(row, encoder) for row in open_rows((TURNS, ["0.png"]), (TURNS[:3], ["0.png"])))
    assert with_answer.prompt == without.prompt
    assert without.references == []
    assert torch.equal(with_answer.sample.sequence["input_ids"], without.sample.sequence["input_ids"])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_batch_answers_as_each_row_alone(setting, open_rows, layout):
    loaded, encoder = setting(layout)
    conversations = [
        (TURNS, ["0.png"]),
        ([user("Is it as it was before, or not?"), assistant("No.")], []),
        ([user(IMAGE, "Why?"), assistant("Yes.")], ["1.png"]),
    ]
    questions = [ask(row, encoder) for row in open_rows(*conversations)]
    collator = probe_collator(loaded.processor)

    def answer(asked):
        batch = join_on_the_right([question.sample for question in asked], collator)
        with torch.no_grad():
            first = loaded.model(**batch).logits[:, -1]
        words = generate_texts(
            loaded.model, loaded.processor.tokenizer, batch, max_new_tokens=12, end_of_turn=encoder.chat.end_of_turn
        )
        return first, words

    logits, together = answer(questions)
    alone = [answer([question]) for question in questions]
    torch.testing.assert_close(logits, torch.cat([first for first, _ in alone]), atol=1e-4, rtol=1e-4)
    assert together == [words[0] for _, words in alone]
    assert any(together) or layout == "granite_vision"  # its embeddings are tied: it repeats the last line break
