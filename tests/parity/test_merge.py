"""A merged checkpoint answers as base and adapter do, has the base's own layout, and is rounded once."""

import json
import math
import re
import warnings
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_models import LAYOUTS, build_model, build_processor, save_layout
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor
from transformers.pytorch_utils import Conv1D

from tuning import cli
from tuning.export.merge import merge_layer
from tuning.export.proof import probe_inputs

QV = ["q_proj", "v_proj"]


def make_adapter(base: Path, folder: Path, *, size: float = 0.05, **lora) -> Path:
    """An adapter of random weights for the model in `base`, made by PEFT alone."""
    torch.manual_seed(3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = AutoModelForImageTextToText.from_pretrained(base, dtype=torch.float32)
        adapted = get_peft_model(model, LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": QV, **lora}))
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.data += size * torch.randn_like(parameter)
        adapted.save_pretrained(folder)
    return folder


def ask(model, processor) -> torch.Tensor:
    """Logits of a row with an image."""
    image_id = model.config.image_token_index
    text = f"{processor.tokenizer.convert_ids_to_tokens(image_id)} What is it?"
    inputs = processor(text=text, images=[Image.new("RGB", (50, 40), "red")], return_tensors="pt")
    with torch.no_grad():
        return model.eval()(**inputs).logits


def check_answers(base: Path, adapter: Path, merged: Path, *, tolerance: float = 1e-5) -> None:
    """The merged model answers as plain PEFT does, which is another answer than the base model's."""
    processor = AutoProcessor.from_pretrained(merged)
    model = AutoModelForImageTextToText.from_pretrained(base, dtype=torch.float32)
    plain = ask(model, processor)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wanted = ask(PeftModel.from_pretrained(model, adapter), processor)
    found = ask(AutoModelForImageTextToText.from_pretrained(merged, dtype=torch.float32), processor)
    assert (wanted - plain).abs().max() > 10 * tolerance * wanted.abs().max()
    assert (found - wanted).abs().max() < tolerance * wanted.abs().max()


def run(*words: str | Path) -> int:
    return cli.main(["export", *map(str, words)])


def read_files(folder: Path) -> dict[str, dict[str, torch.Tensor]]:
    return {file.name: load_file(file) for file in sorted(folder.glob("*.safetensors"))}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_merged_model_answers_as_base_and_adapter(layout, models, tmp_path, capsys):
    base = models[layout]
    adapter = make_adapter(base, tmp_path / "adapter", target_modules=[*QV, "down_proj"])
    assert run("--adapter", adapter, "--output", tmp_path / "out") == 0
    said = capsys.readouterr().out
    assert "merged layers give the right output" in said
    assert "first choices agree" in said
    check_answers(base, adapter, tmp_path / "out")
    before, after = read_files(base), read_files(tmp_path / "out")
    assert {file: list(tensors) for file, tensors in before.items()} == {f: list(t) for f, t in after.items()}
    (name,) = before
    changed = [key for key, tensor in before[name].items() if not torch.equal(tensor, after[name][key])]
    assert f"changes {len(changed)} of {len(before[name])} tensors" in said


KINDS = {
    "tower and projector": {"target_modules": [*QV, "fc1", "linear_1", "linear_2"]},
    "DoRA": {"use_dora": True, "target_modules": [*QV, "linear_1"]},
    "rsLoRA and patterns": {
        "use_rslora": True,
        "rank_pattern": {"v_proj": 2},
        "alpha_pattern": {"layers.0.self_attn.q_proj": 3},
    },
    "head in full, all biases": {"modules_to_save": ["lm_head", "multi_modal_projector"], "bias": "all"},
    "embedding and convolution": {"target_modules": ["embed_tokens", "patch_embedding"]},
    "biases of LoRA": {"bias": "lora_only", "target_modules": ["fc1", "fc2"], "lora_bias": True},
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_adapter_is_merged(kind, models, tmp_path):
    adapter = make_adapter(models["llava15"], tmp_path / "adapter", **KINDS[kind])
    assert run("--adapter", adapter, "--output", tmp_path / "out") == 0
    check_answers(models["llava15"], adapter, tmp_path / "out")


@pytest.mark.parametrize("lora", [{"modules_to_save": ["lm_head"]}, {"target_modules": ["embed_tokens", "q_proj"]}])
def test_an_adapter_that_parts_tied_weights_gives_each_its_own(lora, models, tmp_path, capsys):
    base = models["granite_vision"]
    adapter = make_adapter(base, tmp_path / "adapter", **lora)
    assert run("--adapter", adapter, "--output", tmp_path / "out") == 0
    assert "are tied in the base model. The adapter makes them differ" in capsys.readouterr().out
    check_answers(base, adapter, tmp_path / "out")
    before, after = load_file(base / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    assert after.keys() - before.keys() == {"language_model.lm_head.weight"}
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["tie_word_embeddings"] is config["text_config"]["tie_word_embeddings"] is False


def test_a_layer_with_turned_weights_is_merged():
    torch.manual_seed(0)
    adapted = get_peft_model(
        torch.nn.Sequential(Conv1D(6, 5)),
        LoraConfig(target_modules=["0"], init_lora_weights=False, fan_in_fan_out=True),
    )
    layer = adapted.base_model.model[0]
    weights = {name: value.detach().clone() for name, value in layer.get_base_layer().named_parameters()}
    inputs = probe_inputs(layer.get_base_layer(), weights["weight"])
    wanted = layer(inputs)
    merged = merge_layer(layer, weights, "0")
    assert torch.allclose(inputs @ merged["weight"] + merged["bias"], wanted, atol=1e-5)
    assert torch.equal(layer.get_base_layer().weight, weights["weight"])  # only lent


STYLES = {
    "before transformers 5": lambda key: key.replace("vision_tower.", "vision_tower.vision_model."),
    "as modules": lambda key: (
        key.replace("language_model.lm_head", "lm_head")
        if "lm_head" in key
        else "model." + key.replace("language_model.model.", "language_model.")
    ),
}


def for_engines(key: str) -> str:
    """The key with the level that transformers 5 leaves out, and engines look for."""
    return re.sub(r"vision_tower\.(?!vision_model)", "vision_tower.vision_model.", key)


@pytest.mark.parametrize("style", STYLES)
def test_files_and_names_stay_as_they_were_published(style, tmp_path):
    base = tmp_path / "base"
    build_model("llava15", dtype=torch.bfloat16).save_pretrained(base, max_shard_size="60KB")
    build_processor("llava15").save_pretrained(base)
    index = json.loads((base / "model.safetensors.index.json").read_text())
    for file in set(index["weight_map"].values()):
        renamed = {STYLES[style](key): tensor for key, tensor in load_file(base / file).items()}
        save_file(renamed, base / file, metadata={"format": "pt"})
    index["weight_map"] = {STYLES[style](key): file for key, file in index["weight_map"].items()}
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    adapter = make_adapter(base, tmp_path / "adapter", target_modules=[*QV, "linear_1"])
    assert run("--adapter", adapter, "--output", tmp_path / "out") == 0
    before, after = read_files(base), read_files(tmp_path / "out")
    before = {name: {for_engines(key): tensor for key, tensor in shard.items()} for name, shard in before.items()}
    assert len(before) > 2
    assert {name: set(shard) for name, shard in before.items()} == {name: set(shard) for name, shard in after.items()}
    written = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert written["weight_map"] == {for_engines(key): file for key, file in index["weight_map"].items()}
    changed = 0
    for name, shard in before.items():
        for key, tensor in shard.items():
            assert after[name][key].dtype == torch.bfloat16
            changed += not torch.equal(tensor, after[name][key])
            adapted = key.endswith(("q_proj.weight", "v_proj.weight", "linear_1.weight"))
            assert torch.equal(tensor, after[name][key]) != adapted, key
    assert changed == 13
    check_answers(base, adapter, tmp_path / "out", tolerance=2e-2)


def test_sixteen_bit_weights_are_rounded_once(tmp_path):
    base = save_layout("llava15", tmp_path / "base", dtype=torch.bfloat16)
    adapter = make_adapter(base, tmp_path / "adapter", target_modules="all-linear", size=0.03)
    assert run("--adapter", adapter, "--output", tmp_path / "out") == 0
    before, after = load_file(base / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    model = AutoModelForImageTextToText.from_pretrained(base)
    in_place = PeftModel.from_pretrained(model, adapter, autocast_adapter_dtype=False).merge_and_unload()
    saved, ours, theirs = load_file(adapter / "adapter_model.safetensors"), [], []
    for key in [key for key in saved if "language_model" in key and key.endswith("lora_A.weight")]:
        module = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        published = module.replace("model.language_model", "language_model.model") + ".weight"
        delta = 2 * saved[key.replace("lora_A", "lora_B")].double() @ saved[key].double()
        exact = before[published].double() + delta
        once = exact.to(torch.bfloat16)
        assert torch.equal(after[published], once), published
        ours.append(float((after[published].double() - exact).norm()))
        theirs.append(float((in_place.get_parameter(f"{module}.weight").double() - exact).norm()))
    assert len(ours) == 14
    assert math.hypot(*ours) <= math.hypot(*theirs)
    print(f"error of bfloat16 weights: rounded once {math.hypot(*ours):.4f}, PEFT in place {math.hypot(*theirs):.4f}")


def test_another_precision_is_written_where_it_is_asked_for(models, tmp_path):
    adapter = make_adapter(models["llava_next_vicuna"], tmp_path / "adapter")
    assert run("--adapter", adapter, "--output", tmp_path / "out", "--dtype", "bfloat16") == 0
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert AutoConfig.from_pretrained(tmp_path / "out").dtype == torch.bfloat16
    check_answers(models["llava_next_vicuna"], adapter, tmp_path / "out", tolerance=2e-2)
