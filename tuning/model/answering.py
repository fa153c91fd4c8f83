"""Load a model, or an adapter on its base, to answer questions with."""

from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedConfig, PreTrainedModel

from tuning.config.model_tokens import ModelTokens
from tuning.config.options import ModelSource
from tuning.console import print0
from tuning.model import load
from tuning.model.attention import choose_attention
from tuning.model.lora import Adapter, BaseModel, add_adapter, find_adapter, load_base, read_adapter_config
from tuning.model.lora_targets import kept_whole
from tuning.model.mllama import patch_mllama_cross_attention, patch_mllama_tower
from tuning.model.parts import find_parts
from tuning.model.picture_dtype import patch_picture_dtype
from tuning.model.quantize import Quantization, plan_quantization


@dataclass(frozen=True)
class LoadedModel:
    """A model in evaluation mode on its device, its configuration and processor, and the adapter on it, if any.

    `source`: the model itself, or the base of the adapter.
    """

    model: PreTrainedModel | PeftModel
    config: PreTrainedConfig
    processor: Any
    adapter: Adapter | None
    source: ModelSource

    @property
    def tokens(self) -> ModelTokens:
        """What the checkpoint says of its tokens."""
        return load.read_tokens(self.source, self.processor, self.config)


def load_answering(source: ModelSource, *, device: torch.device | str, device_map: str | None = None) -> LoadedModel:
    """Load the model or adapter that `source` names. Raises `UserError` where it or its base cannot be loaded.

    `device_map`: how transformers shares the layers out over all devices, in place of `device` for all of them.
    """
    device = torch.device(device)
    adapter = find_adapter(source.model_name_or_path)
    base = load_base(source, adapter)
    dtype = load.choose_dtype(base.source, base.config)
    attention = choose_attention(
        load.model_class(base.config),
        use_flash_attn=base.source.use_flash_attn,
        attn_implementation=base.source.attn_implementation,
        dtype=dtype,
        device_type=device.type,
    )
    quantization = _plan_quantization(base, adapter, dtype, device)
    model = load.load_model(
        base.source,
        base.config,
        dtype=dtype,
        attention=attention.loaded,
        quantization=quantization,
        **({"device_map": device_map} if device_map else {}),
    )
    patch_mllama_cross_attention(model)
    patch_mllama_tower(model)
    patch_picture_dtype(model)
    if adapter:
        model = add_adapter(model, adapter)
    if device_map:
        places = dict.fromkeys(str(parameter.device) for parameter in model.parameters())
        print0(f"The layers of the model are on {', '.join(places)}.")
    elif not quantization:  # quantised weights are loaded onto their device and cannot be moved
        model = model.to(device)
    return LoadedModel(model.eval(), base.config, base.processor, adapter, base.source)


def without_masked(logits: torch.Tensor) -> torch.Tensor:
    """Logits to compare: 0 for tokens that the model masks, as Chameleon does its images', with the lowest number."""
    return logits.masked_fill(logits <= torch.finfo(torch.bfloat16).min / 2, 0)


def _plan_quantization(
    base: BaseModel, adapter: Adapter | None, dtype: torch.dtype, device: torch.device
) -> Quantization | None:
    if not base.source.quantization:
        return None
    skeleton = load.build_skeleton(base.config)
    settings = read_adapter_config(adapter.folder) if adapter else None
    whole = [*(settings.modules_to_save or []), *kept_whole(settings.target_parameters or [])] if settings else []
    return plan_quantization(
        skeleton,
        find_parts(skeleton),
        base.source.quantization,
        modules_to_save=whole,
        compute=dtype,
        device=device,
    )
