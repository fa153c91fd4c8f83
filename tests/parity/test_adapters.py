"""The variants of LoRA: each trains, goes on, is saved, and loads as an adapter of PEFT's, alone or with others."""

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from preparation import make_model
from safetensors.torch import load_file
from tiny_models import LAYOUTS
from transformers import AutoModelForImageTextToText

import tuning
from tuning.config.parse import build_config
from tuning.errors import UserError

LORA = {"peft_method": "lora", "target_modules": ["q_proj", "v_proj"], "r": 4, "freeze_vision_tower": False}
KINDS = {"target_modules": ["q_proj", "embed_tokens", "patch_embedding"]}  # linear layers, an embedding, a convolution
VARIANTS = {
    "plain": KINDS | {"bias": "lora_only", "r": 3},
    "dora": KINDS | {"use_dora": True},
    "rslora": {"use_rslora": True, "bias": "all", "modules_to_save": ["multi_modal_projector", "lm_head"]},
}
IDS = torch.arange(5, 25)[None]


@torch.no_grad()
def logits_of(model) -> torch.Tensor:
    return model.eval()(input_ids=IDS, use_cache=False).logits


def digests(folder: Path) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in folder.iterdir()}


@pytest.mark.parametrize(
    ("layout", "variant"),
    [*((layout, variant) for layout in LAYOUTS for variant in ("plain", "dora")), ("llava15", "rslora")],
)
def test_every_variant_trains_and_loads_with_peft_on_an_untouched_base(layout, variant, models, make_options, trainers):
    options = make_options(layout, **LORA | VARIANTS[variant], max_steps=2, save_strategy="no")
    untouched, before = digests(models[layout]), dict(make_model(build_config(options)).named_parameters())
    folder = tuning.train(options).model_dir
    assert digests(models[layout]) == untouched
    trained = trainers[0].model
    loaded = PeftModel.from_pretrained(AutoModelForImageTextToText.from_pretrained(models[layout]), folder)
    found = dict(loaded.named_parameters())
    for name, parameter in trained.named_parameters():
        torch.testing.assert_close(parameter, found[name], rtol=0, atol=0, msg=name)
        is_drawn = "lora_A" in name or "lora_embedding_B" in name  # begins at random
        assert torch.equal(parameter, before[name]) != (parameter.requires_grad or is_drawn), name
    torch.testing.assert_close(logits_of(trained), logits_of(loaded), rtol=0, atol=0)


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_goes_on_bit_by_bit_on_16_bit_weights(variant, make_options, tmp_path):
    changes = VARIANTS[variant] | {"dtype": "bfloat16", "max_steps": 4, "save_steps": 2, "bf16": variant == "dora"}
    options = make_options("granite_vision", **LORA | changes)
    whole = tuning.train(options).model_dir
    shutil.copytree(whole / "checkpoint-2", tmp_path / "cut" / "checkpoint-2")
    cut = tuning.train({**options, "output_dir": str(tmp_path / "cut")}).model_dir
    expected, found = (load_file(folder / "adapter_model.safetensors") for folder in (whole, cut))
    assert expected.keys() == found.keys()
    assert all(torch.equal(tensor, found[name]) for name, tensor in expected.items())


def test_dora_trains_the_same_without_padding(make_options, trainers, tmp_path):
    fixed = {"lora_dropout": 0.0, "train_sampling_strategy": "sequential", "max_steps": 3, "save_strategy": "no"}
    options = make_options("granite_vision", **LORA | VARIANTS["dora"] | fixed)
    losses = []
    for number, free in enumerate((True, False)):
        tuning.train({**options, "padding_free": free, "output_dir": str(tmp_path / str(number))})
        losses.append([line["loss"] for line in trainers[number].state.log_history if "loss" in line])
    torch.testing.assert_close(*losses, rtol=1e-5, atol=1e-5)


def test_adapters_of_one_base_are_loaded_together_and_each_gives_its_own_logits(
    models, make_options, tmp_path, trainers
):
    base = models["llava15"]
    folders, expected = {}, {}
    for name, variant in VARIANTS.items():  # PEFT: "LoraModel supports only 1 adapter with bias"
        changes = {"bias": "none", "learning_rate": 1e-2, "max_steps": 2, "save_strategy": "no"}
        options = make_options("llava15", **LORA | variant | changes)
        folders[name] = tuning.train({**options, "output_dir": str(tmp_path / name)}).model_dir
        expected[name] = logits_of(trainers[-1].model)
        assert json.loads((folders[name] / "adapter_config.json").read_text())["base_model_name_or_path"] == str(base)
    first, *others = VARIANTS
    model = AutoModelForImageTextToText.from_pretrained(base)
    together = PeftModel.from_pretrained(model, folders[first], adapter_name=first)
    for name in others:
        together.load_adapter(folders[name], adapter_name=name)
    for name in (*VARIANTS, first):
        together.set_adapter(name)
        torch.testing.assert_close(logits_of(together), expected[name], rtol=0, atol=0)


def test_dora_of_a_convolution_in_16_bits_is_refused(make_options):
    options = make_options("llava15", **LORA | VARIANTS["dora"], dtype="bfloat16")
    with pytest.raises(UserError, match=r"use_dora: DoRA cannot adapt a convolution \(.*patch_embedding\) .* bfloat16"):
        tuning.train(options)
