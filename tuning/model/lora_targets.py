"""Which modules and which tensors of experts LoRA adapts."""

import re
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, field

import torch
from peft import LoraConfig
from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from tuning.config.options import LoraArguments
from tuning.errors import UserError, try_optional
from tuning.model.parts import LANGUAGE_MODEL, PARTS, Parts

ADAPTABLE = (nn.Linear, nn.Embedding, nn.Conv2d, Conv1D)
PLAIN_NAMES = re.compile(r"[\w.]+(\s*,\s*[\w.]+)*")


@dataclass(frozen=True)
class LoraTargets:
    """What LoRA adapts, by full name, in the model's order.

    `experts`: tensors that hold the matrices of many experts, `[experts, …, …]`. `weights`: those of linear modules
    that PEFT would take for experts under the name of their module, see `_taken_for_experts`.
    """

    modules: list[str] = field(default_factory=list)
    weights: list[str] = field(default_factory=list)
    experts: list[str] = field(default_factory=list)

    @property
    def parameters(self) -> list[str]:
        """What PEFT adapts as `target_parameters`, without dropout."""
        return [*self.weights, *self.experts]

    @property
    def names(self) -> list[str]:
        """Everything that is adapted, as a user names it."""
        return [*self.modules, *(name.removesuffix(".weight") for name in self.weights), *self.experts]

    def without(self, modules: Collection[str]) -> "LoraTargets":
        """These targets without `modules`, where a module of experts may stand for its tensors."""

        def keep(names: list[str]) -> list[str]:
            return [name for name in names if name not in modules and name.rpartition(".")[0] not in modules]

        return LoraTargets(
            [name for name in self.modules if name not in modules], keep(self.weights), keep(self.experts)
        )

    def __str__(self) -> str:
        modules = len(self.modules) + len(self.weights)
        return f"{modules} modules" + (f" and {len(self.experts)} expert tensors" if self.experts else "")


def resolve_targets(
    model: PreTrainedModel, parts: Parts, lora: LoraArguments, trainable_parts: set[str]
) -> LoraTargets:
    """What to adapt.

    Names match the end of a module's or an expert tensor's name. Names and `all-linear` look only into
    `trainable_parts`. A regular expression must match a full name and looks everywhere. Raises `UserError` if there are
    no targets (and lists what the model offers), or if a target matches nothing.
    """
    modules = {name: module for name, module in model.named_modules() if is_adaptable(module)}
    experts = find_expert_tensors(model)
    names, targets, head = [*modules, *experts], lora.target_modules, model.get_output_embeddings()
    candidates = [name for name in names if parts.of(name) in trainable_parts]
    if not targets:
        raise UserError(
            where="target_modules", problem=f"LoRA needs to know what to adapt. {list_modules(model, parts)}"
        )
    if targets == "all-linear":
        linear = {name for name, module in modules.items() if is_linear(module) and module is not head}
        chosen = [name for name in candidates if name in linear or name in experts]
    elif isinstance(targets, str) and not PLAIN_NAMES.fullmatch(targets):
        chosen = _match_expression(targets, names, model, parts)
    else:
        asked = re.split(r"\s*,\s*", targets) if isinstance(targets, str) else targets
        chosen = _match_names(asked, candidates, names, model, parts)
    taken = _taken_for_experts(model, [name for name in chosen if name in modules])
    return LoraTargets(
        modules=[name for name in chosen if name in modules and name not in taken],
        weights=[f"{name}.weight" for name in chosen if name in taken],
        experts=[name for name in chosen if name in experts],
    )


def is_adaptable(module: nn.Module) -> bool:
    """Whether LoRA can be added to what a module computes."""
    return isinstance(module, ADAPTABLE) and (is_linear(module) or not isinstance(module, nn.Linear))


def kept_whole(parameters: Collection[str]) -> list[str]:
    """Modules that cannot be quantized: an adapter adds to their weights as `target_parameters`."""
    return [name.removesuffix(".weight") for name in parameters if name.endswith(".weight")]


def find_expert_tensors(model: nn.Module) -> list[str]:
    """Full names of the tensors that hold the matrices of many experts, `[experts, …, …]`.

    A module of experts has several such tensors of one length, and what one gives, another takes: the hidden size or
    that between their layers. Learned positions and queries have no such partner.
    """
    found = []
    for module_name, module in model.named_modules():
        stacks = {name: weight.shape for name, weight in module.named_parameters(recurse=False) if weight.dim() == 3}
        for name, (number, rows, columns) in stacks.items():
            others = [shape for other, shape in stacks.items() if other != name and shape[0] == number]
            if rows > 1 and columns > 1 and any(rows in shape[2:] or columns in shape[1:2] for shape in others):
                found.append(f"{module_name}.{name}")
    return found


def _taken_for_experts(model: PreTrainedModel, modules: list[str]) -> set[str]:
    """The modules that PEFT would not adapt under their names, as in adapters of transformers 4 they meant experts.

    PEFT 0.21 rewrites names such as `gate_proj` in models whose experts are fused today, and does so again when a saved
    adapter is loaded. As `target_parameters`, the weights of these modules keep their names.
    """

    def is_rewritten(name: str) -> bool:
        config = LoraConfig(target_modules=[name])
        rewriting = try_optional(lambda: convert_peft_config_for_transformers(config, model, None))
        return bool(rewriting.error) or set(config.target_modules or ()) != {name}

    ends = {name.rpartition(".")[2]: name for name in modules}
    rewritten = {end for end, name in ends.items() if is_rewritten(name)}
    return {name for name in modules if name.rpartition(".")[2] in rewritten}


def _match_names(
    asked: list[str], candidates: list[str], everywhere: list[str], model: PreTrainedModel, parts: Parts
) -> list[str]:
    matches = {name: [full for full in candidates if _ends_with(full, name)] for name in asked}
    if missing := [name for name, matched in matches.items() if not matched]:
        elsewhere = sorted({parts.of(full) for full in everywhere for name in missing if full.endswith(f".{name}")})
        hint = f" It is only in the {' and '.join(elsewhere)}: set freeze_{elsewhere[0]} false." if elsewhere else ""
        raise UserError(
            where="target_modules",
            problem=f"{', '.join(missing)} matches no module.{hint} {list_modules(model, parts)}",
        )
    chosen = {full for matched in matches.values() for full in matched}
    return [name for name in candidates if name in chosen]


def _ends_with(full: str, name: str) -> bool:
    return full == name or full.endswith(f".{name}")


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
            where="target_modules",
            problem=f"the expression {expression!r} matches no module. {list_modules(model, parts)}",
        )
    return matched


def list_modules(model: PreTrainedModel, parts: Parts) -> str:
    """The linear modules and expert tensors of each part, and an example of a line for the config."""
    head = model.get_output_embeddings()
    found: dict[str, Counter[str]] = {part: Counter() for part in PARTS}
    for name, module in model.named_modules():
        if is_linear(module) and module is not head:
            found[parts.of(name)][name.rpartition(".")[2]] += 1
    for name in find_expert_tensors(model):
        found[parts.of(name)][name.rpartition(".")[2]] += 1
    lines = [
        f"  {part}: {', '.join(f'{name} ×{n}' for name, n in names.items())}" for part, names in found.items() if names
    ]
    suggested = ", ".join(f'"{name}"' for name in found[LANGUAGE_MODEL])
    return "\n".join(["The model offers:", *lines, f'Add, for example: "target_modules": [{suggested}]'])


def check_modules_to_save(model: PreTrainedModel, names: list[str] | None) -> None:
    """Raises `UserError` for a name that no module ends with: PEFT would train nothing for it."""
    modules = [name for name, _ in model.named_modules()]
    if missing := [name for name in names or [] if not any(_ends_with(full, name) for full in modules)]:
        tops = sorted({name for name in modules if name and name.count(".") < 2})
        raise UserError(
            where="modules_to_save", problem=f"{', '.join(missing)} matches no module; there are {', '.join(tops)}."
        )


def check_dora(model: PreTrainedModel, targets: LoraTargets, dtype: torch.dtype | None) -> None:
    """Raises `UserError` for what PEFT 0.21 cannot adapt with DoRA: expert tensors, and convolutions in 16 bits.

    It gives a convolution float32 inputs without autocast. `dtype`: of the weights, None with autocast.
    """
    if targets.parameters:
        raise UserError(
            where="use_dora",
            problem=f"DoRA cannot adapt the tensors of experts ({targets.parameters[0]}).",
            fix="Leave them out of target_modules, or remove use_dora.",
        )
    convolutions = [name for name in targets.modules if isinstance(model.get_submodule(name), nn.Conv2d)]
    if convolutions and dtype is not None and dtype.itemsize == 2:
        half = str(dtype).removeprefix("torch.")
        raise UserError(
            where="use_dora",
            problem=f"DoRA cannot adapt a convolution ({convolutions[0]}) whose weights are {half}.",
            fix="Leave it out of target_modules, or set dtype float32 or bf16 true.",
        )


def is_linear(module: nn.Module) -> bool:
    """Whether a module is a plain linear layer. Llama 4's router is one that returns more than its product."""
    return isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward
