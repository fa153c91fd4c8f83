"""Which attention a model runs with on this machine, and why."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from peft import PeftModel
from transformers import PreTrainedConfig, PreTrainedModel

from tuning.model.packed_attention import PACKED, PACKED_FLASH


@dataclass(frozen=True)
class Attention:
    """Names of the attention of a run.

    `loaded`: the `attn_implementation` to load the model with; padded batches use it. `packed`: the language model's
    attention for padding-free batches, None where there is none. `reason` is a sentence that names both and says why.
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
    """The attention that the user names, else the fastest one that needs no other package."""
    if attn_implementation:
        packed = attn_implementation if "flash" in attn_implementation and model_class._supports_flash_attn else None
        return Attention(attn_implementation, packed, f"Attention: {attn_implementation}, from attn_implementation.")
    loaded = "sdpa" if model_class._supports_sdpa else "eager"
    own = "PyTorch's own (sdpa)" if loaded == "sdpa" else "eager, the only one that this model supports"
    if not model_class._supports_attention_backend:
        return Attention(loaded, None, f"Attention: {own}; {model_class.__name__} supports no other.")
    if not use_flash_attn:
        return Attention(loaded, PACKED, f"Attention: {own}; use_flash_attn is false.")
    if device_type != "cuda":
        return Attention(loaded, PACKED, f"Attention: {own}; FlashAttention needs a CUDA GPU.")
    if dtype not in (torch.float16, torch.bfloat16):
        reason = f"FlashAttention needs bfloat16 or float16, and this model computes in {dtype}"
        return Attention(loaded, PACKED, f"Attention: {own}; {reason}.")
    if torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 0):
        return Attention(loaded, PACKED, f"Attention: {own}; FlashAttention needs an Ampere GPU or a newer one.")
    reason = "FlashAttention in PyTorch (torch.nn.attention.varlen) for padding-free batches"
    return Attention(loaded, PACKED_FLASH, f"Attention: {reason}, {own} elsewhere.")


def why_layers_need_padding(config: PreTrainedConfig) -> str:
    """The kinds of layers that could mix packed rows, as a reason for padding; "" where there are none."""
    kinds = set(getattr(config.get_text_config(), "layer_types", None) or ())
    others = kinds - {"full_attention", "sliding_attention"}
    return f"it has layers that could mix packed rows: {', '.join(sorted(others))}" if others else ""


def decoder_configs(model: PreTrainedModel | PeftModel) -> list[PreTrainedConfig]:
    """The configurations that the layers of the language model read, each once."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    configs = {id(module.config): module.config for module in base.get_decoder().modules() if hasattr(module, "config")}
    return list(configs.values())


@contextmanager
def decoder_attention(model: PreTrainedModel | PeftModel, name: str) -> Iterator[None]:
    """Run the language model with the attention called `name` while inside."""
    before = [(config, config._attn_implementation) for config in decoder_configs(model)]
    set_decoder_attention(model, name)
    try:
        yield
    finally:
        for config, stock in before:
            config._attn_implementation = stock


def set_decoder_attention(model: PreTrainedModel | PeftModel, name: str | None) -> None:
    """Run the language model, but not the vision tower, with the attention called `name` from now on."""
    for config in decoder_configs(model):
        config._attn_implementation = name
