"""Which weight of the model a key of a checkpoint becomes, by the rules that transformers loads the checkpoint with."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from tuning.errors import UserError


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
        self.prefix, self.weights = skeleton.base_model_prefix, skeleton.state_dict()

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
