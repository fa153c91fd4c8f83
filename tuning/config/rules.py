"""Rules between options: what is set or ignored for the user, with a note, and what cannot work."""

import difflib
import os
import re
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

from tuning.config import legacy_names
from tuning.config.options import AUTO, BATCH_SIZE, OWN_OPTIONS, TRAINING_DEFAULTS, LoraArguments
from tuning.config.values import shorten
from tuning.exit_codes import was_launched
from tuning.files import is_local_path
from tuning.machine import default_workers

REQUIRED = (*(name for name, entry in OWN_OPTIONS.items() if entry.metadata["required"]), "output_dir")
LORA_ONLY = tuple(name for name in LoraArguments.__dataclass_fields__ if name != "peft_method")
DATA_SUFFIXES = (
    *(".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".parquet", ".arrow", ".tar"),
    *(".json.gz", ".jsonl.gz", ".ndjson.gz", ".csv.gz", ".tsv.gz"),
)


VALIDATION = ("validation_data_path", "validation_split")  # each gives rows to evaluate on
BY_MEMORY = {legacy_names.CHECKPOINTING: False, BATCH_SIZE: 1}  # options that may be auto, and what they are until then


def complete(options: Mapping[str, Any]) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Set what follows from the user's options and from this machine. Returns all options and notes to print."""
    values, notes = dict(options), []
    if not torch.accelerator.is_available() and not values.get("use_cpu"):
        values["use_cpu"] = True
        notes.append("No accelerator was found: training on the CPU (use_cpu set to true).")
    if values.get("remove_unused_columns"):
        notes.append("remove_unused_columns is ignored: rows are encoded lazily and need all their columns.")
    values["remove_unused_columns"] = False
    if values.get("dataset_kwargs", {}).get("skip_prepare_dataset") is False:
        notes.append("dataset_kwargs: skip_prepare_dataset is always true here; rows are prepared during training.")
    if "peft_method" in values and str(values["peft_method"]).lower() in ("none", ""):
        values["peft_method"] = None
    validation = [name for name in VALIDATION if values.get(name)]
    if "eval_strategy" not in values and validation:
        values["eval_strategy"] = "epoch"
        notes.append(f"eval_strategy was not given: evaluating on {validation[0]} after every epoch.")
    if missing := _missing_for_early_stopping(values):
        listed = ", ".join(f"{name} {value}" for name, value in missing.items())
        notes.append(f"early_stopping_patience: the best model is kept ({listed}).")
        values |= missing
    if "report_to" in values and values["report_to"] is None:
        values["report_to"] = "none"
    if values.get("report_to") not in (None, [], "none", ["none"]) and values.get("output_dir"):
        values["run_name"] = values.get("run_name") or Path(values["output_dir"]).absolute().name
    if values.get("dataloader_num_workers") is None:
        values["dataloader_num_workers"] = default_workers()
    if values["dataloader_num_workers"] == 0:
        values["dataloader_persistent_workers"] = False
        idle = [
            name for name in ("prefetch_factor", "multiprocessing_context") if values.pop(f"dataloader_{name}", None)
        ]
        notes += [
            f"dataloader_{name} has no effect without worker processes (dataloader_num_workers 0)." for name in idle
        ]
    if values.get(legacy_names.CHECKPOINTING) and values.get(legacy_names.CHECKPOINTING_KWARGS) is None:
        values[legacy_names.CHECKPOINTING_KWARGS] = {"use_reentrant": False}
    if values.get("max_memory_gb") and not _decided_by_memory(values):
        notes.append(
            "max_memory_gb has no effect: neither gradient_checkpointing nor per_device_train_batch_size is auto."
        )
    if values.get("streaming"):
        values["ignore_data_skip"] = True  # a resumed run opens the stream where the checkpoint was
    has_no_epochs = values.get("max_tokens_per_batch") and values.get("max_steps", -1) > 0
    if has_no_epochs and "epoch" in (values.get("eval_strategy"), values.get("save_strategy")):
        notes.append(
            "With max_tokens_per_batch and max_steps one epoch follows another without an end: what you ask for every"
            " epoch (eval_strategy, save_strategy) happens once, after max_steps."
        )
    launch = values.get("accelerate_launch_args")
    if launch and not was_launched():
        notes.append(f"accelerate_launch_args has no effect on one process: {', '.join(launch)}.")
    return values, tuple(notes)


def _decided_by_memory(values: Mapping[str, Any]) -> list[str]:
    return [name for name in BY_MEMORY if values.get(name) == AUTO]


def _missing_for_early_stopping(values: Mapping[str, Any]) -> dict[str, Any]:
    """Options that early stopping needs and the user did not give: keep the best model, save when it is evaluated."""
    if not values.get("early_stopping_patience") or values.get("eval_strategy", "no") == "no":
        return {}
    wanted = {"metric_for_best_model": "loss", "load_best_model_at_end": True}
    if values.get("load_best_model_at_end", True) and "save_strategy" not in values:
        wanted |= {"save_strategy": values["eval_strategy"]}
        if values["eval_strategy"] == "steps":  # without eval_steps, Hugging Face evaluates every logging_steps
            logging = values.get("logging_steps", TRAINING_DEFAULTS["logging_steps"])
            wanted |= {"save_steps": values.get("eval_steps") or logging}
    return {name: value for name, value in wanted.items() if name not in values}


def groups_by_length(values: Mapping[str, Any]) -> bool | None:
    """Whether a batch has rows of similar length; None: only if batches are padded.

    Not with remote images, which would be downloaded to measure the rows, and not with streaming.
    """
    if "train_sampling_strategy" in values:
        return values["train_sampling_strategy"] == "group_by_length"
    return False if values.get("allow_remote_images") or values.get("streaming") else None


def find_problems(values: Mapping[str, Any]) -> Iterator[str]:
    """Every rule between options of a run that `values` breaks, in words that name the option and the remedy."""
    yield from (f"{name}: is required" for name in REQUIRED if not values.get(name))
    yield from find_path_problems(values)
    yield from _mixture_problems(values.get("training_data_path"))
    yield from _tuning_problems(values)
    yield from _data_problems(values)
    yield from _budget_problems(values)
    yield from _memory_problems(values)
    yield from _answer_problems(values)
    yield from _training_problems(values)
    yield from _output_problems(values)
    yield from find_tracker_problems(values.get("report_to"))


WRITTEN = ("output_dir", "save_model_dir", "cache_vision_features", "logging_dir")
PATHS = (
    "model_name_or_path",
    "validation_data_path",
    "data_path",
    "compare",
    "chat_template",
    "image_folder",
    "adapter",
    "base",
)


def find_path_problems(values: Mapping[str, Any]) -> Iterator[str]:
    """Options of any command whose path cannot be one, or does not exist. Hub ids and template texts are others."""
    for name in (*PATHS, *WRITTEN, "training_data_path", "output"):
        path = values.get(name)
        if isinstance(path, str) and (reason := _why_no_path(path)):
            yield f"{name}: {shorten(path)} is not a path: {reason}"
    training = values.get("training_data_path")
    entries = training if isinstance(training, list) else [{"path": training}]
    paths = [("training_data_path", entry.get("path")) for entry in entries if isinstance(entry, dict)]
    for name, path in [*((name, values.get(name)) for name in PATHS), *paths]:
        if not isinstance(path, str) or not path or _why_no_path(path) or (name == "chat_template" and "{" in path):
            continue
        if name == "compare" and path.startswith(("http://", "https://")):  # a server
            continue
        is_local = name == "image_folder" or is_local_path(path) or path.endswith((*DATA_SUFFIXES, ".jinja"))
        if is_local and not os.path.exists(os.path.expanduser(path)):
            yield f"{name}: {path} does not exist"


def _why_no_path(path: str) -> str:
    """Why no file can have this path; "" if one can."""
    try:
        os.fsencode(path)
    except UnicodeEncodeError:
        return "it has half a character"
    if "\0" in path:
        return "it has a NUL character"
    return "there is no such user" if path.startswith("~") and os.path.expanduser(path) == path else ""


def _mixture_problems(entries: Any) -> Iterator[str]:
    if not isinstance(entries, list):
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


def _tuning_problems(values: Mapping[str, Any]) -> Iterator[str]:
    method = values.get("peft_method")
    if method in ("pt", "alora"):
        yield f"peft_method: {method} is not supported; use lora, or none for full fine-tuning"
    elif method not in (None, "lora"):
        yield f"peft_method: {shorten(method)} is unknown; use lora, or none for full fine-tuning"
    unused = [name for name in LORA_ONLY if values.get(name) is not None]
    if unused and "peft_method" not in values:
        yield f"{', '.join(unused)}: only LoRA uses this; add peft_method lora, or peft_method none to train in full"
    parts = [f"freeze_{part}" for part in ("vision_tower", "multi_modal_projector", "language_model")]
    if all(values.get(name) for name in parts):
        yield f"{', '.join(parts)}: nothing is left to train"
    freezes_tower = values.get("freeze_vision_tower")
    if values.get("cache_vision_features") and not (method == "lora" if freezes_tower is None else freezes_tower):
        yield "cache_vision_features: features of a vision tower that trains change; set freeze_vision_tower true"
    if values.get("quantization") and method != "lora":
        yield f"quantization: {values['quantization']} weights cannot be trained; add peft_method lora, or remove it"
    dtype, fp16 = values.get("dtype"), values.get("fp16")
    if fp16 and dtype in ("float16", "bfloat16") and trains_stored_weights(values):
        yield f"fp16: needs trained weights in float32 to scale gradients; remove dtype {dtype}, or use bf16"
    scaled = fp16 or (values.get("bf16") and not trains_stored_weights(values))
    if dtype == "float16" and not scaled:
        yield "dtype: in float16, small gradients become zero without loss scaling; use bfloat16, or add fp16 true"


def trains_stored_weights(values: Mapping[str, Any]) -> bool:
    """Whether weights of the checkpoint train. LoRA's own are new, and PEFT keeps them in float32."""
    more = values.get("modules_to_save") or values.get("bias", "none") != "none"
    return values.get("peft_method") != "lora" or bool(more)


def _data_problems(values: Mapping[str, Any]) -> Iterator[str]:
    if unknown := set(values.get("dataset_kwargs") or {}) - {"skip_prepare_dataset"}:
        yield f"dataset_kwargs: unknown {', '.join(sorted(unknown))}; only skip_prepare_dataset is accepted"
    if values.get("train_on") == "last_turn" and values.get("assistant_only_loss") is False:
        yield "train_on: last_turn does not go with assistant_only_loss false, which trains all text"
    if values.get("streaming") and values.get("max_steps", -1) < 1:
        yield "streaming: needs max_steps, because the number of rows is not known"
    strategy = values.get("train_sampling_strategy")
    if values.get("streaming") and strategy == "group_by_length":
        yield "train_sampling_strategy: group_by_length needs the lengths of all rows; it does not go with streaming"
    if values.get("allow_remote_images") and strategy == "group_by_length":
        what = "group_by_length would download every image before training, to learn its size"
        yield f"train_sampling_strategy: {what}; it does not go with allow_remote_images"
    if strategy == "batch_rebalance":
        yield "train_sampling_strategy: batch_rebalance would encode every row before training; use random"
    if values.get("eval_strategy", "no") != "no" and not any(map(values.get, VALIDATION)):
        yield f"eval_strategy: {values['eval_strategy']} needs validation_data_path or validation_split"
    yield from _validation_split_problems(values)


def _validation_split_problems(values: Mapping[str, Any]) -> Iterator[str]:
    split = values.get("validation_split")
    if not isinstance(split, (int, float)) or isinstance(split, bool):
        return
    if split > 1 and not float(split).is_integer():
        yield f"validation_split: must be a share below 1 or a whole number of rows, got {split!r}"
    if values.get("validation_data_path"):
        yield "validation_split, validation_data_path: both give the rows to evaluate on; give one of them"
    if values.get("streaming"):
        yield "validation_split: needs the number of rows; it does not go with streaming, give validation_data_path"


def _budget_problems(values: Mapping[str, Any]) -> Iterator[str]:
    if values.get("max_tokens_per_batch") is None:
        return
    if "per_device_train_batch_size" in values:
        yield "max_tokens_per_batch, per_device_train_batch_size: both set the size of a batch; give one of them"
    if values.get("streaming"):
        yield "max_tokens_per_batch: needs the lengths of all rows before training; it does not go with streaming"
    strategy = values.get("train_sampling_strategy", "group_by_length")
    if strategy != "group_by_length":
        yield f"max_tokens_per_batch: packs rows by length, which train_sampling_strategy {strategy} forbids"
    if values.get("allow_remote_images"):
        what = "would download every image before training, to learn its size"
        yield f"max_tokens_per_batch: {what}; it does not go with allow_remote_images"


def _memory_problems(values: Mapping[str, Any]) -> Iterator[str]:
    """What auto does not go with. It looks at the longest rows, so that it needs the lengths of all."""
    for name in _decided_by_memory(values):
        if values.get("streaming"):
            yield f"{name}: auto needs the lengths of all rows before training; it does not go with streaming"
        if values.get("allow_remote_images"):
            what = "would download every image before training, to learn its size"
            yield f"{name}: auto {what}; it does not go with allow_remote_images"
        if values.get("deepspeed"):
            yield f"{name}: auto needs an estimate of memory, and deepspeed has none; use FSDP, or another value"
    checkpointing = legacy_names.CHECKPOINTING
    if values.get(checkpointing) == AUTO and "every_n_layers" in (values.get(legacy_names.CHECKPOINTING_KWARGS) or {}):
        yield f"{checkpointing}: auto decides which layers are recomputed; remove every_n_layers"


def _answer_problems(values: Mapping[str, Any]) -> Iterator[str]:
    for name in ("eval_generate_rows", "early_stopping_patience"):
        if values.get(name) and values.get("eval_strategy", "no") == "no":
            yield f"{name}: needs evaluations; give validation_data_path or validation_split"
    metrics = values.get("eval_metrics", "exact_match") if values.get("eval_generate_rows") else []
    known = ["loss", *([metrics] if isinstance(metrics, str) else metrics)]
    best = values.get("metric_for_best_model")
    if best and best.removeprefix("eval_") not in known:
        advice = "" if metrics else "; scores such as exact_match need eval_generate_rows"
        yield f"metric_for_best_model: {best} is not among {', '.join(known)}{advice}"


def _training_problems(values: Mapping[str, Any]) -> Iterator[str]:
    if values.get("max_steps") == 0:
        yield "max_steps: 0 steps train nothing; leave it out to train num_train_epochs"
    if values.get("eval_on_start") and not (values.get("validation_data_path") or values.get("validation_split")):
        yield "eval_on_start: needs evaluations; give validation_data_path or validation_split"
    if values.get("deepspeed") and find_spec("deepspeed") is None:
        yield "deepspeed: is not installed; run pip install deepspeed"
    if values.get("auto_find_batch_size"):
        what = "a process that has no memory left would start again alone, with the same rows"
        yield f"auto_find_batch_size: {what}; lower per_device_train_batch_size, or set max_tokens_per_batch"
    processes = (values.get("accelerate_launch_args") or {}).get("num_processes", 1)
    if not re.fullmatch("0*[1-9][0-9]*", str(processes)):
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
    for name in ("label_smoothing_factor", "use_liger_kernel"):
        if values.get(name):
            yield f"{name}: is not supported, because the loss is computed on supervised positions only; remove it"


def _output_problems(values: Mapping[str, Any]) -> Iterator[str]:
    model = os.path.expanduser(values.get("model_name_or_path") or "")
    for name in WRITTEN:
        folder = os.path.expanduser(values.get(name) or "")
        if not folder or _why_no_path(folder):
            continue
        existing = next(parent for parent in (Path(folder), *Path(folder).parents) if os.path.lexists(parent))
        if not os.path.isdir(existing):
            yield f"{name}: {existing} is a file, not a folder"
        elif os.path.isfile(os.path.join(model, "config.json")) and os.path.realpath(folder) == os.path.realpath(model):
            yield f"{name}: {folder} is the model itself, which would be overwritten; give another folder"


AIM = "aim"  # has a callback of its own; Hugging Face has none for it
TRACKERS = (*INTEGRATION_TO_CALLBACK, AIM)
# Tracker → the module it needs, and the package with that module, if they have another name than the tracker.
MODULES = {"azure_ml": "azureml", "flyte": "flytekit"}
PACKAGES = {"azure_ml": "azureml-sdk", "comet_ml": "comet-ml", "flyte": "flytekit"}
NEEDS_NOTHING = ("kubeflow",)


def find_tracker_problems(report_to: str | list[str] | None) -> Iterator[str]:
    """Names in `report_to` that are unknown, and trackers that are not installed."""
    for name in report_to if isinstance(report_to, list) else [report_to or "none"]:
        if name in ("none", "all"):
            continue
        if name not in TRACKERS:
            close = difflib.get_close_matches(str(name), TRACKERS, n=1)
            advice = f"did you mean {close[0]}?" if close else f"use {', '.join(TRACKERS)}, all or none"
            yield f"report_to: {shorten(name)} is unknown; {advice}"
        elif not is_installed(name):
            yield f"report_to: {name} is not installed; run pip install {PACKAGES.get(name, name)}"


def is_installed(tracker: str) -> bool:
    """Whether this Python has the module that a tracker needs."""
    modules = ("tensorboard", "tensorboardX") if tracker == "tensorboard" else (MODULES.get(tracker, tracker),)
    return tracker in NEEDS_NOTHING or any(find_spec(module) is not None for module in modules)
