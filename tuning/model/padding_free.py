"""Whether a model gives the same results for packed rows as for separate ones, tried before the first step."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from typing import Any

import torch
from peft import PeftModel
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig, PreTrainedModel
from transformers.masking_utils import sdpa_mask

from tuning.errors import describe_failure, try_optional
from tuning.model.attention import Attention, decoder_attention, why_layers_need_padding
from tuning.model.head import find_code
from tuning.model.packed_attention import PACKED, PACKED_FLASH, packed_mask

TOLERANCE, HALF_TOLERANCE = 1e-4, 0.05  # of the norm; packed wrongly, a row is off by more, but not always by much


def why_padding_is_needed_by_structure(
    attention: Attention, config: PreTrainedConfig, *, nested_images: bool, padding_free: bool | str = "auto"
) -> str:
    """Why batches must be padded, as far as that is known without running the model; "" where nothing is against it.

    `padding_free` is the user's option.
    """
    if padding_free is False:
        return "padding_free is false"
    if nested_images:
        return "the processor keeps the images of each row apart"
    if attention.packed is None:
        return f"attention {attention.loaded} cannot keep packed rows apart"
    return why_layers_need_padding(config)


def why_padding_is_needed(
    model: PreTrainedModel | PeftModel,
    forward: Callable[..., Any],
    make_batches: Callable[[], "TrialBatches"],
    attention: Attention,
    *,
    nested_images: bool,
    half: bool,
) -> str:
    """Why this model needs padded batches, by its structure or by a trial; "" where packed rows give the same results.

    `forward` is the model as it is wrapped for training; it takes a batch on the CPU. `make_batches` may raise, where
    the processor does not take a row without an image. `half`: the model computes in 16 bits.
    """
    if reason := why_padding_is_needed_by_structure(attention, model.config, nested_images=nested_images):
        return reason
    trial = try_optional(lambda: run_trial(model, forward, make_batches(), attention), catch_user_errors=True)
    if trial.error:
        return f"it fails on packed rows ({describe_failure(trial.error)})"
    assert trial.value is not None
    return trial.value.why_padding_is_needed(HALF_TOLERANCE if half else TOLERANCE)


@dataclass(frozen=True)
class TrialBatches:
    """The batches of a trial, of three short rows; the first row has an image, the second has none.

    `separate`: each row as a padded batch of its own. `packed`: all rows in one padding-free batch. `changed`: the
    same batch, but the first row has other pixels and another last token.
    """

    separate: Sequence[dict[str, Any]]
    packed: dict[str, Any]
    changed: dict[str, Any]


@dataclass(frozen=True)
class DecoderCall:
    """A call of the language model: the `position_ids` it got, and the last hidden states `[T, H]` of its first row."""

    positions: torch.Tensor | None
    hidden: torch.Tensor


@dataclass(frozen=True)
class Trial:
    """What the language model did with each of `TrialBatches`, and with `packed` under the attention of the run.

    `rows` are the slices of a packed batch, in tokens. `masks` were recorded with `packed` and `changed`.
    """

    rows: Sequence[slice]
    separate: Sequence[DecoderCall]
    packed: DecoderCall
    changed: DecoderCall
    packed_as_in_training: DecoderCall
    masks: "MaskRecord"

    def why_padding_is_needed(self, tolerance: float) -> str:
        """What is wrong with packed rows; "" where nothing is. All but the last finding are exact in any precision."""
        if not self.has_own_positions:
            return "packed rows get other position ids than separate rows"
        if self.masks.is_needed:
            return "its attention mask is more or less than causal, and packed rows have no mask"
        if self.leaks:
            return "packed rows would change each other"
        if not self.distance <= tolerance:
            return f"the results of packed rows differ from those of separate rows, by {self.distance:.1g}"
        return ""

    @property
    def has_own_positions(self) -> bool:
        """Whether each packed row has the position ids that it has when it is separate."""
        if self.packed.positions is None:
            return False
        for call, row in zip(self.separate, self.rows, strict=True):
            found = self.packed.positions[..., row]
            expected = call.positions
            if expected is None:
                expected = torch.arange(found.shape[-1], device=found.device)[None]
            if found.shape != expected.shape or not torch.equal(found, expected):
                return False
        return True

    @property
    def leaks(self) -> bool:
        """Whether another first row changed the rows after it."""
        end = self.rows[0].stop
        return not torch.equal(self.packed.hidden[end:], self.changed.hidden[end:])

    @property
    def distance(self) -> float:
        """The largest ‖packed − separate‖ / ‖separate‖ of a row's last hidden states."""
        found, separate = self.packed_as_in_training.hidden, [call.hidden for call in self.separate]
        pairs = zip(self.rows, separate, strict=True)
        return max(((found[row] - hidden).norm() / hidden.norm()).item() for row, hidden in pairs)


def run_trial(
    model: PreTrainedModel | PeftModel, forward: Callable[..., Any], batches: TrialBatches, attention: Attention
) -> Trial:
    """Run the model on rows, separate and packed; its attention, mode and random state stay as they were.

    Every process makes the same calls, whatever their results. Raises what the model raises.
    """
    assert attention.packed is not None
    bounds = [0, *accumulate(batch["input_ids"].shape[1] for batch in batches.separate)]
    observed = attention.packed if attention.packed in (PACKED, PACKED_FLASH) else PACKED
    was_training = model.training
    model.eval()
    try:
        with record_decoder_calls(model) as calls:
            for batch in batches.separate:
                run_quietly(forward, batch)
            with record_masks(model, observed, bounds) as masks:
                run_quietly(forward, batches.packed)
                run_quietly(forward, batches.changed)
            with decoder_attention(model, attention.packed):
                run_quietly(forward, batches.packed)
    finally:
        model.train(was_training)
    *separate, packed, changed, as_in_training = calls
    return Trial([slice(*ends) for ends in pairwise(bounds)], separate, packed, changed, as_in_training, masks)


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
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    calls: list[DecoderCall] = []

    def record(decoder: Any, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        calls.append(DecoderCall(kwargs.get("position_ids"), output[0][0].float()))

    inner = find_code(base)
    decoder = base.get_decoder() if inner is None or inner.owner is base else inner.body
    hook = decoder.register_forward_hook(record, with_kwargs=True)
    try:
        yield calls
    finally:
        hook.remove()


@dataclass
class MaskRecord:
    """The masks and windows that a model asks for, over rows that begin and end at `bounds`.

    Packed attention makes no mask and only knows its own window; SDPA knows only the mask. `mask_windows` are the
    windows of masks, `attention_windows` those that attention gets. `is_unusual`: some mask is more or less than causal
    within its window and its row.
    """

    bounds: list[int]
    mask_windows: set[int] = field(default_factory=set)
    attention_windows: set[int] = field(default_factory=set)
    is_unusual: bool = False

    @property
    def is_needed(self) -> bool:
        """Whether packed attention would give other results because it has no mask."""
        return self.is_unusual or self.mask_windows != self.attention_windows

    def add(self, mask: torch.Tensor | None, window: int | None) -> None:
        """Record a mask `[B, 1, T, T]`, true where a token (row) sees another (column)."""
        self.mask_windows |= {window} if window else set()
        if mask is None:
            return
        row = torch.bucketize(torch.arange(mask.shape[-1]), torch.tensor(self.bounds[1:]), right=True)
        expected = (row[:, None] == row).tril()
        expected = expected.triu(1 - window) if window else expected
        self.is_unusual |= not torch.equal(mask.cpu().bool(), expected.expand(mask.shape))


@contextmanager
def record_masks(model: PreTrainedModel | PeftModel, attention: str, bounds: list[int]) -> Iterator[MaskRecord]:
    """Run the language model with packed `attention` while recording the masks that this attention leaves out.

    The recording attention stays registered, as transformers has no way to remove a name. Its name contains
    `attention`, because transformers asks for "flash" in the name.
    """
    record, name = MaskRecord(bounds), f"recorded_{attention}"

    def attend(*args: Any, sliding_window: int | None = None, **others: Any) -> Any:
        record.attention_windows |= {sliding_window} if sliding_window else set()
        return AttentionInterface()[attention](*args, sliding_window=sliding_window, **others)

    def make_mask(*, q_length: int, kv_length: int, attention_mask: torch.Tensor | None = None, **others: Any) -> Any:
        sizes = {"q_length": q_length, "kv_length": kv_length}
        if attention_mask is None and q_length == kv_length:
            record.add(sdpa_mask(**sizes, **{**others, "allow_is_causal_skip": False}), others.get("local_size"))
        return packed_mask(**sizes, attention_mask=attention_mask, **others)

    AttentionInterface.register(name, attend)
    AttentionMaskInterface.register(name, make_mask)
    with decoder_attention(model, name):
        yield record
