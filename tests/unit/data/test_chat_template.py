import functools
import string

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tiny_models import LAYOUTS, build_processor

from tuning.data.chat_template import ChatFormat
from tuning.data.encode import IGNORED, Encoder, Sample
from tuning.data.messages import Conversation, count_images, read_messages
from tuning.data.sources import Row
from tuning.errors import UserError

END = {
    "granite_vision": "<|end_of_text|>",
    "llava15": "</s>",
    "llava_next_vicuna": "</s>",
    "llava16_mistral": "</s>",
    "mllama": "<|eot_id|>",
}
VICUNA = ("llava15", "llava_next_vicuna")
PREFIX_STABLE = ("granite_vision", "llava16_mistral", "mllama")
DATE = "01 Jan 2026"
IMAGE = {"type": "image"}


def text(words: str) -> dict:
    return {"type": "text", "text": words}


def user(*parts) -> dict:
    return {"role": "user", "content": [text(part) if isinstance(part, str) else part for part in parts]}


def assistant(*parts: str) -> dict:
    return {"role": "assistant", "content": [text(part) for part in parts]}


def system(*parts: str) -> dict:
    return {"role": "system", "content": [text(part) for part in parts]}


@functools.cache
def encoder_of(layout: str) -> Encoder:
    return encoder_for(build_processor(layout))


def encoder_for(processor) -> Encoder:
    chat = ChatFormat(processor, date_string=DATE)
    return Encoder(processor, chat, max_seq_length=4096)


def encode(encoder: Encoder, messages: list[dict]) -> Sample:
    sizes = [(32 + 8 * (number % 3), 32 + 16 * (number % 2)) for number in range(count_images(messages))]
    images = [Image.new("RGB", size, "teal") for size in sizes]
    return encoder.encode(Row({"messages": messages, "images": images}, "rows.json", 0))


def supervised_texts(encoder: Encoder, sample: Sample) -> list[str]:
    """The decoded stretches of trained tokens, without the blank that some templates put before an answer."""
    labels, ids = sample.sequence["labels"].tolist(), sample.sequence["input_ids"].tolist()
    assert all(label in (IGNORED, token) for label, token in zip(labels, ids, strict=True))
    stretches: list[list[int]] = []
    for position, label in enumerate(labels):
        if label != IGNORED:
            if position == 0 or labels[position - 1] == IGNORED:
                stretches.append([])
            stretches[-1].append(label)
    decode = functools.partial(encoder.processor.tokenizer.decode, clean_up_tokenization_spaces=False)
    return [decode(stretch).removeprefix(" ") for stretch in stretches]


def answers_of(messages: list[dict], joint: str = "\n") -> list[str]:
    return [
        joint.join(part["text"] for part in message["content"])
        for message in messages
        if message["role"] == "assistant"
    ]


def with_template(layout: str, template: str) -> Encoder:
    processor = build_processor(layout)
    processor.chat_template = template
    return encoder_for(processor)


CONVERSATIONS = {
    "text only": [user("How many are there?"), assistant("There are three of them.")],
    "one image": [user(IMAGE, "What is in the picture?"), assistant("A red square.")],
    "many turns": [
        user(IMAGE, "What is it?"),
        assistant("It is a cat."),
        user("How many?"),
        assistant("One."),
        user("Thank you!"),
        assistant("Yes."),
    ],
    "system": [system("You answer in few words."), user("How many?"), assistant("Three."), user("?"), assistant("No.")],
    "two images": [user(IMAGE, "and", IMAGE, "differ how?"), assistant("One is blue, the other is not.")],
    "image in a later turn": [user("Hello"), assistant("Yes?"), user(IMAGE, "What is it?"), assistant("A circle.")],
    "answers repeat the question": [
        user("One."),
        assistant("One."),
        user(IMAGE, "One."),
        assistant("One. One."),
        user("ASSISTANT: One."),
        assistant("One."),
    ],
    "blanks inside": [user("How?"), assistant("First:\n\n- one\n- two  (2)\n\nThen:\tthree")],
    "other scripts": [user("Was?"), assistant("größer 漢字 🙂 é"), user("?"), assistant("🙂")],
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("messages", CONVERSATIONS.values(), ids=CONVERSATIONS)
def test_exactly_the_answers_and_their_end_tokens_are_trained(layout, messages):
    encoder = encoder_of(layout)
    expected = [answer + END[layout] for answer in answers_of(messages)]
    assert supervised_texts(encoder, encode(encoder, messages)) == expected


@pytest.mark.parametrize("layout", [layout for layout in LAYOUTS if layout != "mllama"])
def test_system_prompt_beside_an_image_is_not_trained(layout):
    messages = [
        system("You are helpful."),
        user(IMAGE, "What is it?"),
        assistant("A cat."),
        user("?"),
        assistant("No."),
    ]
    encoder = encoder_of(layout)
    sample = encode(encoder, messages)
    assert supervised_texts(encoder, sample) == [f"A cat.{END[layout]}", f"No.{END[layout]}"]
    assert "You are helpful." in encoder.processor.tokenizer.decode(sample.sequence["input_ids"])


def test_end_token_is_trained_although_it_is_also_the_padding_token():
    encoder = encoder_of("granite_vision")
    tokenizer = encoder.processor.tokenizer
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    labels = encode(encoder, CONVERSATIONS["many turns"]).sequence["labels"]
    assert (labels == tokenizer.eos_token_id).sum() == 3


@pytest.mark.parametrize("layout", LAYOUTS)
def test_end_token_is_added_only_where_the_template_writes_none(layout):
    chat = encoder_of(layout).chat
    assert chat.adds_end_token == (layout in VICUNA)
    assert chat.end_of_turn == END[layout]
    rendered = chat.render(Conversation(CONVERSATIONS["many turns"]))
    trained = [rendered.text[start:end].lstrip() for start, end in rendered.spans]
    assert trained == [answer + END[layout] for answer in ("It is a cat.", "One.", "Yes.")]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_trained_text_begins_where_the_generation_prompt_ends(layout):
    chat = encoder_of(layout).chat
    messages = CONVERSATIONS["many turns"]
    rendered = chat.render(Conversation(messages))
    start = rendered.spans[0][0]
    assert rendered.text[:start] == chat.generation_prompt(messages[:1])


@pytest.mark.parametrize("layout", PREFIX_STABLE)
@pytest.mark.parametrize("name", ["text only", "one image", "many turns", "two images", "answers repeat the question"])
def test_spans_equal_those_found_by_rendering_prefixes(layout, name):
    messages = CONVERSATIONS[name]
    if layout == "mllama" and name == "answers repeat the question":
        messages = [
            messages[2],
            *messages[1::2][:1],
            *messages[4:],
        ]  # Llama 3.2 greets in text-only prefixes: the image comes first
    encoder = encoder_of(layout)

    def render(turns, **options):
        return encoder.processor.apply_chat_template(turns, tokenize=False, date_string=DATE, **options)

    expected = [
        (len(render(messages[:index], add_generation_prompt=True)), len(render(messages[: index + 1]).rstrip()))
        for index, message in enumerate(messages)
        if message["role"] == "assistant"
    ]
    rendered = encoder.chat.render(Conversation(messages))
    assert rendered.text == render(messages)
    assert rendered.spans == expected


@pytest.mark.parametrize("layout", LAYOUTS)
def test_text_parts_that_a_template_would_drop_are_joined(layout):
    messages = [
        system("You are helpful.", "Answer briefly."),
        user("One question.", " Another?"),
        assistant("First part.", "Second part."),
    ]
    encoder = encoder_of(layout)
    sample = encode(encoder, messages)
    joint = "\n" if "assistant" in encoder.chat.template.joined_roles else ""
    assert supervised_texts(encoder, sample) == ["First part." + joint + "Second part." + END[layout]]
    whole = encoder.chat.render(Conversation(messages)).text
    assert "You are helpful.\nAnswer briefly." in whole
    assert whole.index("One question.") < whole.index(" Another?")


def test_granite_would_drop_parts_of_system_and_answer():
    assert encoder_of("granite_vision").chat.template.joined_roles == {"system", "assistant"}


def test_mllama_gets_its_system_prompt_as_a_string():
    chat = encoder_of("mllama").chat
    assert chat.template.string_roles == {"system"}
    rendered = chat.render(Conversation([system("You are helpful."), user("q"), assistant("a")])).text
    assert f"Today Date: {DATE}\n\nYou are helpful.<|eot_id|>" in rendered


@pytest.mark.parametrize("given", [None, "24 Dec 2001"])
def test_date_that_a_template_writes_can_be_fixed(given):
    chat = ChatFormat(build_processor("mllama"), date_string=given)
    rendered = chat.render(Conversation([user("q"), assistant("a")])).text
    date = rendered.partition("Today Date: ")[2].partition("\n")[0]
    assert date == given if given else len(date) == len("24 Dec 2001")


def test_conversation_that_the_template_refuses_names_the_row():
    messages = [system("You are helpful."), user(IMAGE, "What is it?"), assistant("A cat.")]
    with pytest.raises(UserError, match="refuses this conversation: Prompting with images is incompatible") as caught:
        encode(encoder_of("mllama"), messages)
    assert caught.value.where == "rows.json, row 0, field 'messages'"


TURN = "{% for m in messages %}{% for p in m.content if p.type == 'text' %}"
END_TURN = "{% endfor %}{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"


def test_words_that_the_template_leaves_out_name_the_message():
    template = TURN + "{% if m.role != 'system' %}{{ m.role }}:{{ p.text }}</s>{% endif %}" + END_TURN
    messages = [user("q"), assistant("a"), system("Never say so."), user("q"), assistant("a")]
    with pytest.raises(UserError, match=r"leaves out words of this system message: 'Never say so\.'") as caught:
        encode(with_template("llava16_mistral", template), messages)
    assert caught.value.where == "rows.json, row 0, field 'messages', message 2"


def test_answer_that_the_template_rewrites_is_refused():
    template = TURN + "{{ m.role }}:{{ p.text | replace('  ', ' ') }}</s>" + END_TURN
    encoder = with_template("llava16_mistral", template)
    assert supervised_texts(encoder, encode(encoder, [user("q"), assistant("a b")])) == ["a b</s>"]
    with pytest.raises(UserError, match="rewrites the assistant's words") as caught:
        encode(encoder, [user("q"), assistant("a  b")])
    assert caught.value.where == "rows.json, row 0, field 'messages'"


def test_answer_that_the_template_trims_is_found():
    encoder = with_template("llava16_mistral", TURN + "{{ m.role }}:{{ p.text | trim }}</s>" + END_TURN)
    messages = [user("q"), assistant(" one \n"), user("q"), assistant("two ")]
    assert supervised_texts(encoder, encode(encoder, messages)) == ["one</s>", "two</s>"]


def test_template_that_shortens_earlier_turns_still_trains_what_it_writes():
    # Rendering prefixes would fail here: an answer is written differently once another turn follows.
    template = TURN + "{{ m.role }}:{% if loop.last and m.role == 'user' %}!{% endif %}{{ p.text }}</s>"
    template += "{% if not m == messages[-1] %} (more){% endif %}" + END_TURN
    encoder = with_template("llava16_mistral", template)
    messages = [user("q"), assistant("one"), user("r"), assistant("two")]
    assert supervised_texts(encoder, encode(encoder, messages)) == ["one</s>", "two</s>"]


def test_generation_markers_say_what_is_trained():
    template = TURN + "{{ m.role }}:{% if m.role == 'assistant' and m == messages[-1] %}"
    template += "{% generation %}{{ p.text }}</s>{% endgeneration %}{% else %}{{ p.text }}</s>{% endif %}" + END_TURN
    encoder = with_template("llava16_mistral", template)
    messages = [user("q"), assistant("one"), user("r"), assistant("two")]
    assert supervised_texts(encoder, encode(encoder, messages)) == ["two</s>"]


def test_model_without_a_template_is_told_to_give_one():
    processor = build_processor("llava15")
    processor.chat_template = None
    with pytest.raises(UserError, match="has no chat template"):
        ChatFormat(processor)


def test_template_that_writes_no_answers_is_refused():
    with pytest.raises(UserError, match="does not render an assistant's answer"):
        with_template("llava16_mistral", TURN + "{% if m.role == 'user' %}{{ p.text }}{% endif %}" + END_TURN)


# Blanks and characters with two spellings are left out: a tokenizer may spell them otherwise when it decodes.
LETTERS = string.ascii_letters + string.digits + string.punctuation.replace("<", "") + "äéß漢字🙂Ω"
WORDS = st.lists(st.text(LETTERS, min_size=1, max_size=8), min_size=1, max_size=5).map(" ".join)
QUESTIONS = st.lists(st.one_of(st.just(IMAGE), WORDS.map(text)), max_size=2)
TURNS = st.lists(st.tuples(QUESTIONS, WORDS, WORDS), min_size=1, max_size=3)


@pytest.mark.parametrize("layout", LAYOUTS)
@settings(max_examples=30, deadline=None, derandomize=True)
@given(turns=TURNS, prompt=st.none() | WORDS)
def test_any_conversation_trains_its_answers_and_nothing_else(layout, turns, prompt):
    messages = [turn for parts, question, answer in turns for turn in (user(*parts, question), assistant(answer))]
    if prompt and not (layout == "mllama" and count_images(messages)):
        messages = [system(prompt), *messages]
    encoder = encoder_of(layout)
    expected = [answer + END[layout] for answer in answers_of(messages)]
    assert supervised_texts(encoder, encode(encoder, read_messages(messages, "row"))) == expected
