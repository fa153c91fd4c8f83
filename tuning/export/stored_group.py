"""What an adapter adds to stored tensors that it does not adapt one by one: experts, and weights in another layout."""

import functools
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import ParamWrapper
from torch import nn

from tuning.export.checkpoint_keys import KeyRules
from tuning.model.lora import ADAPTER_NAME
from tuning.model.saved_weights import SavedWeights


@dataclass(frozen=True, eq=False)
class StoredGroup:
    """Tensors of a checkpoint that become weights together, and the layers that adapt some of these weights.

    `keys`: of the tensors. `layers`: weight → layer. `names`: of all the weights. `converted`: they are fused, split or
    transposed first; else one tensor is one weight.
    """

    base: SavedWeights
    rules: KeyRules
    keys: tuple[str, ...]
    names: tuple[str, ...]
    layers: Mapping[str, LoraLayer]
    converted: bool

    def find_fault(self) -> str:
        """How the weights of base and adapter differ from what transformers loads from the merged tensors; or "".

        Relative to what the adapter adds. Both ways in float32, so only rounding may differ.
        """
        added = added_to(self)
        base = {key: self.base[key].float() for key in self.keys}
        merged = {key: base[key] + added[key] for key in self.keys}
        before, after = self._load(base), self._load(merged)
        for name, layer in self.layers.items():
            expected, found = before[name] + delta_of(layer), after[name]
            scale = torch.linalg.vector_norm(found - before[name]) + 1e-3 * torch.linalg.vector_norm(expected)
            if found.shape != expected.shape or not torch.linalg.vector_norm(found - expected) <= 1e-3 * scale:
                return f"{name}: merged, the weight is not that of base and adapter"
        return ""

    def _load(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return self.rules.convert(tensors) if self.converted else {self.names[0]: tensors[self.keys[0]]}


def delta_of(layer: LoraLayer) -> torch.Tensor:
    """What the adapter adds to the weight of a layer, in float32, by PEFT's own arithmetic."""
    base, name = layer.get_base_layer(), getattr(layer, "parameter_name", "weight")
    own = getattr(base, name)
    zeros = torch.zeros(()).expand(own.shape)  # without memory; PEFT sends what it adds to the weight's device
    setattr(base, name, nn.Parameter(zeros, requires_grad=False))
    try:
        return layer.get_delta_weight(ADAPTER_NAME).detach().float().reshape(own.shape)
    finally:
        setattr(base, name, own)


@functools.lru_cache(maxsize=4)  # the tensors of a layer's experts lie side by side in a file
def added_to(group: StoredGroup) -> dict[str, torch.Tensor]:
    """What the adapter adds to each tensor of a group, in float32.

    The conversions only move numbers, so what is added to a weight is stored as the weight is.
    """
    weights = {
        name: delta_of(group.layers[name]) if name in group.layers else torch.zeros(group.rules.weights[name].shape)
        for name in group.names
    }
    if not group.converted:
        return {group.keys[0]: weights[group.names[0]]}
    added = group.rules.revert(weights, {key: group.base.stored[key].shape for key in group.keys})
    assert added is not None, "the plan has refused it"
    return added


def can_add(layer: object) -> bool:
    """Whether all that a layer of an adapter does is to add to one weight."""
    return isinstance(layer, ParamWrapper) or (
        isinstance(layer, LoraLayer) and not any(layer.use_dora.values()) and not any(layer.lora_bias.values())
    )
