"""Which weight of the model a key of a checkpoint becomes, by the rules that transformers loads the checkpoint with."""

import copy
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import SimpleNamespace

import torch
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    PrefixChange,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
    revert_weight_conversion,
)

from tuning.errors import UserError
from tuning.model.engine_names import name_for_engines, removed_levels


@dataclass(frozen=True)
class WeightTarget:
    """The weight of the model that a stored tensor becomes. `converted`: it is fused, split or transposed first."""

    name: str
    converted: bool


class KeyRules:
    """The rules of one model, read from a skeleton before an adapter renames the skeleton's modules."""

    def __init__(self, skeleton: PreTrainedModel):
        conversions = get_model_conversion_mapping(skeleton)
        self.renamings = [rule for rule in conversions if isinstance(rule, WeightRenaming)]
        self.converters = [rule for rule in conversions if isinstance(rule, WeightConverter)]
        self.added_levels = removed_levels(self.renamings)
        self.prefix, self.weights = skeleton.base_model_prefix, skeleton.state_dict()
        saved_by = get_model_conversion_mapping(skeleton, add_legacy=False)
        saved_by = [rule for rule in saved_by if not isinstance(rule, PrefixChange)]  # as transformers saves the model
        self._saver = SimpleNamespace(
            _weight_conversions=saved_by, config=skeleton.config, get_parameter=self._get_parameter
        )

    def _get_parameter(self, name: str) -> torch.Tensor:
        """As `nn.Module` has it: some conversions look at the shape of the weight."""
        if name not in self.weights:
            raise AttributeError(name)
        return self.weights[name]

    def targets(self, keys: Iterable[str]) -> dict[str, WeightTarget]:
        """Key of the checkpoint → weight of the model."""
        return {key: self.target(key) for key in keys}

    def target(self, key: str) -> WeightTarget:
        """The weight that `key` becomes.

        As in transformers' `convert_and_load_state_dict_in_model`, a key that is a weight's name already keeps it.
        """
        name, pattern = rename_source_key(key, self.renamings, self.converters, self.prefix, self.weights)
        if name not in self.weights and key in self.weights:
            name, pattern = rename_source_key(key, [], [], self.prefix, self.weights)
        return WeightTarget(name, converted=pattern is not None)

    def convert(self, stored: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The weights that stored tensors become: fused, split or transposed as transformers does when it loads them.

        `stored`: key → tensor, all that belong to these weights. On the meta device this gives names and shapes.
        """
        by_pattern = {pattern: rule for rule in self.converters for pattern in rule.source_patterns}
        running: dict[str, WeightConverter] = {}
        for key in sorted(stored, key=dot_natural_key):
            name, pattern = rename_source_key(key, self.renamings, self.converters, self.prefix, self.weights)
            assert pattern is not None, f"{key} is not converted"
            rule = running.setdefault(name, copy.deepcopy(by_pattern[pattern]))
            rule.add_tensor(name, key, pattern, stored[key])
        made: dict[str, torch.Tensor] = {}
        for name, rule in running.items():
            values = rule.convert(name, model=self._saver, config=self._saver.config)
            made |= {name: value[0] if isinstance(value, list) else value for name, value in values.items()}
        return made

    def revert(
        self, weights: Mapping[str, torch.Tensor], shapes: Mapping[str, tuple[int, ...]]
    ) -> dict[str, torch.Tensor] | None:
        """The inverse of `convert`: key → tensor. None where transformers would not store the weights so.

        `shapes`: of the stored tensors, by key. transformers loads some tensors transposed or not, as their shape says.
        """
        made = revert_weight_conversion(self._saver, dict(weights))
        by_place = {_place(key): key for key in shapes}
        if len(by_place) != len(made) or by_place.keys() != {_place(key) for key in made}:
            return None
        stored = {by_place[_place(key)]: tensor for key, tensor in made.items()}
        for key, tensor in stored.items():
            if tensor.shape != shapes[key] and tensor.dim() > 1:
                stored[key] = tensor.transpose(-1, -2)
        return stored if all(tensor.shape == shapes[key] for key, tensor in stored.items()) else None

    def groups(self, stored: Mapping[str, torch.Tensor]) -> list[tuple[list[str], list[str]]]:
        """Keys and the weights that they become, for all that is converted. `stored`: key → tensor without numbers."""
        by_first: dict[str, list[str]] = defaultdict(list)
        for key in stored:
            target = self.target(key)
            if target.converted and target.name in self.weights:
                by_first[target.name].append(key)
        return [(keys, list(self.convert({key: stored[key] for key in keys}))) for keys in by_first.values()]

    def key_for_engines(self, key: str) -> str:
        """The key under which engines look for what the base has under `key`."""
        new = name_for_engines(key, self.added_levels)
        return new if self.target(new) == self.target(key) else key

    def new_key(self, name: str, targets: Mapping[str, WeightTarget]) -> str:
        """A key that loads into the weight `name`, in the style of a checkpoint that lacks it and has `targets`."""
        plain = [rule for rule in self.renamings if type(rule) is WeightRenaming]
        back = [rule.reverse_transform() for rule in reversed(plain)]

        def reverse(name: str) -> str:
            return rename_source_key(name, back, [], reverse=True)[0]

        old_style = any(target.name != key and reverse(target.name) == key for key, target in targets.items())
        for key in [reverse(name), name] if old_style else [name, reverse(name)]:
            if key not in targets and self.target(key).name == name:
                return key
        raise UserError(where=name, problem="this weight cannot be stored in the base model's checkpoint.")


def _place(key: str) -> tuple[str, ...]:
    """What is the same of a tensor's name in all layouts: its numbers, and what comes after the last of them."""
    numbers = re.findall(r"\d+", key)
    return (*numbers, re.split(r"\.\d+\.", key)[-1]) if numbers else (key,)
