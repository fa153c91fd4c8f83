"""Tensors of a base model that transformers does not load, such as the heads that predict several tokens (`mtp.*`).

Engines use them. A model that transformers saves lacks them, so they are copied from the base.
"""

import copy
import re
from pathlib import Path

from transformers import PreTrainedConfig
from transformers.utils import cached_file

from tuning.console import print0
from tuning.errors import describe_failure, try_optional
from tuning.export.checkpoint_keys import KeyRules
from tuning.model.load import build_skeleton
from tuning.model.saved_weights import SavedWeights, StoredTensor


def find_ignored(name: str, config: PreTrainedConfig) -> list[StoredTensor]:
    """The tensors in the model `name`, a folder or hub id, that its class tells transformers to ignore.

    A warning is printed where the model cannot be read any more: what was trained is worth more.
    """
    config = copy.deepcopy(config)
    config._attn_implementation = None  # that of a trained model may be one that transformers does not know
    skeleton = build_skeleton(config)
    patterns = [re.compile(pattern) for pattern in skeleton._keys_to_ignore_on_load_unexpected or ()]
    if not patterns:
        return []
    attempt = try_optional(lambda: SavedWeights(Path(cached_file(str(Path(name).expanduser()), "config.json")).parent))
    if attempt.value is None:
        assert attempt.error is not None
        reason = describe_failure(attempt.error)
        print0(f"Warning: {name} cannot be read any more ({reason}). The saved model lacks what transformers ignores.")
        return []
    rules, found = KeyRules(skeleton), []
    for key, tensor in attempt.value.stored.items():
        target = rules.target(key).name
        if target not in rules.weights and any(pattern.search(target) for pattern in patterns):
            found.append(tensor)
    return found
