"""Gradient checkpointing of some layers: which ones the backward can recompute, and how to recompute only the first."""

from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from tuning.model.parts import VISION_TOWER, Parts


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


def recompute_first(model: nn.Module, parts: Parts, number: int) -> None:
    """Recompute the first `number` layers of a model that recomputes all of them.

    The backward reaches the first layers last. What the other layers kept is free by then.
    """
    for layer in recomputable_layers(model, parts)[number:]:
        layer.gradient_checkpointing = False
