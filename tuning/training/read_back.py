"""What was just saved, read back: is it what the model in memory has, tensor by tensor and setting by setting?"""

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel, get_peft_model_state_dict
from torch import nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from torch.distributed.tensor import DTensor
from transformers import AutoProcessor
from transformers.core_model_loading import revert_weight_conversion
from transformers.utils import GENERATION_CONFIG_NAME

from tuning.export.base_files import describe_processor
from tuning.files import SHARDED_MODEL, read_json
from tuning.training.checkpoint_files import read_shards
from tuning.training.model_writer import ModelWriter

PATIENCE = 60  # seconds until a network file system shows other machines what one has written
READ_AT_ONCE = 1e9  # bytes of shards in main memory, twice; the list of all shards is read each time
BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # bytes of a number → integers of that size


def find_shard_fault(model: nn.Module, folder: Path) -> str:
    """How the shards of this process in the checkpoint `folder` differ from those in memory; "" if they do not."""
    left = list(get_model_state_dict(model).items())
    while left:
        trained, nbytes = dict[str, torch.Tensor](), 0
        while left and nbytes < READ_AT_ONCE:
            name, tensor = left.pop()
            trained[name] = tensor.detach().to("cpu")
            nbytes += local_part(trained[name]).nbytes
        saved = {name: torch.empty_like(tensor) for name, tensor in trained.items()}
        read_written(saved, folder)
        parts = ({name: local_part(tensor) for name, tensor in tensors.items()} for tensors in (saved, trained))
        if fault := find_tensor_fault(*parts):
            return fault
    return ""


def local_part(tensor: torch.Tensor) -> torch.Tensor:
    """What this process has of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def read_written(tensors: dict[str, torch.Tensor], folder: Path) -> None:
    """Fill `tensors` from the shards in `folder`. Another machine may see what was just written later."""
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            (folder / SHARDED_MODEL / ".metadata").stat()  # without it, PyTorch raises an AssertionError
            return read_shards({"model": tensors}, folder / SHARDED_MODEL, no_dist=True)
        except FileNotFoundError:
            if time.monotonic() > deadline:
                raise
            time.sleep(1)


def weights_on_disk(
    writer: ModelWriter, model: Any, weights: Mapping[str, torch.Tensor] | None
) -> Mapping[str, torch.Tensor]:
    """The tensors that the files of a model, or of its adapter, must hold, by key.

    `weights`: by name; None for those that `model` has.
    """
    if isinstance(model, PeftModel):
        adapter = get_peft_model_state_dict(model, state_dict=weights)
        return {writer.stored_names.get(name, name): weight for name, weight in adapter.items()}
    weights = model.state_dict(keep_vars=True) if weights is None else weights
    tensors = writer.tensors_to_save(weights)
    return revert_weight_conversion(model, weights) if tensors is None else tensors


def find_tensor_fault(saved: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> str:
    """How `saved` differs from `expected`, tensor by tensor; "" if it does not.

    Where `expected` is a `dict`, tied weights are one tensor under several names, of which one need be saved.
    """
    if surplus := sorted(saved.keys() - expected.keys()):
        return f"the file has {len(surplus)} tensors too many, first {surplus[0]}"
    missing = [name for name in expected if name not in saved]
    if isinstance(expected, dict):
        there = {id(expected[name]) for name in saved}
        missing = [name for name in missing if id(expected[name]) not in there]
    if missing:
        return f"the file lacks {len(missing)} tensors, first {missing[0]}"
    differing, worst = [], 0.0
    for name in saved:
        found, right = saved[name].detach(), expected[name].detach().cpu()
        if (found.shape, found.dtype) != (right.shape, right.dtype):
            kinds = (f"{str(t.dtype).removeprefix('torch.')} {list(t.shape)}" for t in (found, right))
            return f"{name} is {' instead of '.join(kinds)}"
        bits = BITS[found.element_size()]
        if not torch.equal(found.contiguous().view(bits), right.contiguous().view(bits)):
            differing.append(name)
            worst = max(worst, float((found.double() - right.double()).abs().max()))
    if differing:
        return f"{len(differing)} of {len(saved)} tensors differ, by up to {worst:.3g}, first {differing[0]}"
    return ""


def find_setting_fault(writer: ModelWriter, model: Any, folder: Path) -> str:
    """Which setting of the saved processor, generation or adapter differs from the one in memory; "" if none does."""
    saved = AutoProcessor.from_pretrained(folder, trust_remote_code=writer.source.trust_remote_code)
    found, expected = describe_processor(saved), describe_processor(writer.processor)
    pairs: dict[str, tuple[Any, Any]] = {name: (found.get(name), expected[name]) for name in expected}
    if files := writer.base_files:
        published = files.files.get(GENERATION_CONFIG_NAME)
        pairs["generation config"] = (read_json(folder / GENERATION_CONFIG_NAME), published and json.loads(published))
    if isinstance(model, PeftModel):
        configs = (PeftConfig.from_pretrained(str(folder)), model.peft_config[model.active_adapter])
        first, second = (describe_adapter_config(config, model) for config in configs)
        pairs["adapter config"] = (first, second)
    for name, (one, other) in pairs.items():
        if one != other:
            return f"its {name} differs{_first_difference(one, other)}"
    return ""


def describe_adapter_config(config: PeftConfig, model: PeftModel) -> dict[str, Any]:
    """An adapter's settings, with the modules of this model only: an earlier version named no others."""
    settings = {**config.to_dict(), "inference_mode": True}
    modules = {name for name, _ in model.get_base_model().named_modules()}
    if isinstance(settings["target_modules"], (list, set)):
        settings["target_modules"] = sorted(modules & set(settings["target_modules"]))
    return settings


def _first_difference(found: Any, expected: Any) -> str:
    if not (isinstance(found, dict) and isinstance(expected, dict)):
        return ""
    name = next(name for name in [*expected, *found] if found.get(name) != expected.get(name))
    return f": {name} is {found.get(name)!r:.60}, not {expected.get(name)!r:.60}"
