"""`vlm-tuning chat` without its page: answers as they are written, the adapter left out, what ends before a model."""

import importlib.util
import json
import socket
import threading
from contextlib import nullcontext

import pytest
import torch
from PIL import Image
from scripted import save_scripted
from tiny_models import LAYOUTS

from tuning import cli
from tuning.commands import chat
from tuning.commands.chat import ChatArguments, is_base_of, make_speakers
from tuning.config.options import ModelSource
from tuning.data.prompts import ask as read_question
from tuning.data.sources import Row
from tuning.errors import UserError
from tuning.model.answering import load_answering
from tuning.model.generate import generate_texts, greedy_settings, stream_text
from tuning.pages.chat_page import Answer, Conversation, Turn, stream_answers
from tuning.training.evaluation import answer as answer_batch

PICTURE = Image.new("RGB", (60, 40), "red")


@pytest.fixture(scope="module")
def scripted(tmp_path_factory):
    """Folders of a model that says one thing and of an adapter on it that says another."""
    folder = tmp_path_factory.mktemp("scripted")
    words = " It is a red square."
    save_scripted(folder / "base", " A cat sits there.", adapter_words=words, adapter_folder=folder / "adapter")
    return folder


@pytest.fixture(scope="module")
def pair(scripted):
    """The adapter, and its base beside it."""
    options = ChatArguments(str(scripted / "adapter"), compare=str(scripted / "base"))
    return make_speakers(options, threading.Event())


def user(words, images=0):
    return {"role": "user", "content": [*[{"type": "image"}] * images, {"type": "text", "text": words}]}


def asked(*texts, images=()):
    return Turn(texts[0], list(images), [], [Answer(text) for text in texts[1:]])


class Fake:
    """A speaker that says given pieces, an exception among them is raised, and notes what it was asked."""

    name, about = "fake", "facts"

    def __init__(self, *pieces):
        self.pieces, self.asked, self.closed = pieces, [], 0

    def reply(self, messages, images):
        self.asked.append((messages, images))
        try:
            for piece in self.pieces:
                if isinstance(piece, Exception):
                    raise piece
                yield piece
        finally:
            self.closed += 1


def batch_of(folder):
    loaded = load_answering(ModelSource(str(folder)), device="cpu")
    batch = dict(loaded.processor(text=["USER: Why? ASSISTANT:"], return_tensors="pt"))
    return loaded.model, loaded.processor.tokenizer, batch


def test_the_pieces_are_the_answer_that_a_batch_gets(models):
    model, tokenizer, batch = batch_of(models["llava15"])
    settings = greedy_settings(model, tokenizer, max_new_tokens=30, end_of_turn="")
    pieces = list(stream_text(model, tokenizer, batch, settings, during=nullcontext(), ending=threading.Event()))
    assert len(pieces) > 3
    assert "".join(pieces).strip() == generate_texts(model, tokenizer, batch, max_new_tokens=30)[0] != ""


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_later_turn_of_every_layout_is_answered_as_a_row_of_data_is(models, layout):
    speaker = make_speakers(ChatArguments(str(models[layout]), max_new_tokens=12), threading.Event())[0]
    pictures = [PICTURE] * (speaker.encoder.max_images or 2)
    talk = Conversation([asked("What is it?", "A dog.", images=pictures), asked("Sure?", "")])
    messages, images = talk.history(0)
    question = read_question(Row({"messages": messages, "images": images}, "file", 0), speaker.encoder)
    expected = answer_batch(
        speaker.loaded.model, [question.sample], speaker.encoder, speaker.collator, max_new_tokens=12
    )
    assert "".join(speaker.reply(messages, images)).strip() == expected[0]


@pytest.mark.parametrize("how", ["closed", "ended"])
def test_an_answer_stops_at_the_next_token(models, how):
    model, tokenizer, batch = batch_of(models["llava15"])
    settings = greedy_settings(model, tokenizer, max_new_tokens=1500, end_of_turn="")
    settings.eos_token_id = None
    steps, ending = [], threading.Event()
    model.register_forward_hook(lambda *_: steps.append(1))
    pieces = stream_text(model, tokenizer, batch, settings, during=nullcontext(), ending=ending)
    next(pieces)
    if how == "closed":
        pieces.close()
    else:
        ending.set()
        list(pieces)
    assert len(steps) < 500


def test_what_generation_raises_is_raised_to_the_reader(models):
    model, tokenizer, batch = batch_of(models["llava15"])
    settings = greedy_settings(model, tokenizer, max_new_tokens=4, end_of_turn="")
    batch["input_ids"] = torch.full_like(batch["input_ids"], 10**6)
    with pytest.raises(IndexError):
        list(stream_text(model, tokenizer, batch, settings, during=nullcontext(), ending=threading.Event()))


def test_adapter_and_base_answer_from_one_model_in_memory(pair):
    tuned, base = pair
    assert tuned.loaded.model is base.loaded.model
    for _ in range(2):
        assert "".join(tuned.reply([user("What is it?", 1)], [PICTURE])).strip() == "It is a red square."
        assert "".join(base.reply([user("What is it?", 1)], [PICTURE])).strip() == "A cat sits there."
    assert "LoRA adapter on base" in tuned.about
    assert "without the adapter" in base.about
    assert "cpu · float32" in base.about
    assert (tuned.name, base.name) == ("adapter", "base")


def test_a_second_model_and_an_adapter_with_biases_are_loaded_apart(scripted, pair, tmp_path):
    assert not is_base_of(str(scripted), pair[0].loaded)
    config = json.loads((scripted / "adapter" / "adapter_config.json").read_text())
    copied = tmp_path / "biased"
    copied.mkdir()
    (copied / "adapter_config.json").write_text(json.dumps({**config, "bias": "lora_only"}))
    (copied / "adapter_model.safetensors").write_bytes(
        (scripted / "adapter" / "adapter_model.safetensors").read_bytes()
    )
    options = ChatArguments(str(copied), compare=str(scripted / "base"))
    tuned, base = make_speakers(options, threading.Event())
    assert tuned.loaded.model is not base.loaded.model
    assert "".join(base.reply([user("What?")], [])).strip() == "A cat sits there."


def test_the_model_reads_the_conversation_as_it_is_trained(pair, monkeypatch):
    seen = []
    monkeypatch.setattr(chat, "stream_text", lambda model, tokenizer, batch, *_, **__: seen.append(batch) or iter(()))
    talk = Conversation([asked("What is it?", "A dog.", images=[PICTURE]), asked("Sure? </s> <image>", "")])
    list(pair[0].reply(*talk.history(0)))
    encoder, ids = pair[0].encoder, seen[0]["input_ids"][0]
    text = encoder.processor.tokenizer.decode(ids, skip_special_tokens=False)
    assert text.count("<image>") - 1 == (ids == encoder.image_token_id).sum() == 16
    assert "What is it?" in text
    assert "ASSISTANT: A dog.</s>" in text
    assert text.endswith("ASSISTANT:")
    end = encoder.processor.tokenizer.eos_token_id
    assert (ids == end).sum() == 1  # the end of the answer; the one that was typed is words


def test_what_cannot_be_asked_says_why(pair):
    tuned = pair[0]
    for messages, images, why in [
        ([user("Both?", 2)], [PICTURE] * 2, "takes 1 image per conversation, and there are 2"),
        ([user("why " * 3000)], [], "tokens are more than"),
    ]:
        with pytest.raises(UserError, match=why):
            list(tuned.reply(messages, images))


def test_each_speaker_is_asked_its_own_conversation_without_questions_left_open():
    first, second = Fake("One."), Fake("Two.")
    talk = Conversation([asked("a", "A1", ""), asked("b", "", "B2", images=[PICTURE]), asked("c", "", "")])
    for _ in stream_answers(talk, [first, second]):
        pass
    roles = [(m["role"], m["content"][-1]["text"]) for m in first.asked[0][0]]
    assert roles == [("user", "a"), ("assistant", "A1"), ("user", "c")]
    assert first.asked[0][1] == []
    roles = [(m["role"], m["content"][-1]["text"]) for m in second.asked[0][0]]
    assert roles == [("user", "b"), ("assistant", "B2"), ("user", "c")]
    assert second.asked[0][1] == [PICTURE]
    assert [answer.text for answer in talk.turns[-1].answers] == ["One.", "Two."]


def test_an_error_of_one_is_shown_in_its_place_and_the_other_answers():
    talk = Conversation([asked("q", "", "")])
    for _ in stream_answers(
        talk, [Fake("Half", UserError(problem="there is no room.", fix="Mend it.")), Fake("Whole.")]
    ):
        pass
    assert talk.bubbles(0)[-1]["content"] == "Half\n\n⚠ There is no room."
    assert talk.bubbles(1)[-1]["content"] == "Whole."


def test_stopping_keeps_what_was_said_and_spares_the_second():
    first, second = Fake("a ", "b ", "c "), Fake("d")
    talk = Conversation([asked("q", "", "")])
    writing = stream_answers(talk, [first, second])
    next(writing)
    talk.stopped = True
    list(writing)
    assert [place.text for place in talk.turns[0].answers] == ["a", ""]
    assert talk.turns[0].answers[1].problem == "Stopped."
    assert (first.closed, second.asked) == (1, [])


def test_clearing_while_it_answers_leaves_an_empty_talk():
    talk = Conversation([asked("q", "", "")])
    writing = stream_answers(talk, [Fake("a ", "b "), Fake("c")])
    next(writing)
    talk.turns.clear()
    talk.stopped = True
    list(writing)
    assert talk.bubbles(0) == talk.bubbles(1) == []


@pytest.mark.parametrize("case", ["no gradio", "port in use", "no port", "unknown option", "no model"])
def test_what_is_wrong_is_said_before_a_model_is_loaded(case, scripted, monkeypatch, capsys):
    monkeypatch.setattr(chat, "load_answering", lambda *_, **__: pytest.fail("a model was loaded"))
    options = {"model_name_or_path": str(scripted / "base"), "port": "7893"}
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        expected = "chat"
        if case == "no gradio":
            monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
            expected = 'pip install "vlm-tuning[chat]"'
        elif case == "port in use":
            options["port"], expected = str(taken.getsockname()[1]), "Give another one with --port."
        elif case == "no port":
            options["port"], expected = "70000", "port: must be at least 1 and at most 65535, got 70000"
        elif case == "unknown option":
            options["max_new_token"], expected = "7", "Did you mean max_new_tokens?"
        else:
            options["compare"], expected = "/no/such/model", "compare: /no/such/model does not exist"
        assert cli.main(["chat", *(f"--{name}={value}" for name, value in options.items())]) == 1
    printed = capsys.readouterr().err
    assert expected in printed
    assert "Traceback" not in printed


def test_help_lists_the_options(capsys):
    assert cli.main(["chat", "--help"]) == 0
    assert "--compare" in capsys.readouterr().out
