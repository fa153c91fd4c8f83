"""LoRA: which modules are adapted, and the adapted model."""

import re
import warnings
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.utils import cached_file
from transformers.utils.peft_utils import find_adapter_config_file

from tuning.config.options import LoraArguments, ModelSource
from tuning.errors import UserError
from tuning.model import load
from tuning.model.attention import choose_attention
from tuning.model.mllama import patch_mllama_cross_attention
from tuning.model.parts import LANGUAGE_MODEL, PARTS, Parts, find_parts
from tuning.model.quantize import plan_quantization

ADAPTABLE = (nn.Linear, nn.Embedding, nn.Conv2d, Conv1D)
PLAIN_NAMES = re.compile(r"[\w.]+(\s*,\s*[\w.]+)*")


def resolve_targets(model: PreTrainedModel, parts: Parts, lora: LoraArguments, trainable_parts: set[str]) -> list[str]:
    """The full names of the modules to adapt, in the model's order.

    Names match the end of a module's name and, like `all-linear`, look only into
    `trainable_parts`; a regular expression
    must match a full name and looks everywhere. Raises `UserError` when nothing is asked for (with what the model
    offers) or a target matches nothing.
    """
    adaptable = {name: module for name, module in model.named_modules() if isinstance(module, ADAPTABLE)}
    within = [name for name in adaptable if parts.of(name) in trainable_parts]
    targets = lora.target_modules
    if not targets:
        raise UserError(where="target_modules", problem=f"LoRA needs to know what to adapt. {offer(model, parts)}")
    if targets == "all-linear":
        head = model.get_output_embeddings()
        return [name for name in within if isinstance(adaptable[name], nn.Linear) and adaptable[name] is not head]
    if isinstance(targets, str) and not PLAIN_NAMES.fullmatch(targets):
        return _match_expression(targets, list(adaptable), model, parts)
    wanted = re.split(r"\s*,\s*", targets) if isinstance(targets, str) else targets
    matches = {target: [name for name in within if name == target or name.endswith(f".{target}")] for target in wanted}
    if missing := [target for target, names in matches.items() if not names]:
        elsewhere = sorted({parts.of(name) for name in adaptable for target in missing if name.endswith(f".{target}")})
        hint = f" It is only in the {' and '.join(elsewhere)}: set freeze_{elsewhere[0]} false." if elsewhere else ""
        raise UserError(
            where="target_modules", problem=f"{', '.join(missing)} matches no module.{hint} {offer(model, parts)}"
        )
    chosen = {name for names in matches.values() for name in names}
    return [name for name in within if name in chosen]


def _match_expression(expression: str, names: list[str], model: PreTrainedModel, parts: Parts) -> list[str]:
    try:
        pattern = re.compile(expression)
    except re.error as error:
        raise UserError(
            where="target_modules", problem=f"{expression!r} is not a regular expression: {error}."
        ) from error
    matched = [name for name in names if pattern.fullmatch(name)]
    if not matched:
        raise UserError(
            where="target_modules", problem=f"the expression {expression!r} matches no module. {offer(model, parts)}"
        )
    return matched


def offer(model: PreTrainedModel, parts: Parts) -> str:
    """What can be adapted, per part, and the line to add to the config."""
    head = model.get_output_embeddings()
    found: dict[str, Counter[str]] = {part: Counter() for part in PARTS}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and module is not head:
            found[parts.of(name)][name.rpartition(".")[2]] += 1
    lines = [
        f"  {part}: {', '.join(f'{name} ×{n}' for name, n in names.items())}" for part, names in found.items() if names
    ]
    suggested = ", ".join(f'"{name}"' for name in found[LANGUAGE_MODEL])
    return "\n".join(["The model offers:", *lines, f'Add, for example: "target_modules": [{suggested}]'])


def check_modules_to_save(model: PreTrainedModel, names: list[str] | None) -> None:
    """Raises `UserError` for a name that no module ends with; PEFT would train nothing for it."""
    modules = [name for name, _ in model.named_modules()]
    missing = [name for name in names or [] if not any(m == name or m.endswith(f".{name}") for m in modules)]
    if missing:
        tops = sorted({name for name in modules if name and name.count(".") < 2})
        raise UserError(
            where="modules_to_save", problem=f"{', '.join(missing)} matches no module; there are {', '.join(tops)}."
        )


def check_dora(model: PreTrainedModel, targets: list[str], dtype: torch.dtype) -> None:
    """Raises `UserError` for a convolution with 16-bit weights: PEFT 0.21 hands it float32 inputs without autocast."""
    convolutions = [name for name in targets if isinstance(model.get_submodule(name), nn.Conv2d)]
    if convolutions and dtype.itemsize == 2:
        half = str(dtype).removeprefix("torch.")
        raise UserError(
            where="use_dora",
            problem=f"DoRA cannot adapt a convolution ({convolutions[0]}) whose weights are {half}.",
            fix="Leave it out of target_modules, or set dtype float32 or bf16 true.",
        )


def load_adapter(model: PeftModel, folder: Path) -> None:
    """Give an adapted model the adapter weights saved in `folder`. Raises `UserError` where they do not fit."""
    try:
        saved = load_file(folder / "adapter_model.safetensors")
    except SafetensorError as error:
        raise UserError(
            where=str(folder), problem=f"adapter_model.safetensors is damaged: {error}.", fix="Copy it again."
        ) from error
    try:
        outcome = set_peft_model_state_dict(model, saved)
    except (KeyError, RuntimeError) as error:  # PEFT looks modules_to_save up; PyTorch compares shapes
        lines = [line.strip() for line in str(error).splitlines()]
        raise UserError(where=str(folder), problem=f"does not fit the model: {lines[-1]}") from error
    mine = get_peft_model_state_dict(model)
    wrong = sorted([*outcome.unexpected_keys, *(mine.keys() - saved.keys())])
    if wrong:
        listed = ", ".join(wrong[:3]) + (", …" if len(wrong) > 3 else "")
        raise UserError(
            where=str(folder), problem=f"holds an adapter for another model or other modules than this one: {listed}."
        )


def add_lora(model: PreTrainedModel, lora: LoraArguments, targets: list[str]) -> PeftModel:
    """Wrap `model` with LoRA on exactly `targets`; the saved adapter carries these names."""
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=lora.r,
        lora_alpha=lora.lora_alpha,
        lora_dropout=lora.lora_dropout,
        target_modules=list(targets),
        bias=lora.bias,
        modules_to_save=lora.modules_to_save,
        use_rslora=lora.use_rslora,
        use_dora=lora.use_dora,
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*")  # PEFT asks under the old name
        adapted = get_peft_model(model, config)
    # PEFT shortens long lists to suffixes, which would match more in another model of the family.
    adapted.peft_config["default"].target_modules = set(targets)
    return adapted


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
    patch_mllama_cross_attention(model)
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
