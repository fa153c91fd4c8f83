"""What is known of a run before its first step, written beside its logs: `run_facts.json`."""

import platform
from contextlib import suppress
from dataclasses import asdict
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from PIL import Image
from transformers.trainer_utils import has_length

from tuning.config.arguments import LoraArguments, RunConfig
from tuning.data.encode import Encoder
from tuning.data.formats import describe_format
from tuning.data.sources import Part
from tuning.data_paths import TYPICAL_IMAGE
from tuning.errors import UserError
from tuning.files import FACTS_FILE, read_json, write_json
from tuning.model.parts import count_parameters
from tuning.training.trainer import SupervisedTrainer

PACKAGES = ("vlm-tuning", "torch", "transformers", "peft", "accelerate", "datasets")


def write_facts(
    config: RunConfig, trainer: SupervisedTrainer, encoder: Encoder, parts: list[Part], *, goes_on: bool
) -> None:
    """Write what the run trains, on what data (`parts` of it) and with what, from the first process.

    A run that `goes_on` keeps the time it was begun at.
    """
    if trainer.args.process_index:
        return
    path = Path(config.training.output_dir, FACTS_FILE)
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
        "data": _describe_data(config, trainer, encoder, parts),
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


def _describe_data(config: RunConfig, trainer: SupervisedTrainer, encoder: Encoder, parts: list[Part]) -> dict:
    args, data, (width, height) = config.training, config.data, TYPICAL_IMAGE
    rows = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    budget = f"as many as {data.max_tokens_per_batch:,} tokens take" if data.max_tokens_per_batch else None
    forms = {describe_format(part.form, data.dataset_text_field, data.dataset_image_field) for part in parts}
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
