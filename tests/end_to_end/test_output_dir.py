"""What a second command finds in output_dir: a finished run, a cut one, or another run's."""

import json
import math
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import tuning
from tuning import sft_trainer
from tuning.errors import UserError

LORA = {"peft_method": "lora", "target_modules": ["q_proj", "v_proj"], "r": 4}


@pytest.fixture(scope="module")
def finished(models, rows, tmp_path_factory):
    """A finished LoRA run of four steps with a checkpoint after two and four: its options."""
    output_dir = tmp_path_factory.mktemp("finished") / "out"
    options = {
        "model_name_or_path": str(models["llava15"]),
        "training_data_path": str(rows),
        "output_dir": str(output_dir),
        "num_train_epochs": 1,
        "per_device_train_batch_size": 4,
        "save_steps": 2,
        "logging_steps": 1,
        **LORA,
    }
    tuning.train(options)
    return options


@pytest.fixture
def options(finished, tmp_path):
    """The same run in a folder of its own, which a test may change."""
    shutil.copytree(finished["output_dir"], tmp_path / "out")
    return {**finished, "output_dir": str(tmp_path / "out")}


def files_of(folder) -> dict:
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def test_repeating_a_finished_command_says_so_and_changes_nothing(options, tmp_path, capsys):
    before = files_of(tmp_path)
    config = tmp_path / "out" / "resolved_config.json"
    assert sft_trainer.main([str(config), "--output_dir", options["output_dir"]]) == 0
    assert "already finished after 4 steps" in capsys.readouterr().out
    assert files_of(tmp_path) == before


def test_a_half_written_final_save_is_finished_without_training(options, tmp_path, capsys):
    out = tmp_path / "out"
    expected = load_file(out / "adapter_model.safetensors")
    for name in (".complete", "adapter_model.safetensors", "processor_config.json"):
        (out / name).unlink()
    assert tuning.train(options).global_step == 4
    assert "only the final model remains" in capsys.readouterr().out
    saved = load_file(out / "adapter_model.safetensors")
    assert all(torch.equal(saved[name], expected[name]) for name in expected)
    assert (out / "processor_config.json").exists()
    assert (out / ".complete").exists()


CHANGES = {
    "r": {"r": 8},
    "target_modules": {"target_modules": ["k_proj"]},
    "assistant_only_loss": {"assistant_only_loss": False},
    "peft_method": {"peft_method": None, "target_modules": None, "r": None},
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_changed_run_cannot_be_continued(options, tmp_path, name):
    (tmp_path / "out" / ".complete").unlink()
    changed = {key: value for key, value in {**options, **CHANGES[name]}.items() if value is not None}
    with pytest.raises(UserError, match=f"{name} was .*, is "):
        tuning.train(changed)


def test_changed_data_and_a_changed_model_are_named(options, tmp_path, rows, models):
    text = rows.read_text().splitlines()
    shutil.copytree(rows.parent, tmp_path / "data")
    (tmp_path / "data" / "rows.jsonl").write_text("\n".join(text[:8]))
    with pytest.raises(UserError, match="training_data_path was"):
        tuning.train({**options, "training_data_path": str(tmp_path / "data" / "rows.jsonl")})
    with pytest.raises(UserError, match="model_name_or_path was"):
        tuning.train({**options, "model_name_or_path": str(models["llava_next_vicuna"])})


def test_not_resuming_in_a_used_folder_needs_a_word(options, tmp_path, capsys):
    with pytest.raises(UserError, match="overwrite_output_dir true"):
        tuning.train({**options, "resume_from_checkpoint": "false"})
    tuning.train({**options, "overwrite_output_dir": True, "max_steps": 1, "save_strategy": "no"})
    assert not list((tmp_path / "out").glob("checkpoint-*"))
    assert "Continuing" not in capsys.readouterr().out


def test_resume_from_checkpoint_must_find_one(options, tmp_path):
    for wanted in ("true", str(tmp_path / "nowhere")):
        with pytest.raises(UserError, match="resume_from_checkpoint"):
            tuning.train({**options, "output_dir": str(tmp_path / "new"), "resume_from_checkpoint": wanted})


def test_more_epochs_continue_a_finished_run(options):
    assert tuning.train({**options, "num_train_epochs": 2}).global_step == 8


def test_the_best_model_is_the_one_that_is_saved(models, rows, tmp_path):
    config = {
        "model_name_or_path": str(models["granite_vision"]),
        "training_data_path": str(rows),
        "validation_data_path": str(rows),
        "output_dir": str(tmp_path),
        "num_train_epochs": 3,
        "per_device_train_batch_size": 8,
        "learning_rate": 0.2,  # much too high: an early checkpoint is the best
        "lr_scheduler_type": "constant",
        "save_strategy": "epoch",
        "load_best_model_at_end": True,
    }
    tuning.train(config)
    log = [json.loads(line) for line in (tmp_path / "training_logs.jsonl").read_text().splitlines()]
    losses = {line["step"]: line["eval_loss"] for line in log if "eval_loss" in line}
    best = min(losses, key=losses.get)
    saved = {step: load_file(tmp_path / f"checkpoint-{step}" / "model.safetensors") for step in losses}
    final = load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(final[name], saved[best][name]) for name in final)
    others = [step for step in losses if step != best]
    assert all(any(not torch.equal(final[name], saved[step][name]) for name in final) for step in others)


def broken_copy(models, tmp_path, change) -> str:
    folder = tmp_path / "broken"
    shutil.copytree(models["llava15"], folder)
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return str(folder)


def test_a_loss_that_is_no_number_ends_the_run_and_names_the_rows(models, rows, tmp_path, capsys):
    model = broken_copy(models, tmp_path, lambda weights: weights["language_model.model.norm.weight"].fill_(math.nan))
    arguments = {"model_name_or_path": model, "training_data_path": rows, "output_dir": tmp_path / "out"}
    code = sft_trainer.main([word for name, value in arguments.items() for word in (f"--{name}", str(value))])
    message = capsys.readouterr().err.splitlines()[-1]
    assert code == 1
    assert "the loss became nan at step 1" in message
    assert f"{rows}, row " in message
    assert not (tmp_path / "out" / "model.safetensors").exists()


def test_a_checkpoint_without_some_weights_is_refused(models, rows, tmp_path):
    model = broken_copy(models, tmp_path, lambda weights: weights.pop("language_model.model.norm.weight"))
    with pytest.raises(UserError, match=r"lacks 1 of the model's weights: .*norm\.weight"):
        tuning.train({"model_name_or_path": model, "training_data_path": str(rows), "output_dir": str(tmp_path / "o")})


def test_an_adapter_is_not_a_model(finished):
    with pytest.raises(UserError, match="is a LoRA adapter"):
        tuning.train({**finished, "model_name_or_path": finished["output_dir"]})
