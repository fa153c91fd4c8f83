"""Which attention a model runs with on this machine, and why."""

import torch
from transformers import PreTrainedModel
from transformers.utils import is_flash_attn_2_available


def choose_attention(
    model_class: type[PreTrainedModel], *, use_flash_attn: bool, dtype: torch.dtype, device_type: str
) -> tuple[str, str]:
    """Returns the `attn_implementation` to load with, and a sentence that says which it is and why."""
    fallback = "sdpa" if model_class._supports_sdpa else "eager"
    own = "PyTorch's own (sdpa)" if fallback == "sdpa" else "eager, the only one this model has"
    if not use_flash_attn:
        return fallback, f"Attention: {own}; use_flash_attn is false."
    if not model_class._supports_flash_attn:
        return (
            fallback,
            f"Attention: {own}; use_flash_attn was asked for, but {model_class.__name__} does not support it.",
        )
    if device_type != "cuda":
        return fallback, f"Attention: {own}; FlashAttention needs a CUDA GPU."
    if not is_flash_attn_2_available():
        return fallback, f"Attention: {own}; the flash-attn package is not installed."
    if dtype not in (torch.float16, torch.bfloat16):
        return fallback, f"Attention: {own}; FlashAttention needs bfloat16 or float16 weights, these are {dtype}."
    return "flash_attention_2", "Attention: FlashAttention-2, from the flash-attn package."
