"""DeepSpeed ZeRO-3: a process holds its shards of weights and gradients outside of the parameters, which are empty."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel


def is_zero3(tensor: torch.Tensor) -> bool:
    """Whether this is a parameter that ZeRO-3 shards."""
    return hasattr(tensor, "ds_id")


def is_zero3_model(model: nn.Module) -> bool:
    """Whether ZeRO-3 shards the parameters of a model."""
    return any(map(is_zero3, model.parameters()))


def local_weight(parameter: nn.Parameter) -> torch.Tensor:
    """The shard of a parameter that this process holds; of a trained one the float32 numbers that are stepped."""
    from deepspeed.utils import safe_get_local_fp32_param

    if parameter.requires_grad:
        return safe_get_local_fp32_param(parameter)
    return parameter.ds_tensor  # also of a small one, which ZeRO-3 keeps whole beside it


def local_gradient(parameter: nn.Parameter) -> torch.Tensor | None:
    """The shard of a gradient that this process holds, from the backward of a step to the next one."""
    from deepspeed.utils import safe_get_local_grad

    return safe_get_local_grad(parameter)


def gather_weight(parameter: nn.Parameter) -> torch.Tensor:
    """A copy of the whole parameter. All processes must call this."""
    with gathered([parameter]):
        return parameter.detach().clone()


def gather_gradient(parameter: nn.Parameter) -> torch.Tensor | None:
    """The whole gradient. All processes must call this."""
    from deepspeed.utils import safe_get_full_grad

    return safe_get_full_grad(parameter)


def gathered(parameters: list[nn.Parameter]) -> AbstractContextManager:
    """While inside, these parameters are whole on every process."""
    if not parameters:
        return nullcontext()
    from deepspeed import zero

    return zero.GatheredParameters(parameters)


def weights_outside_layers(model: nn.Module) -> Iterator[nn.Parameter]:
    """Sharded parameters of the models inside a model that are in no layer, such as LLaVA-NeXT's `image_newline`.

    ZeRO-3 gathers a module's own parameters around its forward. `generate` calls other methods of a model, too.
    """
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            yield from filter(is_zero3, module.parameters(recurse=False))


def find_learning_rates(optimizer: Any) -> dict[nn.Parameter, float]:
    """The learning rate of each parameter. DeepSpeed's optimizer has flat shards in the groups of the stock one."""
    groups = optimizer.param_groups
    if not hasattr(optimizer, "sub_group_to_group_id"):
        return {parameter: float(group["lr"]) for group in groups for parameter in group["params"]}
    return {
        parameter: float(groups[optimizer.sub_group_to_group_id[number]]["lr"])
        for number, parameters in enumerate(optimizer.fp16_groups)  # of any dtype
        for parameter in parameters
    }


def patch_zero3_step(optimizer: Any, before: Callable[[], None]) -> None:
    """Call `before` ahead of each step of DeepSpeed's optimizer, which accelerate lets it take inside the backward."""
    step = optimizer.step

    def look_and_step(*args: Any, **kwargs: Any) -> Any:
        before()
        return step(*args, **kwargs)

    optimizer.step = look_and_step
