"""Packed rows give the loss and gradients of padded rows, and the trial finds models for which they do not."""

import functools
from dataclasses import replace

import pytest
import torch
from sample_batches import assert_same_gradients, gradients, make_batch, try_rows
from tiny_models import LAYOUTS, build_model, build_processor

from tuning.data.chat_template import ChatFormat
from tuning.data.collator import probe_collator
from tuning.data.encode import Encoder
from tuning.model.attention import Attention, set_decoder_attention
from tuning.model.loss import patch_supervised_loss, supervised_loss
from tuning.model.packed_attention import PACKED
from tuning.model.padding_free import Packing

PLAIN = [layout for layout in LAYOUTS if layout != "mllama"]
ATTENTION = Attention("sdpa", PACKED, "")


def batches(layout: str) -> list[dict]:
    """The same samples, padded and packed."""
    samples, collator = make_batch(layout), probe_collator(build_processor(layout))
    made = []
    for collator.padding_free in (False, True):
        batch = collator.join(samples)
        made.append({k: v.double() if torch.is_tensor(v) and v.is_floating_point() else v for k, v in batch.items()})
    return made


@pytest.mark.parametrize("layout", PLAIN)
def test_loss_and_gradients_equal_padded_ones(layout):
    padded, packed = batches(layout)
    model = build_model(layout, dtype=torch.float64)
    patch_supervised_loss(model)
    expected_loss = model(**padded).loss
    expected_loss.backward()
    expected = gradients(model)
    model.zero_grad()
    set_decoder_attention(model, PACKED)
    loss = model(**packed).loss
    loss.backward()
    assert packed["input_ids"].shape == (1, int(padded["attention_mask"].sum()))
    assert abs(loss.item() - expected_loss.item()) < 1e-10
    assert_same_gradients(gradients(model), expected)


@pytest.mark.parametrize("layout", PLAIN)
def test_no_mask_of_tokens_by_tokens_is_made(layout):
    """No layer gets one."""
    packed = batches(layout)[1]
    model = build_model(layout, dtype=torch.float64)
    patch_supervised_loss(model)
    set_decoder_attention(model, PACKED)
    masks = []
    for layer in model.get_decoder().layers:
        layer.register_forward_pre_hook(
            lambda layer, args, kwargs: masks.append(kwargs["attention_mask"]), with_kwargs=True
        )
    model(**packed)
    assert masks == [None] * len(model.get_decoder().layers)


@functools.cache
def encoder_of(layout: str) -> Encoder:
    processor = build_processor(layout)
    return Encoder(processor, ChatFormat(processor), 4096)


@pytest.mark.parametrize("layout", PLAIN)
def test_the_trial_passes_a_model_that_keeps_rows_apart(layout):
    model, encoder = build_model(layout).train(), encoder_of(layout)
    patch_supervised_loss(model)
    state = torch.get_rng_state()
    assert try_rows(model, model, encoder, ATTENTION) == Packing(PACKED)
    assert model.config.get_text_config()._attn_implementation == "sdpa"  # as it was
    assert model.training
    assert torch.equal(torch.get_rng_state(), state)


def test_mllama_is_padded_because_of_its_images():
    model, encoder = build_model("mllama"), encoder_of("mllama")
    patch_supervised_loss(model)
    assert "cross_attention_mask has a place for each" in try_rows(model, model, encoder, ATTENTION).reason


def attend_across(attend):
    """Attention that ignores where samples begin."""
    return lambda *args, **kwargs: attend(*args, **{**kwargs, "cu_seq_lens_q": None})


def forget_positions(forward):
    """A decoder that computes other positions from those it gets."""
    return lambda position_ids=None, **kwargs: forward(
        position_ids=None if position_ids is None else position_ids // 9, **kwargs
    )


LAYERS = ("layers.0", "layers.1")
FAULTS = {
    "leak": Packing(PACKED, LAYERS),  # then layers get one row at a time
    "refusal": Packing(None, LAYERS),
    "positions": Packing(reason="the results of packed rows differ from those of separate rows"),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_trial_finds_a_model_that_mixes_samples(fault, dtype, monkeypatch):
    from transformers import AttentionInterface

    model, encoder = build_model("granite_vision"), encoder_of("granite_vision")
    with torch.no_grad():
        for parameter in model.get_decoder().parameters():
            parameter.mul_(8)  # random weights are so small that attention does nothing
    model.to(dtype)
    patch_supervised_loss(model)
    decoder, stock = model.get_decoder(), AttentionInterface()[PACKED]
    if fault == "leak":
        monkeypatch.setitem(AttentionInterface()._global_mapping, PACKED, attend_across(stock))
    elif fault == "positions":
        monkeypatch.setattr(decoder, "forward", forget_positions(decoder.forward))
    else:
        monkeypatch.setitem(AttentionInterface()._global_mapping, PACKED, lambda *args, s_aux: None)

    def forward(**batch):
        return model(**{k: v.to(dtype) if "pixel" in k else v for k, v in batch.items()})

    found = try_rows(model, forward, encoder, ATTENTION, half=dtype == torch.bfloat16)
    assert replace(found, reason=found.reason.partition(", by")[0]) == FAULTS[fault]
    monkeypatch.undo()
    assert try_rows(model, forward, encoder, ATTENTION, half=dtype == torch.bfloat16) == Packing(PACKED)


@pytest.mark.parametrize("chunk_size", [1, 3, 7, 8, 100])
def test_a_loss_in_chunks_is_the_loss_at_once(chunk_size):
    torch.manual_seed(0)
    hidden = torch.randn(2, 9, 6, dtype=torch.float64, requires_grad=True)
    head = torch.nn.Linear(6, 11).double()
    labels = torch.randint(0, 11, (2, 9))
    labels[0, :5] = labels[1, 4] = -100

    def run(**settings) -> list:
        hidden.grad = None
        head.zero_grad()
        loss = supervised_loss(hidden, labels, head, lambda head, hidden: torch.tanh(head(hidden)) * 3, 5, **settings)
        loss.backward()
        return [loss, hidden.grad, head.weight.grad, head.bias.grad]

    for got, expected in zip(run(chunk_size=chunk_size), run(chunk_size=10**6), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-14)


def test_never_more_logits_at_once_than_allowed():
    shapes = []

    def make_logits(head, hidden):
        shapes.append(len(hidden))
        return head(hidden)

    head, hidden = torch.nn.Linear(4, 50), torch.randn(1, 101, 4, requires_grad=True)
    supervised_loss(hidden, torch.zeros(1, 101, dtype=torch.long), head, make_logits, chunk_size=30).backward()
    assert shapes == [30, 30, 30, 10, 10, 30, 30, 30]  # the forward's, and again in the backward


def test_hooks_of_the_head_run_once_however_many_chunks_there_are():
    """FSDP and ZeRO-3 gather its weight in hooks, so that every process must run them equally often."""
    head, hidden, calls = torch.nn.Linear(6, 11), torch.randn(1, 9, 6, requires_grad=True), []
    head.register_forward_pre_hook(lambda *_: calls.append("gather"))
    head.register_forward_hook(lambda *_: calls.append("free"))
    head.register_full_backward_pre_hook(lambda *_: calls.append("gather again"))
    head.register_full_backward_hook(lambda *_: calls.append("reduce"))
    labels = torch.randint(0, 11, (1, 9))
    supervised_loss(hidden, labels, head, lambda head, hidden: head(hidden), chunk_size=3).backward()
    assert calls == ["gather", "free", "gather again", "reduce"]
    assert "forward" not in vars(head)
