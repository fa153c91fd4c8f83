"""QLoRA against LoRA on the same weights, dequantised: real bitsandbytes layers, on the CPU."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from peft import PeftModel
from preparation import HAS_BITSANDBYTES, make_model
from safetensors.torch import load_file, save_file
from tiny_models import LAYOUTS
from transformers import AutoModelForImageTextToText, LlavaConfig

import tuning
from tuning.checking import memory
from tuning.commands.check import check
from tuning.config.options import ModelSource
from tuning.config.parse import build_config
from tuning.errors import UserError
from tuning.model import build, load, quantize
from tuning.model.answering import load_answering
from tuning.model.parts import find_parts, parameter_table

if not HAS_BITSANDBYTES:
    pytest.skip("bitsandbytes is not installed", allow_module_level=True)
import bitsandbytes as bnb

LORA = {"peft_method": "lora", "target_modules": "all-linear", "r": 4, "lora_dropout": 0.0, "learning_rate": 1e-2}
QUANTISED = {"4bit": bnb.nn.Linear4bit, "8bit": bnb.nn.Linear8bitLt}


def is_quantised(name: str) -> bool:
    """Whether the weight of this published name should be, by the layouts' own names."""
    linear = name.endswith(("proj.weight", "fc1.weight", "fc2.weight"))
    return ".language_model." in f".{name}" and linear


def round_trip(weight: torch.Tensor, kind: str) -> torch.Tensor:
    """A weight quantised and back, by bitsandbytes' functions."""
    if kind == "4bit":
        settings = {"blocksize": 64, "quant_type": "nf4", "compress_statistics": True}
        return bnb.functional.dequantize_4bit(*bnb.functional.quantize_4bit(weight, **settings))
    rows, scales, _ = bnb.functional.int8_vectorwise_quant(weight.half())
    return rows * scales[:, None] / 127


@pytest.fixture
def dequantised(models, tmp_path):
    """Layout and kind → a folder with the model whose weights have been quantised and back."""

    def make(layout: str, kind: str) -> str:
        folder = tmp_path / "dequantised"
        shutil.copytree(models[layout], folder)
        weights = load_file(folder / "model.safetensors")
        for name, weight in weights.items():
            if is_quantised(name):
                weights[name] = round_trip(weight, kind).contiguous()
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        return str(folder)

    return make


def losses(trainer) -> list[float]:
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]


@pytest.mark.parametrize(
    ("layout", "kind"), [*((layout, "4bit") for layout in LAYOUTS), ("granite_vision", "8bit"), ("mllama", "8bit")]
)
def test_it_trains_as_lora_on_the_dequantised_model(layout, kind, make_options, dequantised, trainers, rows, tmp_path):
    evaluated = {"validation_data_path": str(rows), "eval_strategy": "steps", "eval_steps": 2, "save_strategy": "no"}
    options = make_options(layout, **LORA, **evaluated, max_steps=6)
    found = tuning.train({**options, "quantization": kind}).model_dir
    other = {"model_name_or_path": dequantised(layout, kind), "output_dir": str(tmp_path / "reference")}
    expected = tuning.train({**options, **other}).model_dir
    torch.testing.assert_close(losses(trainers[0]), losses(trainers[1]), rtol=1e-5, atol=1e-5)
    assert losses(trainers[0])[-1] < losses(trainers[0])[0]
    adapters = [load_file(folder / "adapter_model.safetensors") for folder in (found, expected)]
    torch.testing.assert_close(*adapters, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_only_linear_layers_of_the_language_model_are_quantised(layout, models, make_options):
    published = AutoModelForImageTextToText.from_pretrained(models[layout])
    before = published.state_dict()
    for kind, layer in QUANTISED.items():
        saved = "mlp.up_proj" if kind == "4bit" else "v_proj"
        model = make_model(build_config(make_options(layout, **LORA, quantization=kind, modules_to_save=[saved])))
        modules = {plain(name): module for name, module in model.named_modules()}
        found = {f"{name}.weight" for name, module in modules.items() if isinstance(module, layer)}
        assert found == {name for name in before if is_quantised(name) and f"{saved}." not in name}
        for name, parameter in model.named_parameters():
            if "lora_" not in name and plain(name) not in found:
                torch.testing.assert_close(parameter, before[plain(name)], rtol=0, atol=0)
        lines = parameter_table(model.base_model.model, find_parts(model)).splitlines()
        added = sum(p.numel() for name, p in model.named_parameters() if "lora_" in name or "modules_to_save" in name)
        assert int(lines[-1].split()[1].replace(",", "")) == added + sum(p.numel() for p in published.parameters())


@pytest.mark.parametrize("kind", QUANTISED)
def test_an_adapter_answers_on_its_quantised_base(kind, make_options, dequantised):
    options = make_options("llava15", **LORA, quantization=kind, modules_to_save=["v_proj"], max_steps=4)
    adapter = tuning.train({**options, "target_modules": ["q_proj"]}).model_dir
    config = json.loads((adapter / "adapter_config.json").read_text())
    ids, models = torch.arange(5, 25)[None], {}
    for quantization in (kind, None):
        source = ModelSource(str(adapter), quantization=quantization)
        models[quantization] = load_answering(source, device="cpu").model
        base = dequantised("llava15", kind) if quantization else ""
        (adapter / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": base}))
    layers = {type(module) for module in models[kind].modules()}
    assert QUANTISED[kind] in layers
    for model in models.values():
        model.train()  # in evaluation, 8 bits would round the inputs of layers, too
    found, expected = (model(input_ids=ids).logits for model in models.values())
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def plain(name: str) -> str:
    """The published name of a module or parameter of an adapted model."""
    for part in ("base_model.model.", ".base_layer", ".original_module", ".modules_to_save.default"):
        name = name.replace(part, "")
    return name


def test_the_adapter_records_the_base_and_loads_on_it_with_peft(models, make_options):
    folder = tuning.train(make_options("llava15", **LORA, quantization="4bit", max_steps=2)).model_dir
    assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"] == str(models["llava15"])
    saved = load_file(folder / "adapter_model.safetensors")
    assert all(".lora_" in name and tensor.dtype == torch.float32 for name, tensor in saved.items())
    base = AutoModelForImageTextToText.from_pretrained(models["llava15"])
    ids = torch.arange(5, 25)[None]
    without = base(input_ids=ids).logits
    adapted = PeftModel.from_pretrained(base, folder)
    loaded = {name.replace(".default", ""): parameter for name, parameter in adapted.named_parameters()}
    assert all(torch.equal(loaded[name], tensor) for name, tensor in saved.items())
    assert not torch.equal(adapted(input_ids=ids).logits, without)


@pytest.mark.parametrize("kind", QUANTISED)
def test_a_resumed_run_ends_in_the_same_adapter_and_keeps_its_quantization(kind, make_options, tmp_path):
    dropout = {"lora_dropout": 0.1, "gradient_checkpointing": kind == "4bit", "dtype": "bfloat16"}
    options = make_options("llava15", **LORA | dropout, quantization=kind, max_steps=4, save_steps=2)
    whole = tuning.train(options).model_dir
    shutil.copytree(whole / "checkpoint-2", tmp_path / "cut" / "checkpoint-2")
    cut = tuning.train({**options, "output_dir": str(tmp_path / "cut")}).model_dir
    files = [(folder / "adapter_model.safetensors").read_bytes() for folder in (whole, cut)]
    assert files[0] == files[1]
    with pytest.raises(UserError, match=f'quantization was "{kind}", is null'):
        tuning.train({name: value for name, value in options.items() if name != "quantization"})


def test_checkpointing_changes_nothing(make_options, trainers, tmp_path):
    options = make_options("granite_vision", **LORA, quantization="4bit", max_steps=3, save_strategy="no")
    tuning.train(options)
    tuning.train({**options, "gradient_checkpointing": True, "output_dir": str(tmp_path / "second")})
    assert losses(trainers[0]) == losses(trainers[1])


@pytest.mark.parametrize("kind", QUANTISED)
def test_a_skeleton_takes_the_bytes_of_the_loaded_model(kind, make_options):
    config = build_config(make_options("granite_vision", **LORA, quantization=kind, dtype="bfloat16"))
    model_config = load.load_config(config.model)
    skeleton = load.build_skeleton(model_config).to(torch.bfloat16)
    plan = build.find_quantization(config, model_config, skeleton, find_parts(skeleton))
    quantize.quantise_skeleton(skeleton, plan)
    model = load.load_model(config.model, model_config, dtype=torch.bfloat16, attention="sdpa", quantization=plan)
    taken = memory.bytes_of(memory.tensors_of(model))
    assert memory.bytes_of(memory.tensors_of(skeleton)) == pytest.approx(taken, abs=64)  # positions are float32 in one
    linear = sum(model.get_submodule(name).weight.untyped_storage().nbytes() for name in plan.layers)
    layers = [skeleton.get_submodule(name) for name in plan.layers]
    numbers = sum(layer.in_features * layer.out_features for layer in layers)
    assert linear == numbers * int(kind[0]) // 8


def test_what_the_weights_of_llava_7b_take():
    taken = {}
    for kind in (None, *QUANTISED):
        skeleton = load.build_skeleton(LlavaConfig()).to(torch.bfloat16)
        if kind:
            settings = {"modules_to_save": None, "compute": torch.bfloat16, "device": torch.device("cpu")}
            plan = quantize.plan_quantization(skeleton, find_parts(skeleton), kind, **settings)
            quantize.quantise_skeleton(skeleton, plan)
        taken[kind] = memory.bytes_of(memory.tensors_of(skeleton)) / 1e9
        print(f"\nLLaVA-1.5 7B, {kind or 'bfloat16'}: {taken[kind]:.2f} GB")
    layers = [skeleton.get_submodule(name) for name in plan.layers]
    numbers = sum(layer.in_features * layer.out_features for layer in layers) / 1e9
    assert taken[None] - taken["8bit"] == pytest.approx(numbers, rel=0.01)
    assert taken[None] - taken["4bit"] == pytest.approx(numbers * (16 - 4 - 8 / 64) / 8, rel=0.01)  # and scales


def test_check_counts_quantised_weights(make_options, tmp_path):
    options = make_options("granite_vision", **LORA)
    peaks = {}
    for kind in (None, "8bit", "4bit"):
        check(build_config({**options, "quantization": kind, "output_dir": str(tmp_path / str(kind))}))
        estimates = json.loads((tmp_path / str(kind) / "check.json").read_text())["estimates"]
        peaks[kind] = estimates["peak_memory_gb_per_device"]["value"]
    assert max(peaks["4bit"], peaks["8bit"]) < peaks[None] - 4e-5  # of 36 kB in half, or a quarter, and a layer's copy


@pytest.fixture
def unread(models, tmp_path):
    """A model without its weights: what fails on it fails before they are read."""
    folder = tmp_path / "unread"
    shutil.copytree(models["llava15"], folder)
    (folder / "model.safetensors").unlink()
    return str(folder)


def test_what_cannot_work_is_said_before_weights_are_read(unread, make_options, monkeypatch):
    options = make_options("llava15", **LORA, model_name_or_path=unread)
    for changes, words in (
        ({"peft_method": "none"}, "quantization: 4bit weights cannot be trained; add peft_method lora"),
        ({"quantization": "3bit"}, "quantization: '3bit' is unknown; use 4bit or 8bit"),
        (
            {"modules_to_save": ["layers"]},
            "quantization 4bit: modules_to_save covers every linear layer of the language model",
        ),
    ):
        with pytest.raises(UserError, match=words):
            tuning.train({**options, "quantization": "4bit", **changes})
    monkeypatch.setattr(quantize, "is_bitsandbytes_available", lambda: False)
    with pytest.raises(
        UserError, match=r"quantization 8bit: bitsandbytes is missing or too old.*pip install -U bitsandbytes"
    ):
        tuning.train({**options, "quantization": "8bit"})


def test_a_machine_that_does_not_run_it_is_told_what_happened(unread, make_options, monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("CUDA error: no kernel image\nmore")

    monkeypatch.setattr(bnb, "matmul_4bit", fail)
    options = make_options("llava15", **LORA, model_name_or_path=unread, quantization="4bit")
    with pytest.raises(UserError, match=r"does not run on cpu: RuntimeError: CUDA error: no kernel image\."):
        tuning.train(options)


def test_a_checkpoint_that_is_quantised_already_is_refused(unread, make_options):
    file = Path(unread, "config.json")
    settings = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    file.write_text(json.dumps({**json.loads(file.read_text()), "quantization_config": settings}))
    with pytest.raises(UserError, match="the checkpoint is quantised already"):
        tuning.train(make_options("llava15", **LORA, model_name_or_path=unread, quantization="4bit"))


def test_8bit_weights_cannot_be_divided(make_options, monkeypatch):
    config = build_config(make_options("llava15", **LORA, quantization="8bit"))
    model_config = load.load_config(config.model)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    skeleton = load.build_skeleton(model_config)
    with pytest.raises(UserError, match=r"FSDP cannot shard 8-bit weights.* Use quantization 4bit"):
        build.find_quantization(config, model_config, skeleton, find_parts(skeleton))


@pytest.mark.parametrize("kind", QUANTISED)
def test_quantised_weights_are_refused_under_zero3(kind, make_options):
    config = build_config(make_options("llava15", **LORA, quantization=kind))
    config.training.deepspeed_plugin = SimpleNamespace(zero_stage=3)
    model_config = load.load_config(config.model)
    skeleton = load.build_skeleton(model_config)
    with pytest.raises(UserError, match=rf"quantization {kind}: transformers does not load .* Use FSDP"):
        build.find_quantization(config, model_config, skeleton, find_parts(skeleton))


def test_dora_trains_on_4bit_weights_and_is_refused_on_8bit_ones_here(make_options):
    options = make_options("llava15", **LORA, use_dora=True, max_steps=1, save_strategy="no", quantization="4bit")
    saved = load_file(tuning.train(options).model_dir / "adapter_model.safetensors")
    assert any("lora_magnitude_vector" in name for name in saved)
    with pytest.raises(UserError, match=r"quantization 8bit, use_dora: PEFT loses the scales"):
        tuning.train({**options, "quantization": "8bit", "overwrite_output_dir": True})


@pytest.mark.parametrize("kind", QUANTISED)
def test_a_save_that_peft_cannot_load_beside_the_trained_one_is_compared_by_its_tensors(kind, make_options, capsys):
    """The published base, which is not quantised, would give other logits."""
    options = make_options("llava15", **LORA, bias="lora_only", quantization=kind, max_steps=1, verify_save=True)
    folder = tuning.train(options).model_dir
    said = f"Read {folder} back: its weights are those that were trained. It was not loaded: its base was trained in"
    assert f"{said} {kind}" in capsys.readouterr().out
