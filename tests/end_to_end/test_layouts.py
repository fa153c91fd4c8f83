"""Every documented layout, full and LoRA, through the sample config: trains, saves, loads, resumes."""

import json
import shutil

import pytest
import torch
from peft import PeftModel
from PIL import Image
from safetensors.torch import load_file
from tiny_models import LAYOUTS
from transformers import AutoModelForImageTextToText, AutoProcessor

import tuning
from tuning import sft_trainer

SAMPLE = {
    "dataset_text_field": "messages",
    "dataset_image_field": "images",
    "num_train_epochs": 1.0,
    "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 2,
    "learning_rate": 1e-4,
    "bf16": True,
    "torch_dtype": "bfloat16",
    "use_flash_attn": True,
    "remove_unused_columns": False,
    "dataset_kwargs": {"skip_prepare_dataset": True},
    "gradient_checkpointing": True,
    "gradient_checkpointing_kwargs": {"use_reentrant": False},
    "accelerate_launch_args": {"fsdp_transformer_layer_cls_to_wrap": "GraniteDecoderLayer"},
}
LORA = {"peft_method": "lora", "target_modules": ["q_proj", "v_proj"], "r": 4}
METHODS = {"full": {}, "lora": LORA}
LOG_FIELDS = {
    "step",
    "epoch",
    "loss",
    "learning_rate",
    "grad_norm",
    "step_seconds",
    "tokens_per_second",
    "supervised_tokens",
    "data_wait_share",
    "peak_memory_gb",
}


@pytest.fixture
def paths(models, rows, tmp_path, layout):
    return {
        "model_name_or_path": str(models[layout]),
        "training_data_path": str(rows),
        "output_dir": str(tmp_path / "out"),
    }


@pytest.fixture
def trained(monkeypatch):
    """The model in memory at the end of every run, as `trained[-1]`."""
    seen, save = [], sft_trainer.save
    monkeypatch.setattr(
        sft_trainer, "save", lambda trainer, config: (seen.append(trainer.model), save(trainer, config))
    )
    return seen


def read_log(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "training_logs.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_sample_config_trains_as_it_stands(paths, layout, method, tmp_path, capfd):
    config = tmp_path / "config.json"
    config.write_text(json.dumps({**SAMPLE, **paths, **METHODS[method], "logging_steps": 1}))
    assert sft_trainer.main([str(config)]) == 0
    said = capfd.readouterr()
    assert "gradient_checkpointing` is deprecated" not in said.err
    assert "use_cpu" in said.out or torch.accelerator.is_available()
    log = read_log(tmp_path / "out")
    assert [line["step"] for line in log] == [1]
    assert set(log[0]) == LOG_FIELDS
    assert all(isinstance(value, (int, float)) for value in log[0].values())


def logits(model, folder, rows) -> torch.Tensor:
    processor = AutoProcessor.from_pretrained(folder)
    question = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is in the picture?"}]}]
    text = processor.apply_chat_template(question, add_generation_prompt=True)
    inputs = processor(text=text, images=[Image.open(rows.parent / "1.png")], return_tensors="pt")
    with torch.no_grad():
        return model.eval()(**inputs).logits


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_loss_falls_and_the_saved_model_is_the_trained_one(paths, layout, method, tmp_path, rows, trained):
    speed = {"learning_rate": 5e-2 if method == "lora" else 1e-2, "num_train_epochs": 12, "save_strategy": "no"}
    batches = {"per_device_train_batch_size": 4, "logging_steps": 4}
    result = tuning.train({**paths, **METHODS[method], **speed, **batches, "dataloader_num_workers": 0})
    losses = [line["loss"] for line in read_log(tmp_path / "out")]
    # LoRA leaves the head as it is, and Granite divides its logits by 8: these random ones can hardly leave zero.
    assert losses[-1] < (0.8 if method == "full" else 0.97) * losses[0]
    if method == "full":
        loaded, report = AutoModelForImageTextToText.from_pretrained(result.model_dir, output_loading_info=True)
        assert not any(report[keys] for keys in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    else:
        loaded = AutoModelForImageTextToText.from_pretrained(paths["model_name_or_path"])
        loaded = PeftModel.from_pretrained(loaded, result.model_dir)
    assert (result.model_dir / "generation_config.json").exists()
    assert torch.equal(logits(loaded, result.model_dir, rows), logits(trained[-1], result.model_dir, rows))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("layout", ["granite_vision", "llava15", "mllama"])
def test_a_resumed_run_equals_an_uninterrupted_one(paths, layout, method, tmp_path):
    config = {**paths, **METHODS[method], "learning_rate": 3e-3, "num_train_epochs": 2, "logging_steps": 1}
    config |= {"per_device_train_batch_size": 4, "save_steps": 3}
    assert tuning.train(config).global_step == 8
    whole, cut = tmp_path / "out", tmp_path / "cut"
    shutil.copytree(whole / "checkpoint-3", cut / "checkpoint-3")
    (cut / "checkpoint-6").mkdir()  # the run was killed while it wrote this one
    (cut / "training_logs.jsonl").write_text((whole / "training_logs.jsonl").read_text())
    assert tuning.train({**config, "output_dir": str(cut)}).global_step == 8
    name = "adapter_model.safetensors" if method == "lora" else "model.safetensors"
    expected, resumed = load_file(whole / name), load_file(cut / name)
    base = load_file(whole / "checkpoint-3" / name)
    assert expected.keys() == resumed.keys()
    assert all(torch.equal(expected[key], resumed[key]) for key in expected)
    assert any(not torch.equal(expected[key], base[key]) for key in expected)
    assert [(x["step"], x["loss"]) for x in read_log(cut)] == [(x["step"], x["loss"]) for x in read_log(whole)]
