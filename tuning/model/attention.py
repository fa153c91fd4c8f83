"""Which attention a model runs with on this machine, and why."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

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
        packs_itself = "flash" in attn_implementation or "flex" in attn_implementation
        packed = PACKED if attn_implementation == "sdpa" else attn_implementation if packs_itself else None
        return Attention(attn_implementation, packed, f"Attention: {attn_implementation}, from attn_implementation.")
    loaded = "sdpa" if model_class._supports_sdpa else "eager"
    own = "PyTorch's own (sdpa)" if loaded == "sdpa" else "eager, the only one that this model supports"
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


KNOWN_LAYERS = {"full_attention", "sliding_attention", "chunked_attention", "linear_attention", "conv"}
"""Kinds of layers whose rows are seen to mix, if they do, in a few short rows."""


def find_unknown_layers(config: PreTrainedConfig, names: Sequence[str]) -> list[str]:
    """Those of the layers called `names` that are of another kind: some choose among keys only in long rows."""
    kinds = getattr(config.get_text_config(), "layer_types", None) or ()
    if {*kinds} <= KNOWN_LAYERS:
        return []
    if len(kinds) != len(names):
        return [*names]
    return [name for name, kind in zip(names, kinds, strict=True) if kind not in KNOWN_LAYERS]


def get_base(model: PreTrainedModel | PeftModel) -> Any:
    """The model without adapters' wrapper."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def decoder_configs(model: PreTrainedModel | PeftModel) -> list[PreTrainedConfig]:
    """The configurations that the layers of the language model read, each once."""
    decoder = get_base(model).get_decoder()
    configs = {id(module.config): module.config for module in decoder.modules() if hasattr(module, "config")}
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
