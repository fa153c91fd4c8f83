"""Attention over samples packed end to end in one row: each sees only itself, without a mask of tokens × tokens.

Registered under three names through transformers' attention interface, which this module extends and does not patch:
https://huggingface.co/docs/transformers/attention_interface
"""

import inspect
from collections.abc import Callable, Sequence
from functools import cached_property, partial
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention.flex_attention import BlockMask
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from tuning.model.row_by_row import RUNNING, row_ends

PACKED, PACKED_FLASH, PACKED_MASKED = "packed", "packed_flash", "packed_masked"
"""Names to set as `_attn_implementation`: PyTorch's SDPA sample by sample, or its FlashAttention for all samples at
once. The third does what the first does, with the mask that the model asks for within each sample (`RowMasks`).
"""
_VARLEN_OPTIONS = set(inspect.signature(varlen_attn).parameters)  # torch 2.10 has is_causal, later ones window_size
_UNSUPPORTED = ("s_aux", "position_bias")


class RowMasks(BlockMask):
    """The mask that a model asks for over a packed batch, row by row.

    Models hand this object to their layers as the attention mask. transformers looks for the class and the shape, to
    see that a mask is made. `ends`: where rows begin, and where the last one ends. `options`: what transformers gives a
    mask function, such as `mask_function` and `device`.
    """

    def __init__(self, ends: Sequence[int], **options: Any):
        self.ends, self.options = ends, {**options, "attention_mask": None, "allow_is_causal_skip": False}

    @property
    def shape(self) -> tuple[int, ...]:
        return 1, 1, self.ends[-1], self.ends[-1]

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def for_row(self, number: int) -> "RowMasks":
        """The mask of a row that runs alone."""
        row = RowMasks([0, self.ends[number + 1] - self.ends[number]], **self.options)
        row.rows = [self.rows[number]]
        return row

    @cached_property
    def rows(self) -> list[torch.Tensor | None]:
        """For each row, its mask `[1, 1, t, t]`, true where a token (row) sees another; None where it is causal."""
        masks = [self._make(start, end - start) for start, end in pairwise(self.ends)]
        causal = torch.stack([(mask == torch.ones_like(mask).tril()).all() for mask in masks]).tolist()
        return [None if is_causal else mask for mask, is_causal in zip(masks, causal, strict=True)]

    def _make(self, start: int, length: int) -> torch.Tensor:
        place = dict(q_length=length, kv_length=length, q_offset=start, kv_offset=start)
        return sdpa_mask(**{**self.options, **place})


def packed_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | RowMasks | None,
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
    tokens. Without it every row is one sample. `RowMasks` have the whole truth, windows included. A call with a mask
    only (padding), or with fewer queries than keys (a cache), goes to transformers' SDPA. Raises `NotImplementedError`
    for what this function would silently leave out: attention sinks, biases, and a mask together with `cu_seq_lens_q`.
    """
    ends: Sequence[int] | None = None
    masks, has_masks = None, isinstance(attention_mask, RowMasks)
    if isinstance(attention_mask, RowMasks):
        ends, masks = attention_mask.ends, attention_mask.rows
        masks = masks if any(mask is not None for mask in masks) else None
        attention_mask, sliding_window = None, None
    if attention_mask is not None and cu_seq_lens_q is not None:
        raise NotImplementedError("attention over packed rows with a mask of the model's own")
    if attention_mask is not None or query.shape[2] != key.shape[2]:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, softcap=softcap, **others
        )
    if unknown := [name for name in _UNSUPPORTED if others.get(name) is not None]:
        raise NotImplementedError(f"attention with {', '.join(unknown)}")
    if not has_masks and not others.get("is_causal", getattr(module, "is_causal", True)):
        raise NotImplementedError("attention that is not causal")
    if flash:
        query, key, value = _autocast(query, key, value)
    can_use_flash = flash and masks is None and _can_use_flash(query, dropout, softcap, sliding_window)
    if can_use_flash and cu_seq_lens_q is not None:
        return _flash(query, key, value, cu_seq_lens_q, max_length_q, scaling, sliding_window), None
    attend = partial(_attend_sample, dropout=dropout, scaling=scaling, window=sliding_window, softcap=softcap)
    ends = ends or row_ends(cu_seq_lens_q) or [0, query.shape[2]]
    return _sample_by_sample(attend, query, key, value, ends, masks), None


@torch.compiler.disable
def _sample_by_sample(
    attend: Callable,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    ends: Sequence[int],
    masks: Sequence[torch.Tensor | None] | None,
) -> torch.Tensor:
    """Not compiled: the lengths of samples differ in every batch, so torch would compile it again in every batch."""
    lengths = [end - start for start, end in pairwise(ends)]
    parts = [states.split(lengths, dim=2) for states in (query, key, value)]
    samples = zip(*parts, masks or [None] * len(lengths), strict=True)
    return torch.cat([attend(*sample).transpose(1, 2) for sample in samples], dim=1)


def _attend_sample(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    *,
    dropout: float,
    scaling: float | None,
    window: int | None,
    softcap: float | None,
) -> torch.Tensor:
    """Attention of one sample. Without a `mask`, a query sees itself and the keys before it, `window` of them in all.

    `softcap` turns scores into `softcap · tanh(scores / softcap)`.
    """
    length, groups = query.shape[2], query.shape[1] // key.shape[1]
    plain = mask is None and not softcap and not (window and window < length)
    use_gqa = plain and (query.is_cpu or query.dtype.itemsize == 2)  # elsewhere no fast kernel supports it
    if groups > 1 and not use_gqa:
        key, value = repeat_kv(key, groups), repeat_kv(value, groups)
    if plain:
        return F.scaled_dot_product_attention(
            query, key, value, dropout_p=dropout, is_causal=True, scale=scaling, enable_gqa=groups > 1 and use_gqa
        )
    if mask is None:
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


def row_masks(*, q_length: int, kv_length: int, attention_mask: torch.Tensor | None = None, **others: Any) -> Any:
    """`RowMasks` for packed samples; transformers' SDPA mask for padding and caches."""
    if ends := row_ends(RUNNING.get()):
        return RowMasks(ends, **others)
    return sdpa_mask(q_length=q_length, kv_length=kv_length, attention_mask=attention_mask, **others)


AttentionInterface.register(PACKED, packed_attention)
AttentionInterface.register(PACKED_FLASH, partial(packed_attention, flash=True))
AttentionInterface.register(PACKED_MASKED, partial(packed_attention, flash=True))
AttentionMaskInterface.register(PACKED, packed_mask)
AttentionMaskInterface.register(PACKED_FLASH, packed_mask)
AttentionMaskInterface.register(PACKED_MASKED, row_masks)
