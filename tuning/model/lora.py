"""LoRA: which modules are adapted, and the adapted model."""

import re
import warnings
from collections import Counter
from pathlib import Path

import torch
from peft import (
    LoraConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from tuning.config.arguments import LoraArguments
from tuning.errors import UserError
from tuning.model.parts import LANGUAGE_MODEL, PARTS, Parts

ADAPTABLE = (nn.Linear, nn.Embedding, nn.Conv2d, Conv1D)
PLAIN_NAMES = re.compile(r"[\w.]+(\s*,\s*[\w.]+)*")


def resolve_targets(model: PreTrainedModel, parts: Parts, lora: LoraArguments, open_parts: set[str]) -> list[str]:
    """The full names of the modules to adapt, in the model's order.

    Names match the end of a module's name and, like `all-linear`, look only into `open_parts`; a regular expression
    must match a full name and looks everywhere. Raises `UserError` when nothing is asked for (with what the model
    offers) or a target matches nothing.
    """
    adaptable = {name: module for name, module in model.named_modules() if isinstance(module, ADAPTABLE)}
    within = [name for name in adaptable if parts.of(name) in open_parts]
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
