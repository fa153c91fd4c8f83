"""How the vision tower runs where it does not train: without a graph, a few images at a time, or not again at all."""

import hashlib
import json
import os
import types
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
import transformers
from peft import PeftModel
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_leaves, tree_map_only, tree_unflatten
from transformers import PreTrainedModel

from tuning.console import print0
from tuning.errors import UserError
from tuning.model.dry_run import CANNOT_SIMULATE, find_leaves, run_without_weights
from tuning.model.parts import find_parts

# 28 tiles of 384×384, for which a tower like so400m takes 0.6 GB in float32 beside what it returns. On the CPU it takes
# 4 % less time with twice as many, and 30 % more with half as many.
CHUNK_PIXELS = 2**22
CACHE = "cache_vision_features"


@dataclass(frozen=True)
class TowerOutput:
    """What a model's vision tower returns, and what of it the loss depends on.

    `structure`: of its output. `read`: places among the output's leaves.
    """

    structure: TreeSpec
    read: tuple[int, ...]


def find_tower(model: PreTrainedModel | PeftModel) -> nn.Module | None:
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    names = find_parts(base).vision_tower
    return base.get_submodule(names[0]) if names else None


def patch_frozen_tower_without_grad(model: PreTrainedModel | PeftModel, *, sharded: bool) -> None:
    """Run the vision tower without a graph, and few images at a time, in every call in which nothing of it trains.

    PEFT and gradient checkpointing make its embeddings' output require a gradient: a frozen tower would be recomputed
    and differentiated for nothing. Its forward is replaced on the instance, after everything that decides what
    trains. `sharded`: every process must run its layers equally often, so that all images go through at once.
    """
    tower = find_tower(model)
    if tower is None:
        return
    stock = tower.forward
    whole = sharded or bool(_noise(tower))

    def forward(self, *args, **kwargs):
        if _trains(self, (args, kwargs)):
            return stock(*args, **kwargs)
        with torch.no_grad():
            images = _only_images((args, kwargs))
            if whole or images is None:
                return stock(*args, **kwargs)
            return _run_in_chunks(lambda part: _call(stock, part, args, kwargs), images)

    tower.forward = types.MethodType(forward, tower)


def _trains(tower: nn.Module, call: Any) -> bool:
    """Whether a gradient is wanted in the tower or before it."""
    inputs = (value for value in tree_leaves(call) if isinstance(value, torch.Tensor))
    return any(tensor.requires_grad for tensors in (inputs, tower.parameters()) for tensor in tensors)


def _only_images(call: Any) -> torch.Tensor | None:
    """The images `[N, C, H, W]` of a call, unless it has other tensors: which would have to be divided as well."""
    tensors = [value for value in tree_leaves(call) if isinstance(value, torch.Tensor)]
    return tensors[0] if len(tensors) == 1 and tensors[0].dim() == 4 else None


def _call(tower: Callable, images: torch.Tensor, args: tuple, kwargs: dict[str, Any]) -> Any:
    """Call `tower` with `images` in place of those among its arguments."""
    args, kwargs = tree_map_only(torch.Tensor, lambda _: images, (args, kwargs))
    return tower(*args, **kwargs)


def _run_in_chunks(run: Callable[[torch.Tensor], Any], images: torch.Tensor) -> Any:
    """`run(images)`, in parts of `CHUNK_PIXELS`; all at once where the output's first dimension is not the images'."""
    # With one image that could not be seen.
    size = max(2, CHUNK_PIXELS // (images.shape[2] * images.shape[3]))
    if len(images) <= size:
        return run(images)
    whole: list[Any] = []
    done = 0
    for part in images.split(size):
        leaves, structure = tree_flatten(run(part))
        if not done:
            if not _are_along(leaves, len(part)):
                return run(images)
            whole = [leaf.new_empty(len(images), *leaf.shape[1:]) if _is_tensor(leaf) else leaf for leaf in leaves]
        for place, leaf in zip(whole, leaves, strict=True):
            if _is_tensor(leaf):
                place[done : done + len(part)] = leaf
        done += len(part)
    return tree_unflatten(whole, structure)


def _is_tensor(value: Any) -> bool:
    return isinstance(value, torch.Tensor)


def _are_along(leaves: Iterable[Any], images: int) -> bool:
    return all(leaf.shape[:1] == (images,) for leaf in leaves if _is_tensor(leaf))


def _noise(tower: nn.Module) -> str:
    """What makes the features of an image depend on more than the image and the weights: dropout, batch norm."""
    settings = _settings(tower).items()
    found = [f"{name} {value}" for name, value in settings if "drop" in name and isinstance(value, float) and value > 0]
    for module in tower.modules():
        if isinstance(module, nn.Dropout) and module.p > 0:
            found.append(f"dropout {module.p}")
        elif isinstance(module, nn.modules.batchnorm._BatchNorm):
            found.append("batch normalisation")
    return ", ".join(dict.fromkeys(found))


def _settings(tower: nn.Module) -> dict[str, Any]:
    config: Any = getattr(tower, "config", None)
    return config.to_dict() if hasattr(config, "to_dict") else {}


def probe_tower(skeleton: PreTrainedModel | PeftModel, batch: dict[str, torch.Tensor], *, sharded: bool) -> TowerOutput:
    """What the vision tower returns to this model. Raises `UserError` where its features cannot be kept.

    `skeleton`, on the meta device, is prepared as for training; `batch` is what the collator made of two rows with
    an image each, without its facts.
    """
    tower = find_tower(skeleton)
    if tower is None:
        raise UserError(where=CACHE, problem="this model has no vision tower of its own.", fix="Remove it.")
    if any(parameter.requires_grad for parameter in tower.parameters()):
        raise UserError(
            where=CACHE,
            problem="the vision tower trains, so that its features change.",
            fix="Freeze it, or remove this.",
        )
    if sharded:
        raise UserError(
            where=CACHE,
            problem="FSDP and DeepSpeed need every process to run the vision tower every time.",
            fix="Remove it.",
        )
    if noise := _noise(tower):
        raise UserError(
            where=CACHE, problem=f"the features of an image are not always the same: {noise}.", fix="Remove it."
        )
    outputs: list[tuple[TreeSpec, bool]] = []
    cut: list[Any] = []

    def cut_graph(_, args, kwargs, output):
        leaves, structure = tree_flatten(output)
        images = _only_images((args, kwargs))
        outputs.append((structure, images is not None and _are_along(leaves, len(images))))
        cut[:] = [leaf.detach().requires_grad_() if _is_tensor(leaf) else leaf for leaf in leaves]
        return tree_unflatten(cut, structure)

    hook = tower.register_forward_hook(cut_graph, with_kwargs=True)
    try:
        reached = find_leaves(run_without_weights(skeleton, batch))
    except (*CANNOT_SIMULATE, TypeError, ValueError, IndexError) as error:
        raise UserError(
            where=CACHE, problem=f"this model does not run without weights: {error}", fix="Remove it."
        ) from error
    finally:
        hook.remove()
    if len(outputs) != 1 or not outputs[0][1]:
        raise UserError(
            where=CACHE,
            problem="this model's vision tower takes more than images, so that none has features of its own.",
            fix="Remove it.",
        )
    return TowerOutput(outputs[0][0], tuple(place for place, leaf in enumerate(cut) if id(leaf) in reached))


def patch_cached_vision_features(model: PreTrainedModel | PeftModel, output: TowerOutput, folder: str) -> None:
    """Let the frozen tower run once an image: its features are kept in `folder`, and taken from there again.

    `output` is from `probe_tower`. Raises `UserError` where there can be no such folder.
    """
    tower = find_tower(model)
    assert tower is not None, "probe_tower has found it"
    run, features = tower.forward, FeatureFolder.open(folder, CACHE)
    weights: list[str] = []

    def forward(self, *args, **kwargs):
        images = _only_images((args, kwargs))
        if images is None or _trains(self, (args, kwargs)):
            return run(*args, **kwargs)
        if not weights:
            weights.append(_digest_tower(self, output))
        device = images.device.type
        precision = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        about = (weights[0], precision, _describe_call(args, kwargs))
        keys = [digest(*about, image) for image in images.cpu()]
        found = {key: features.load(key) for key in dict.fromkeys(keys)}
        missing = [key for key, kept in found.items() if kept is None]
        if missing:
            leaves = tree_leaves(_call(run, images[[keys.index(key) for key in missing]], args, kwargs))
            assert all(_is_tensor(leaves[place]) for place in output.read), "the tower was called as never in planning"
            for number, key in enumerate(missing):
                kept = {str(place): leaves[place][number] for place in output.read}
                found[key] = {name: value.cpu().contiguous().clone() for name, value in kept.items()}
                features.save(key, found[key])
        leaves = [None] * output.structure.num_leaves
        for place in output.read:
            leaves[place] = torch.stack([found[key][str(place)] for key in keys]).to(images.device)
        return tree_unflatten(leaves, output.structure)

    tower.forward = types.MethodType(forward, tower)


def _digest_tower(tower: nn.Module, output: TowerOutput) -> str:
    """What features depend on beside the image and the call: weights with their precision, structure, code."""
    settings = {name: value for name, value in _settings(tower).items() if name != "_name_or_path"}
    written = json.dumps(settings, sort_keys=True, default=str)
    facts = (transformers.__version__, type(tower).__name__, written, output.read)
    return digest(*facts, *(item for pair in tower.state_dict().items() for item in pair))


def _describe_call(args: tuple, kwargs: dict[str, Any]) -> str:
    """A call without its tensors. `use_cache`, which some models hand on and Trainer changes, is none of a tower's."""
    kept = {name: value for name, value in sorted(kwargs.items()) if name != "use_cache"}
    return repr(tree_map_only(torch.Tensor, lambda _: None, (args, kept)))


def digest(*items: Any) -> str:
    """A name for `items`, tensors by shape, precision and contents, all else as Python writes it: 40 hexadecimal
    digits.
    """
    found = hashlib.blake2b(digest_size=20)
    for item in items:
        if isinstance(item, torch.Tensor):
            found.update(f"{item.dtype} {tuple(item.shape)}\0".encode())
            found.update(item.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
        else:
            found.update(f"{item!r}\0".encode())
    return found.hexdigest()


@dataclass
class FeatureFolder:
    """Features by their key. A file is whole or not there; one that cannot be read counts as not there.

    `full`: the disk takes no more, so that nothing is written any longer.
    """

    path: Path
    full: bool = False

    @classmethod
    def open(cls, folder: str, option: str) -> "FeatureFolder":
        """Raises `UserError` that names `option` where `folder` neither exists nor can be made."""
        path = Path(folder).expanduser()
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(where=f"{option} {folder}", problem=f"cannot be made: {error.strerror}.") from error
        return cls(path)

    def load(self, key: str) -> dict[str, torch.Tensor] | None:
        try:
            return load_file(self._file(key))
        except (OSError, SafetensorError):
            return None

    def save(self, key: str, features: dict[str, torch.Tensor]) -> None:
        if self.full:
            return
        file = self._file(key)
        unfinished = file.with_suffix(f".{uuid4().hex}")
        try:
            file.parent.mkdir(exist_ok=True)
            unfinished.write_bytes(save(features))
            os.replace(unfinished, file)
        except OSError as error:
            self.full = True
            print0(f"{self.path} takes no more features ({error.strerror}): the run goes on without writing any.")
        finally:
            with suppress(OSError):
                unfinished.unlink()

    def _file(self, key: str) -> Path:
        return self.path / key[:2] / f"{key[2:]}.safetensors"
