"""The auxiliary loss of expert routers is added where config.json asks for it, as the stock forward does."""

import pytest
import torch
from architectures.checkpoints import build
from architectures.pieces import fill
from transformers import AutoModelForImageTextToText

from tuning.model.head import find_head
from tuning.model.loss import describe_loss, patch_supervised_loss

NAMES = ["qwen3_vl_moe", "qwen3_5_moe", "glm4v_moe", "ernie4_5_vl_moe", "minimax_m3_vl", "qwen3_omni_moe_thinker"]


def tiny(name, *, asks):
    config = build(name).config
    config.text_config.output_router_logits = asks
    config.text_config.router_aux_loss_coef = 0.5
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config, dtype=torch.float64, experts_implementation="eager")
    return fill(model).eval()


def make_batch():
    ids = torch.randint(300, 340, (3, 11), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, 8:] = 0
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, :4] = -100
    return {"input_ids": ids, "attention_mask": mask}, labels


def gradients(model):
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


@pytest.mark.parametrize("name", NAMES)
def test_it_is_the_stock_forwards_loss(name):
    model = tiny(name, asks=True)
    inputs, labels = make_batch()
    stock = model(**inputs, labels=labels, use_cache=False)
    assert stock.aux_loss > 0
    stock.loss.backward()
    expected = gradients(model)
    patch_supervised_loss(model)
    loss = model(**inputs, labels=labels).loss
    loss.backward()
    torch.testing.assert_close(loss.double(), stock.loss.double(), rtol=1e-6, atol=0)
    found = gradients(model)
    assert found.keys() == expected.keys()
    for parameter, gradient in found.items():
        torch.testing.assert_close(gradient, expected[parameter], rtol=1e-4, atol=1e-7)
    count = int((labels[:, 1:] != -100).sum())
    torch.testing.assert_close(model(**inputs, labels=labels, num_items_in_batch=count).loss, loss)
    half = model(**inputs, labels=labels, num_items_in_batch=2 * count).loss  # a global batch twice as large
    torch.testing.assert_close(half, loss / 2)


@pytest.mark.parametrize("name", NAMES[:2])
def test_it_is_said(name):
    asking, silent = tiny(name, asks=True), tiny(name, asks=False)
    line = "Loss: the auxiliary loss of the routers is added, 0.5 of it, as config.json asks."
    assert describe_loss(asking, find_head(asking)) == [line]
    assert describe_loss(silent, find_head(silent)) == []


@pytest.mark.parametrize("name", NAMES[:2])
def test_without_the_setting_nothing_is_added(name):
    model = tiny(name, asks=False)
    inputs, labels = make_batch()
    expected = model(**inputs, labels=labels, use_cache=False).loss
    patch_supervised_loss(model)
    torch.testing.assert_close(model(**inputs, labels=labels).loss.double(), expected.double(), rtol=1e-6, atol=0)
