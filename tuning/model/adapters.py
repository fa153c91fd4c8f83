"""A name → the model that answers: a base model, a tuned one, or a LoRA adapter on its base."""

import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel, get_peft_model
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import cached_file
from transformers.utils.peft_utils import find_adapter_config_file

from tuning.config.arguments import ModelSource
from tuning.errors import UserError
from tuning.model import load
from tuning.model.attention import choose_attention
from tuning.model.cross_attention import keep_rows_apart
from tuning.model.lora import load_adapter
from tuning.model.parts import find_parts
from tuning.model.quantize import plan_quantization

ADAPTER_WEIGHTS = "adapter_model.safetensors"
OPTIONAL = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}


@dataclass(frozen=True)
class Adapter:
    """A saved adapter: its local `folder` and the name of the model it was trained on."""

    folder: Path
    base: str


@dataclass(frozen=True)
class LoadedModel:
    """A model in evaluation mode on its device, with what belongs to it. `adapter`: the one on it, if any."""

    model: PreTrainedModel | PeftModel
    config: PreTrainedConfig
    processor: Any
    adapter: Adapter | None


def find_adapter(name: str, base: str | None = None) -> Adapter | None:
    """The adapter in `name`, a folder or hub id; None where that is a model. `base`: instead of the one that it names.

    Raises `UserError` where it is an adapter without weights in safetensors, or one that names no base model.
    """
    local = Path(name).expanduser()
    config_file = find_adapter_config_file(str(local) if local.exists() else name)
    if config_file is None:
        return None
    folder = Path(config_file).parent
    weights = folder / ADAPTER_WEIGHTS if local.exists() else cached_file(name, ADAPTER_WEIGHTS, **OPTIONAL)
    if weights is None or not Path(weights).is_file():
        raise UserError(where=name, problem=f"is an adapter without {ADAPTER_WEIGHTS}.")
    base = base or _read_config(folder).base_model_name_or_path
    if not base:
        raise UserError(
            where=f"{folder}/adapter_config.json",
            problem="names no base model.",
            fix="Set base_model_name_or_path in it.",
        )
    return Adapter(folder, base)


def _read_config(folder: Path) -> Any:
    return PeftConfig.from_pretrained(str(folder))


def has_processor(folder: Path) -> bool:
    """Whether a processor was saved with an adapter."""
    return any((folder / name).is_file() for name in ("processor_config.json", "preprocessor_config.json"))


def load_base_config(source: ModelSource, adapter: Adapter | None) -> tuple[ModelSource, PreTrainedConfig, Any]:
    """Where the weights of `source` come from, their configuration, and the processor: the adapter's, if it has one."""
    base = replace(source, model_name_or_path=adapter.base) if adapter else source
    try:
        config = load.load_config(base)
    except UserError as error:
        if adapter is None:
            raise
        place = f"{adapter.folder}/adapter_config.json, base_model_name_or_path {adapter.base}"
        raise UserError(where=place, problem=error.problem, fix=error.fix) from error
    processor = load.load_processor(base, config)
    if adapter and has_processor(adapter.folder):
        own = load.load_processor(replace(source, model_name_or_path=str(adapter.folder)), config)
        check_same_model(own, processor, adapter)
        processor = own
    pinpoints = getattr(processor.image_processor, "image_grid_pinpoints", None)
    if pinpoints is not None and hasattr(config, "image_grid_pinpoints"):  # the model counts image tokens by them
        config.image_grid_pinpoints = pinpoints
    return base, config, processor


def check_same_model(own: Any, of_base: Any, adapter: Adapter) -> None:
    """Raises `UserError` where an adapter's processor is for another model than its base: its layers might fit."""
    kinds = [f"{type(one).__name__} with {len(one.tokenizer):,} tokens" for one in (own, of_base)]
    if kinds[0] != kinds[1]:
        raise UserError(
            where=str(adapter.folder),
            problem=f"was trained on a model with {kinds[0]}, and {adapter.base} has {kinds[1]}.",
            fix="Name the model that it was trained on.",
        )


def load_answering(source: ModelSource, *, device: torch.device | str) -> LoadedModel:
    """Load what `source` names, to answer with. Raises `UserError` where it or its base cannot be loaded."""
    adapter = find_adapter(source.model_name_or_path)
    base, config, processor = load_base_config(source, adapter)
    dtype = load.choose_dtype(base, config)
    attention = choose_attention(
        load.model_class(config),
        use_flash_attn=base.use_flash_attn,
        attn_implementation=base.attn_implementation,
        dtype=dtype,
        device_type=torch.device(device).type,
    )
    quantization = None
    if base.quantization:
        skeleton = load.build_skeleton(config)
        quantization = plan_quantization(
            skeleton,
            find_parts(skeleton),
            base.quantization,
            modules_to_save=_read_config(adapter.folder).modules_to_save if adapter else None,
            compute=dtype,
            device=torch.device(device),
        )
    model = load.load_model(base, config, dtype=dtype, attention=attention.loaded, quantization=quantization)
    keep_rows_apart(model)
    if adapter:
        model = add_adapter(model, adapter)
    on_device = model if quantization else model.to(device)  # its weights are there, and cannot be moved
    return LoadedModel(on_device.eval(), config, processor, adapter)


def add_adapter(model: PreTrainedModel, adapter: Adapter) -> PeftModel:
    """Put a saved adapter on its base. Raises `UserError` where its weights do not fit; PEFT would only warn."""
    adapted = wrap(model, adapter)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Setting `save_embedding_layers`")  # said as names are compared
        load_adapter(adapted, adapter.folder)
    return adapted


def wrap(model: PreTrainedModel, adapter: Adapter) -> PeftModel:
    """Give a model layers for a saved adapter, whose weights are still to be loaded."""
    config = _read_config(adapter.folder)
    targets = config.target_modules
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*")  # PEFT asks under the old name
        try:
            adapted = get_peft_model(model, config)
        except ValueError as error:  # a target that is not there
            raise UserError(
                where=str(adapter.folder), problem=f"does not fit the model: {str(error).splitlines()[0]}"
            ) from error
    adapted.peft_config["default"].target_modules = targets
    return adapted
