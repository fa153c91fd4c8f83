"""Whether a model gives a row in a padded batch what it gives the row alone, tried before the first step."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedModel

from tuning.errors import Attempt, describe_failure, try_optional
from tuning.model.decoder_calls import find_decoder, run_quietly
from tuning.model.padding_free import HALF_TOLERANCE, TOLERANCE

GPU_TOLERANCE = 0.01  # of the norm in float32: convolutions compute in TF32 there, which has 10 bits


@dataclass
class BodyCall:
    """What a model made of a batch: its last hidden states `[B, T, H]`, and the `position_ids` that its decoder got."""

    hidden: torch.Tensor
    positions: torch.Tensor | None = None

    def row(self, number: int, length: int) -> "BodyCall":
        """What belongs to the first `length` tokens of a row."""
        positions = None if self.positions is None else self.positions[..., number % self.positions.shape[-2], :length]
        return BodyCall(self.hidden[number, :length], positions)


@dataclass(frozen=True)
class BatchTrial:
    """What a model did with rows alone, and with the batch of those that it takes alone (`numbers`)."""

    numbers: list[int]
    alone: list[BodyCall]
    together: Attempt[BodyCall]

    def find_fault(self, *, half: bool) -> str:
        """How a row in the batch gets other results than alone; "" where none does.

        `half`: the model computes in 16 bits. Then the tokens' median counts, as rounding may send single tokens to
        other experts. Position ids are compared exactly in any precision.
        """
        if len(self.numbers) < 2:
            return ""
        if self.together.error:
            return f"it fails on rows together that it takes one by one ({describe_failure(self.together.error)})"
        assert self.together.value is not None
        for place, call in enumerate(self.alone):
            if not call.hidden.isfinite().all():  # the first step ends with an error of its own
                continue
            length = call.hidden.shape[1]
            own, found = call.row(0, length), self.together.value.row(place, length)
            if own.positions is not None and found.positions is not None and not own.positions.equal(found.positions):
                return f"row {place + 1} of the trial gets other position ids in a batch than alone"
            apart = distance(found.hidden, own.hidden, half=half)
            limit = GPU_TOLERANCE if own.hidden.device.type != "cpu" else TOLERANCE
            if not apart <= (HALF_TOLERANCE if half else limit):  # also where it is NaN
                return f"the results of row {place + 1} of the trial differ by {apart:.1g} of their norm"
        return ""


def distance(found: torch.Tensor, expected: torch.Tensor, *, half: bool) -> float:
    """How far hidden states `[T, H]` are from the expected ones, in parts of their norm."""
    if half:
        return ((found - expected).norm(dim=-1) / expected.norm(dim=-1)).median().item()
    return ((found - expected).norm() / expected.norm()).item()


def try_batch(
    model: PreTrainedModel | PeftModel,
    forward: Callable[..., Any],
    separate: Sequence[dict[str, Any]],
    join: Callable[[Sequence[int]], dict[str, Any]],
) -> BatchTrial:
    """Run each row alone, and then a batch of those rows. The model's mode stays as it was.

    `forward`: see `why_padding_is_needed`. `separate`: each row as a batch of its own. `join(numbers)` makes the padded
    batch of these rows. Every process makes the same calls.
    """

    def run(make_batch: Callable[[], dict[str, Any]]) -> Attempt[BodyCall]:
        return try_optional(lambda: run_body(model, forward, make_batch()), catch_user_errors=True)

    was_training = model.training
    model.eval()
    try:
        calls = {number: run(partial(dict, batch)).value for number, batch in enumerate(separate)}
        alone = {number: call for number, call in calls.items() if call is not None}
        together = run(partial(join, [*alone])) if len(alone) > 1 else Attempt[BodyCall]()
    finally:
        model.train(was_training)
    return BatchTrial([*alone], [*alone.values()], together)


def run_body(model: PreTrainedModel | PeftModel, forward: Callable[..., Any], batch: dict[str, Any]) -> BodyCall:
    """Run the model on a batch as in training, and record what its body returns."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    decoder = find_decoder(base)
    body = base.base_model if base.base_model is not base else decoder
    positions, hidden = list[torch.Tensor | None](), list[torch.Tensor]()
    hooks = [
        decoder.register_forward_pre_hook(
            lambda decoder, args, kwargs: positions.append(kwargs.get("position_ids")), with_kwargs=True
        ),
        body.register_forward_hook(lambda body, args, output: hidden.append(output[0].float())),
    ]
    try:
        run_quietly(forward, batch)
    finally:
        for hook in hooks:
            hook.remove()
    return BodyCall(hidden[-1], positions[-1] if positions else None)
