"""Describes a run: for `run_facts.json`, which is written before its first step, and for its model card."""

import platform
from contextlib import suppress
from dataclasses import asdict, replace
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import yaml
from huggingface_hub import ModelCard, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from peft import PeftModel
from PIL import Image
from transformers import TrainerState, TrainingArguments
from transformers.trainer_utils import has_length

from tuning.config.options import RunConfig
from tuning.config.rules import DATA_SUFFIXES
from tuning.data.formats import describe_format
from tuning.data.from_config import TYPICAL_IMAGE, TrainingData
from tuning.errors import writing
from tuning.files import CARD_FILE, RUN_INFO_FILE, hide_paths, is_local_path, read_json, write_json
from tuning.hub import HubRepo
from tuning.model.build import TrainableModel
from tuning.model.parts import count_parameters
from tuning.pages.run_summary import RunSummary
from tuning.training.checkpoint_files import step_of

PACKAGES = ("vlm-tuning", "torch", "transformers", "peft", "accelerate", "datasets")
OF_THIS_MACHINE = (
    *("output_dir", "save_model_dir", "resume_from_checkpoint", "overwrite_output_dir", "accelerate_launch_args"),
    *("cache_vision_features", "run_name", "logging_dir"),
)


def describe_run(
    config: RunConfig, model: TrainableModel, data: TrainingData, hub: HubRepo | None, *, resumed: bool
) -> RunSummary:
    """What is known of a run before its first step. A `resumed` run keeps the time at which it began."""
    given, training = config.data.training_data_path, config.training
    paths = [str(entry["path"]) for entry in given] if isinstance(given, list) else [str(given)]
    before = read_json(Path(training.output_dir, RUN_INFO_FILE)) if resumed else None
    names = [config.model.model_name_or_path, *paths, *filter(None, [config.data.validation_data_path])]
    base = model.model.get_base_model() if isinstance(model.model, PeftModel) else model.model
    width, height = TYPICAL_IMAGE
    tokens = data.encoder.count_image_tokens(Image.new("RGB", TYPICAL_IMAGE))
    lora = {name: value for name, value in asdict(config.lora).items() if value not in (None, False)}
    return RunSummary(
        name=hub.repo_id if hub else Path(config.save_model_dir).absolute().name,
        model=config.model.model_name_or_path,
        training_data=paths,
        validation_data=config.data.validation_data_path,
        on_hub=frozenset(filter(is_hub_id, names)),
        options={name: hide_paths(value) for name, value in config.to_dict().items() if name not in OF_THIS_MACHINE},
        begun=(before or {}).get("begun") or datetime.now().astimezone().isoformat(timespec="seconds"),
        architecture=type(base).__name__,
        parts=count_parameters(model.model, model.parts),
        dtypes=list(dict.fromkeys(str(dtype).removeprefix("torch.") for dtype in model.dtypes.values())),
        attention=model.attention.reason.removeprefix("Attention: "),
        adapter=lora if config.lora.peft_method else None,
        rows=len(data.train) if has_length(data.train) else None,
        validation_rows=None if data.validation is None else len(data.validation),
        row_format=_describe_formats(config, data),
        row_limit=f"{data.encoder.max_seq_length:,} tokens",
        typical_image=f"{width} × {height} pixels cost {tokens:,} tokens",
        rows_per_step=_describe_step(config),
        device=_describe_device(training.device),
        processes=training.world_size,
        precision="bf16" if training.bf16 else "fp16" if training.fp16 else None,
        versions=find_versions(),
        added_start=data.encoder.row_processor.added_start,
        added_end="" if data.encoder.chat.adds_end_token else data.encoder.chat.added_end,
        base_metadata=read_metadata(config.model.model_name_or_path),
    )


def _describe_formats(config: RunConfig, data: TrainingData) -> str:
    text, images = config.data.dataset_text_field, config.data.dataset_image_field
    formats = {describe_format(file.format, text, images) for file in data.files}
    return " ".join(sorted(filter(None, formats))) or f"messages in '{text}'"


def _describe_step(config: RunConfig) -> int | str:
    training, budget = config.training, config.data.max_tokens_per_batch
    if budget:
        return f"as many as {budget:,} tokens take"
    return training.train_batch_size * training.gradient_accumulation_steps * training.world_size


def _describe_device(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def write_run_info(summary: RunSummary, training: TrainingArguments) -> None:
    """Write `run_facts.json` on the main process."""
    if training.process_index == 0:
        with writing(f"output_dir {training.output_dir}"):
            write_json(Path(training.output_dir, RUN_INFO_FILE), summary.to_run_info())


def add_result(
    summary: RunSummary, state: TrainerState, *, rows_left_out: int, best_checkpoint: Path | None
) -> RunSummary:
    """The summary of a run that has ended. `best_checkpoint`: the one that the saved model is of, if any."""
    return replace(
        summary,
        rows_left_out=rows_left_out,
        steps=state.global_step,
        epochs=state.epoch or 0.0,
        log_history=state.log_history,
        best_step=step_of(best_checkpoint) if best_checkpoint else None,
    )


def find_versions() -> dict[str, str]:
    """Versions of Python and of the packages that train. Ours may be missing: it can be run without being installed."""
    versions = {"Python": platform.python_version()}
    for package in PACKAGES:
        with suppress(PackageNotFoundError):
            versions[package] = version(package)
    return versions


def is_hub_id(name: str) -> bool:
    """Whether `name` is a name on the Hub, and not a path of this machine."""
    if is_local_path(name) or name.endswith(DATA_SUFFIXES) or Path(name).exists():
        return False
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def read_metadata(model: str) -> dict[str, Any]:
    """The head of a base model's card, if it is on this machine. Nothing is downloaded."""
    cached = try_to_load_from_cache(model, CARD_FILE) if is_hub_id(model) else None
    card = Path(cached if isinstance(cached, str) else Path(model).expanduser() / CARD_FILE)
    if not card.is_file():
        return {}
    try:
        return ModelCard(card.read_text(encoding="utf-8"), ignore_metadata_errors=True).data.to_dict()
    except (ValueError, TypeError, yaml.YAMLError):  # somebody else's card: do without what cannot be read
        return {}
