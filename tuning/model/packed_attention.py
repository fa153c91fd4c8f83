"""Attention over samples that lie end to end in one row: each sees itself only, and no mask of tokens × tokens exists.

transformers' attention interface: https://huggingface.co/docs/transformers/attention_interface
"""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
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
"""Names to set as `_attn_implementation`: PyTorch's SDPA sample by sample, and its FlashAttention over all at once."""

_VARLEN_TAKES = set(inspect.signature(varlen_attn).parameters)  # torch 2.10 has is_causal, later ones window_size
_CANNOT = ("s_aux", "position_bias")


@dataclass
class MaskWatch:
    """What a model asks of masks and attention while it is tried. `bounds`: where samples begin and end.

    `limits` are the windows of masks, `windows` those given to attention: SDPA heeds the first, this attention the
    second. `odd`: a mask that is more or less than causal within its window and its sample.
    """

    bounds: list[int]
    limits: set[int] = field(default_factory=set)
    windows: set[int] = field(default_factory=set)
    odd: bool = False

    def see(self, mask: torch.Tensor | None, limit: int | None) -> None:
        """Note a mask `[B, 1, T, T]`, true where a token (row) sees another."""
        self.limits |= {limit} if limit else set()
        if mask is None:
            return
        sample = torch.bucketize(torch.arange(mask.shape[-1]), torch.tensor(self.bounds[1:]), right=True)
        expected = (sample[:, None] == sample).tril()
        expected = expected.triu(1 - limit) if limit else expected
        self.odd |= not torch.equal(mask.cpu().bool(), expected.expand(mask.shape))


_watches: list[MaskWatch] = []


@contextmanager
def watch_masks(bounds: list[int]) -> Iterator[MaskWatch]:
    """Have the masks that packed attention leaves out made and looked at."""
    _watches.append(MaskWatch(bounds))
    try:
        yield _watches[-1]
    finally:
        _watches.pop()


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

    `cu_seq_lens_q` `[samples + 1]`: where each sample of the one row (B = 1) begins and the last one ends, in tokens;
    without it every row is one sample. Calls with only a mask (padding) or fewer queries than keys (a cache) are
    transformers' SDPA. Raises `NotImplementedError` for what would be left out silently: attention sinks and biases, a
    mask beside `cu_seq_lens_q`.
    """
    if attention_mask is not None and cu_seq_lens_q is not None:
        raise NotImplementedError("a mask of the model's own")
    for watch in _watches:
        watch.windows |= {sliding_window} if sliding_window else set()
    if attention_mask is not None or query.shape[2] != key.shape[2]:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, softcap=softcap, **others
        )
    if unknown := [name for name in _CANNOT if others.get(name) is not None]:
        raise NotImplementedError(f"attention with {', '.join(unknown)}")
    if not others.get("is_causal", getattr(module, "is_causal", True)):
        raise NotImplementedError("attention that is not causal")
    groups = query.shape[1] // key.shape[1]
    if flash:
        query, key, value = _as_autocast(query, key, value)
    if flash and cu_seq_lens_q is not None and _suits_flash(query, dropout, softcap, sliding_window):
        return _flash(query, key, value, cu_seq_lens_q, max_length_q, scaling, sliding_window, groups), None
    attend = partial(_attend, dropout=dropout, scaling=scaling, window=sliding_window, softcap=softcap)
    return _one_by_one(attend, query, key, value, cu_seq_lens_q), None


@torch.compiler.disable
def _one_by_one(
    attend: Callable, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bounds: torch.Tensor | None
) -> torch.Tensor:
    """Samples have other lengths every time: compiled, this would be compiled again every time."""
    ends = [0, query.shape[2]] if bounds is None else bounds.tolist()
    lengths = [end - start for start, end in pairwise(ends)]
    samples = zip(*(states.split(lengths, dim=2) for states in (query, key, value)), strict=True)
    return torch.cat([attend(*sample).transpose(1, 2) for sample in samples], dim=1)


def _attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    dropout: float,
    scaling: float | None,
    window: int | None,
    softcap: float | None,
) -> torch.Tensor:
    """One sample. A query sees itself and the keys before it, `window` in all; `softcap · tanh(scores / softcap)`."""
    length, groups = query.shape[2], query.shape[1] // key.shape[1]
    plain = not softcap and not (window and window < length)
    takes_groups = plain and (query.is_cpu or query.dtype.itemsize == 2)  # else no fast kernel does
    if groups > 1 and not takes_groups:
        key, value = repeat_kv(key, groups), repeat_kv(value, groups)
    if plain:
        return F.scaled_dot_product_attention(
            query, key, value, dropout_p=dropout, is_causal=True, scale=scaling, enable_gqa=groups > 1 and takes_groups
        )
    mask = torch.ones(length, length, dtype=torch.bool, device=query.device).tril()
    mask = mask.triu(1 - window) if window else mask
    if not softcap:
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=dropout, scale=scaling)
    scores = query @ key.transpose(2, 3) * (scaling or query.shape[-1] ** -0.5)
    scores = (torch.tanh(scores / softcap) * softcap).masked_fill(~mask, float("-inf"))
    weights = scores.softmax(dim=-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(query.dtype)
    return F.dropout(weights, dropout) @ value


def _as_autocast(*states: torch.Tensor) -> list[torch.Tensor]:
    """What autocast does for SDPA: rotary embeddings give float32, which FlashAttention cannot take."""
    kind = states[0].device.type
    if not torch.is_autocast_enabled(kind):
        return list(states)
    return [state.to(torch.get_autocast_dtype(kind)) for state in states]


def _suits_flash(query: torch.Tensor, dropout: float, softcap: float | None, window: int | None) -> bool:
    is_half = query.dtype in (torch.float16, torch.bfloat16)
    plain = not dropout and not softcap and (not window or "window_size" in _VARLEN_TAKES)
    return query.is_cuda and is_half and plain and query.shape[-1] <= 256


def _flash(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bounds: torch.Tensor,
    longest: int | None,
    scaling: float | None,
    window: int | None,
    groups: int,
) -> torch.Tensor:
    """FlashAttention of all samples in one kernel, as far as this version of PyTorch takes its options."""
    options: dict = {"enable_gqa": True} if "enable_gqa" in _VARLEN_TAKES else {}
    if not options:
        key, value = repeat_kv(key, groups), repeat_kv(value, groups)
    if "window_size" in _VARLEN_TAKES:
        options["window_size"] = (window - 1 if window else -1, 0)
    else:
        options["is_causal"] = True
    if scaling is not None and "scale" in _VARLEN_TAKES:
        options["scale"] = scaling
    elif scaling is not None:
        query = query * (scaling * query.shape[-1] ** 0.5)
    longest = int(bounds.diff().max()) if longest is None else longest
    query, key, value = (states[0].transpose(0, 1) for states in (query, key, value))
    return varlen_attn(query, key, value, bounds, bounds, longest, longest, **options)[None]


def _mask_where_padded(*, q_length: int, kv_length: int, attention_mask: torch.Tensor | None = None, **others):
    """No mask for packed samples; the usual one for padding and caches."""
    if attention_mask is None and q_length == kv_length:
        for watch in _watches:
            mask = sdpa_mask(q_length=q_length, kv_length=kv_length, **{**others, "allow_is_causal_skip": False})
            watch.see(mask, others.get("local_size"))
        return None
    return sdpa_mask(q_length=q_length, kv_length=kv_length, attention_mask=attention_mask, **others)


AttentionInterface.register(PACKED, packed_attention)
AttentionInterface.register(PACKED_FLASH, partial(packed_attention, flash=True))
for _name in (PACKED, PACKED_FLASH):
    AttentionMaskInterface.register(_name, _mask_where_padded)
