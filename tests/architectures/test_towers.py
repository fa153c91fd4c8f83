"""Vision towers that take the lengths of pictures: with our attention, outputs and gradients in float64 are stock."""

import pytest
import torch
from architectures.case import Case
from architectures.names import each_architecture
from architectures.test_loss import as_double, load_in_double
from peft import LoraConfig, get_peft_model
from torch import nn

from tuning.model import tower_attention, vision_tower
from tuning.model.patch_embedding import patch_patch_embeddings
from tuning.model.tower_attention import TOWER, find_tower_configs, set_attention
from tuning.model.vision_tower import find_tower, keeps_pictures_apart, patch_frozen_tower


def tower_results(model, batch):
    """What the tower returns for a batch, and the gradients of what trains in it."""
    outputs = []
    tower = find_tower(model)
    hook = tower.register_forward_hook(
        lambda tower, args, output: outputs.extend(tower_attention._float_leaves(output))
    )
    model.zero_grad()
    model(**{name: value for name, value in batch.items() if name != "labels"})
    hook.remove()
    torch.manual_seed(0)
    sum((output * torch.rand_like(output)).sum() for output in outputs).backward()
    gradients = {name: weight.grad for name, weight in tower.named_parameters() if weight.grad is not None}
    return [output.detach() for output in outputs], gradients


@each_architecture
def test_few_pictures_at_a_time_give_what_all_at_once_do(name, tmp_path, monkeypatch):
    case = Case.make(name, tmp_path)
    model = load_in_double(case).requires_grad_(False)
    tower = find_tower(model)
    if tower is None or not keeps_pictures_apart(tower):
        pytest.skip("its tower has no pictures to keep apart")
    samples = 3 * [sample for sample in case.samples if sample.images]
    batch = {name: value for name, value in as_double(case.collator.join(samples)).items() if name != "labels"}
    outputs, calls, stock = [], [], tower.forward
    tower.register_forward_hook(lambda tower, args, output: outputs.append(tower_attention.tree_leaves(output)))
    model(**batch)
    tower.forward = lambda *args, **kwargs: calls.append(1) or stock(*args, **kwargs)
    patch_frozen_tower(model, sharded=False)
    monkeypatch.setattr(vision_tower, "CHUNK_PIXELS", 1)
    model(**batch)
    expected, found = outputs
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    if name in ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "glm4v"):
        assert len(calls) > 1


def add_adapters(model):
    tower = find_tower(model)
    linear = [name for name, module in tower.named_modules() if type(module) is nn.Linear]
    prefix = next(name for name, module in model.named_modules() if module is tower)
    config = LoraConfig(r=2, target_modules=[f"{prefix}.{name}" for name in linear], init_lora_weights=False)
    return get_peft_model(model, config)


@each_architecture
def test_our_attention_gives_what_the_stock_tower_gives(name, tmp_path, monkeypatch):
    case = Case.make(name, tmp_path)
    model = load_in_double(case)
    if not find_tower_configs(model):
        pytest.skip("its tower has no pictures to keep apart")
    monkeypatch.setattr(
        tower_attention,
        "_float_leaves",
        lambda output: [
            leaf for leaf in tower_attention.tree_leaves(output) if torch.is_tensor(leaf) and leaf.is_floating_point()
        ],
    )
    with_pictures = [sample for sample in case.samples if sample.images]
    batches = [as_double(case.collator.join(samples)) for samples in (with_pictures[-1:], with_pictures)]
    used = []
    lengths = tower_attention._lengths
    monkeypatch.setattr(tower_attention, "_lengths", lambda bounds: used.append(bounds) or lengths(bounds))
    for adapted in (False, True):
        model = add_adapters(model) if adapted else model
        configs = find_tower_configs(model)
        stock = [config._attn_implementation for config in configs]
        expected = [tower_results(model, batch) for batch in batches]
        set_attention(configs, TOWER)
        patch_patch_embeddings(model)
        base = model.get_base_model() if adapted else model
        for checkpointing in (False, True) if base.supports_gradient_checkpointing else (False,):
            if checkpointing:
                model.train()
                base.gradient_checkpointing_enable({"use_reentrant": False})
            for batch, (outputs, gradients) in zip(batches, expected, strict=True):
                ours, our_gradients = tower_results(model, batch)
                torch.testing.assert_close(ours, outputs, rtol=1e-9, atol=1e-10)
                assert our_gradients.keys() == gradients.keys()
                torch.testing.assert_close(our_gradients, gradients, rtol=1e-7, atol=1e-9)
        base.gradient_checkpointing_disable()
        model.eval()
        for config, attention in zip(configs, stock, strict=True):
            set_attention([config], attention)
    assert used
