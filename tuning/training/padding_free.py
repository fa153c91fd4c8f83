"""Whether a model may be given padding-free batches: a forward before the first step is compared with separate ones."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedModel

from tuning.data.collator import Collator
from tuning.data.encode import Sample
from tuning.model.attention import Attention, set_decoder_attention
from tuning.training.faults import is_out_of_memory

TOLERANCE, HALF_TOLERANCE = 1e-4, 0.05
CANNOT_RUN = (NotImplementedError, TypeError, ValueError, RuntimeError, IndexError, KeyError)


def find_structural_obstacle(attention: Attention, collator: Collator) -> str:
    """Why batches of this model must be padded, as far as its structure tells; else ""."""
    if collator.nested_images:
        return "the processor keeps the images of each row apart"
    if attention.packed is None:
        return f"attention {attention.loaded} of this model cannot tell rows apart that lie end to end"
    return ""


def find_obstacle(
    model: PreTrainedModel | PeftModel,
    forward: Callable[..., Any],
    samples: Sequence[Sample],
    collator: Collator,
    attention: Attention,
    *,
    half: bool,
) -> str:
    """Why batches of this model must be padded, found by trying; "" where they need not be.

    `forward` is the model as it is wrapped for training; it takes a batch on the CPU. `half`: it computes in 16 bits.
    """
    if obstacle := find_structural_obstacle(attention, collator):
        return obstacle
    try:
        distance = compare_with_separate(model, forward, samples, collator, attention)
    except CANNOT_RUN as error:
        if isinstance(error, RuntimeError) and is_out_of_memory(error):
            raise
        return f"it does not take rows end to end ({type(error).__name__}: {str(error).partition(chr(10))[0]})"
    if distance <= (HALF_TOLERANCE if half else TOLERANCE):
        return ""
    return f"rows end to end would give other results than separate ones, by {distance:.1g}"


def compare_with_separate(
    model: PreTrainedModel | PeftModel,
    forward: Callable[..., Any],
    samples: Sequence[Sample],
    collator: Collator,
    attention: Attention,
) -> float:
    """How far the logits of `samples` in one padding-free batch are from those of each alone, padded as usual.

    The largest of ‖packed − alone‖ / ‖alone‖. The model keeps its attention for padded batches. Raises one of
    `CANNOT_RUN` where the model does not run so at all.
    """
    assert attention.packed is not None
    alone = replace(collator, padding_free=False, filler=None)
    together = replace(alone, padding_free=True)
    was_training = model.training
    model.eval()
    try:
        separate = [_logits(forward, alone([sample])) for sample in samples]
        set_decoder_attention(model, attention.packed)
        packed = _logits(forward, together(samples)).split([len(logits) for logits in separate])
    finally:
        set_decoder_attention(model, attention.loaded)
        model.train(was_training)
    distances = [(a - b).norm() / b.norm() for a, b in zip(packed, separate, strict=True)]
    return torch.stack(distances).max().item()


@torch.no_grad()
def _logits(forward: Callable[..., Any], batch: dict[str, Any]) -> torch.Tensor:
    inputs = {name: value for name, value in batch.items() if name not in ("facts", "labels")}
    return forward(**inputs, use_cache=False).logits[0].float()
