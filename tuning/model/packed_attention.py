"""Attention over samples packed end to end in one row: each sees only itself, without a mask of tokens × tokens.

Registered under two names through transformers' attention interface, which this module extends and does not patch:
https://huggingface.co/docs/transformers/attention_interface
"""

import inspect
from collections.abc import Callable
from functools import partial
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

PACKED, PACKED_FLASH = "packed", "packed_flash"
"""Names to set as `_attn_implementation`: PyTorch's SDPA sample by sample, or its FlashAttention for all samples at
once.
"""
_VARLEN_OPTIONS = set(inspect.signature(varlen_attn).parameters)  # torch 2.10 has is_causal, later ones window_size
_UNSUPPORTED = ("s_aux", "position_bias")


def packed_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    max_length_q: int | None = None,
    flash: bool = False,
    **others,
) -> tuple[torch.Tensor, None]:
    """Causal attention within each sample. `query` `[B, H, T, D]`, `key` and `value` `[B, K, T, D]` → `[B, T, H, D]`.

    `cu_seq_lens_q` `[samples + 1]`: where each sample of the one row (B = 1) begins, and where the last one ends, in
    tokens. Without it every row is one sample. A call with only a mask (padding), or with fewer queries than keys (a
    cache), goes to transformers' SDPA. Raises `NotImplementedError` for what this function would silently leave out:
    attention sinks, biases, and a mask together with `cu_seq_lens_q`.
    """
    if attention_mask is not None and cu_seq_lens_q is not None:
        raise NotImplementedError("attention over packed rows with a mask of the model's own")
    if attention_mask is not None or query.shape[2] != key.shape[2]:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, softcap=softcap, **others
        )
    if unknown := [name for name in _UNSUPPORTED if others.get(name) is not None]:
        raise NotImplementedError(f"attention with {', '.join(unknown)}")
    if not others.get("is_causal", getattr(module, "is_causal", True)):
        raise NotImplementedError("attention that is not causal")
    if flash:
        query, key, value = _autocast(query, key, value)
    if flash and cu_seq_lens_q is not None and _can_use_flash(query, dropout, softcap, sliding_window):
        return _flash(query, key, value, cu_seq_lens_q, max_length_q, scaling, sliding_window), None
    attend = partial(_attend_sample, dropout=dropout, scaling=scaling, window=sliding_window, softcap=softcap)
    return _sample_by_sample(attend, query, key, value, cu_seq_lens_q), None


@torch.compiler.disable
def _sample_by_sample(
    attend: Callable, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bounds: torch.Tensor | None
) -> torch.Tensor:
    """Not compiled: the lengths of samples differ in every batch, so torch would compile it again in every batch."""
    ends = [0, query.shape[2]] if bounds is None else bounds.tolist()
    lengths = [end - start for start, end in pairwise(ends)]
    samples = zip(*(states.split(lengths, dim=2) for states in (query, key, value)), strict=True)
    return torch.cat([attend(*sample).transpose(1, 2) for sample in samples], dim=1)


def _attend_sample(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    dropout: float,
    scaling: float | None,
    window: int | None,
    softcap: float | None,
) -> torch.Tensor:
    """Attention of one sample. A query sees itself and the keys before it, `window` of them in all.

    `softcap` turns scores into `softcap · tanh(scores / softcap)`.
    """
    length, groups = query.shape[2], query.shape[1] // key.shape[1]
    plain = not softcap and not (window and window < length)
    use_gqa = plain and (query.is_cpu or query.dtype.itemsize == 2)  # elsewhere no fast kernel supports it
    if groups > 1 and not use_gqa:
        key, value = repeat_kv(key, groups), repeat_kv(value, groups)
    if plain:
        return F.scaled_dot_product_attention(
            query, key, value, dropout_p=dropout, is_causal=True, scale=scaling, enable_gqa=groups > 1 and use_gqa
        )
    mask = torch.ones(length, length, dtype=torch.bool, device=query.device).tril()
    mask = mask.triu(1 - window) if window else mask
    if not softcap:
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=dropout, scale=scaling)
    scores = query @ key.transpose(2, 3) * (scaling or query.shape[-1] ** -0.5)
    scores = (torch.tanh(scores / softcap) * softcap).masked_fill(~mask, float("-inf"))
    weights = scores.softmax(dim=-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(query.dtype)
    return F.dropout(weights, dropout) @ value


def _autocast(*states: torch.Tensor) -> list[torch.Tensor]:
    """Cast as autocast does for SDPA: rotary embeddings return float32, which FlashAttention does not accept."""
    device = states[0].device.type
    if not torch.is_autocast_enabled(device):
        return list(states)
    return [state.to(torch.get_autocast_dtype(device)) for state in states]


def _can_use_flash(query: torch.Tensor, dropout: float, softcap: float | None, window: int | None) -> bool:
    is_half = query.dtype in (torch.float16, torch.bfloat16)
    plain = not dropout and not softcap and (not window or "window_size" in _VARLEN_OPTIONS)
    return query.is_cuda and is_half and plain and query.shape[-1] <= 256


def _flash(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bounds: torch.Tensor,
    longest: int | None,
    scaling: float | None,
    window: int | None,
) -> torch.Tensor:
    """FlashAttention of all samples in one kernel, with the options that this version of PyTorch has."""
    options: dict = {"enable_gqa": True} if "enable_gqa" in _VARLEN_OPTIONS else {}
    if not options:
        groups = query.shape[1] // key.shape[1]
        key, value = repeat_kv(key, groups), repeat_kv(value, groups)
    if "window_size" in _VARLEN_OPTIONS:
        options["window_size"] = (window - 1 if window else -1, 0)
    else:
        options["is_causal"] = True
    if scaling is not None and "scale" in _VARLEN_OPTIONS:
        options["scale"] = scaling
    elif scaling is not None:
        query = query * (scaling * query.shape[-1] ** 0.5)
    longest = int(bounds.diff().max()) if longest is None else longest
    query, key, value = (states[0].transpose(0, 1) for states in (query, key, value))
    return varlen_attn(query, key, value, bounds, bounds, longest, longest, **options)[None]


def packed_mask(
    *, q_length: int, kv_length: int, attention_mask: torch.Tensor | None = None, **others
) -> torch.Tensor | None:
    """No mask for packed samples; transformers' SDPA mask for padding and caches."""
    if attention_mask is None and q_length == kv_length:
        return None
    return sdpa_mask(q_length=q_length, kv_length=kv_length, attention_mask=attention_mask, **others)


AttentionInterface.register(PACKED, packed_attention)
AttentionInterface.register(PACKED_FLASH, partial(packed_attention, flash=True))
AttentionMaskInterface.register(PACKED, packed_mask)
AttentionMaskInterface.register(PACKED_FLASH, packed_mask)
