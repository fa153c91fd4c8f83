"""Pictures arrive in the dtype of the weights that read them, and casting them early changes no result."""

from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from sample_batches import make_batch
from tiny_models import LAYOUTS, build_model, build_processor

import tuning
from tuning.data.collator import probe_collator
from tuning.model.generate import prepare_prompts
from tuning.model.picture_dtype import patch_picture_dtype, picture_dtype, reader_of
from tuning.model.vision_tower import find_tower
from tuning.training.trainer import SupervisedTrainer


def batch_of(layout: str) -> dict[str, torch.Tensor]:
    batch = probe_collator(build_processor(layout)).join(make_batch(layout))
    return {name: value for name, value in batch.items() if name != "labels"}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_models_that_cast_themselves_give_the_same_bits(layout, dtype):
    model, batch = build_model(layout).to(dtype).eval(), batch_of(layout)
    with torch.no_grad():
        expected = model(**batch).logits
        patch_picture_dtype(model)
        assert torch.equal(model(**batch).logits, expected)


def refuse_other_dtypes(tower: torch.nn.Module, args: tuple, kwargs: dict) -> None:
    """As the towers of Kimi or Aria, which give pictures to their first layer as they come."""
    assert [value.dtype for value in (*args, *kwargs.values()) if torch.is_tensor(value)] == [
        next(tower.parameters()).dtype
    ]


@pytest.mark.parametrize("adapters", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_the_tower_gets_pictures_in_its_own_dtype(dtype, adapters):
    model, batch = build_model("llava15"), batch_of("llava15")
    find_tower(model).register_forward_pre_hook(refuse_other_dtypes, with_kwargs=True)
    patch_picture_dtype(model)
    model = get_peft_model(model, LoraConfig(target_modules=["q_proj"])) if adapters else model
    model = model.to(dtype).eval()
    with torch.no_grad():
        model(**batch)
        model.generate(**prepare_prompts(model, batch), max_new_tokens=2)


def test_a_tower_in_another_dtype_than_the_language_model_decides():
    model, batch = build_model("llava15").to(torch.bfloat16).eval(), batch_of("llava15")
    tower = find_tower(model).float()
    patch_picture_dtype(model)
    seen = []
    tower.register_forward_pre_hook(lambda tower, args: seen.extend(args))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        model(**batch)
    assert [pixels.dtype for pixels in seen] == [torch.float32]


def test_other_inputs_stay_as_they_are():
    model, seen = build_model("llava15").to(torch.bfloat16), {}
    model.forward = lambda **inputs: seen.update(inputs)
    patch_picture_dtype(model)
    inputs = dict(
        inputs_embeds=torch.ones(1, 2, 8), attention_mask=torch.ones(1, 1, 2, 2), image_sizes=torch.ones(1, 2).long()
    )
    model(**inputs, pixel_values=torch.ones(1, 3, 8, 8))
    assert all(seen[name] is value for name, value in inputs.items())
    assert seen["pixel_values"].dtype == torch.bfloat16


@pytest.mark.parametrize("layout", LAYOUTS)
def test_pictures_that_travel_in_16_bits_give_the_same_bits(layout):
    """The collator casts them in the data workers, as the model would on its device."""
    model, samples = build_model(layout).to(torch.bfloat16).eval(), make_batch(layout)
    collator = probe_collator(build_processor(layout))
    small = replace(collator, picture_dtype=picture_dtype(reader_of(model))).join(samples)
    assert small["pixel_values"].dtype == torch.bfloat16
    assert all(small[name].dtype == value.dtype for name, value in batch_of(layout).items() if name != "pixel_values")
    with torch.no_grad():
        assert torch.equal(model(**small).logits, model(**collator.join(samples)).logits)


def test_the_batches_of_a_run_carry_pictures_in_the_dtype_of_the_tower(make_options, tmp_path, monkeypatch):
    seen, step = [], SupervisedTrainer.training_step
    monkeypatch.setattr(
        SupervisedTrainer,
        "training_step",
        lambda trainer, model, inputs, *args: (
            seen.append(inputs["pixel_values"].dtype) or step(trainer, model, inputs, *args)
        ),
    )
    for dtype in ("bfloat16", "float32"):
        tuning.train(make_options("llava15", output_dir=str(tmp_path / dtype), dtype=dtype, max_steps=1))
    assert seen == [torch.bfloat16, torch.float32]
