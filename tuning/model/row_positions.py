"""Positions in several dimensions (m-RoPE, https://arxiv.org/abs/2409.12191), computed for each row alone."""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from torch import nn


@dataclass(frozen=True)
class RowPositions:
    """A model's own `get_rope_index`, without its weights, so that data workers can run it.

    `owner`: what has the method. `axes`: how many dimensions a position has. `counts`: the first of them is the tokens
    counted (HunYuanVL).
    """

    owner: Any
    axes: int = 0
    counts: bool = False

    def __call__(self, sequence: Mapping[str, torch.Tensor], images: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Position ids of a row: its tokens counted, from which models make masks, and then the other axes."""
        count = torch.arange(len(sequence["input_ids"]))[None]
        others = self.compute(sequence, images) if images else count.expand(self.axes, -1)
        return others if self.counts else torch.cat([count, others])

    def compute(self, sequence: Mapping[str, torch.Tensor], images: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """What the model computes for a row with images, `[axes, T]`."""
        inputs = {**{name: value[None] for name, value in sequence.items()}, **images}
        known = inspect.signature(self.owner.get_rope_index).parameters
        return self.owner.get_rope_index(**{name: inputs[name] for name in known if name in inputs})[0][:, 0]


def find_row_positions(
    model: nn.Module, sequence: Mapping[str, torch.Tensor], images: Mapping[str, torch.Tensor]
) -> RowPositions | None:
    """How `model` computes positions in several dimensions, tried on a row with images; None where it has none.

    Raises what its method raises.
    """
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    owner = next((module for module in base.modules() if hasattr(module, "get_rope_index")), None)
    if owner is None:
        return None
    weightless: Any = object.__new__(type(owner))
    weightless.__dict__.update(vars(owner), _parameters={}, _buffers={}, _modules={})
    vars(weightless).pop("forward", None)  # one of ours would hold the whole model
    found = RowPositions(weightless).compute(sequence, images)
    return RowPositions(weightless, len(found), torch.equal(found[0], torch.arange(found.shape[-1])))
