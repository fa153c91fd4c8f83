"""Our loss and its gradients against a plain reference in float64: all logits, then cross-entropy."""

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from tiny_models import LAYOUTS, build_model, build_processor
from transformers import GraniteForCausalLM

from tuning.data.chat_template import ChatFormat
from tuning.data.collator import probe_collator
from tuning.data.encode import Encoder
from tuning.data.sources import Row
from tuning.model.loss import logit_arithmetic, patch_supervised_loss
from tuning.model.mllama import patch_mllama_cross_attention

SIZES = [(40, 40), (90, 30), (30, 80), (64, 64)]


def make_batch(layout: str) -> list:
    processor = build_processor(layout)
    encoder = Encoder(processor, ChatFormat(processor), 4096)
    samples = []
    for number, size in enumerate(SIZES):
        question = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]}
        answer = {"role": "assistant", "content": "It is a cat. " * (number + 1)}
        row = {"messages": [question, answer], "images": [Image.new("RGB", size, (60 * number, 99, 200))]}
        samples.append(encoder.encode(Row(row, "rows", number)))
    text_only = {
        "messages": [{"role": "user", "content": "Hello?"}, {"role": "assistant", "content": "Yes."}],
        "images": None,
    }
    several = {
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "Which?"}, {"type": "image"}, {"type": "image"}]},
            {"role": "assistant", "content": "The blue one."},
        ],
        "images": [Image.new("RGB", (50, 50), "blue"), Image.new("RGB", (20, 70), "red")],
    }
    return [*samples, *(encoder.encode(Row(row, "", 0)) for row in (text_only, several))]


def as_inputs(layout: str, samples: list) -> dict:
    batch = probe_collator(build_processor(layout))(samples)
    batch.pop("facts")
    return {name: value.double() if value.is_floating_point() else value for name, value in batch.items()}


def gradients(model) -> dict:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same_gradients(ours: dict, reference: dict) -> None:
    assert ours.keys() == reference.keys()
    for name, gradient in reference.items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-6, atol=1e-9, msg=name)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_loss_and_gradients_equal_the_plain_reference(layout):
    # Mllama's stock forward mixes rows with and without images up: there the reference holds for equal rows.
    inputs = as_inputs(layout, make_batch(layout)[: 4 if layout == "mllama" else 6])
    labels = inputs.pop("labels")
    model = build_model(layout, dtype=torch.float64)
    # The stock forward leaves out Granite's division; GraniteForCausalLM divides by 8.
    logits = model(**inputs).logits / (8.0 if layout == "granite_vision" else 1.0)
    reference = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
    reference.backward()
    expected = gradients(model)
    model.zero_grad()

    patch_supervised_loss(model)
    loss = model(**inputs, labels=labels).loss
    loss.backward()
    assert abs(loss.item() - reference.item()) < 1e-6
    assert_same_gradients(gradients(model), expected)


def test_granite_logits_are_those_of_its_text_model():
    model = build_model("granite_vision", dtype=torch.float64)
    text = GraniteForCausalLM(model.config.text_config).double()
    text.model.load_state_dict(model.model.language_model.state_dict())
    text.lm_head.load_state_dict(model.lm_head.state_dict())
    ids = torch.arange(5, 25)[None]
    hidden = model.model.language_model(ids).last_hidden_state
    ours = logit_arithmetic(model.config)(model.lm_head(hidden))
    torch.testing.assert_close(ours, text(ids).logits)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_one_batch_of_six_equals_six_of_one(layout):
    samples = make_batch(layout)
    model = build_model(layout, dtype=torch.float64)
    patch_mllama_cross_attention(model)
    patch_supervised_loss(model)
    together = model(**as_inputs(layout, samples)).loss
    together.backward()
    expected = gradients(model)
    model.zero_grad()
    count = sum(int((sample.sequence["labels"] != -100).sum()) for sample in samples)
    total = 0.0
    for sample in samples:
        loss = model(**as_inputs(layout, [sample]), num_items_in_batch=count).loss
        loss.backward()
        total += loss.item()
    assert abs(total - together.item()) < 1e-6
    assert_same_gradients(gradients(model), expected)


def test_no_logit_is_computed_where_nothing_is_trained():
    samples = make_batch("llava15")
    inputs = as_inputs("llava15", samples)
    model = build_model("llava15", dtype=torch.float64)
    patch_supervised_loss(model)
    rows = []
    model.lm_head.register_forward_hook(lambda module, given, output: rows.append(output.shape[0]))
    model(**inputs)
    assert rows == [int((inputs["labels"] != -100).sum())]
