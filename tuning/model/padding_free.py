"""Whether a model gives the same results for packed rows as for separate ones, tried before the first step."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate, pairwise
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedModel

from tuning.errors import UserError, describe_failure, try_optional
from tuning.model.attention import (
    Attention,
    decoder_attention,
    find_unknown_layers,
    get_base,
    set_decoder_attention,
)
from tuning.model.decoder_calls import (
    DecoderCall,
    are_same,
    find_decoder,
    find_first_position,
    have_same_masks,
    record_masks,
    run_all,
    run_quietly,
)
from tuning.model.packed_attention import PACKED, PACKED_FLASH, PACKED_MASKED
from tuning.model.row_by_row import find_layers, layers_by_row, run_layers_by_row

CHUNKED = "chunked_attention"  # a kind of layers whose mask changes at certain positions
WITH_MASKS = (PACKED_MASKED, "flex_attention", None)  # attention that gets masks in packed rows
TOLERANCE, HALF_TOLERANCE = 1e-4, 0.05  # of the norm; packed wrongly, a row is off by more, but not always by much


@dataclass(frozen=True)
class Packing:
    """How a model takes packed rows, or why it does not.

    `attention`: of its language model; None stands for the one it was loaded with, and its masks. `by_row`: the names
    of the layers of its language model that run row by row. `first_position`: of each row, 1 for PaliGemma.
    `masked`: batches have a mask of ones, so that the model makes its masks as for one row (transformers 5.24 looks
    image blocks up at the wrong places in packed rows). `reason`: why batches are padded; "" where they need not.
    """

    attention: str | None = None
    by_row: tuple[str, ...] = ()
    first_position: int = 0
    masked: bool = False
    reason: str = ""

    def apply(self, model: PreTrainedModel | PeftModel) -> None:
        """Run the language model so from now on."""
        base = get_base(model)
        if self.attention:
            set_decoder_attention(model, self.attention)
        run_layers_by_row(find_decoder(base), self.by_row, base.packed_rows)

    def adapt(self, batch: dict[str, Any]) -> dict[str, Any]:
        """A padding-free batch as this model needs it."""
        positions = batch["position_ids"] + self.first_position
        mask = {"attention_mask": torch.ones_like(batch["input_ids"])} if self.masked else {}
        return {**batch, "position_ids": positions, **mask}

    @contextmanager
    def applied(self, model: PreTrainedModel | PeftModel) -> Iterator[None]:
        """Run the language model so while inside."""
        base = get_base(model)
        decoder = find_decoder(base)
        name = self.attention or base.config.get_text_config()._attn_implementation
        with decoder_attention(model, name), layers_by_row(decoder, self.by_row, base.packed_rows):
            yield


@dataclass(frozen=True)
class TrialBatches:
    """The batches of a trial, of up to four short rows.

    `separate`: each row as a padded batch of its own. `packed`: all rows in one padding-free batch. `changed`: the
    same batch, but the row of number `place` has other pixels and another last token.
    """

    separate: Sequence[dict[str, Any]]
    packed: dict[str, Any]
    changed: dict[str, Any]
    place: int

    @property
    def ends(self) -> list[int]:
        """Where packed rows begin, and where the last one ends."""
        return [0, *accumulate(batch["input_ids"].shape[1] for batch in self.separate)]


def find_packing(
    model: PreTrainedModel | PeftModel,
    forward: Callable[..., Any],
    make_batches: Callable[[], TrialBatches],
    attention: Attention,
    *,
    half: bool,
    by_row: bool = True,
    agree: Callable[[str], str] = lambda fault: fault,
) -> Packing:
    """The fastest way in which this model gives packed rows what it gives them separately, found by trying.

    `forward` is the model as it is wrapped for training; it takes a batch on the CPU. `make_batches` may raise, where
    the processor does not take a second row. `half`: the model computes in 16 bits. `by_row`: layers may run row by
    row; not under ZeRO-3, which gathers weights in every call of a module. `agree` gives all processes the same fault,
    if one has any, so that all of them try the same. The model's mode and random state stay as they were.
    """
    limit = HALF_TOLERANCE if half else TOLERANCE

    def attempt(run: Callable[[], Any]) -> tuple[Any, str]:
        tried = try_optional(run, catch_user_errors=True)
        return tried.value, agree(describe_fault(tried.error) if tried.error else "")

    was_training = model.training
    model.eval()
    try:
        batches, fault = attempt(make_batches)
        if fault:
            return Packing(reason=fault)
        separate, fault = attempt(lambda: run_all(model, forward, batches.separate))
        if fault:
            return Packing(reason=fault)
        faults = []
        for packing in list_packings(model, forward, batches, attention):
            if packing.by_row and not by_row:
                continue
            packing = replace(packing, first_position=find_first_position(separate[0]))
            trial, fault = attempt(partial(run_trial, model, forward, batches, separate, packing))
            fault = fault or agree(trial.find_fault(limit))
            if not fault:
                return packing
            faults.append(fault)
    finally:
        model.train(was_training)
    return Packing(reason=faults[0] if faults else "its layers would run row by row, which ZeRO-3 cannot share out")


def describe_fault(error: Exception) -> str:
    """Why packed rows cannot be tried, or fail."""
    if isinstance(error, UserError):
        return error.problem.rstrip(".")
    return f"it fails on packed rows ({describe_failure(error)})"


def list_packings(
    model: PreTrainedModel | PeftModel, forward: Callable[..., Any], batches: TrialBatches, attention: Attention
) -> Iterator[Packing]:
    """Ways to run packed rows, the fastest first.

    The first leaves to the model what is not attention: some take the bounds of rows. Then layers without attention run
    row by row, and at last all of them, each as it is.
    """
    base = get_base(model)
    decoder, config = find_decoder(base), base.config.get_text_config()
    layers = [*find_layers(decoder)]
    unknown, has_chunks = find_unknown_layers(config, layers), CHUNKED in (getattr(config, "layer_types", None) or ())
    if attention.packed:
        own = attention.packed in (PACKED, PACKED_FLASH)
        with record_masks(model, attention.packed if own else PACKED) as masks:
            for batch in batches.separate:
                unmasked = {name: value for name, value in batch.items() if name != "attention_mask"}
                try_optional(partial(run_quietly, forward, unmasked), catch_user_errors=True)
        chosen = PACKED_MASKED if own and masks.is_needed else attention.packed
        attended = [name for name, module in decoder.named_modules() if id(module) in masks.attended]
        others = [name for name in layers if not any(inner.startswith(f"{name}.") for inner in attended)]
        ways = dict.fromkeys(
            [tuple(unknown), tuple(name for name in layers if name in {*unknown, *others}), tuple(layers)]
        )
        yield from (Packing(chosen, names) for names in ways)
        if masks.is_needed and not has_chunks:
            yield from (Packing(chosen, names, masked=True) for names in ways)
    yield Packing(None, tuple(layers))
    if not has_chunks:
        yield Packing(None, tuple(layers), masked=True)


@dataclass(frozen=True)
class Trial:
    """What the language model did with each of `TrialBatches`. `rows` are slices of a packed batch, in tokens."""

    rows: Sequence[slice]
    separate: Sequence[DecoderCall]
    packed: DecoderCall
    changed: DecoderCall
    place: int
    has_masks: bool

    def find_fault(self, tolerance: float) -> str:
        """What is wrong with packed rows; "" where nothing is. All but the last finding are exact in any precision."""
        if not self.has_own_positions:
            return "packed rows get other position ids than separate rows"
        if self.has_masks and not have_same_masks(self.separate, self.packed, [0, *(row.stop for row in self.rows)]):
            return "packed rows get other attention masks than separate rows"
        if self.leaks:
            return "packed rows would change each other"
        if not self.distance <= tolerance:
            return f"the results of packed rows differ from those of separate rows, by {self.distance:.1g}"
        return ""

    @property
    def has_own_positions(self) -> bool:
        """Whether each packed row has the position ids that it has when it is separate."""
        found = self.packed.positions
        pairs = zip(self.separate, self.rows, strict=True)
        return found is not None and all(are_same(call.positions, found[..., row]) for call, row in pairs)

    @property
    def leaks(self) -> bool:
        """Whether the changed row changed another one."""
        others = [row for number, row in enumerate(self.rows) if number != self.place]
        return any(not torch.equal(self.packed.hidden[row], self.changed.hidden[row]) for row in others)

    @property
    def distance(self) -> float:
        """The largest ‖packed − separate‖ / ‖separate‖ of a row's last hidden states."""
        found, separate = self.packed.hidden, [call.hidden for call in self.separate]
        pairs = zip(self.rows, separate, strict=True)
        return max(((found[row] - hidden).norm() / hidden.norm()).item() for row, hidden in pairs)


def run_trial(
    model: PreTrainedModel | PeftModel,
    forward: Callable[..., Any],
    batches: TrialBatches,
    separate: Sequence[DecoderCall],
    packing: Packing,
) -> Trial:
    """Run packed rows in a certain way. Every process makes the same calls, whatever their results."""
    with packing.applied(model):
        packed, changed = run_all(model, forward, [packing.adapt(batches.packed), packing.adapt(batches.changed)])
    rows, has_masks = [slice(*ends) for ends in pairwise(batches.ends)], packing.attention in WITH_MASKS
    return Trial(rows, separate, packed, changed, batches.place, has_masks)
