import base64
import copy
import json
import os
import warnings
from dataclasses import fields, replace

import pytest
import torch
from sample_config import SAMPLE

from tuning import cli
from tuning.commands.predict import PredictArguments
from tuning.config import legacy_names
from tuning.config.describe import describe_all_options
from tuning.config.options import OWN_OPTIONS, SECTIONS, default_options
from tuning.config.parse import LIMITS, build_config, read_command, read_options, to_flags
from tuning.config.values import find_value_problems
from tuning.errors import UserError

needs_no_accelerator = pytest.mark.skipif(torch.accelerator.is_available(), reason="this machine has an accelerator")


@pytest.fixture
def required(tmp_path):
    """The three options that every run needs, with paths that exist."""
    (tmp_path / "model").mkdir()
    (tmp_path / "rows.json").write_text("[]", encoding="utf-8")
    return {
        "model_name_or_path": str(tmp_path / "model"),
        "training_data_path": str(tmp_path / "rows.json"),
        "output_dir": str(tmp_path / "out"),
    }


def encode(text: str) -> str:
    return base64.b64encode(text.encode()).decode()


def problems_of(options) -> str:
    with pytest.raises(UserError) as caught:
        build_config(options)
    return str(caught.value)


# --- read_options ---


@pytest.mark.parametrize(
    ("argv", "options"),
    [
        (["--learning_rate", "1e-4"], {"learning_rate": "1e-4"}),
        (["--learning_rate=1e-4"], {"learning_rate": "1e-4"}),
        (["--run_name=a=b"], {"run_name": "a=b"}),
        (["--run_name="], {"run_name": ""}),
        (["--weight_decay", "-0.5"], {"weight_decay": "-0.5"}),
        (["--bf16"], {"bf16": True}),
        (["--no_use_flash_attn"], {"use_flash_attn": False}),
        (["--no_cuda"], {"no_cuda": True}),
        (["--use-flash-attn", "false"], {"use_flash_attn": "false"}),
        (["--target_modules", "q_proj", "v_proj", "--r", "4"], {"target_modules": ["q_proj", "v_proj"], "r": "4"}),
        (["--r", "4", "--r", "16"], {"r": "16"}),
    ],
)
def test_flags_become_options(argv, options):
    assert read_options(argv, {}) == options


def test_flags_override_the_json_file_beside_them(tmp_path):
    file = tmp_path / "config.json"
    file.write_text('{"learning_rate": 0.1, "bf16": false, "r": 4}', encoding="utf-8")
    options = read_options([str(file), "--learning_rate", "0.2", "--bf16"], {})
    assert options == {"learning_rate": "0.2", "bf16": True, "r": 4}


def test_config_comes_from_the_path_in_the_environment(tmp_path):
    file = tmp_path / "config.json"
    file.write_text('{"r": 4}', encoding="utf-8")
    encoded = encode('{"r": 5}')
    environ = {"SFT_TRAINER_CONFIG_JSON_PATH": str(file), "SFT_TRAINER_CONFIG_JSON_ENV_VAR": encoded}
    assert read_options([], environ) == {"r": 4}


def test_config_comes_from_base64_in_the_environment():
    encoded = encode('{"run_name": "größer", "nested": {"a": [1]}}')
    environ = {"SFT_TRAINER_CONFIG_JSON_ENV_VAR": encoded}
    assert read_options([], environ) == {"run_name": "größer", "nested": {"a": [1]}}


def test_arguments_win_over_the_environment():
    assert read_options(["--r", "4"], {"SFT_TRAINER_CONFIG_JSON_ENV_VAR": encode('{"r": 5}')}) == {"r": "4"}


@pytest.mark.parametrize(
    ("encoded", "message"),
    [
        ("%%%", "the value is not base64 of JSON text"),
        (base64.b64encode(b"\xff\xfe").decode(), "the value is not base64 of JSON text"),
        (encode('{"r": 5'), "not valid JSON"),
        (encode("[1]"), "JSON object with option names, not a list"),
    ],
)
def test_broken_base64_config_names_its_variable(encoded, message):
    with pytest.raises(UserError, match=message) as caught:
        read_options([], {"SFT_TRAINER_CONFIG_JSON_ENV_VAR": encoded})
    assert "SFT_TRAINER_CONFIG_JSON_ENV_VAR" in caught.value.where


def test_broken_json_file_names_line_and_column(tmp_path):
    file = tmp_path / "config.json"
    file.write_text('{\n  "r": 5,\n}', encoding="utf-8")
    with pytest.raises(UserError, match="not valid JSON") as caught:
        read_options([str(file)], {})
    assert caught.value.where.startswith(f"{file}, line ")


def test_json_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(UserError, match="the config file cannot be read") as caught:
        read_options([str(tmp_path / "none.json")], {})
    assert caught.value.where == str(tmp_path / "none.json")


@pytest.mark.parametrize("argv", [["--r=4", "stray"], ["CONFIG", "stray"]])
def test_stray_positional_is_refused(argv, tmp_path):
    file = tmp_path / "config.json"
    file.write_text("{}", encoding="utf-8")
    with pytest.raises(UserError, match="'stray' is neither a flag nor the value of one"):
        read_options([str(file) if word == "CONFIG" else word for word in argv], {})


def test_nothing_given_says_how_to_give_options():
    with pytest.raises(UserError, match="no options were given"):
        read_options([], {})


# --- build_config: what is wrong ---


@pytest.mark.parametrize(
    ("wrong", "meant"),
    [("learning_rat", "learning_rate"), ("lora_alfa", "lora_alpha"), ("max_sequence_length", "max_seq_length")],
)
def test_unknown_option_names_the_nearest_one(required, wrong, meant):
    assert f"{wrong}: unknown option. Did you mean {meant}?" in problems_of({**required, wrong: 1})


def test_unknown_option_unlike_any_other_points_to_help(required):
    assert "zzzz: unknown option. --help lists the options." in problems_of({**required, "zzzz": 1})


def test_several_problems_are_reported_together(required):
    options = {**required, "learning_rat": 1, "bf16": "maybe", "overlong_rows": "cut", "peft_method": "pt"}
    message = problems_of(options)
    assert "4 problems:" in message
    for name in ("learning_rat:", "bf16:", "overlong_rows:", "peft_method:"):
        assert f"\n  - {name}" in message


def test_every_required_option_is_missed_at_once():
    message = problems_of({})
    assert all(f"{name}: is required" in message for name in ("model_name_or_path", "training_data_path", "output_dir"))


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("learning_rate", "fast", "expected a number, got 'fast'"),
        ("per_device_train_batch_size", 1.5, "expected a whole number or auto, got 1.5"),
        ("per_device_train_batch_size", True, "expected a whole number or auto, got True"),
        ("use_flash_attn", 3, "expected true or false, got 3"),
        ("dataset_text_field", 3, "expected text, got 3"),
        ("dataset_text_field", None, "a value is needed"),
        ("dataset_kwargs", "skip", "expected a JSON object, got 'skip'"),
        ("dataset_kwargs", "{skip", "not valid JSON"),
        ("lora_dropout", [0.1], "expected a number"),
    ],
)
def test_value_of_the_wrong_type_says_what_is_expected(required, name, value, message):
    assert f"{name}: {message}" in problems_of({**required, "peft_method": "lora", name: value})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"peft_method": "pt"}, "peft_method: pt is not supported; use lora, or none"),
        ({"peft_method": "alora"}, "peft_method: alora is not supported; use lora, or none"),
        ({"peft_method": "loro"}, "peft_method: 'loro' is unknown"),
        ({"r": 4}, "r: only LoRA uses this"),
        ({"peft_method": "lora", "r": 0}, "r: must be at least 1"),
        ({"peft_method": "lora", "lora_dropout": 1.0}, "lora_dropout: must be at least 0 and below 1, got 1.0"),
        ({"gradient_checkpointing_kwargs": {"use_reentrant": True}}, "use_reentrant true loses gradients"),
        ({"dtype": "int8"}, "dtype: 'int8' is unknown"),
        ({"fp16": True, "dtype": "float16"}, "fp16: needs trained weights in float32"),
        ({"fp16": True, "dtype": "bfloat16"}, "fp16: needs trained weights in float32"),
        (
            {"fp16": True, "dtype": "float16", "peft_method": "lora", "modules_to_save": ["multi_modal_projector"]},
            "fp16: needs trained weights in float32",
        ),
        ({"dtype": "float16"}, "dtype: in float16, small gradients become zero"),
        ({"dtype": "float16", "peft_method": "lora"}, "dtype: in float16, small gradients become zero"),
        ({"max_seq_length": 0}, "max_seq_length: must be at least 1"),
        ({"max_images_per_sample": 0}, "max_images_per_sample: must be at least 1"),
        ({"eval_strategy": "steps"}, "eval_strategy: steps needs validation_data_path"),
        ({"dataset_kwargs": {"cut": 1}}, "dataset_kwargs: unknown cut"),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor: is not supported"),
        ({"packing": True}, "packing: is no longer an option."),
        ({"fsdp_min_num_params": 5}, 'Use fsdp_config: {"min_num_params": …}.'),
        (
            {f"freeze_{part}": True for part in ("vision_tower", "multi_modal_projector", "language_model")},
            "nothing is left to train",
        ),
        ({"cache_vision_features": "features"}, "cache_vision_features: features of a vision tower that trains change"),
        (
            {"cache_vision_features": "features", "peft_method": "lora", "freeze_vision_tower": False},
            "cache_vision_features: features of a vision tower that trains change; set freeze_vision_tower true",
        ),
    ],
)
def test_option_that_cannot_work_says_why(required, options, message, monkeypatch):
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    assert message in problems_of({**required, **options})


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("vision_tower_learning_rate", -1e-5, "must be at least 0, got -1e-05"),
        ("projector_learning_rate", "-1", "must be at least 0, got -1.0"),
        ("projector_learning_rate", "nan", "must be finite, got nan"),
        ("learning_rate", -1e-4, "must be at least 0, got -0.0001"),
        ("weight_decay", -0.1, "must be at least 0, got -0.1"),
        ("lora_alpha", 0, "must be at least 1, got 0"),
        ("sample_rows", -1, "must be at least 0, got -1"),
        ("eval_generate_rows", -1, "must be at least 0, got -1"),
        ("report_samples", -1, "must be at least 0, got -1"),
        ("max_bad_fraction", 1.5, "must be at least 0 and at most 1, got 1.5"),
        ("max_image_megabytes", 0, "must be above 0, got 0.0"),
        ("max_image_megabytes", "inf", "must be finite, got inf"),
        ("save_before_walltime", 0, "must be above 0, got 0.0"),
        ("num_train_epochs", 0, "must be above 0, got 0.0"),
        ("num_train_epochs", "inf", "must be finite, got inf"),
        ("seed", -1, "must be at least 0 and at most 4294967295, got -1"),
        ("per_device_train_batch_size", 0, "must be at least 1, got 0"),
        ("max_rows", 0, "must be at least 1, got 0"),
        ("dtype", "int8", "'int8' is unknown; use auto, float32, bfloat16 or float16"),
        ("on_bad_row", "drop", "'drop' is unknown; use error or skip"),
        ("overlong_rows", "cut", "'cut' is unknown; use error, drop or truncate_text"),
        ("padding_free", "yes please", "'yes please' is unknown; use auto, true or false"),
        ("bias", "some", "'some' is unknown; use none, all or lora_only"),
    ],
)
def test_value_outside_its_limits_says_what_is_allowed(required, name, value, message):
    options = {**required, "validation_data_path": required["training_data_path"], "peft_method": "lora"}
    assert problems_of({**options, name: value}) == f"config: {name}: {message}"


def test_every_default_is_within_its_limits():
    for section in SECTIONS.values():
        values = {entry.name: getattr(section(), entry.name) for entry in fields(section)}
        assert not find_value_problems({name: value for name, value in values.items() if value != ""}, LIMITS)
    assert not find_value_problems(default_options(), LIMITS)


def test_every_option_has_one_plain_line_of_help():
    described = describe_all_options()
    assert {option.name for option in described} == set(OWN_OPTIONS)
    for option in described:
        assert option.help.endswith(".")
        assert option.help[0].isupper()
        assert "\n" not in option.help
        assert option.type
    (on_bad_row,) = (option for option in described if option.name == "on_bad_row")
    assert (on_bad_row.section, on_bad_row.type, on_bad_row.default) == ("data", "error or skip", "error")


@pytest.mark.parametrize("frozen", [{"freeze_vision_tower": True}, {"peft_method": "lora"}], ids=["full", "lora"])
def test_features_of_a_frozen_tower_can_be_cached(required, frozen):
    config = build_config({**required, **frozen, "cache_vision_features": "features"})
    assert config.model.cache_vision_features == "features"
    assert config.to_dict()["cache_vision_features"] == "features"


def test_missing_local_paths_are_said_at_once(required):
    missing = {
        "model_name_or_path": "/nowhere/model",
        "training_data_path": "rows.jsonl",
        "validation_data_path": "./held_out",
        "chat_template": "chat.jinja",
    }
    message = problems_of({**required, **missing})
    assert all(f"{name}: {path} does not exist" in message for name, path in missing.items())


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (
            {"per_device_train_batch_size": 4},
            "max_tokens_per_batch, per_device_train_batch_size: both set the size of a batch",
        ),
        ({"streaming": True, "max_steps": 1}, "it does not go with streaming"),
        ({"train_sampling_strategy": "random"}, "which train_sampling_strategy random forbids"),
        ({"group_by_length": False}, "which train_sampling_strategy random forbids"),
        (
            {"auto_find_batch_size": True},
            "auto_find_batch_size: a process that has no memory left would start again alone",
        ),
    ],
)
def test_what_a_token_budget_does_not_go_with(required, options, told):
    assert build_config({**required, "max_tokens_per_batch": 100}).data.max_tokens_per_batch == 100
    with pytest.raises(UserError, match=told):
        build_config({**required, "max_tokens_per_batch": 100, **options})


@pytest.mark.parametrize(
    ("options", "grouped"),
    [
        ({}, None),
        ({"train_sampling_strategy": "group_by_length"}, True),
        ({"group_by_length": True}, True),
        ({"group_by_length": False}, False),
        ({"train_sampling_strategy": "sequential"}, False),
        ({"allow_remote_images": True}, False),
        ({"streaming": True, "max_steps": 1}, False),
    ],
)
def test_rows_are_grouped_where_batches_are_padded_unless_something_speaks_against_it(required, options, grouped):
    config = build_config({**required, **options})
    assert config.group_by_length is grouped
    if not config.data.allow_remote_images and not config.data.streaming:
        assert build_config(config.to_dict()).group_by_length is grouped


def test_hub_ids_and_template_text_are_not_taken_for_paths(required):
    options = {"model_name_or_path": "owner/name", "training_data_path": "rows", "chat_template": "{{ '/a/b.jinja' }}"}
    assert build_config({**required, **options}).model.model_name_or_path == "owner/name"


# --- build_config: what is translated ---


@pytest.mark.parametrize(
    ("name", "value", "section", "new_name", "new_value"),
    [
        ("torch_dtype", "bfloat16", "model", "dtype", "bfloat16"),
        ("no_cuda", True, "training", "use_cpu", True),
        ("per_gpu_train_batch_size", 3, "training", "per_device_train_batch_size", 3),
        ("warmup_ratio", 0.1, "training", "warmup_steps", 0.1),
        ("warmup_ratio", "0.25", "training", "warmup_steps", 0.25),
        ("group_by_length", True, "training", "train_sampling_strategy", "group_by_length"),
        ("group_by_length", False, "training", "train_sampling_strategy", "random"),
        ("adafactor", "true", "training", "optim", "adafactor"),
        ("gradient_checkpointing", True, "training", legacy_names.CHECKPOINTING, True),
    ],
)
def test_old_name_keeps_its_meaning(required, name, value, section, new_name, new_value):
    config = build_config({**required, name: value})
    assert getattr(getattr(config, section), new_name) == new_value


def test_evaluation_strategy_is_eval_strategy(required):
    options = {"evaluation_strategy": "steps", "validation_data_path": required["training_data_path"]}
    assert build_config({**required, **options}).training.eval_strategy == "steps"


def test_logging_dir_is_kept_in_the_config_and_sets_no_environment_variable(required):
    before = dict(os.environ)
    config = build_config({**required, "logging_dir": "/tmp/boards"})
    assert config.run.logging_dir == config.to_dict()["logging_dir"] == "/tmp/boards"
    assert dict(os.environ) == before


def test_the_options_that_are_given_stay_as_they_are(required):
    nested = {
        "fsdp_config": {"min_num_params": 5},
        "lr_scheduler_kwargs": {"num_cycles": 2},
        "accelerator_config": {"split_batches": True},
        "dataset_kwargs": {"skip_prepare_dataset": True},
        "training_data_path": [{"path": required["training_data_path"]}],
    }
    given = {**required, "gradient_checkpointing": True, "torch_dtype": "float32", **nested}
    before = copy.deepcopy(given)
    config = build_config(given)
    assert given == before
    config.data.dataset_kwargs["more"] = config.data.training_data_path[0]["weight"] = 1
    assert given == before


def test_old_and_new_name_with_different_values_contradict_each_other(required):
    message = problems_of({**required, "torch_dtype": "bfloat16", "dtype": "float32"})
    assert "dtype: means dtype, which is also given with another value" in message
    both = build_config({**required, "torch_dtype": "bfloat16", "dtype": "bfloat16"})
    assert both.model.dtype == "bfloat16"


def test_bad_value_under_an_old_name_is_a_problem(required):
    assert "warmup_ratio: 'some' is not a valid value" in problems_of({**required, "warmup_ratio": "some"})


@pytest.mark.parametrize(("given", "meant"), [(True, True), ("false", False), ("yes", True)])
def test_overwrite_output_dir_is_an_option_of_ours(required, given, meant):
    assert build_config({**required, "overwrite_output_dir": given}).run.overwrite_output_dir is meant


def test_gradient_checkpointing_gives_no_warning_and_is_not_reentrant(required):
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        config = build_config({**required, "gradient_checkpointing": True})
    assert getattr(config.training, legacy_names.CHECKPOINTING_KWARGS) == {"use_reentrant": False}


def test_remove_unused_columns_is_never_true(required):
    config = build_config({**required, "remove_unused_columns": True})
    assert config.training.remove_unused_columns is False
    assert any("remove_unused_columns is ignored" in note for note in config.notes)


@needs_no_accelerator
def test_machine_without_accelerator_uses_the_cpu_and_says_so(required):
    config = build_config(required)
    assert config.training.use_cpu is True
    assert any("training on the CPU" in note for note in config.notes)
    asked_for = build_config({**required, "use_cpu": True})
    assert not any("training on the CPU" in note for note in asked_for.notes)


@pytest.mark.parametrize("value", ["none", "None", None, ""])
def test_peft_method_none_is_full_fine_tuning(required, value):
    assert build_config({**required, "peft_method": value, "r": 4}).lora.peft_method is None


@pytest.mark.parametrize(
    ("value", "modules"),
    [
        ("all-linear", "all-linear"),
        ('["q_proj", "v_proj"]', ["q_proj", "v_proj"]),
        (["q_proj"], ["q_proj"]),
        (".*q_proj", ".*q_proj"),
    ],
)
def test_target_modules_take_a_list_or_text(required, value, modules):
    assert build_config({**required, "peft_method": "lora", "target_modules": value}).lora.target_modules == modules


@pytest.mark.parametrize(
    "name", ["r", "lora_alpha", "lora_dropout", "dataset_kwargs", "accelerate_launch_args", "use_flash_attn"]
)
def test_null_means_the_default(required, name):
    given = build_config({**required, "peft_method": "lora", name: None}).to_dict()
    assert given == build_config({**required, "peft_method": "lora"}).to_dict()


def test_validation_data_alone_evaluates_every_epoch(required):
    config = build_config({**required, "validation_data_path": required["training_data_path"]})
    assert config.training.eval_strategy == "epoch"
    assert any("evaluating on validation_data_path after every epoch" in note for note in config.notes)


def test_workers_that_are_none_do_not_persist(required):
    training = build_config({**required, "dataloader_num_workers": 0}).training
    assert (training.dataloader_num_workers, training.dataloader_persistent_workers) == (0, False)
    assert build_config(required).training.dataloader_num_workers >= 1


def test_final_model_goes_to_output_dir_unless_told(required):
    assert build_config(required).save_model_dir == required["output_dir"]
    assert build_config({**required, "save_model_dir": "/tmp/final"}).save_model_dir == "/tmp/final"


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"peft_method": "lora", "r": 4, "target_modules": ["q_proj"], "gradient_checkpointing": True},
        {"warmup_ratio": 0.1, "lr_scheduler_type": "cosine", "optim": "adafactor", "torch_dtype": "float32"},
        {"gradient_checkpointing": "auto", "per_device_train_batch_size": "auto", "max_memory_gb": 20},
        {"dataloader_num_workers": 0, "lr_scheduler_kwargs": {"num_cycles": 2}, "max_steps": 3, "seed": 7},
    ],
)
def test_resolved_config_can_be_run_again(required, options):
    resolved = build_config({**required, **options}).to_dict()
    again = build_config(json.loads(json.dumps(resolved))).to_dict()
    assert again == resolved
    assert again["output_dir"] == required["output_dir"]


def test_resolved_config_holds_no_token(required):
    assert "secret" not in json.dumps(build_config({**required, "push_to_hub_token": "secret"}).to_dict())


def test_documented_sample_parses(required, monkeypatch):
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    config = build_config({**required, **SAMPLE})
    assert config.model.dtype == "bfloat16"
    assert config.training.bf16 is True
    assert config.training.per_device_train_batch_size == 8
    assert config.training.learning_rate == 1e-4
    assert getattr(config.training, legacy_names.CHECKPOINTING) is True
    noted = [note for note in config.notes if "accelerate_launch_args" in note]
    assert noted
    assert "fsdp_transformer_layer_cls_to_wrap" in noted[0]


def test_flags_give_the_same_run_as_json(required):
    words = [word for name, value in required.items() for word in (f"--{name}", value)]
    words += ["--bf16", "--learning_rate", "1e-4", "--peft_method", "lora", "--target_modules", "q_proj", "v_proj"]
    as_json = {"bf16": True, "learning_rate": 1e-4, "peft_method": "lora", "target_modules": ["q_proj", "v_proj"]}
    assert build_config(read_options(words, {})).to_dict() == build_config({**required, **as_json}).to_dict()


def test_flags_of_options_give_the_same_options(tmp_path):
    given = {
        "model_name_or_path": "owner/name",
        "data_path": "owner/rows",
        "metrics": ["exact_match", "anls"],
        "processor_kwargs": {"size": {"height": 32}, "mean": [0.5, 0.5]},
        "chat_template": "{{ messages }} --r",
        "use_flash_attn": False,
        "max_image_megabytes": 0.1,
        "accelerate_launch_args": {"num_processes": 2},
    }
    (tmp_path / "config.json").write_text(json.dumps(given), encoding="utf-8")
    options = read_command([str(tmp_path / "config.json")], PredictArguments)
    assert options == PredictArguments(**given)
    assert read_command(to_flags(options), PredictArguments) == options
    assert PredictArguments(**given | {"metrics": "anls"}) == read_command(
        to_flags(replace(options, metrics="anls")), PredictArguments
    )


@pytest.mark.parametrize("command", ["train", "check"])
def test_help_lists_every_option(command, capsys):
    assert cli.main([command, "--help"]) == 0
    text = capsys.readouterr().out
    assert text.startswith(f"usage: vlm-tuning {command} ")
    assert all(f"--{name} " in text for name in ("model_name_or_path", "r", "max_seq_length", "save_model_dir"))
    assert "learning_rate" in text


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_every_command_has_help_that_begins_with_its_usage(command, capsys):
    assert cli.main([command, "--help"]) == 0
    text = capsys.readouterr().out
    assert text.startswith(f"usage: vlm-tuning {command} ")
    assert "  --" in text
    assert cli.main([]) == 0
    assert f"\n  {command} " in capsys.readouterr().out


def test_a_mistyped_command_is_guessed(capsys):
    assert cli.main(["trian"]) == 1
    assert "unknown command 'trian'. Did you mean train?" in capsys.readouterr().err


def test_the_model_to_tune_is_not_overwritten(tmp_path):
    base = tmp_path / "base"
    base.mkdir()
    (base / "config.json").write_text("{}")
    options = {"model_name_or_path": str(base), "training_data_path": "some/rows", "output_dir": str(tmp_path / "out")}
    build_config(options)
    for name in ("output_dir", "save_model_dir"):
        with pytest.raises(UserError, match=f"{name}: .* is the model itself"):
            build_config({**options, name: f"{base}/../base"})
