"""What is known of a run before its first step, written beside its logs: `run_facts.json`."""

import platform
from contextlib import suppress
from dataclasses import asdict
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
from transformers.trainer_utils import has_length

from tuning.config.options import LoraArguments, RunConfig
from tuning.config.rules import DATA_SUFFIXES
from tuning.data.encode import Encoder
from tuning.data.formats import describe_format
from tuning.data.from_config import TYPICAL_IMAGE
from tuning.data.sources import DataFile
from tuning.errors import UserError
from tuning.files import CARD_FILE, RUN_INFO_FILE, hide_paths, is_local_path, read_json, write_json
from tuning.model.parts import count_parameters
from tuning.pages.model_card import RunSummary
from tuning.training.checkpoint_files import step_of
from tuning.training.trainer import SupervisedTrainer

PACKAGES = ("vlm-tuning", "torch", "transformers", "peft", "accelerate", "datasets")


def write_run_info(
    config: RunConfig, trainer: SupervisedTrainer, encoder: Encoder, files: list[DataFile], *, goes_on: bool
) -> None:
    """Write what the run trains, on what data (`files`) and with what, from the first process.

    A run that `goes_on` keeps the time it was begun at.
    """
    if trainer.args.process_index:
        return
    path = Path(config.training.output_dir, RUN_INFO_FILE)
    before = read_json(path) if goes_on else None
    model = trainer.accelerator.unwrap_model(trainer.model)
    facts = {
        "model": config.model.model_name_or_path,
        "training_data": _name_data(config),
        "begun": (before or {}).get("begun") or datetime.now().astimezone().isoformat(timespec="seconds"),
        "architecture": type(model.get_base_model() if isinstance(model, PeftModel) else model).__name__,
        "parts": [asdict(size) for size in count_parameters(trainer.model, trainer.parts)],
        "dtype": ", ".join(sorted({str(dtype).removeprefix("torch.") for dtype in trainer.dtypes.values()})),
        "attention": trainer.attention.reason.removeprefix("Attention: "),
        "adapter": _describe_adapter(config.lora) if config.lora.peft_method else None,
        "data": _describe_data(config, trainer, encoder, files),
        "machine": _describe_machine(trainer),
    }
    try:
        write_json(path, facts)
    except OSError as error:
        raise UserError(where=f"output_dir {path.parent}", problem=f"cannot be written: {error.strerror}.") from error


def _name_data(config: RunConfig) -> str:
    paths = config.data.training_data_path
    return ", ".join(str(entry["path"]) for entry in paths) if isinstance(paths, list) else str(paths)


def _describe_adapter(lora: LoraArguments) -> dict[str, Any]:
    return {name: value for name, value in asdict(lora).items() if value not in (None, False)}


def _describe_data(config: RunConfig, trainer: SupervisedTrainer, encoder: Encoder, files: list[DataFile]) -> dict:
    args, data, (width, height) = config.training, config.data, TYPICAL_IMAGE
    rows = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    budget = f"as many as {data.max_tokens_per_batch:,} tokens take" if data.max_tokens_per_batch else None
    forms = {describe_format(file.format, data.dataset_text_field, data.dataset_image_field) for file in files}
    tokens = encoder.count_image_tokens(Image.new("RGB", TYPICAL_IMAGE))
    return {
        "training_data": _name_data(config),
        "training_rows": len(trainer.train_dataset) if has_length(trainer.train_dataset) else "streamed",
        "validation_data": data.validation_data_path,
        "validation_rows": len(trainer.eval_dataset) if trainer.eval_dataset is not None else None,
        "form": " ".join(sorted(filter(None, forms))) or f"messages in '{data.dataset_text_field}'",
        "row_limit": f"{encoder.max_seq_length:,} tokens",
        "typical_image": f"{width} × {height} pixels cost {tokens:,} tokens",
        "rows_per_step": budget or rows,
    }


def _describe_machine(trainer: SupervisedTrainer) -> dict[str, Any]:
    args = trainer.args
    gpu = torch.cuda.get_device_name(args.device) if args.device.type == "cuda" else args.device.type
    return {
        "device": gpu,
        "processes": args.world_size,
        "precision": "bf16" if args.bf16 else "fp16" if args.fp16 else None,
        "versions": ", ".join(f"{name} {number}" for name, number in find_versions().items()),
    }


def find_versions() -> dict[str, str]:
    """The packages that made the model, as far as they are installed as such: ours may be run from its folder."""
    versions = {"Python": platform.python_version()}
    for package in PACKAGES:
        with suppress(PackageNotFoundError):
            versions[package] = version(package)
    return versions


OF_THIS_MACHINE = (
    *("output_dir", "save_model_dir", "resume_from_checkpoint", "overwrite_output_dir", "accelerate_launch_args"),
    *("cache_vision_features", "run_name"),
)


def gather_facts(trainer: SupervisedTrainer, config: RunConfig) -> RunSummary:
    """What is known of this run, for its card. Nothing in it leads to this machine or its user."""
    options, state, name = config.to_dict(), trainer.state, config.model.model_name_or_path
    given = config.data.training_data_path
    data: list[Any] = [entry["path"] for entry in given] if isinstance(given, list) else [given]
    validation = config.data.validation_data_path
    named = [name, *data, *filter(None, [validation])]
    rows = trainer.train_dataset
    return RunSummary(
        name=trainer.hub.repo_id if trainer.hub else Path(config.save_model_dir).absolute().name,
        options={key: hide_paths(value) for key, value in options.items() if key not in OF_THIS_MACHINE},
        base_model=hide_paths(name),
        datasets=[hide_paths(path) for path in data],
        validation=hide_paths(validation),
        on_hub=frozenset(filter(is_hub_id, named)),
        parts=count_parameters(trainer.model, trainer.parts),
        dtype=str(next(iter(trainer.dtypes.values()))).removeprefix("torch."),
        processes=trainer.args.world_size,
        rows=len(rows) if has_length(rows) else None,
        rows_left_out=len(trainer.rows.skipped),
        steps=state.global_step,
        epochs=state.epoch or 0.0,
        log_history=state.log_history,
        best_step=step_of(best) if (best := trainer.best_checkpoint) else None,
        base_metadata=read_metadata(name),
        versions=find_versions(),
    )


def is_hub_id(name: str) -> bool:
    """Whether `name` is a name on the Hub and not a place here."""
    if is_local_path(name) or name.endswith(DATA_SUFFIXES) or Path(name).exists():
        return False
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def read_metadata(model: str) -> dict[str, Any]:
    """The head of a base model's card, where it is on this machine; nothing is fetched."""
    cached = try_to_load_from_cache(model, CARD_FILE) if is_hub_id(model) else None
    card = Path(cached if isinstance(cached, str) else Path(model).expanduser() / CARD_FILE)
    if not card.is_file():
        return {}
    try:
        return ModelCard(card.read_text(encoding="utf-8"), ignore_metadata_errors=True).data.to_dict()
    except (ValueError, TypeError, yaml.YAMLError):  # somebody else's card: what cannot be read is left out
        return {}
