"""What a language model does with a batch, as it runs: its positions, its masks, and its last hidden states."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from torch.nn.attention.flex_attention import BlockMask, create_mask
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import sdpa_mask

from tuning.model.attention import decoder_attention, get_base
from tuning.model.head import find_code
from tuning.model.packed_attention import RowMasks, packed_mask
from tuning.model.row_by_row import find_layers, row_cutter


@dataclass(frozen=True)
class DecoderCall:
    """A call of the language model: the `position_ids` it got, and the last hidden states `[T, H]` of its first row.

    `masks`: the attention mask that each of its layers got.
    """

    positions: torch.Tensor | None
    hidden: torch.Tensor
    masks: list[Any]


def find_first_position(call: DecoderCall) -> int:
    """The position of a row's first token."""
    return int(call.positions[..., 0].max()) if call.positions is not None else 0


def are_same(expected: torch.Tensor | None, found: torch.Tensor) -> bool:
    """Whether positions `[…, T]` are the expected ones in each axis. None stands for the tokens counted.

    We add an axis with the tokens counted before the others, and give a row of text as many axes as one with images.
    """
    found = found.reshape(-1, found.shape[-1])
    count = torch.arange(found.shape[-1], device=found.device)[None]
    expected = count if expected is None else expected.reshape(-1, expected.shape[-1]).to(found.device)
    if 1 < len(expected) < len(found):
        expected = torch.cat([count.expand(len(found) - len(expected), -1), expected])
    return torch.equal(found, expected.expand(found.shape))


def have_same_masks(separate: Sequence[DecoderCall], packed: DecoderCall, ends: Sequence[int]) -> bool:
    """Whether each layer got the same mask for each packed row as for the separate row."""
    for number, call in enumerate(separate):
        cut, length = row_cutter(number, ends), ends[number + 1] - ends[number]
        if len(call.masks) != len(packed.masks):
            return False
        for expected, found in zip(call.masks, packed.masks, strict=True):
            if isinstance(found, BlockMask) and not isinstance(found, RowMasks):
                found = create_mask(found.mask_mod, 1, 1, ends[-1], ends[-1], device=packed.hidden.device)
            if not torch.equal(see_mask(expected, length), see_mask(cut(found), length)):
                return False
    return True


def see_mask(mask: Any, length: int) -> torch.Tensor:
    """A layer's attention mask for a row of `length` tokens as booleans `[T, T]`, true where a token sees another."""
    mask = mask.rows[0] if isinstance(mask, RowMasks) else mask
    if not isinstance(mask, torch.Tensor) or mask.dim() != 4:  # causal, or of a layer without attention
        return torch.ones(length, length, dtype=torch.bool).tril()
    return (mask[0, 0] if mask.dtype == torch.bool else mask[0, 0] == 0).cpu()


def run_all(
    model: PreTrainedModel | PeftModel, forward: Callable[..., Any], batches: Sequence[dict[str, Any]]
) -> list[DecoderCall]:
    """What the language model did with each batch. Raises what the model raises."""
    with record_decoder_calls(model) as calls:
        for batch in batches:
            run_quietly(forward, batch)
    return calls


@torch.no_grad()
def run_quietly(forward: Callable[..., Any], batch: dict[str, Any]) -> None:
    """Run the model as in training, without a graph."""
    forward(**batch, num_items_in_batch=1)


def find_decoder(model: PreTrainedModel) -> PreTrainedModel:
    """The layers that give the last hidden states. `get_decoder` of Llama 4 gives them with their output head."""
    decoder = model.get_decoder()
    code = find_code(decoder)
    return code.body if code else decoder


@contextmanager
def record_decoder_calls(model: PreTrainedModel | PeftModel) -> Iterator[list[DecoderCall]]:
    """A list that grows with each call of the language model."""
    decoder = find_decoder(get_base(model))
    calls, masks = list[DecoderCall](), list[Any]()

    def record(decoder: Any, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        calls.append(DecoderCall(kwargs.get("position_ids"), output[0][0].float(), masks.copy()))
        masks.clear()

    def record_mask(layer: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        masks.append(kwargs.get("attention_mask"))

    hooks = [layer.register_forward_pre_hook(record_mask, with_kwargs=True) for layer in find_layers(decoder).values()]
    hooks.append(decoder.register_forward_hook(record, with_kwargs=True))
    try:
        yield calls
    finally:
        for hook in hooks:
            hook.remove()


@dataclass
class MaskRecord:
    """The masks and windows that a model asks for over a row.

    Packed attention makes no mask and only knows its own window; SDPA knows only the mask. `mask_windows` are the
    windows of masks, `attention_windows` those that attention gets. `is_unusual`: some mask is more or less than causal
    within its window. `attended`: ids of the modules that called attention.
    """

    mask_windows: set[int] = field(default_factory=set)
    attention_windows: set[int] = field(default_factory=set)
    is_unusual: bool = False
    attended: set[int] = field(default_factory=set)

    @property
    def is_needed(self) -> bool:
        """Whether packed attention would give other results because it has no mask."""
        return self.is_unusual or self.mask_windows != self.attention_windows

    def add(self, mask: torch.Tensor | None, window: int | None) -> None:
        """Record a mask `[B, 1, T, T]`, true where a token (row) sees another (column)."""
        self.mask_windows |= {window} if window else set()
        if mask is None:
            return
        expected = torch.ones(mask.shape[-2:], dtype=torch.bool).tril()
        expected = expected.triu(1 - window) if window else expected
        self.is_unusual |= not torch.equal(mask.cpu().bool(), expected.expand(mask.shape))


@contextmanager
def record_masks(model: PreTrainedModel | PeftModel, attention: str) -> Iterator[MaskRecord]:
    """Run the language model with packed `attention` while recording the masks that this attention leaves out.

    The recording attention stays registered, as transformers has no way to remove a name. Its name contains
    `attention`, because transformers asks for "flash" in the name.
    """
    record, name = MaskRecord(), f"recorded_{attention}"

    def attend(module: nn.Module, *args: Any, sliding_window: int | None = None, **others: Any) -> Any:
        record.attended.add(id(module))
        record.attention_windows |= {sliding_window} if sliding_window else set()
        return AttentionInterface()[attention](module, *args, sliding_window=sliding_window, **others)

    def make_mask(*, q_length: int, kv_length: int, attention_mask: torch.Tensor | None = None, **others: Any) -> Any:
        sizes = {"q_length": q_length, "kv_length": kv_length}
        if attention_mask is None and q_length == kv_length:
            record.add(sdpa_mask(**sizes, **{**others, "allow_is_causal_skip": False}), others.get("local_size"))
        return packed_mask(**sizes, attention_mask=attention_mask, **others)

    AttentionInterface.register(name, attend)
    AttentionMaskInterface.register(name, make_mask)
    with decoder_attention(model, name):
        yield record
