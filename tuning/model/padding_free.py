"""Whether a model may be given padding-free batches: tried before the first step, against rows one by one."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedConfig, PreTrainedModel

from tuning.errors import UserError, is_out_of_memory
from tuning.model.attention import Attention, decoder_attention, why_layers_need_padding
from tuning.model.packed_attention import PACKED, PACKED_FLASH, watch_masks

TOLERANCE, HALF_TOLERANCE = 1e-4, 0.05  # of the norm; packed wrongly, a row is off by more, but not always by much
# What models raise that do not take rows end to end, and processors that do not take a row without an image.
CANNOT_RUN = (
    UserError,
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    RuntimeError,
    TypeError,
    ValueError,
)


@dataclass(frozen=True)
class TrialBatches:
    """Batches of three short rows, the first with an image, the second without.

    `alone`: each row in a padded batch of its own. `packed`: all of them end to end. `disturbed`: the same, but the
    first row has other pixels and another last token.
    """

    alone: Sequence[dict[str, Any]]
    packed: dict[str, Any]
    disturbed: dict[str, Any]


def why_padding_is_needed_by_structure(attention: Attention, config: PreTrainedConfig, *, nested_images: bool) -> str:
    """Why batches of this model must be padded, as far as its structure tells; else ""."""
    if nested_images:
        return "the processor keeps the images of each row apart"
    if attention.packed is None:
        return f"attention {attention.loaded} cannot tell rows apart that lie end to end"
    return why_layers_need_padding(config)


def why_padding_is_needed(
    model: PreTrainedModel | PeftModel,
    forward: Callable[..., Any],
    make_batches: Callable[[], TrialBatches],
    attention: Attention,
    *,
    nested_images: bool,
    half: bool,
) -> str:
    """Why batches of this model must be padded, found by trying; "" where they need not be.

    `forward` is the model as it is wrapped for training; it takes a batch on the CPU. `make_batches` makes the
    batches to try; it may raise for processors that do not take a row without an image. `half`: the model computes in
    16 bits.
    """
    if obstacle := why_padding_is_needed_by_structure(attention, model.config, nested_images=nested_images):
        return obstacle
    try:
        trial = try_packed(model, forward, make_batches(), attention)
    except CANNOT_RUN as error:
        if is_out_of_memory(error):
            raise
        return f"it does not take rows end to end ({type(error).__name__}: {str(error).partition(chr(10))[0]})"
    return trial.obstacle(HALF_TOLERANCE if half else TOLERANCE)


@dataclass(frozen=True)
class Trial:
    """How rows in one padding-free batch fared against each alone, padded as usual.

    `distance`: the largest ‖packed − alone‖ / ‖alone‖ of a row's last hidden states. `leaks`: another first row changed
    those after it. `other_masks`, `other_positions`: the model does not mask or number tokens as packed attention
    takes it.
    """

    distance: float
    leaks: bool
    other_masks: bool
    other_positions: bool

    def obstacle(self, tolerance: float) -> str:
        if self.other_positions:
            return "it numbers the positions of its tokens in a way of its own"
        if self.other_masks:
            return "its attention is more than causal, and the mask would be lost"
        if self.leaks:
            return "rows that lie end to end would change each other"
        if not self.distance <= tolerance:
            return f"rows end to end would give other results than separate ones, by {self.distance:.1g}"
        return ""


def try_packed(
    model: PreTrainedModel | PeftModel,
    forward: Callable[..., Any],
    batches: TrialBatches,
    attention: Attention,
) -> Trial:
    """Put rows through the model one by one and end to end; it keeps its attention, mode and random numbers.

    Every process makes the same calls, whatever comes of them. Raises one of `CANNOT_RUN` where the model does not run.
    """
    assert attention.packed is not None
    bounds = [0, *accumulate(batch["input_ids"].shape[1] for batch in batches.alone)]
    cuts = [slice(*ends) for ends in pairwise(bounds)]
    was_training = model.training
    model.eval()
    try:
        with watch_decoder(model) as calls:
            for batch in batches.alone:
                _run(forward, batch)
            own = attention.packed if attention.packed in (PACKED, PACKED_FLASH) else PACKED
            with decoder_attention(model, own), watch_masks(bounds) as masks:
                _run(forward, batches.packed)
                _run(forward, batches.disturbed)
            with decoder_attention(model, attention.packed):
                _run(forward, batches.packed)
    finally:
        model.train(was_training)
    *separate, packed, disturbed, final = calls
    rows = zip(cuts, separate, strict=True)
    distances = [(final.hidden[cut] - row.hidden).norm() / row.hidden.norm() for cut, row in rows]
    return Trial(
        distance=torch.stack(distances).max().item(),
        leaks=not torch.equal(packed.hidden[bounds[1] :], disturbed.hidden[bounds[1] :]),
        other_masks=masks.odd or masks.limits != masks.windows,
        other_positions=not _same_positions([row.positions for row in separate], packed.positions, cuts),
    )


@dataclass(frozen=True)
class Call:
    """Of the language model: the `position_ids` it was given, and its last hidden states `[T, H]` of the first row."""

    positions: torch.Tensor | None
    hidden: torch.Tensor


@contextmanager
def watch_decoder(model: PreTrainedModel | PeftModel) -> Iterator[list[Call]]:
    """The calls of the language model, one by one."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    calls: list[Call] = []

    def note(decoder: Any, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        calls.append(Call(kwargs.get("position_ids"), output[0][0].float()))

    hook = base.get_decoder().register_forward_hook(note, with_kwargs=True)
    try:
        yield calls
    finally:
        hook.remove()


def _same_positions(
    separate: Sequence[torch.Tensor | None], packed: torch.Tensor | None, cuts: Sequence[slice]
) -> bool:
    if packed is None:
        return False
    for positions, cut in zip(separate, cuts, strict=True):
        part = packed[..., cut]
        expected = torch.arange(part.shape[-1], device=part.device)[None] if positions is None else positions
        if part.shape != expected.shape or not torch.equal(part, expected):
            return False
    return True


@torch.no_grad()
def _run(forward: Callable[..., Any], batch: dict[str, Any]) -> None:
    """As in training; with no token to train there is no logit."""
    forward(**batch, num_items_in_batch=1)
