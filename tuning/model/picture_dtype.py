"""Pictures get the dtype of the weights that read them."""

import inspect
import types
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedModel

from tuning.model.vision_tower import find_tower

NO_PICTURES = {"inputs_embeds", "attention_mask", "num_items_in_batch"}  # other inputs that may be floats


def patch_picture_dtype(model: PreTrainedModel | PeftModel) -> None:
    """Replace `model.forward`: it first casts pictures to the dtype of the vision tower, or of a model without one.

    Processors return float32. Most models cast that themselves, with the same result. The others fail on 16-bit
    weights. It can go once every model of transformers casts pictures (Kimi, DeepSeek-OCR and Aria do not in 5.24).
    """
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    tower, stock_forward = find_tower(base) or base, base.forward

    def forward(self, *args: Any, **inputs: Any) -> Any:
        dtype = next((weight.dtype for weight in tower.parameters() if weight.is_floating_point()), None)
        for name, value in inputs.items():
            if torch.is_tensor(value) and value.is_floating_point() and name not in NO_PICTURES:
                inputs[name] = value.to(dtype)
        return stock_forward(*args, **inputs)

    forward.__signature__ = inspect.signature(stock_forward)  # type: ignore[attr-defined]
    base.forward = types.MethodType(forward, base)
