"""Writes the trained model, or its adapter, into a folder that is otherwise the base's."""

import copy
import functools
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedConfig

from tuning.config.options import ModelSource
from tuning.console import print0
from tuning.errors import describe_failure, try_optional
from tuning.export.base_files import BaseFiles, find_folder, read_base_files
from tuning.export.base_weights import BaseWeights, TensorsToSave, plan_weights
from tuning.files import SHARDED_MODEL
from tuning.model.load import build_skeleton
from tuning.model.lora import rename_saved
from tuning.model.saved_weights import SavedWeights, open_weights
from tuning.training.checkpoint_files import PROCESSOR_FILES, load_checkpoint
from tuning.training.trained_weights import repeated_names


class ModelWriter:
    """Saves what a run trains.

    It finds the base's folder when the run starts (`find_base`), and reads it when the first model is saved. Where the
    base cannot be read any more, or stores weights in a way of its own, transformers saves the model: the trained
    weights are worth more. `stored_names`: those of an adapter's weights on the disk, where they differ.
    """

    def __init__(
        self, source: ModelSource, config: PreTrainedConfig, processor: Any, stored_names: Mapping[str, str]
    ) -> None:
        self.source, self.config, self.processor, self.stored_names = source, config, processor, stored_names
        self.folder = Path(source.model_name_or_path)

    def find_base(self) -> None:
        """Find the folder of a base from the Hub now: there may be another revision when a model is saved."""
        self.folder = try_optional(lambda: find_folder(self.source.model_name_or_path)).value or self.folder

    def write(self, model: Any, folder: Path, weights: Mapping[str, torch.Tensor] | None) -> None:
        """Write the model, or the adapter, and its processor. `weights`: by name; None for those that `model` has."""
        if isinstance(model, PeftModel):
            model.save_pretrained(folder, state_dict=weights)
            if self.stored_names:
                rename_saved(folder, self.stored_names)
        else:
            weights = model.state_dict(keep_vars=True) if weights is None else weights
            if self.base_weights:
                self.base_weights.without_lost().write(weights, folder)
            else:
                tied = repeated_names(model)  # transformers finds them by their storage, which sharded ones lack
                model.save_pretrained(folder, state_dict={k: v for k, v in weights.items() if k not in tied})
        self.write_files(model, folder, find_float_dtype((weights or {}).values()))

    def write_files(self, model: Any, folder: Path, dtype: torch.dtype | None) -> None:
        """Write all that is saved beside the weights, which have `dtype`."""
        is_adapter = isinstance(model, PeftModel)
        if self.base_files is None:
            self.processor.save_pretrained(folder)
            model.generation_config.save_pretrained(folder)
            if not is_adapter:
                config = copy.deepcopy(model.config)
                config.dtype = dtype or config.dtype
                config.save_pretrained(folder)
            return
        self.base_files.write(folder, for_adapter=is_adapter)
        if not is_adapter:
            self.base_files.write_config(folder, model.config, dtype and str(dtype).removeprefix("torch."))

    @functools.cached_property
    def base_files(self) -> BaseFiles | None:
        folder, trust = self.folder, self.source.trust_remote_code
        attempt = try_optional(lambda: read_base_files(folder, self.processor, trust_remote_code=trust))
        if attempt.error:
            self._warn(describe_failure(attempt.error))
        return attempt.value

    @functools.cached_property
    def base_weights(self) -> BaseWeights | None:
        config = copy.deepcopy(self.config)
        config._attn_implementation = None  # that of a trained model may be one that transformers does not know
        attempt = try_optional(
            lambda: plan_weights(open_weights(self.folder), build_skeleton(config)), catch_user_errors=True
        )
        if attempt.value is None:
            self._warn(describe_failure(attempt.error) if attempt.error else "it stores some weights in another layout")
        return attempt.value

    def complete_copy(self, model: Any, source: Path, folder: Path) -> None:
        """Give the copy of the checkpoint `source` in `folder` the base's layout: an earlier version had another."""
        for name in PROCESSOR_FILES:
            (folder / name).unlink(missing_ok=True)
        if isinstance(model, PeftModel):
            self.write_files(model, folder, None)
        elif self.wrote(source):
            self.write_files(model, folder, find_float_dtype(SavedWeights(source).values()))
        else:
            for file in folder.glob("*.safetensors*"):
                file.unlink()
            self.write(load_checkpoint(source), folder, None)

    def wrote(self, checkpoint: Path) -> bool:
        """Whether the checkpoint has the weights as they are saved: not sharded, nor by an earlier version."""
        if (checkpoint / SHARDED_MODEL).is_dir():
            return False
        return self.base_weights is None or SavedWeights(checkpoint).keys() == self.base_weights.keys

    def tensors_to_save(self, weights: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor] | None:
        """The tensors of a saved model by key; None where transformers saves it."""
        return TensorsToSave(self.base_weights.without_lost(), weights) if self.base_weights else None

    def describe(self) -> str:
        """What of the saved weights is not as the model in memory has it."""
        lines, base = list[str](), self.base_weights
        if base and base.copied:
            size = sum(tensor.nbytes for tensor in base.copied) / 1e6
            lines.append(
                f"{len(base.copied)} tensors ({size:,.1f} MB) that transformers does not load stay as in the base."
            )
        if base and base.renamed:
            old, new = base.renamed[0].base_key, base.renamed[0].key
            lines.append(
                f"{len(base.renamed)} tensors of the vision tower get the names that engines look for, such as {new}:"
                f" the base has {old}, as transformers 5 writes it."
            )
        if base and base.left_out:
            lines.append(f"The model has no place for {len(base.left_out)} tensors of its base: {base.left_out[0]}, …")
        return "\n".join(lines)

    def _warn(self, reason: str) -> None:
        name = self.source.model_name_or_path
        print0(f"Warning: the model is not saved like {name}, but as transformers writes it ({reason}).")


def find_float_dtype(weights: Iterable[torch.Tensor]) -> torch.dtype | None:
    """The dtype of the first weight that is not of integers; None without one."""
    return next((weight.dtype for weight in weights if weight.is_floating_point()), None)
