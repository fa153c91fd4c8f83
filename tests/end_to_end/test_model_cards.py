"""The model card of a run: its content, that its code runs, and which card may be replaced."""

import json
import os
import re
import shutil

import pytest
from huggingface_hub import ModelCard
from PIL import Image

import tuning
from tuning.model.parts import PartSize
from tuning.pages.model_card import MARK, OLD_MARK, merge_card, write_card
from tuning.pages.run_summary import RunSummary

LORA = {"peft_method": "lora", "target_modules": ["q_proj", "v_proj"], "r": 4, "lora_alpha": 16}
BASE_CARD = "---\nlicense: other\nlicense_name: llama\nlicense_link: LICENSE\n---\n# Base\n"


@pytest.fixture
def base(models, tmp_path):
    """A base model with a card of its own, in a folder called base."""
    shutil.copytree(models["granite_vision"], tmp_path / "base")
    (tmp_path / "base" / "README.md").write_text(BASE_CARD)
    return tmp_path / "base"


def code_of(card: str) -> str:
    return re.search(r"```python\n(.*?)```", card, re.DOTALL)[1]


def run_code(card: str, folder, capsys, monkeypatch) -> str:
    """Run a card's code in the folder of the model that it names. Returns what it prints."""
    Image.new("RGB", (40, 40), (220, 20, 20)).save(folder / "image.png")
    monkeypatch.chdir(folder)
    capsys.readouterr()
    exec(code_of(card), {})
    return capsys.readouterr().out


@pytest.mark.parametrize("lora", [False, True])
def test_a_card_describes_its_run_and_its_code_runs(lora, base, rows, make_options, tmp_path, capsys, monkeypatch):
    changes = {"model_name_or_path": str(base), "validation_data_path": str(rows), "seed": 7, "max_steps": 3}
    place = {"save_model_dir": str(tmp_path / "final")}
    result = tuning.train(make_options("granite_vision", **changes, **place, **(LORA if lora else {})))
    text = (result.model_dir / "README.md").read_text()
    card = ModelCard(text)
    assert card.data.library_name == ("peft" if lora else "transformers")
    assert (card.data.pipeline_tag, card.data.license, card.data.license_name) == (
        "image-text-to-text",
        "other",
        "llama",
    )
    assert card.data.base_model is None  # a folder here is no model of the Hub
    assert card.data.eval_results is None
    assert "`base`" in text
    assert f"16 rows of `{rows.name}`" in text
    assert re.search(r"\| steps \| 3 \|", text)
    assert re.search(r"\| rows per step \| 4 \|", text)
    assert f"| eval_loss | {result.metrics['eval_loss']:.4g} |" in text
    assert ("| LoRA | r 4, alpha 16, dropout 0.05 |" in text) == lora
    assert re.search(r"\| vision tower \| [\d,]+ \| (0) \|", text) or not lora
    options = json.loads(re.search(r"```json\n(.*?)```", text, re.DOTALL)[1])
    assert (options["seed"], options["model_name_or_path"]) == (7, "base")
    assert not [part for part in (str(tmp_path), str(rows.parent), os.path.expanduser("~/")) if part in text]
    assert run_code(text, tmp_path, capsys, monkeypatch) != ""


def test_a_run_replaces_its_own_card_but_not_a_users(make_options, tmp_path):
    """With LoRA, as PEFT writes its own card with every adapter."""
    card, ours = tmp_path / "out" / "README.md", {"overwrite_output_dir": True, **LORA}
    tuning.train(make_options("llava15", max_steps=1, **ours))
    assert "| steps | 1 |" in card.read_text()
    tuning.train(make_options("llava15", max_steps=2, **ours))
    assert "| steps | 2 |" in card.read_text()
    card.write_text(card.read_text().replace(MARK, OLD_MARK).replace("| steps | 2 |", "| steps | old |"))
    tuning.train(make_options("llava15", max_steps=1, **ours))
    assert "| steps | 1 |" in card.read_text()
    card.write_text("# Mine\n")
    tuning.train(make_options("llava15", max_steps=1, **ours))
    assert card.read_text() == "# Mine\n"
    assert not list(card.parent.glob("*.tmp"))


def test_a_card_has_the_scores_of_the_saved_model(rows, make_options, trainers):
    best = {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "greater_is_better": True}
    steps = {"eval_strategy": "steps", "eval_steps": 1, "save_steps": 1, "max_steps": 2}
    changes = {"validation_data_path": str(rows), **steps}
    result = tuning.train(make_options("llava15", **best, **changes))
    losses = {line["step"]: line["eval_loss"] for line in trainers[0].state.log_history if "eval_loss" in line}
    assert losses[1] > losses[2]  # so that the best by this measure is not the last
    assert f"| eval_loss | {losses[1]:.4g} |" in (result.model_dir / "README.md").read_text()


def make_summary(**changes) -> RunSummary:
    options = {
        **{"peft_method": None, "assistant_only_loss": True, "gradient_accumulation_steps": 2, "seed": 1, "r": 8},
        **{"per_device_train_batch_size": 4, "learning_rate": 1e-4, "lr_scheduler_type": "cosine"},
        **{"warmup_steps": 0.1, "optim": "adamw_torch", "weight_decay": 0.0, "max_seq_length": None},
        **{"lora_alpha": 16, "lora_dropout": 0.1, "target_modules": ["q_proj"]},
    } | changes.pop("options", {})
    fields = {
        **{"name": "me/colours", "options": options, "model": "some/base", "on_hub": {"some/base", "some/rows"}},
        **{"training_data": ["some/rows", "more.jsonl"], "validation_data": "some/rows"},
        **{"parts": [PartSize("projector", 2000, 10)], "dtypes": ["bfloat16"], "processes": 3, "rows": None},
        **{"rows_left_out": 2, "steps": 5, "epochs": 0.5, "versions": {}},
        **{"log_history": [{"loss": 2.0, "step": 5}, {"eval_loss": 1.5, "eval_runtime": 3.0, "step": 5}]},
        **dict.fromkeys(
            ["begun", "architecture", "attention", "adapter", "validation_rows", "row_format", "row_limit"]
        ),
        **dict.fromkeys(["typical_image", "rows_per_step", "device", "precision"]),
    }
    return RunSummary(**(fields | changes))


def test_names_of_the_hub_are_metadata():
    data = ModelCard(write_card(make_summary())).data
    assert (data.base_model, data.datasets) == ("some/base", ["some/rows"])
    (score,) = data.eval_results
    assert (score.dataset_type, score.metric_type, score.metric_value) == ("some/rows", "loss", 1.5)


def test_a_step_counts_all_processes():
    assert "| rows per step | 24 |" in write_card(make_summary())
    budget = {"max_tokens_per_batch": 1000, "per_device_train_batch_size": 8}
    assert "| tokens per step | at most 6 × 1,000 |" in write_card(make_summary(options=budget))
    assert "| warmup | 10% of the steps |" in write_card(make_summary())


def test_a_card_says_what_a_server_must_write():
    assert "## Serve" not in write_card(make_summary())
    start = write_card(make_summary(added_start="<s>"))
    assert "began with `<s>`, which the chat template does not write" in start
    assert "answer ended" not in start
    both = write_card(make_summary(added_start="<s>", added_end="</s>"))
    assert both.count("## Serve") == 1
    assert "every answer ended with `</s>`" in both
    assert "The chat template that is saved here writes it." in write_card(make_summary(added_end="</s>"))


def test_the_card_of_a_merged_adapter_loads_a_whole_model():
    adapter = write_card(make_summary(options={"peft_method": "lora"}))
    merged = merge_card(adapter, "merged")
    assert "PeftModel" in code_of(adapter)
    assert "PeftModel" not in code_of(merged)
    assert 'from_pretrained("merged", dtype="auto")' in code_of(merged)
    assert re.findall("^# .*", merged, re.M) == ["# merged"]
    assert ModelCard(merged).data.library_name == "transformers"
    assert ModelCard(merged).data.base_model == "some/base"
    for section in ("## Data", "## Scores", "## How it was made"):
        assert merged.partition(section)[2] == adapter.partition(section)[2]
