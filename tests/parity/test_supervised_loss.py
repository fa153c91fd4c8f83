"""Our loss and its gradients equal a plain reference in float64: all logits, then cross-entropy."""

import pytest
import torch
import torch.nn.functional as F
from sample_batches import as_inputs, assert_same_gradients, gradients, make_batch
from tiny_models import LAYOUTS, build_model
from transformers import GraniteForCausalLM

from tuning.model.head import find_head
from tuning.model.loss import patch_supervised_loss
from tuning.model.mllama import patch_mllama_cross_attention, patch_mllama_tower
from tuning.model.vision_tower import find_tower


@pytest.mark.parametrize("layout", LAYOUTS)
def test_loss_and_gradients_equal_the_plain_reference(layout):
    # Mllama's stock forward mixes rows with different numbers of images, so the reference needs equal rows.
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
    ours = find_head(model).logits(model.lm_head, hidden[0])
    torch.testing.assert_close(ours, text(ids).logits[0])


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


def test_pictures_that_only_pad_are_not_computed_and_change_nothing():
    samples = make_batch("mllama")
    inputs = as_inputs("mllama", samples)
    pictures = inputs["aspect_ratio_ids"]
    assert 0 < (pictures > 0).sum() < pictures.numel()
    results = []
    for patch in (False, True):
        model = build_model("mllama", dtype=torch.float64)
        patch_mllama_cross_attention(model)
        patch_supervised_loss(model)
        seen = []
        find_tower(model).patch_embedding.register_forward_hook(
            lambda module, given, out, seen=seen: seen.append(len(out))
        )
        if patch:
            patch_mllama_tower(model)
        loss = model(**inputs).loss
        loss.backward()
        results.append((loss, gradients(model), seen[0] // inputs["pixel_values"].shape[2]))
    (stock, expected, computed), (ours, found, needed) = results
    assert (computed, needed) == (pictures.numel(), int((pictures > 0).sum()))
    torch.testing.assert_close(ours, stock, rtol=1e-12, atol=0)
    assert_same_gradients(found, expected)


def test_no_logit_is_computed_where_nothing_is_trained():
    samples = make_batch("llava15")
    inputs = as_inputs("llava15", samples)
    model = build_model("llava15", dtype=torch.float64)
    patch_supervised_loss(model)
    rows, stock_forward = [], model.lm_head.forward
    model.lm_head.forward = lambda hidden: rows.append(len(hidden)) or stock_forward(hidden)
    model(**inputs)
    assert rows == [int((inputs["labels"] != -100).sum())]
