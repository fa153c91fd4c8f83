"""Pictures get the dtype of the weights that read them."""

import inspect
import types
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

from tuning.model.vision_tower import find_tower

NO_PICTURES = {"inputs_embeds", "attention_mask", "num_items_in_batch"}  # other inputs that may be floats


def patch_picture_dtype(model: PreTrainedModel | PeftModel) -> None:
    """Replace `model.forward`: it first casts pictures to the dtype of `reader_of(model)`.

    Processors return float32. Most models cast pictures themselves, with the same result. The others fail on 16-bit
    weights. It can go once every model of transformers casts them (Kimi, DeepSeek-OCR and Aria do not in 5.24).
    """
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    stock_forward, reader = base.forward, reader_of(base)

    def forward(self, *args: Any, **inputs: Any) -> Any:
        return stock_forward(*args, **cast_pictures(inputs, reader))

    forward.__signature__ = inspect.signature(stock_forward)  # type: ignore[attr-defined]
    base.forward = types.MethodType(forward, base)


def reader_of(model: PreTrainedModel | PeftModel) -> nn.Module:
    """What reads pictures: the vision tower, which may have another dtype than the rest, or the model without one."""
    return find_tower(model) or model


def picture_dtype(reader: nn.Module) -> torch.dtype | None:
    """The dtype of the first float weight of `reader`; None without one."""
    return next((weight.dtype for weight in reader.parameters() if weight.is_floating_point()), None)


def cast_pictures(inputs: dict[str, Any], reader: nn.Module) -> dict[str, Any]:
    """`inputs` with pictures in the dtype that `reader` takes."""
    dtype = picture_dtype(reader)

    def cast(name: str, value: Any) -> Any:
        is_picture = torch.is_tensor(value) and value.is_floating_point() and name not in NO_PICTURES
        return value.to(dtype) if is_picture else value

    return {name: cast(name, value) for name, value in inputs.items()}
