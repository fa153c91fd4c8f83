"""Names of weights that engines and transformers 4 look for, where transformers 5 has others.

transformers 5 has removed a level, `vision_model`, from the names in CLIP and SigLIP towers. It reads both.
"""

from collections.abc import Iterable

from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import PrefixChange, WeightTransform

TOWER_LEVEL = "vision_model"


def removed_levels(rules: Iterable[WeightTransform]) -> list[WeightTransform]:
    """Of the rules that transformers loads a model with, reversed, those that remove the level of a tower."""
    return [
        rule.reverse_transform()
        for rule in rules
        if isinstance(rule, PrefixChange) and rule.prefix_to_remove == TOWER_LEVEL and rule.scope_prefix
    ]


def name_for_engines(name: str, added: Iterable[WeightTransform]) -> str:
    """The name with the level that engines look for. `added`: see `removed_levels`."""
    for rule in added:
        name = rule.rename_source_key(name)[0]
    return name


def names_for_engines(model: PreTrainedModel, names: Iterable[str]) -> dict[str, str]:
    """Name of a module or weight → the one that engines look for, where that is another one."""
    added = removed_levels(get_model_conversion_mapping(model))
    found = {name: name_for_engines(name, added) for name in names} if added else {}
    return {name: new for name, new in found.items() if name != new}
