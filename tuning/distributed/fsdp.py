"""FSDP2 through accelerate: which layers are wrapped, and parameters that it can tell apart."""

import os
from collections.abc import Sequence
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy
from transformers import PreTrainedModel, TrainingArguments

from tuning.errors import UserError


def is_fsdp_asked_for() -> bool:
    """Whether the launcher asked for FSDP (accelerate's way to tell its processes)."""
    return os.environ.get("ACCELERATE_USE_FSDP", "false").lower() in ("true", "1")


def is_sharded(training: TrainingArguments) -> bool:
    """Whether FSDP or DeepSpeed was asked for: a forward may then be one of all processes together."""
    return is_fsdp_asked_for() or bool(training.fsdp) or training.deepspeed_plugin is not None


def disable_fsdp_on_cpu() -> bool:
    """Do without FSDP where the processes have no accelerator: accelerate, asked for it, silently uses DDP there.

    Returns whether it was asked for. Call this once the process group is there.
    """
    if not is_fsdp_asked_for() or PartialState().distributed_type != DistributedType.MULTI_CPU:
        return False
    os.environ["ACCELERATE_USE_FSDP"] = "false"  # what accelerate and transformers go by
    return True


def receives_weights() -> bool:
    """Whether this process is sent the weights that the first process of its machine has read."""
    frugal = os.environ.get("FSDP_CPU_RAM_EFFICIENT_LOADING", "false").lower() in ("true", "1")
    return is_fsdp_asked_for() and frugal and os.environ.get("LOCAL_RANK", "0") != "0"


def find_wrap_classes(model: PreTrainedModel) -> list[str]:
    """Class names of the layers to wrap, in the model's order.

    The sets in `_no_split_modules` also name classes that are not instantiated (`SiglipTextEmbeddings`), at which
    accelerate's own search fails: only names with a module, inside a list of layers, are taken.
    """
    named = {name for module in model.modules() for name in getattr(module, "_no_split_modules", None) or ()}
    layers = [layer for module in model.modules() if isinstance(module, nn.ModuleList) for layer in module]
    return list(dict.fromkeys(type(layer).__name__ for layer in layers if type(layer).__name__ in named))


def choose_wrap_classes(model: PreTrainedModel, wanted: Sequence[str] = ()) -> list[str]:
    """The classes the user named, else those of `find_wrap_classes`. Raises `UserError` for one the model lacks."""
    if missing := set(wanted) - {type(module).__name__ for module in model.modules()}:
        raise UserError(
            where="fsdp_transformer_layer_cls_to_wrap",
            problem=f"{type(model).__name__} contains no {', '.join(sorted(missing))}.",
            fix=f"Leave it out, or choose from {', '.join(find_wrap_classes(model))}.",
        )
    return list(wanted) or find_wrap_classes(model)


def set_fsdp_param_dtype(model: nn.Module, plugin: Any) -> bool:
    """Let FSDP shard trained 16-bit weights in float32, and compute with them in their own dtype, as one process does.

    Returns whether there are any. accelerate does this for mixed precision only, whose autocast is another arithmetic.
    """
    half = {parameter.dtype for parameter in model.parameters() if parameter.requires_grad} - {torch.float32}
    for dtype in half:  # one: FSDP wants uniform weights
        plugin.mixed_precision_policy = MixedPrecisionPolicy(param_dtype=dtype)
    return bool(half)


def cast_trainable_to_fp32(model: nn.Module) -> None:
    """Bring trained weights to float32, as accelerate does for mixed precision."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def materialize_meta_params(model: nn.Module) -> None:
    """Replace parameters on the meta device by ones on the CPU whose memory is never touched.

    Only the first process reads the weights (`fsdp_cpu_ram_efficient_loading`); the others' are on the meta device,
    where every address is 0. accelerate matches the optimizer's parameters by address: those processes would train
    the last parameter only, under all names. Untouched memory has an address and costs nothing.
    """
    replaced: dict[nn.Parameter, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.is_meta and parameter not in replaced:
                empty = torch.empty_like(parameter, device="cpu")
                replaced[parameter] = nn.Parameter(empty, requires_grad=parameter.requires_grad)
            module._parameters[name] = replaced.get(parameter, parameter)
