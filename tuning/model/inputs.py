"""What a model gets in its own precision, and what of it stays as it is in training."""

import types
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from transformers import PreTrainedModel

from tuning.model.parts import Parts, find_parts

TEXT_INPUTS = ("inputs_embeds", "attention_mask")


def patch_picture_dtype(model: PreTrainedModel) -> None:
    """Let the body cast tensors of pictures to the dtype of its vision tower, as most towers do themselves.

    Others fail on float32 pictures when their weights have 16 bits (Kimi K2.5, DeepSeek-OCR 2, Chameleon in
    transformers 5.24).
    """

    def cast(body: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        return args, cast_pictures(model, kwargs)

    model.base_model.register_forward_pre_hook(cast, with_kwargs=True)


def cast_pictures(model: PreTrainedModel | PeftModel, inputs: dict[str, Any]) -> dict[str, Any]:
    """The inputs with tensors of pictures in the dtype of the model's vision tower."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    names = find_parts(base).vision_tower
    tower = base.get_submodule(names[0]) if names else base
    dtype = next((weight.dtype for weight in tower.parameters() if weight.is_floating_point()), None)
    pictures = {
        name: value.to(dtype)
        for name, value in inputs.items()
        if torch.is_tensor(value) and value.is_floating_point() and name not in TEXT_INPUTS
    }
    return inputs | pictures


def patch_frozen_statistics(model: nn.Module, parts: Parts) -> None:
    """Keep frozen normalizations with running statistics in evaluation mode, whatever mode the model is put in.

    In training mode they would normalize by the batch, and move their statistics (FastVLM's tower). Call this once it
    is decided what trains.
    """
    trained = {parts.of(name) for name, parameter in model.named_parameters() if parameter.requires_grad}
    for name, module in model.named_modules():
        if isinstance(module, _NormBase) and module.track_running_stats:
            own = [parameter.requires_grad for parameter in module.parameters(recurse=False)]
            if not any(own or [parts.of(name) in trained]):
                module.eval()
                module.train = types.MethodType(_stay_in_evaluation, module)  # type: ignore[method-assign]


def _stay_in_evaluation(self: nn.Module, mode: bool = True) -> nn.Module:
    return self
