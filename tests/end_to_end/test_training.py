"""Every documented layout, full and LoRA: the sample config as it stands, a falling loss, logs and evaluation."""

import gc
import json
import math
import warnings
import weakref
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from sample_config import SAMPLE
from tiny_models import LAYOUTS, build_model, build_processor
from transformers import AutoModelForImageTextToText, AutoProcessor

import tuning
from tuning import sft_trainer
from tuning.data.chat_template import ChatFormat
from tuning.data.collator import probe_collator
from tuning.data.encode import Encoder
from tuning.data.open_source import open_source
from tuning.training.trainer import SupervisedTrainer

LORA = {"peft_method": "lora", "target_modules": ["q_proj", "v_proj"]}
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


def read_log(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "training_logs.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_sample_config_trains_as_it_stands(layout, method, models, rows, tmp_path, trainers, capfd):
    paths = {"model_name_or_path": str(models[layout]), "training_data_path": str(rows)}
    config = {**SAMPLE, **METHODS[method], **paths, "output_dir": str(tmp_path / "out")}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        code = sft_trainer.main([str(tmp_path / "config.json")])
    said = capfd.readouterr()
    assert code == 0, said.err
    assert [str(w.message) for w in caught if "gradient_checkpointing" in str(w.message)] == []
    assert "gradient_checkpointing" not in said.err
    (trainer,) = trainers
    assert trainer.state.global_step == 1
    assert {p.dtype for name, p in trainer.model.named_parameters() if "lora_" not in name} == {torch.bfloat16}
    assert trainer.model.config._attn_implementation == "sdpa"  # no GPU, and never FlashAttention for Mllama
    assert any(getattr(module, "gradient_checkpointing", False) for module in trainer.model.modules())
    assert trainer.args.gradient_checkpointing_kwargs == {"use_reentrant": False}


@pytest.fixture(scope="module")
def sure_models(tmp_path_factory):
    """The tiny models with larger output weights: as they are, LoRA could hardly lower the loss under a fixed head."""
    folders = {}
    for layout in LAYOUTS:
        folders[layout] = tmp_path_factory.mktemp("sure") / layout
        model = build_model(layout)
        scale = 2
        if layout == "granite_vision":  # it divides its logits by 8, and its input and output weights are the same
            scale = 16
            model.config.text_config.embedding_multiplier /= scale
        model.get_output_embeddings().weight.data *= scale
        model.save_pretrained(folders[layout])
        build_processor(layout).save_pretrained(folders[layout])
    return folders


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_loss_falls_clearly_in_thirty_steps(layout, method, make_options, sure_models, tmp_path):
    changes = {"max_steps": 30, "learning_rate": 1e-2, "lr_scheduler_type": "constant", "save_strategy": "no"}
    if method == "lora":
        changes |= {**LORA, "target_modules": "all-linear"}
    tuning.train(make_options(layout, **changes, model_name_or_path=str(sure_models[layout])))
    losses = [line["loss"] for line in read_log(tmp_path / "out")]
    assert sum(losses[-4:]) / 4 < 0.5 * losses[0]


@pytest.mark.parametrize("layout", ["granite_vision", "mllama"])
def test_gradient_checkpointing_changes_no_weight(layout, make_options, trainers, tmp_path):
    for name, checkpointing in (("with", True), ("without", False)):
        options = make_options(layout, gradient_checkpointing=checkpointing, max_steps=2, save_strategy="no")
        tuning.train({**options, "output_dir": str(tmp_path / name)})
    with_it, without = (trainer.model.state_dict() for trainer in trainers)
    assert [name for name in without if not torch.equal(with_it[name], without[name])] == []


def test_the_log_has_a_line_a_step_with_every_figure(make_options, rows, tmp_path):
    tuning.train(make_options("llava15", num_train_epochs=2))
    log = read_log(tmp_path / "out")
    assert [line["step"] for line in log] == list(range(1, 9))
    assert all(set(line) == LOG_FIELDS for line in log)
    assert all(isinstance(value, int | float) and math.isfinite(value) for line in log for value in line.values())
    assert [line["epoch"] for line in log] == [0.25 * step for step in range(1, 9)]
    assert all(0 <= line["data_wait_share"] <= 1 for line in log)
    assert all(line["step_seconds"] > 0 and line["tokens_per_second"] > line["supervised_tokens"] for line in log)
    expected = sum(int((labels != -100).sum()) for _, labels in encode_rows(make_options("llava15"), rows))
    assert sum(line["supervised_tokens"] for line in log) == 2 * expected


def encode_rows(options: dict, path: Path) -> list:
    """Every row alone, as `(inputs, labels)`."""
    processor = AutoProcessor.from_pretrained(options["model_name_or_path"])
    encoder = Encoder(processor, ChatFormat(processor), 2048)
    rows = open_source(str(path), text_field="messages", image_field="images")
    batches = [probe_collator(processor).join([encoder.encode(row)]) for row in rows]
    return [({k: v for k, v in batch.items() if k != "labels"}, batch["labels"]) for batch in batches]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_evaluation_loss_is_the_mean_over_all_supervised_tokens(layout, make_options, rows, tmp_path):
    changes = {"validation_data_path": str(rows), "per_device_eval_batch_size": 3, "learning_rate": 1e-2}
    changes |= {"num_train_epochs": 1}
    result = tuning.train(make_options(layout, **changes))
    (line,) = [line for line in read_log(result.model_dir) if "eval_loss" in line]
    assert line["step"] == 4
    assert result.metrics["eval_loss"] == line["eval_loss"]
    model = AutoModelForImageTextToText.from_pretrained(result.model_dir).eval()
    total, count, means = 0.0, 0, []
    for inputs, labels in encode_rows(make_options(layout), rows):
        with torch.no_grad():
            logits = model(**inputs).logits / (8.0 if layout == "granite_vision" else 1.0)
        losses = F.cross_entropy(logits[0, :-1], labels[0, 1:], ignore_index=-100, reduction="none")
        total, count = total + losses.sum().item(), count + int((labels[0, 1:] != -100).sum())
        means.append(losses.sum().item() / int((labels[0, 1:] != -100).sum()))
    assert line["eval_loss"] == pytest.approx(total / count, rel=1e-5)
    assert line["eval_tokens"] == count
    assert sum(means) / len(means) != pytest.approx(total / count, rel=1e-3)  # the mean of means is another number


def test_nothing_holds_the_trainer_after_a_run(make_options, monkeypatch):
    """In a reference cycle, its data loaders would be collected after their queues, and wait for their processes."""
    trainers, make = [], SupervisedTrainer.__init__

    def remember(trainer, *args, **kwargs):
        trainers.append(weakref.ref(trainer))
        make(trainer, *args, **kwargs)

    monkeypatch.setattr(SupervisedTrainer, "__init__", remember)
    gc.disable()
    try:
        tuning.train(make_options("llava15", max_steps=2, dataloader_num_workers=1, report_samples=1))
        assert trainers[0]() is None
    finally:
        gc.enable()
