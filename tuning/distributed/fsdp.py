"""FSDP2 through accelerate: which layers it wraps, in which precision it shards, and where it cannot be used."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy
from transformers import PreTrainedModel, TrainingArguments

from tuning.console import print0
from tuning.errors import UserError

STRATEGY_IS_OURS = "VLM_TUNING_CHOOSES_STRATEGY"
"""Our launcher sets this variable to 1 where the user has named neither FSDP nor a file."""
LARGE_STATE = 20e9
BYTES_OF_STATE = 12  # of a trained number: its float32 copy, and two averages of Adam


def is_fsdp_asked_for() -> bool:
    """Whether the launcher asked for FSDP: accelerate sets this variable for its processes."""
    return os.environ.get("ACCELERATE_USE_FSDP", "false").lower() in ("true", "1")


def is_sharded(training: TrainingArguments) -> bool:
    """Whether FSDP or DeepSpeed was asked for: all processes may then have to run a forward together."""
    return is_fsdp_asked_for() or bool(training.fsdp) or training.deepspeed_plugin is not None


def disable_fsdp_on_cpu() -> bool:
    """Turn FSDP off where the processes have no accelerator: accelerate silently uses DDP there.

    Returns whether FSDP was asked for. Call this after the process group was created.
    """
    if not is_fsdp_asked_for() or PartialState().distributed_type != DistributedType.MULTI_CPU:
        return False
    os.environ["ACCELERATE_USE_FSDP"] = "false"  # accelerate and transformers read it
    os.environ["ACCELERATE_USE_PARALLELISM_CONFIG"] = "false"  # hybrid sharding, which is for FSDP only
    return True


def shards_of_a_copy(launch_args: Mapping[str, Any]) -> int | None:
    """Over how many processes hybrid FSDP shards each copy of the model; None where there is one copy.

    The launcher says it in the environment. Before a launch, its options do.
    """
    if os.environ.get("ACCELERATE_USE_PARALLELISM_CONFIG", "false").lower() == "true":
        return int(os.environ.get("PARALLELISM_CONFIG_DP_SHARD_SIZE", "1"))
    size = launch_args.get("parallelism_config_dp_shard_size")
    return None if size is None else int(size)


def receives_weights() -> bool:
    """Whether this process gets its weights from the first process of its machine instead of from the disk."""
    efficient = os.environ.get("FSDP_CPU_RAM_EFFICIENT_LOADING", "false").lower() in ("true", "1")
    return is_fsdp_asked_for() and efficient and os.environ.get("LOCAL_RANK", "0") != "0"


def find_wrap_classes(model: PreTrainedModel) -> list[str]:
    """Class names of the layers to wrap, in the model's order.

    Only classes of modules in a list of layers count. The sets in `_no_split_modules` also name classes that are not
    instantiated (`SiglipTextEmbeddings`), and accelerate's own search fails at those.
    """
    named = {name for module in model.modules() for name in getattr(module, "_no_split_modules", None) or ()}
    layers = [layer for module in model.modules() if isinstance(module, nn.ModuleList) for layer in module]
    return list(dict.fromkeys(type(layer).__name__ for layer in layers if type(layer).__name__ in named))


def choose_wrap_classes(model: PreTrainedModel, named: Sequence[str] = ()) -> list[str]:
    """The classes that the user `named`, else those of `find_wrap_classes`.

    Raises `UserError` for a class that the model lacks.
    """
    if missing := set(named) - {type(module).__name__ for module in model.modules()}:
        raise UserError(
            where="fsdp_transformer_layer_cls_to_wrap",
            problem=f"{type(model).__name__} contains no {', '.join(sorted(missing))}.",
            fix=f"Leave it out, or choose from {', '.join(find_wrap_classes(model))}.",
        )
    return list(named) or find_wrap_classes(model)


def padded_numel(parameter: torch.Tensor, shards: int) -> int:
    """The numbers of a parameter as FSDP2 gathers it from `shards` processes.

    It pads the first dimension to a multiple of them. That is much for a short one: adapters have `r` rows.
    """
    first = max(1, parameter.shape[0]) if parameter.dim() else 1
    return -(-first // shards) * shards * (parameter.numel() // first)


def shard_large_checkpoints(model: nn.Module, plugin: Any) -> None:
    """Let every process write its part of a checkpoint above 20 GB, if the user has left that to us.

    Otherwise the first process gathers all of it in its main memory, and writes it alone.
    """
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    if os.environ.get(STRATEGY_IS_OURS) == "1" and trained * BYTES_OF_STATE > LARGE_STATE:
        plugin.state_dict_config = plugin.optim_state_dict_config = None  # those of whole ones
        plugin.set_state_dict_type("SHARDED_STATE_DICT")
        print0(
            f"Checkpoints are sharded: a whole one would have {trained * BYTES_OF_STATE / 1e9:.3g} GB."
            " The final model is whole."
        )


def set_fsdp_param_dtype(model: nn.Module, plugin: Any) -> bool:
    """Let FSDP shard trained 16-bit weights in float32 and compute in their own dtype, as a single process does.

    Gradients are summed over the processes in float32. Returns whether there are any. accelerate does this only for
    mixed precision, whose autocast computes differently.
    """
    half = {parameter.dtype for parameter in model.parameters() if parameter.requires_grad} - {torch.float32}
    for dtype in half:  # only one: FSDP needs weights of one dtype
        plugin.mixed_precision_policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    return bool(half)


def cast_trainable_to_fp32(model: nn.Module) -> None:
    """Cast trained weights to float32, as accelerate does for mixed precision."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def materialize_meta_params(model: nn.Module) -> None:
    """Replace parameters on the meta device by uninitialised ones on the CPU.

    Only the first process reads the weights (`fsdp_cpu_ram_efficient_loading`). The others have theirs on the meta
    device, where every address is 0. accelerate matches the optimizer's parameters by address: those processes would
    train the last parameter only, under all names. Memory that is never written to has an address and costs nothing.
    """
    replaced: dict[nn.Parameter, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.is_meta and parameter not in replaced:  # tied ones stay one
                empty = torch.empty_like(parameter, device="cpu")
                replaced[parameter] = nn.Parameter(empty, requires_grad=parameter.requires_grad)
            if parameter in replaced:
                setattr(module, name, replaced[parameter])
