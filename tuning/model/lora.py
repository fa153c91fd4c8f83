"""LoRA: the model that is trained with it, and adapters that were saved."""

import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming, rename_source_key
from transformers.utils import ADAPTER_SAFE_WEIGHTS_NAME, cached_file
from transformers.utils.peft_utils import find_adapter_config_file

from tuning.config.options import LoraArguments, ModelSource
from tuning.errors import UserError, describe_failure, first_line, try_optional
from tuning.model import load
from tuning.model.engine_names import names_for_engines
from tuning.model.lora_targets import LoraTargets
from tuning.model.saved_weights import open_weights

PREFIX = "base_model.model."  # of names in an adapter
ADAPTER_NAME = "default"  # what PEFT calls an adapter unless another name is given
OTHER_BASE = "Name the model that the adapter was trained on, as it was then."
OPTIONAL = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}


# The model that is trained.


def add_lora(model: PreTrainedModel, lora: LoraArguments, targets: LoraTargets) -> PeftModel:
    """Wrap `model` with LoRA on exactly `targets`.

    The settings of the adapter name modules as transformers 5 and as transformers 4 does: PEFT takes those that exist.
    """
    older = names_for_engines(model, targets.modules)
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=lora.r,
        lora_alpha=lora.lora_alpha,
        lora_dropout=0.0 if targets.parameters else lora.lora_dropout,
        target_modules=list(targets.modules),
        target_parameters=targets.parameters or None,
        bias=lora.bias,
        modules_to_save=lora.modules_to_save,
        use_rslora=lora.use_rslora,
        use_dora=lora.use_dora,
    )
    adapted = _wrap_with_peft(model, config)
    adapted.peft_config[ADAPTER_NAME].target_modules = [*targets.modules, *older.values()]
    if lora.lora_dtype == "auto":
        for name, parameter in adapted.named_parameters():
            if ".lora_" in name:  # PEFT makes them in float32 where weights have 16 bits
                parameter.data = parameter.data.to(model.dtype)
    return adapted


def _wrap_with_peft(model: PreTrainedModel, config: PeftConfig) -> PeftModel:
    # PEFT shortens a long list to suffixes, which can match more in a larger model
    asked = {name: getattr(config, name, None) for name in ("target_modules", "target_parameters")}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*")  # PEFT reads its old name
        adapted = get_peft_model(model, config)
    for name, value in asked.items():
        setattr(adapted.peft_config[ADAPTER_NAME], name, value)
    return adapted


def load_adapter(model: PeftModel, folder: Path) -> None:
    """Load the adapter weights in `folder` into an adapted model. Raises `UserError` if they do not fit."""
    saved = _rename_old_keys(dict(open_weights(folder)), model)
    try:
        wrong = set_weights(model, saved)
        if wrong and (names := stored_names(model, saved)):
            wrong = wrong if set_weights(model, {names[key]: weight for key, weight in saved.items()}) else []
    except (KeyError, RuntimeError) as error:  # PEFT looks modules_to_save up; PyTorch compares shapes
        reason = str(error).splitlines()[-1].strip().rstrip(".")
        raise UserError(
            where=str(folder), problem=f"the adapter does not fit the model: {reason}.", fix=OTHER_BASE
        ) from error
    if wrong:
        listed = ", ".join(wrong[:3]) + (", …" if len(wrong) > 3 else "")
        raise UserError(
            where=str(folder),
            problem=f"the adapter is for another model or other modules than this one: {listed}.",
            fix=OTHER_BASE,
        )


def set_weights(model: PeftModel, saved: dict[str, torch.Tensor]) -> list[str]:
    """Let PEFT load `saved` into an adapted model. Returns the names that it found no place or no tensor for."""
    arrived: dict[str, torch.Tensor] = {}
    hook = model.register_load_state_dict_pre_hook(lambda _, state, *rest: arrived.update(state))
    try:
        outcome = set_peft_model_state_dict(model, saved)
    finally:
        hook.remove()
    found = get_peft_model_state_dict(model, state_dict=arrived)
    return sorted([*outcome.unexpected_keys, *(get_peft_model_state_dict(model).keys() - found.keys())])


def stored_names(model: PeftModel, keys: Iterable[str]) -> dict[str, str]:
    """Name of a weight of the adapter → its name by the layout of the base model's checkpoints.

    PEFT 0.21 takes the names of LoRA's own weights for such names and renames them to those of today, some twice.
    Empty where that changes no name, or gives two weights one name.
    """
    rules = get_model_conversion_mapping(model.get_base_model(), add_legacy=False)
    back = [rule.reverse_transform() for rule in reversed(rules) if type(rule) is WeightRenaming]

    def rename(key: str) -> str:
        return PREFIX + rename_source_key(key.removeprefix(PREFIX), back, [], reverse=True)[0]

    names = {key: rename(key) if ".lora_" in key else key for key in keys}
    is_new = any(name != key for key, name in names.items()) and len(set(names.values())) == len(names)
    return names if is_new else {}


def stored_for_engines(model: PeftModel, keys: Iterable[str]) -> dict[str, str]:
    """Name of a weight of the adapter → the name under which engines and transformers 4 find it; empty if all do.

    Modules that are saved in full keep their names: PEFT looks for no others.
    """
    plain = {key: key.removeprefix(PREFIX) for key in keys}
    new = names_for_engines(model.get_base_model(), (name for name in plain.values() if ".lora_" in name))
    return {key: PREFIX + new.get(name, name) for key, name in plain.items()} if new else {}


def rename_saved(folder: Path, names: Mapping[str, str]) -> None:
    """Give the weights of the adapter saved in `folder` their `names`."""
    file = folder / ADAPTER_SAFE_WEIGHTS_NAME
    weights = load_file(file)
    save_file({names[key]: weight for key, weight in weights.items()}, file, metadata={"format": "pt"})


def _rename_old_keys(saved: dict[str, torch.Tensor], model: PeftModel) -> dict[str, torch.Tensor]:
    """The weights of an adapter under the names of today: transformers 4.52 moved the parts of these models.

    The rules are those by which transformers loads a base model that was saved before.
    """
    expected = get_peft_model_state_dict(model)
    rules = [rule for rule in get_model_conversion_mapping(model.get_base_model()) if type(rule) is WeightRenaming]

    def rename(key: str) -> str:
        renamed = PREFIX + rename_source_key(key.removeprefix(PREFIX), rules, [])[0]
        return renamed if key not in expected and renamed in expected else key

    return {rename(key): weight for key, weight in saved.items()}


# Saved adapters.


@dataclass(frozen=True)
class Adapter:
    """A saved adapter: its local `folder` and the name of the model it was trained on."""

    folder: Path
    base: str


@dataclass(frozen=True)
class BaseModel:
    """Where the weights below an adapter come from, their configuration, and the processor to use with the adapter."""

    source: ModelSource
    config: PreTrainedConfig
    processor: Any


def find_adapter(name: str, base: str | None = None) -> Adapter | None:
    """The adapter in `name`, a folder or hub id, or None if that is a model. `base` replaces the one that it names.

    Raises `UserError` if its weights are not stored as safetensors, or if it names no base model.
    """
    local = Path(name).expanduser()
    try:
        config_file = find_adapter_config_file(str(local) if local.exists() else name)
    except OSError as error:  # not a hub id
        what = f"there is no such folder, and no such hub id: {first_line(error)}."
        raise UserError(where=name, problem=what, fix="Give the folder that training wrote, or a hub id.") from error
    if config_file is None:
        return None
    folder = Path(config_file).parent
    weights = folder / ADAPTER_SAFE_WEIGHTS_NAME
    if not local.exists():
        weights = cached_file(name, ADAPTER_SAFE_WEIGHTS_NAME, **OPTIONAL)
    if weights is None or not Path(weights).is_file():
        raise UserError(where=name, problem=f"the adapter has no {ADAPTER_SAFE_WEIGHTS_NAME}.")
    base = base or read_adapter_config(folder).base_model_name_or_path
    if not isinstance(base, str) or not base:
        raise UserError(
            where=f"{folder}/adapter_config.json",
            problem="base_model_name_or_path names no model.",
            fix="Set it to the model that the adapter was trained on.",
        )
    return Adapter(folder, base)


def read_adapter_config(folder: Path) -> PeftConfig:
    """The adapter_config.json of an adapter. Raises `UserError` if PEFT cannot read it."""
    attempt = try_optional(lambda: PeftConfig.from_pretrained(str(folder)))
    if attempt.error:
        raise UserError(
            where=f"{folder}/adapter_config.json",
            problem=f"this is not an adapter that PEFT can read: {describe_failure(attempt.error)}.",
            fix="Give the folder that training wrote, complete, and install a PEFT that knows its kind.",
        ) from attempt.error
    assert attempt.value is not None
    return attempt.value


def is_untrained(adapter: Adapter) -> bool:
    """Whether an adapter has LoRA's matrices only, and every B is 0, as before the first step: it changes nothing."""
    weights = dict(open_weights(adapter.folder))
    parts = [name for name in weights if ".lora_B" in name or ".lora_embedding_B" in name]
    is_lora = all(".lora_" in name for name in weights)
    return bool(parts) and is_lora and not any(bool(weights[name].any()) for name in parts)


def has_processor(folder: Path) -> bool:
    """Whether a processor was saved with an adapter."""
    return any((folder / name).is_file() for name in ("processor_config.json", "preprocessor_config.json"))


def load_base(source: ModelSource, adapter: Adapter | None) -> BaseModel:
    """Load configuration and processor of `source`, or of the adapter's base. The adapter's own processor wins.

    Raises `UserError` if they cannot be loaded, or if the adapter was trained on another model than its base.
    """
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
        saved = load.load_processor(replace(source, model_name_or_path=str(adapter.folder)), config)
        check_same_model(saved, processor, adapter)
        processor = saved
    pinpoints = getattr(processor.image_processor, "image_grid_pinpoints", None)
    if pinpoints is not None and hasattr(config, "image_grid_pinpoints"):  # the model counts image tokens by them
        config.image_grid_pinpoints = pinpoints
    return BaseModel(base, config, processor)


def check_same_model(saved: Any, processor: Any, adapter: Adapter) -> None:
    """Raises `UserError` if the processor `saved` with an adapter is for another model than its base's `processor`.

    The adapter's layers might fit nevertheless.
    """
    trained_on, base = (f"{type(one).__name__} with {len(one.tokenizer):,} tokens" for one in (saved, processor))
    if trained_on != base:
        raise UserError(
            where=str(adapter.folder),
            problem=f"the adapter was trained on a model with {trained_on}, but {adapter.base} has {base}.",
            fix="Name the model that it was trained on.",
        )


def add_adapter(model: PreTrainedModel, adapter: Adapter) -> PeftModel:
    """Put a saved adapter on its base. Raises `UserError` if its weights do not fit: PEFT would only warn."""
    adapted = wrap(model, adapter)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Setting `save_embedding_layers`")  # nothing is saved here
        load_adapter(adapted, adapter.folder)
    return adapted


def wrap(model: PreTrainedModel, adapter: Adapter) -> PeftModel:
    """Give a model the layers of a saved adapter, without its weights. Raises `UserError` for a missing module."""
    config = read_adapter_config(adapter.folder)
    attempt = try_optional(lambda: _wrap_with_peft(model, config))  # PEFT checks few of the values in the file
    if attempt.error:
        is_plain = isinstance(attempt.error, ValueError)
        reason = first_line(attempt.error) if is_plain else describe_failure(attempt.error)
        raise UserError(
            where=str(adapter.folder), problem=f"the adapter does not fit the model: {reason}.", fix=OTHER_BASE
        ) from attempt.error
    assert attempt.value is not None
    return attempt.value
