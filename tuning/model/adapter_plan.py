"""What LoRA adapts and how the adapter is stored, so that PEFT reads it back: found before anything is trained.

PEFT rewrites the names and settings of some models' adapters when it loads them, and leaves out what it then does not
find, without an error.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from peft import PeftConfig, PeftModel, get_peft_model_state_dict
from transformers import PreTrainedModel

from tuning.config.options import LoraArguments
from tuning.errors import UserError
from tuning.model.lora import ADAPTER_NAME, PREFIX, add_lora, set_weights, stored_for_engines, stored_names
from tuning.model.lora_targets import LoraTargets


@dataclass(frozen=True)
class AdapterPlan:
    """`targets`: what LoRA adapts. `stored_names`: name of a weight → its name on the disk, where that is another one.

    `left_out`: modules that `all-linear` does not adapt, because PEFT would not read them back.
    """

    targets: LoraTargets = field(default_factory=LoraTargets)
    stored_names: dict[str, str] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)


def plan_adapter(build: Callable[[], PreTrainedModel], lora: LoraArguments, targets: LoraTargets) -> AdapterPlan:
    """Save and load the fresh adapter once, as PEFT does it for a user, on skeletons that `build` makes.

    Raises `UserError` for modules that PEFT cannot read back, unless `all-linear` can do without them.
    """
    with torch.random.fork_rng(devices=[]):  # the run's own adapter begins as it would without this
        lost, names = find_unreadable(build, lora, targets)
    if not lost:
        return AdapterPlan(targets, names)
    left = targets.without(lost)
    if lora.target_modules == "all-linear" and left.names:
        with torch.random.fork_rng(devices=[]):
            still_lost, names = find_unreadable(build, lora, left)
        if not still_lost:
            return AdapterPlan(left, names, lost)
    listed = ", ".join(lost[:3]) + (", …" if len(lost) > 3 else "")
    raise UserError(
        where="target_modules",
        problem=f"PEFT saves but does not read back what LoRA trains in {len(lost)} modules: {listed}.",
        fix="Leave them out of target_modules.",
    )


def describe_adapter(plan: AdapterPlan, lora: LoraArguments) -> str:
    """What LoRA adapts, in words for the user."""
    targets, lines = plan.targets, [f"LoRA adapts {plan.targets}."]
    if plan.left_out:
        lines.append(f"all-linear leaves out {', '.join(plan.left_out)}: PEFT would not read them back.")
    if targets.parameters and lora.lora_dropout:
        lines.append(f"lora_dropout {lora.lora_dropout} becomes 0: PEFT has no dropout for tensors of experts.")
    return "\n".join(lines)


def find_unreadable(
    build: Callable[[], PreTrainedModel], lora: LoraArguments, targets: LoraTargets
) -> tuple[list[str], dict[str, str]]:
    """Modules whose weights PEFT loses between save and load, and the names on the disk under which it loses fewest.

    Nothing is written: a weight is one number of its own, spread over its shape without taking memory. With `bias all`
    PEFT saves some weights under two names.
    """
    adapted = add_lora(build(), lora, targets)
    saved = get_peft_model_state_dict(adapted, state_dict=adapted.state_dict(keep_vars=True))
    numbers = {id(weight): float(number) for number, weight in enumerate(saved.values(), start=1)}
    weights = {key: torch.tensor(numbers[id(weight)]).expand(weight.shape) for key, weight in saved.items()}
    if (names := stored_for_engines(adapted, weights)) and not _lost_keys(build, adapted, weights, names):
        return [], names
    lost, names = _lost_keys(build, adapted, weights, {}), {}
    if lost and (other := stored_names(adapted, weights)):
        lost_then = _lost_keys(build, adapted, weights, other)
        if len(lost_then) < len(lost):
            lost, names = lost_then, other
    modules = [key.removeprefix(PREFIX).partition(".lora_")[0].replace(".base_layer", "") for key in lost]
    return list(dict.fromkeys(modules)), names


def _lost_keys(
    build: Callable[[], PreTrainedModel], adapted: PeftModel, weights: dict[str, torch.Tensor], names: dict[str, str]
) -> list[str]:
    """The weights that do not arrive where they came from, if they are stored under `names`."""
    arrived: dict[str, torch.Tensor] = {}
    settings = {**adapted.peft_config[ADAPTER_NAME].to_dict(), "inference_mode": True}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # nothing is copied into weights on the meta device
        loaded = PeftModel(build(), PeftConfig.from_peft_type(**settings))
        loaded.register_load_state_dict_pre_hook(lambda _, state, *rest: arrived.update(state))
        set_weights(loaded, {names.get(key, key): weight for key, weight in weights.items()})
        found = get_peft_model_state_dict(loaded, state_dict=arrived)
    return [key for key, weight in weights.items() if not _is_same(found.get(key), weight)]


def _is_same(found: torch.Tensor | None, weight: torch.Tensor) -> bool:
    """Whether a weight kept its shape and its one number."""
    return found is not None and found.shape == weight.shape and bool((found == weight.flatten()[0]).all())
