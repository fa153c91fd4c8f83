"""Which attention a model runs with on this machine, and why."""

from dataclasses import dataclass

import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

from tuning.model.packed_attention import PACKED, PACKED_FLASH


@dataclass(frozen=True)
class Attention:
    """`loaded`: the `attn_implementation` to load with, which padded batches use; `packed`: the language model's for
    padding-free batches, None where it has none. `reason` says which it is and why.
    """

    loaded: str
    packed: str | None
    reason: str


def choose_attention(
    model_class: type[PreTrainedModel],
    *,
    use_flash_attn: bool,
    attn_implementation: str | None,
    dtype: torch.dtype,
    device_type: str,
) -> Attention:
    """The attention of a run: what the user names, else the fastest that needs nothing installed."""
    if attn_implementation:
        packed = attn_implementation if "flash" in attn_implementation and model_class._supports_flash_attn else None
        return Attention(attn_implementation, packed, f"Attention: {attn_implementation}, as attn_implementation says.")
    loaded = "sdpa" if model_class._supports_sdpa else "eager"
    own = "PyTorch's own (sdpa)" if loaded == "sdpa" else "eager, the only one this model has"
    if not model_class._supports_attention_backend:
        return Attention(loaded, None, f"Attention: {own}; {model_class.__name__} takes no other.")
    if not use_flash_attn:
        return Attention(loaded, PACKED, f"Attention: {own}; use_flash_attn is false.")
    if device_type != "cuda":
        return Attention(loaded, PACKED, f"Attention: {own}; FlashAttention needs a CUDA GPU.")
    if dtype not in (torch.float16, torch.bfloat16):
        reason = f"FlashAttention needs bfloat16 or float16, and this model computes in {dtype}"
        return Attention(loaded, PACKED, f"Attention: {own}; {reason}.")
    reason = "FlashAttention in PyTorch (torch.nn.attention.varlen) for padding-free batches"
    return Attention(loaded, PACKED_FLASH, f"Attention: {reason}, {own} elsewhere.")


def set_decoder_attention(model: PreTrainedModel | PeftModel, name: str | None) -> None:
    """Let the language model, not the vision tower, run with the attention called `name` from now on."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    decoder: nn.Module = base.get_decoder()
    for module in decoder.modules():
        if hasattr(module, "config"):
            module.config._attn_implementation = name
