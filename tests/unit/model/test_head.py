"""The output head: found by structure, run by its own code, compared with the text model and with the stock forward."""

import copy

import pytest
import torch
import torch.nn.functional as F
from architectures.checkpoints import build
from architectures.pieces import fill
from torch import nn
from transformers import AutoModelForImageTextToText

from tuning.errors import UserError
from tuning.model import head as head_module
from tuning.model.head import find_code, find_head
from tuning.model.load import build_skeleton
from tuning.model.loss import check_logits, patch_supervised_loss


def tiny(name, change=lambda config: None):
    config = build(name).config
    change(config)
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config, dtype=torch.float64, experts_implementation="eager")
    return fill(model).eval()


def text_batch(model, *, rows=2, length=9):
    """Token ids that are no placeholders, and labels on the second half."""
    ids = torch.randint(300, 340, (rows, length), generator=torch.Generator().manual_seed(1))
    labels = ids.clone()
    labels[:, : length // 2] = -100
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, labels


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


ARITHMETIC = ["muse_glimmer", "inkling_mm_model", "chameleon", "cohere_compass", "hyperclovax_vision_v2", "gemma3n"]


@pytest.mark.parametrize("name", [*ARITHMETIC, "llama4", "nemotron_h_omni"])
def test_loss_and_gradients_are_those_of_the_stock_logits(name):
    model = tiny(name)
    inputs, labels = text_batch(model)
    logits = model(**inputs, use_cache=False).logits
    expected = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    expected.backward()
    expected_gradients = gradients(model)
    model.zero_grad()
    patch_supervised_loss(model)
    loss = model(**inputs, labels=labels).loss
    loss.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-9, atol=0)
    found = gradients(model)
    assert found.keys() == expected_gradients.keys()
    for gradient_name, gradient in found.items():
        torch.testing.assert_close(gradient, expected_gradients[gradient_name], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", ["llama4", "nemotron_h_omni"])
def test_the_head_of_an_inner_causal_model_makes_logits_of_supervised_tokens_only(name):
    model = tiny(name)
    code = find_code(model)
    assert code.owner is model.language_model
    patch_supervised_loss(model)
    inputs, labels = text_batch(model)
    made, stock_forward = [], code.head.forward
    code.head.forward = lambda hidden: made.append(hidden.shape[:-1].numel()) or stock_forward(hidden)
    model(**inputs, labels=labels)
    assert made == [int((labels[:, 1:] != -100).sum())]
    made.clear()
    model(**inputs)
    assert made == [inputs["input_ids"].numel()]  # without labels its forward is the stock one again


@pytest.mark.parametrize(
    ("name", "setting", "used"),
    [(name, "logit_scale", "Cohere2ForCausalLM") for name in ("aya_vision", "cohere2_vision")],
)
def test_what_the_stock_forward_is_known_to_leave_out_is_named_and_applied(name, setting, used):
    model = tiny(name)
    found = find_head(model)
    factor = getattr(model.config.text_config, setting)
    assert found.left_out == {setting: factor}
    assert found.describe() == (
        f"Logits: the forward of {type(model).__name__} leaves out {setting} {factor:g}. We apply it as {used} does."
    )
    hidden = torch.randn(3, model.config.text_config.hidden_size, dtype=torch.float64)
    torch.testing.assert_close(found.logits(model.lm_head, hidden), model.lm_head(hidden) * factor)
    torch.testing.assert_close(found.stock_logits(hidden), model.lm_head(hidden))


def test_softcapping_that_a_wrapper_leaves_out_is_applied():
    """LLaVA around Gemma 2, whose text model caps its logits."""
    from transformers import AutoConfig

    config = build("llava").config
    size = config.text_config.hidden_size
    config.text_config = AutoConfig.for_model(
        "gemma2",
        vocab_size=config.text_config.vocab_size,
        hidden_size=size,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        final_logit_softcapping=3.0,
    )
    model = build_skeleton(config)
    found = find_head(model)
    assert found.left_out == {"final_logit_softcapping": 3.0}


def test_a_model_that_differs_from_its_text_model_in_an_unknown_way_is_refused(monkeypatch):
    monkeypatch.setattr(head_module, "LEFT_OUT", {})
    with pytest.raises(UserError) as refused:
        find_head(build_skeleton(build("cohere2_vision").config))
    message = str(refused.value)
    assert (
        "Cohere2VisionForConditionalGeneration computes other logits than its text model Cohere2ForCausalLM" in message
    )
    assert "by up to 16 standard deviations, and we do not know which are right." in message


def test_a_known_setting_does_not_excuse_another_difference(monkeypatch):
    """The wrapper leaves out `logit_scale`, and shifts its logits besides."""
    model = build_skeleton(build("cohere2_vision").config)
    stock = type(model).forward

    def shifted(self, *args, **kwargs):
        output = stock(self, *args, **kwargs)
        output.logits = output.logits * 1.5
        return output

    monkeypatch.setattr(type(model), "forward", shifted)
    with pytest.raises(UserError, match="we do not know which are right"):
        find_head(model)


def test_a_model_without_a_head_is_refused():
    model = build_skeleton(build("llava").config).model
    with pytest.raises(UserError, match="LlavaModel has no separate body and output head"):
        find_head(model)


def test_the_comparison_finds_a_forward_that_our_loss_does_not_follow():
    """A stock forward that changes what its body gets, or what its body gives: our loss knows neither."""
    model = tiny("llava")
    inputs, _ = text_batch(model)
    stock = model.forward
    model.forward = lambda *args, **kwargs: stock(*args, **kwargs)
    patch_supervised_loss(model)
    check_logits(model, model, inputs, half=False)

    other = tiny("llava")
    untouched = other.forward

    def forward(input_ids, **kwargs):
        return untouched(input_ids.flip(-1), **kwargs)

    other.forward = forward
    patch_supervised_loss(other)
    with pytest.raises(UserError) as refused:
        check_logits(other, other, inputs, half=False)
    assert "our logits of LlavaForConditionalGeneration differ from those of its own forward, by up to" in str(
        refused.value
    )
    assert "so its loss would be wrong" in str(refused.value)


@pytest.mark.parametrize("name", ["llava", "cohere2_vision", "chameleon", "inkling_mm_model", "llama4"])
def test_the_comparison_passes_models_whose_logits_agree(name):
    model = tiny(name)
    patch_supervised_loss(model)
    model.train()
    check_logits(model, model, text_batch(model)[0], half=False)
    assert model.training


def test_a_lora_head_takes_part():
    """The head's code looks its head up when it runs, so that an adapter of the head is in the loss."""
    model = tiny("muse_glimmer")
    patch_supervised_loss(model)
    inputs, labels = text_batch(model)
    before = model(**inputs, labels=labels).loss

    class Doubled(nn.Module):
        def __init__(self, base):
            super().__init__()
            self.base, self.weight = base, base.weight

        def forward(self, hidden):
            return 2 * self.base(hidden)

    model.lm_head = Doubled(copy.deepcopy(model.lm_head))
    after = model(**inputs, labels=labels).loss
    logits = model(**inputs).logits
    expected = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    torch.testing.assert_close(after, expected)
    assert not torch.allclose(before, after)


def test_a_head_that_cannot_run_alone_is_refused(monkeypatch):
    """Code of a checkpoint may need the tokens after its body, for example."""
    model = build_skeleton(build("llava").config)

    def forward(self, input_ids=None, **kwargs):
        return self.lm_head(self.model(input_ids)[0][:, : len(input_ids)])

    monkeypatch.setattr(type(model), "forward", forward)
    with pytest.raises(UserError, match="the output head of LlavaForConditionalGeneration cannot run alone: TypeError"):
        find_head(model)


@pytest.mark.parametrize(
    ("found", "expected", "distance"),
    [
        ([[1.0, 2.0, 4.0]], [[1.0, 2.0, 4.0]], 0.0),
        ([[1.0, 2.0, 3.0, -3e38]], [[1.0, 2.0, 3.0, -3e38]], 0.0),
        ([[1.0, 2.0, 3.0, 0.0]], [[1.0, 2.0, 3.0, -3e38]], float("inf")),
        ([[1.0, 2.0]], [[1.0, 2.0, 3.0]], float("inf")),
        ([[3.0, 0.0]], [[1.0, 0.0]], 2.0 / 0.5**0.5),
        ([[float("nan"), 1.0]], [[float("nan"), 1.0]], 0.0),  # the first step ends with a message of its own
        ([[float("nan"), 1.0]], [[2.0, 1.0]], float("inf")),
    ],
)
def test_the_distance_of_logits(found, expected, distance):
    assert head_module.measure_distance(torch.tensor(found), torch.tensor(expected)) == pytest.approx(distance)
