"""Rules between options: what is set for the user (and said), and what cannot work."""

import difflib
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

from tuning.config import legacy_names
from tuning.config.options import TRAINING_DEFAULTS
from tuning.exit_codes import was_launched
from tuning.files import is_local_path
from tuning.machine import default_workers

LORA_ONLY = ("r", "lora_alpha", "lora_dropout", "target_modules", "modules_to_save", "use_rslora", "use_dora", "bias")
AT_LEAST_ONE = (
    *("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"),
    *("max_seq_length", "max_images_per_sample", "max_image_pixels", "max_messages_per_row", "max_rows"),
    *("max_tokens_per_batch", "eval_max_new_tokens", "early_stopping_patience", "max_new_tokens", "batch_size"),
)
DATA_SUFFIXES = (".json", ".jsonl", ".parquet", ".arrow")
QUANTIZATIONS = ("4bit", "8bit")
DTYPES = ("auto", "float32", "bfloat16", "float16")


def adjust(values: Mapping[str, Any]) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Complete the user's options with what this machine and these models need. Returns them and what to tell."""
    values, notes = dict(values), []
    if not torch.accelerator.is_available() and not values.get("use_cpu"):
        values["use_cpu"] = True
        notes.append("No accelerator was found: training on the CPU (use_cpu set to true).")
    if values.get("remove_unused_columns"):
        notes.append("remove_unused_columns is ignored: rows are encoded lazily and need all their columns.")
    values["remove_unused_columns"] = False
    if values.get("dataset_kwargs", {}).get("skip_prepare_dataset") is False:
        notes.append("dataset_kwargs: skip_prepare_dataset is always true here; rows are prepared while training.")
    if "peft_method" in values and str(values["peft_method"]).lower() in ("none", ""):
        values["peft_method"] = None
    if "eval_strategy" not in values and values.get("validation_data_path"):
        values["eval_strategy"] = "epoch"
        notes.append("eval_strategy was not given: evaluating on validation_data_path after every epoch.")
    if values.get("early_stopping_patience") and values.get("eval_strategy", "no") != "no":
        notes += _settle_early_stopping(values)
    if values.get("report_to") not in (None, [], "none", ["none"]) and values.get("output_dir"):
        values["run_name"] = values.get("run_name") or Path(values["output_dir"]).absolute().name
    if values.get("dataloader_num_workers") is None:
        values["dataloader_num_workers"] = default_workers()
    if values["dataloader_num_workers"] == 0:
        values["dataloader_persistent_workers"] = False
    if values.get(legacy_names.CHECKPOINTING) and values.get(legacy_names.CHECKPOINTING_KWARGS) is None:
        values[legacy_names.CHECKPOINTING_KWARGS] = {"use_reentrant": False}
    if values.get("streaming"):
        values["ignore_data_skip"] = True  # our stream goes on where the checkpoint was
    endless = values.get("max_tokens_per_batch") and values.get("max_steps", -1) > 0
    if endless and "epoch" in (values.get("eval_strategy"), values.get("save_strategy")):
        notes.append(
            "With max_tokens_per_batch and max_steps epochs follow one another without an end: what is asked for every"
            " epoch (eval_strategy, save_strategy) is done once, after max_steps."
        )
    launch = values.get("accelerate_launch_args")
    if launch and not was_launched():
        notes.append(f"accelerate_launch_args is noted but has no effect on one process: {', '.join(launch)}.")
    return values, tuple(notes)


def _settle_early_stopping(values: dict[str, Any]) -> list[str]:
    """Early stopping is meant to keep the best model: save where it is evaluated, unless the user says otherwise."""
    wanted = {"metric_for_best_model": "loss", "load_best_model_at_end": True}
    if values.get("load_best_model_at_end", True) and "save_strategy" not in values:
        wanted |= {"save_strategy": values["eval_strategy"]}
        if values["eval_strategy"] == "steps":  # Hugging Face evaluates when it logs, unless told otherwise
            logging = values.get("logging_steps", TRAINING_DEFAULTS["logging_steps"])
            wanted |= {"save_steps": values.get("eval_steps") or logging}
    missing = {name: value for name, value in wanted.items() if name not in values}
    values |= missing
    listed = ", ".join(f"{name} {value}" for name, value in missing.items())
    return [f"early_stopping_patience: the best model is kept ({listed})."] if missing else []


def groups_by_length(values: Mapping[str, Any]) -> bool | None:
    """Whether rows of similar length go together; None: where batches are padded. Not where each is fetched for it."""
    if "train_sampling_strategy" in values:
        return values["train_sampling_strategy"] == "group_by_length"
    return False if values.get("allow_remote_images") or values.get("streaming") else None


def find_problems(values: Mapping[str, Any]) -> list[str]:
    """Every rule between options that `values` breaks, in words that name the option and the remedy."""
    return [
        *(
            f"{name}: is required"
            for name in ("model_name_or_path", "training_data_path", "output_dir")
            if not values.get(name)
        ),
        *find_row_problems(values),
        *_tuning_problems(values),
        *_data_problems(values),
        *_answer_problems(values),
        *_training_problems(values),
        *_output_problems(values),
        *find_tracker_problems(values.get("report_to")),
    ]


def find_row_problems(values: Mapping[str, Any]) -> list[str]:
    """What is wrong with how a model and rows are read, for every command."""
    problems = list(_path_problems(values))
    if values.get("dtype", "auto") not in DTYPES:
        problems.append(f"dtype: {values['dtype']!r} is unknown; use {', '.join(DTYPES)}")
    if values.get("quantization") not in (None, *QUANTIZATIONS):
        problems.append(f"quantization: {values['quantization']!r} is unknown; use {' or '.join(QUANTIZATIONS)}")
    if values.get("on_bad_row", "error") not in ("error", "skip"):
        problems.append(f"on_bad_row: {values['on_bad_row']!r} is unknown; use error or skip")
    for name in AT_LEAST_ONE:
        if values.get(name) is not None and values[name] < 1:
            problems.append(f"{name}: must be at least 1, got {values[name]}")
    if not 0 < values.get("max_image_megabytes", 1) < float("inf"):
        problems.append(f"max_image_megabytes: must be above 0, got {values['max_image_megabytes']}")
    return problems


def _path_problems(values: Mapping[str, Any]):
    training = values.get("training_data_path")
    entries = training if isinstance(training, list) else [{"path": training}]
    yield from _mixture_problems(training if isinstance(training, list) else None)
    paths = [("training_data_path", entry.get("path")) for entry in entries if isinstance(entry, dict)]
    names = ("model_name_or_path", "validation_data_path", "data_path", "compare", "chat_template", "image_folder")
    for name, path in [*((name, values.get(name)) for name in names), *paths]:
        if not isinstance(path, str) or not path or (name == "chat_template" and "{" in path):
            continue
        suffixes = (*DATA_SUFFIXES, ".jinja")
        if (name == "image_folder" or is_local_path(path) or path.endswith(suffixes)) and not Path(
            path
        ).expanduser().exists():
            yield f"{name}: {path} does not exist"


def _mixture_problems(entries: list | None):
    if entries is None:
        return
    for number, entry in enumerate(entries):
        place = f"training_data_path, dataset {number}"
        if not isinstance(entry, dict) or not isinstance(entry.get("path"), str) or not entry["path"]:
            yield f'{place}: expected an object like {{"path": …, "weight": …, "split": …}}, got {entry!r}'
            continue
        if unknown := set(entry) - {"path", "weight", "split"}:
            yield f"{place}: unknown {', '.join(sorted(unknown))}; use path, weight and split"
        weight = entry.get("weight")
        is_number = isinstance(weight, (int, float)) and not isinstance(weight, bool)
        if weight is not None and not (is_number and 0 < weight < float("inf")):
            yield f"{place}: weight must be a number above 0, got {weight!r}"
        if entry.get("split") is not None and not isinstance(entry["split"], str):
            yield f"{place}: split must be text, got {entry['split']!r}"
    weighted = [entry.get("weight") is not None for entry in entries if isinstance(entry, dict)]
    if not entries or (any(weighted) and not all(weighted)):
        yield "training_data_path: give every dataset of the list a weight, or none of them"


def _tuning_problems(values: Mapping[str, Any]):
    method = values.get("peft_method")
    if method in ("pt", "alora"):
        yield f"peft_method: {method} is not supported; use lora, or none for full fine-tuning"
    elif method not in (None, "lora"):
        yield f"peft_method: {method!r} is unknown; use lora, or none for full fine-tuning"
    stray = [name for name in LORA_ONLY if values.get(name) is not None]
    if stray and "peft_method" not in values:
        yield f"{', '.join(stray)}: only LoRA uses this; add peft_method lora, or peft_method none to train in full"
    if values.get("bias", "none") not in ("none", "all", "lora_only"):
        yield f"bias: {values['bias']!r} is unknown; use none, all or lora_only"
    if values.get("r", 1) < 1:
        yield f"r: must be at least 1, got {values['r']}"
    if not 0 <= values.get("lora_dropout", 0.0) < 1:
        yield f"lora_dropout: must be in [0, 1), got {values['lora_dropout']}"
    frozen = [values.get(f"freeze_{part}") for part in ("vision_tower", "multi_modal_projector", "language_model")]
    if all(frozen):
        yield "freeze_vision_tower, freeze_multi_modal_projector, freeze_language_model: nothing is left to train"
    keeps_tower = values.get("freeze_vision_tower")
    if values.get("cache_vision_features") and not (method == "lora" if keeps_tower is None else keeps_tower):
        yield "cache_vision_features: features of a vision tower that trains change; set freeze_vision_tower true"
    quantization = values.get("quantization")
    if quantization in QUANTIZATIONS and method != "lora":
        yield f"quantization: {quantization} weights cannot be trained; add peft_method lora, or remove it"
    if values.get("fp16") and values.get("dtype") == "float16":
        yield "fp16: needs weights in float32 to scale gradients; use dtype float32, or bf16 with dtype bfloat16"


def _data_problems(values: Mapping[str, Any]):
    if unknown := set(values.get("dataset_kwargs") or {}) - {"skip_prepare_dataset"}:
        yield f"dataset_kwargs: unknown {', '.join(sorted(unknown))}; only skip_prepare_dataset is accepted"
    if values.get("overlong_rows", "error") not in ("error", "drop", "truncate_text"):
        yield f"overlong_rows: {values['overlong_rows']!r} is unknown; use error, drop or truncate_text"
    if values.get("padding_free", "auto") not in ("auto", True, False):
        yield f"padding_free: {values['padding_free']!r} is unknown; use auto, true or false"
    if not 0 <= values.get("max_bad_fraction", 0) <= 1:
        yield f"max_bad_fraction: must be between 0 and 1, got {values['max_bad_fraction']}"
    if values.get("streaming") and values.get("max_steps", -1) < 1:
        yield "streaming: needs max_steps, because the number of rows is not known"
    if values.get("streaming") and values.get("train_sampling_strategy") == "group_by_length":
        yield "train_sampling_strategy: group_by_length needs the lengths of all rows; it does not go with streaming"
    if values.get("allow_remote_images") and values.get("train_sampling_strategy") == "group_by_length":
        what = "group_by_length would fetch every image beforehand, for its size"
        yield f"train_sampling_strategy: {what}; it does not go with allow_remote_images"
    yield from _budget_problems(values)
    if values.get("eval_strategy", "no") != "no" and not values.get("validation_data_path"):
        yield f"eval_strategy: {values['eval_strategy']} needs validation_data_path"
    if values.get("train_sampling_strategy") == "batch_rebalance":
        yield "train_sampling_strategy: batch_rebalance would encode every row before training; use random"


def _budget_problems(values: Mapping[str, Any]):
    if values.get("max_tokens_per_batch") is None:
        return
    if "per_device_train_batch_size" in values:
        yield "max_tokens_per_batch, per_device_train_batch_size: both say how large a batch is; give one of them"
    if values.get("streaming"):
        yield "max_tokens_per_batch: needs the lengths of rows beforehand; it does not go with streaming"
    strategy = values.get("train_sampling_strategy", "group_by_length")
    if strategy != "group_by_length":
        yield f"max_tokens_per_batch: packs rows by length, which train_sampling_strategy {strategy} forbids"
    if values.get("allow_remote_images"):
        yield "max_tokens_per_batch: would fetch every image beforehand, for its size; not with allow_remote_images"


def _answer_problems(values: Mapping[str, Any]):
    for name in ("eval_generate_rows", "report_samples"):
        if values.get(name, 0) < 0:
            yield f"{name}: must be 0 or more, got {values[name]}"
    for name in ("eval_generate_rows", "early_stopping_patience"):
        if values.get(name) and values.get("eval_strategy", "no") == "no":
            yield f"{name}: needs evaluations; give validation_data_path"
    metrics = values.get("eval_metrics", "exact_match") if values.get("eval_generate_rows") else []
    known = ["loss", *([metrics] if isinstance(metrics, str) else metrics)]
    best = values.get("metric_for_best_model")
    if best and best.removeprefix("eval_") not in known:
        advice = "" if metrics else "; scores such as exact_match need eval_generate_rows"
        yield f"metric_for_best_model: {best} is not among {', '.join(known)}{advice}"


def _output_problems(values: Mapping[str, Any]):
    model = Path(str(values.get("model_name_or_path") or "")).expanduser()
    for name in ("output_dir", "save_model_dir"):
        place = Path(str(values.get(name) or "")).expanduser()
        if values.get(name) and (model / "config.json").is_file() and place.resolve() == model.resolve():
            yield f"{name}: {place} is the model itself, which would be overwritten; give another folder"


def _training_problems(values: Mapping[str, Any]):
    if not 0 < values.get("num_train_epochs", 1) < float("inf"):
        yield f"num_train_epochs: must be a number above 0, got {values['num_train_epochs']}"
    if not 0 <= values.get("seed", 0) < 2**32:
        yield f"seed: must be between 0 and 2³² - 1, got {values['seed']}"
    if values.get("auto_find_batch_size"):
        what = "a process that has no memory left would begin anew alone, with the same rows"
        yield f"auto_find_batch_size: {what}; lower per_device_train_batch_size, or set max_tokens_per_batch"
    processes = (values.get("accelerate_launch_args") or {}).get("num_processes", 1)
    if not str(processes).isdigit() or int(processes) < 1:
        yield f"accelerate_launch_args: num_processes must be a whole number above 0, got {processes!r}"
    if (values.get(legacy_names.CHECKPOINTING_KWARGS) or {}).get("use_reentrant"):
        yield (
            f"{legacy_names.CHECKPOINTING_KWARGS}: use_reentrant true loses gradients of frozen or sharded"
            ' vision-language models ("mat2 must be a matrix, got 1-D tensor"); use {"use_reentrant": false}'
        )
    if values.get("average_tokens_across_devices") is False:
        yield "average_tokens_across_devices: false would train another model on several processes; remove it"
    if values.get("save_on_each_node"):
        yield "save_on_each_node: checkpoints are written once, to an output_dir that all machines share; remove it"
    minutes = values.get("save_before_walltime")
    if minutes is not None and not 0 < minutes < float("inf"):
        yield f"save_before_walltime: must be a number of minutes above 0, got {minutes}"
    for name in ("label_smoothing_factor", "use_liger_kernel"):
        if values.get(name):
            yield f"{name}: is not supported: the loss is computed on supervised positions only; remove it"


AIM = "aim"  # brings its own callback; Hugging Face has none for it
TRACKERS = (*INTEGRATION_TO_CALLBACK, AIM)
# Tracker → the module it needs, and the package that has it, where these are not called like the tracker.
MODULES = {"azure_ml": "azureml", "flyte": "flytekit"}
PACKAGES = {"azure_ml": "azureml-sdk", "comet_ml": "comet-ml", "flyte": "flytekit"}
NEEDS_NOTHING = ("kubeflow",)


def find_tracker_problems(report_to: str | list[str] | None) -> Iterator[str]:
    """What is wrong with `report_to`: names that are none, and packages that are missing."""
    asked_for = report_to if isinstance(report_to, list) else [report_to or "none"]
    for name in asked_for:
        if name in ("none", "all"):
            continue
        if name not in TRACKERS:
            close = difflib.get_close_matches(str(name), TRACKERS, n=1)
            yield f"report_to: {name!r} is unknown; " + (
                f"did you mean {close[0]}?" if close else f"use {', '.join(TRACKERS)}, all or none"
            )
        elif not is_installed(name):
            yield f"report_to: {name} is not installed; run pip install {PACKAGES.get(name, name)}"


def is_installed(tracker: str) -> bool:
    """Whether the package of a tracker is there."""
    modules = ("tensorboard", "tensorboardX") if tracker == "tensorboard" else (MODULES.get(tracker, tracker),)
    return tracker in NEEDS_NOTHING or any(find_spec(module) is not None for module in modules)
