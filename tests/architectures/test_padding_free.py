"""Padding-free batches give the loss and the gradients of padded ones in float64, for every architecture."""

import functools
import re
from dataclasses import replace

import pytest
import torch
from architectures.case import Case
from architectures.names import ALONE, PADDED, each_architecture
from architectures.page import LORA
from sample_batches import try_rows
from torch import nn
from transformers import PreTrainedModel

from tuning.config.parse import resolve
from tuning.data.encode import IGNORED
from tuning.data.from_config import dummy_batch
from tuning.model.attention import get_base
from tuning.model.build import build_model, plan_model
from tuning.training.data_loading import find_positions

PRECISION = 1e-5  # relative: parts of many models compute in float32, whatever their weights have (norms, routers)
SINGLE = ("nemotron_h_omni",)  # its tower's pictures are float32 whatever its weights are: the test runs in float32
WAYS = {"full": {}, "LoRA": {**LORA, "freeze_vision_tower": False, "freeze_multi_modal_projector": False}}


def build(case: Case, **options):
    """A model as it trains, in float64, and the attention that it was planned with."""
    config = resolve(case.options(**options))
    plan = plan_model(config, case.model_config, functools.partial(dummy_batch, case.encoder))
    model = build_model(config, case.model_config, plan).model.train()
    if case.name not in SINGLE:
        keep_float32(get_base(model.double()))
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if hasattr(module, "config"):
            module.config._experts_implementation = "eager"  # grouped products do not take float64
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:  # else the gradient of A is zero
                parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) / 10)
    return model, plan.attention


def keep_float32(model) -> None:
    """Convert back what transformers keeps in float32, whatever the dtype of a model."""
    for part in (module for module in model.modules() if isinstance(module, PreTrainedModel)):
        kept = [*(part._keep_in_fp32_modules or ()), *(part._keep_in_fp32_modules_strict or ())]
        for name, parameter in part.named_parameters():
            if any(re.search(rf"(^|\.){re.escape(module)}(\.|$)", name) for module in kept):
                parameter.data = parameter.data.float()


def differentiate(model, batches: list[dict]) -> tuple[float, dict]:
    """The loss and the gradients of batches that are a step together."""
    model.zero_grad()
    count = sum(int((batch["labels"][:, 1:] != IGNORED).sum()) for batch in batches)
    total = 0.0
    for batch in batches:
        loss = model(**batch, num_items_in_batch=count).loss
        loss.backward()
        total += loss.item()
    gradients = [(n, p.grad.clone()) for n, p in model.named_parameters() if p.requires_grad and p.grad is not None]
    return total, dict(gradients)


@pytest.mark.parametrize("way", ["full", pytest.param("LoRA", marks=pytest.mark.slow)])
@each_architecture
def test_loss_and_gradients_are_those_of_padded_batches(name, way, tmp_path):
    case = Case.make(name, tmp_path)
    model, attention = build(case, **WAYS[way])
    limit = 1e-4 if name in SINGLE else PRECISION
    padded = [[sample] for sample in case.samples] if name in ALONE else [case.samples]
    loss, expected = differentiate(model, [case.collator.join(samples) for samples in padded])

    model.eval()
    packing = try_rows(model, model, case.encoder, attention)
    model.train()
    if name in PADDED:
        assert packing.reason
        return
    assert packing.reason == ""
    packing.apply(model)
    positions = find_positions(model, case.samples)
    collator = replace(case.collator, padding_free=True, positions=positions, adapt=packing.adapt)
    batch = collator.join(case.samples)
    assert batch["input_ids"].shape == (1, sum(len(sample.sequence["input_ids"]) for sample in case.samples))
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
            model.enable_input_require_grads()
        found_loss, found = differentiate(model, [batch])
        assert found_loss == pytest.approx(loss, rel=limit)
        assert found.keys() == expected.keys()
        largest = max(gradient.norm().item() for gradient in expected.values())
        for parameter, gradient in expected.items():
            distance = (found[parameter] - gradient).norm().item()
            assert distance <= limit * (gradient.norm().item() + 1e-3 * largest), parameter
