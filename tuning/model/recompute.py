"""Gradient checkpointing of some layers: which ones the backward can recompute, and how to recompute only the first."""

from typing import NamedTuple

from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from tuning.model.parts import VISION_TOWER, Parts


class Recomputed(NamedTuple):
    """The first `number` of the layers that the backward can recompute. `parts`: those of their model."""

    parts: Parts
    number: int


def recomputable_layers(model: nn.Module, parts: Parts) -> list[GradientCheckpointingLayer]:
    """The layers of a model, or a skeleton, that gradient checkpointing recomputes, in the order in which they run.

    Layers of a tower do not count where nothing in them trains: they have no backward.
    """
    return [
        module
        for name, module in model.named_modules()
        if isinstance(module, GradientCheckpointingLayer)
        and (parts.of(name) != VISION_TOWER or any(weight.requires_grad for weight in module.parameters()))
    ]


def recompute_only(model: nn.Module, recomputed: Recomputed) -> None:
    """Recompute no more than the first layers of a model that recomputes all of them.

    The backward reaches the first layers last. What the other layers kept is free by then.
    """
    for layer in recomputable_layers(model, recomputed.parts)[recomputed.number :]:
        layer.gradient_checkpointing = False
