"""Options as Python programs have them, and what is said of values that cannot be."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from tuning import cli
from tuning.config.parse import build_config, check_options, resolve
from tuning.config.values import to_json_value
from tuning.errors import UserError


@pytest.fixture
def required(tmp_path):
    """The three options that every run needs, with paths that exist, as `pathlib` has them."""
    (tmp_path / "model").mkdir()
    (tmp_path / "rows.json").write_text("[]", encoding="utf-8")
    return {
        "model_name_or_path": tmp_path / "model",
        "training_data_path": tmp_path / "rows.json",
        "output_dir": tmp_path / "out",
        "use_cpu": True,
    }


def problems_of(options) -> str:
    with pytest.raises(UserError) as caught:
        check_options(options)
    return str(caught.value)


class Place:
    """A path of a class of its own."""

    def __fspath__(self) -> str:
        return "here/rows.json"


@pytest.mark.parametrize(
    ("given", "taken"),
    [
        (Path("a/b"), "a/b"),
        (Place(), "here/rows.json"),
        (np.int64(3), 3),
        (np.uint8(3), 3),
        (np.float32(0.5), 0.5),
        (np.bool_(True), True),
        (np.str_("text"), "text"),
        (np.array([1, 2]), [1, 2]),
        (("q", "v"), ["q", "v"]),
        (frozenset({"v", "q"}), ["q", "v"]),
        ((name for name in "qv"), ["q", "v"]),
        ({"q": 1}.keys(), ["q"]),
        (range(2), [0, 1]),
        (torch.bfloat16, "bfloat16"),
        ([{"path": Path("a"), "weight": np.float64(2)}], [{"path": "a", "weight": 2.0}]),
    ],
)
def test_values_of_a_program_become_those_of_a_config_file(given, taken):
    found = to_json_value(given)
    assert (found, type(found)) == (taken, type(taken))
    json.dumps(found)


def test_a_program_may_give_its_own_values(required, tmp_path):
    options = {
        **required,
        "peft_method": "lora",
        "target_modules": (name for name in ("q_proj", "v_proj")),
        "r": np.int32(4),
        "learning_rate": np.float32(0.5),
        "bf16": np.bool_(False),
        "dtype": torch.float32,
        "accelerate_launch_args": {"num_processes": np.int64(1)},
        "max_steps": np.int64(2**40),
    }
    config = build_config(options)
    assert (config.lora.target_modules, config.lora.r) == (["q_proj", "v_proj"], 4)
    assert (config.training.learning_rate, config.training.max_steps, config.training.bf16) == (0.5, 2**40, False)
    assert (config.model.dtype, config.model.model_name_or_path) == ("float32", str(tmp_path / "model"))
    assert config.run.accelerate_launch_args == {"num_processes": 1}
    json.dumps(config.to_dict(), default=str)


def test_the_mixture_may_be_a_tuple_of_paths(required):
    parts = ({"path": required["training_data_path"], "weight": np.float32(1)},)
    assert build_config({**required, "training_data_path": parts}).data.training_data_path[0]["weight"] == 1.0


def test_null_trackers_are_none(required):
    assert build_config({**required, "report_to": None}).training.report_to == []


def test_a_value_of_the_wrong_type_is_one_problem(required):
    found = problems_of({**required, "model_name_or_path": 3, "validation_data_path": 4, "eval_strategy": "epoch"})
    assert found.count("model_name_or_path") == found.count("validation_data_path") == 1
    assert found.startswith("config: 2 problems:")
    found = problems_of({**required, "max_tokens_per_batch": -1, "per_device_train_batch_size": 2})
    assert found == "config: max_tokens_per_batch: must be at least 1, got -1"


def test_lists_of_names_hold_nothing_else(required):
    found = problems_of({**required, "peft_method": "lora", "target_modules": ["q_proj", 1]})
    assert found == "config: target_modules: expected a list or text, got ['q_proj', 1]"


@pytest.mark.parametrize(
    ("name", "meant"),
    [("lora_rank", "r"), ("lora_r", "r"), ("lr", "learning_rate"), ("cutoff_len", "max_seq_length")],
)
def test_names_of_other_tools_lead_to_ours(required, name, meant):
    assert f"{name}: unknown option. Did you mean {meant}?" in problems_of({**required, name: 8})


@pytest.mark.parametrize(
    ("name", "value", "problem"),
    [
        ("max_steps", 0, "0 steps train nothing"),
        ("max_grad_norm", -1, "must be at least 0"),
        ("warmup_steps", -3, "must be at least 0"),
        ("max_steps", 10**300, f"must be at most {2**63 - 1}, got 1000"),
        ("max_steps", -(10**300), f"must be at least -{2**63 - 1}, got -1000"),
        ("per_device_train_batch_size", 1e300, f"must be at most {2**63 - 1}, got 1000"),
        ("adam_beta2", 1, "must be at least 0 and below 1"),
        ("eval_delay", float("nan"), "must be finite"),
        ("learning_rate", float("inf"), "must be finite"),
        ("neftune_noise_alpha", -1, "must be at least 0"),
        ("save_total_limit", -1, "must be at least 0"),
        ("dataloader_num_workers", -1, "must be at least 0"),
        ("dataloader_multiprocessing_context", "thread", "is unknown; use"),
        ("lr_scheduler_type", "cosin", "expected linear, cosine"),
        ("optim", "adamw_torc", "expected adamw_torch"),
        ("eval_on_start", True, "needs evaluations; give validation_data_path"),
        ("lr_scheduler_kwargs", " ", "expected a JSON object, got ' '"),
        ("log_level", "loud", "is unknown; use"),
        ("deepspeed", "zero3.json", "is not installed; run pip install deepspeed"),
        ("report_to", 5, "expected"),
        ("save_model_dir", "/dev/null/model", "/dev/null is a file, not a folder"),
        ("save_model_dir", "a\0b", "is not a path: it has a NUL character"),
        ("logging_dir", "~nobody-here/x", "is not a path: there is no such user"),
        ("image_folder", "\ud83d", "is not a path: it has half a character"),
        ("accelerate_launch_args", {"num_processes": "²"}, "must be a whole number above 0"),
    ],
)
def test_a_value_that_cannot_be_is_one_message_that_names_its_option(required, name, value, problem):
    with pytest.raises(UserError) as caught:
        build_config({**required, name: value})
    assert str(caught.value).startswith(f"config: {name}")
    assert problem in str(caught.value)


def test_settings_of_workers_are_left_out_where_there_are_none(required):
    config = build_config({**required, "dataloader_num_workers": 0, "dataloader_prefetch_factor": 4})
    assert config.training.dataloader_prefetch_factor is None
    assert (
        "dataloader_prefetch_factor has no effect without worker processes (dataloader_num_workers 0)." in config.notes
    )


@pytest.mark.parametrize("encoding", ["utf-16", "utf-32", "latin-1"])
@pytest.mark.parametrize("from_environment", [False, True])
def test_a_config_file_that_is_not_utf8_is_named(required, tmp_path, monkeypatch, capsys, encoding, from_environment):
    file = tmp_path / "config.json"
    text = json.dumps({"run_name": "café", "model_name_or_path": "m"}, ensure_ascii=False)
    file.write_bytes(text.encode(encoding))
    if from_environment:
        monkeypatch.setenv("SFT_TRAINER_CONFIG_JSON_PATH", str(file))
    assert cli.main(["train", *([] if from_environment else [str(file)])]) == 1
    assert f"Error: {file}: the config file is not UTF-8 text: byte " in capsys.readouterr().err


def test_a_config_file_may_begin_with_a_byte_order_mark(required, tmp_path):
    options = {name: str(value) for name, value in required.items()}
    (tmp_path / "config.json").write_text(json.dumps(options), encoding="utf-8-sig")
    assert resolve(tmp_path / "config.json").model.model_name_or_path == options["model_name_or_path"]


@pytest.mark.parametrize("text", ["[" * 100_000, '{"max_steps": ' + "9" * 10_000 + "}"])
def test_json_that_python_cannot_read_is_a_message(tmp_path, capsys, text):
    (tmp_path / "config.json").write_text(text)
    assert cli.main(["train", str(tmp_path / "config.json")]) == 1
    assert f"Error: {tmp_path / 'config.json'}: this JSON cannot be read" in capsys.readouterr().err
