"""The features of a frozen vision tower from a cache: it runs once per image."""

import hashlib
import json
import os
import types
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
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
from tuning.errors import UserError, describe_failure, try_optional, writing
from tuning.model.dry_run import find_leaves, run_without_weights
from tuning.model.vision_tower import (
    call_with,
    describe_randomness,
    find_tower,
    has_row_per_image,
    is_tensor,
    needs_gradient,
    only_images,
    settings_of,
)

CACHE_OPTION = "cache_vision_features"
INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by their bytes


@dataclass(frozen=True)
class TowerOutput:
    """What a model's vision tower returns, and which of it the loss depends on.

    `structure`: of the tower's output. `used`: numbers of the leaves in it that the loss depends on.
    """

    structure: TreeSpec
    used: tuple[int, ...]


def probe_tower(skeleton: PreTrainedModel | PeftModel, batch: dict[str, torch.Tensor], *, sharded: bool) -> TowerOutput:
    """Find out what the vision tower returns to this model. Raises `UserError` where its features cannot be cached.

    `skeleton`, on the meta device, is prepared as for training. `batch` holds the tensors that the collator made of two
    rows with one image each.
    """
    tower = find_tower(skeleton)
    if tower is None:
        raise _cannot_cache("this model has no separate vision tower.")
    if any(parameter.requires_grad for parameter in tower.parameters()):
        raise _cannot_cache("the vision tower trains, so its features change.", f"Freeze it, or remove {CACHE_OPTION}.")
    if sharded:
        raise _cannot_cache("FSDP and DeepSpeed need every process to run the vision tower on every batch.")
    if randomness := describe_randomness(tower):
        raise _cannot_cache(f"the features of an image are not always the same: {randomness}.")
    outputs: list[tuple[TreeSpec, bool]] = []
    detached: list[Any] = []

    def detach_output(_, args, kwargs, output):
        leaves, structure = tree_flatten(output)
        images = only_images((args, kwargs))
        outputs.append((structure, images is not None and has_row_per_image(leaves, len(images))))
        detached[:] = [leaf.detach().requires_grad_() if is_tensor(leaf) else leaf for leaf in leaves]
        return tree_unflatten(detached, structure)

    hook = tower.register_forward_hook(detach_output, with_kwargs=True)
    try:
        loss = try_optional(lambda: run_without_weights(skeleton, batch))
    finally:
        hook.remove()
    if loss.error:
        raise _cannot_cache(f"this model does not run without weights: {describe_failure(loss.error)}.") from loss.error
    if len(outputs) != 1 or not outputs[0][1]:
        raise _cannot_cache("this model's vision tower takes more than images, so an image has no features of its own.")
    assert loss.value is not None
    leaves_of_loss = find_leaves(loss.value)
    return TowerOutput(outputs[0][0], tuple(n for n, leaf in enumerate(detached) if id(leaf) in leaves_of_loss))


def _cannot_cache(problem: str, fix: str = f"Remove {CACHE_OPTION}.") -> UserError:
    return UserError(where=CACHE_OPTION, problem=problem, fix=fix)


def patch_cached_vision_features(model: PreTrainedModel | PeftModel, output: TowerOutput, folder: str) -> None:
    """Replace the tower's `forward`: it runs once per image, keeps the features in `folder` and then reads them there.

    Nothing in transformers does this. `output` comes from `probe_tower`. Raises `UserError` where the folder cannot be
    made.
    """
    tower = find_tower(model)
    assert tower is not None, "probe_tower has found it"
    stock_forward, cache = tower.forward, FeatureCache.open(folder)
    weights_digest: list[str] = []  # one, made at the first call: then the weights are on their device

    def forward(self, *args, **kwargs):
        images = only_images((args, kwargs))
        if images is None or needs_gradient(self, (args, kwargs)):
            return stock_forward(*args, **kwargs)
        if not weights_digest:
            weights_digest.append(_digest_tower(self, output))
        device = images.device.type
        precision = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        picture = images.dtype, tuple(images.shape[1:])
        call = (weights_digest[0], precision, _describe_call(args, kwargs), *picture)
        keys = [digest(*call, *numbers) for numbers in hash_images(images)]
        found = {key: cache.load(key) for key in dict.fromkeys(keys)}
        missing = [key for key, features in found.items() if features is None]
        if missing:
            new_images = images[[keys.index(key) for key in missing]]
            leaves = tree_leaves(call_with(stock_forward, [new_images], args, kwargs))
            assert all(is_tensor(leaves[n]) for n in output.used), "the output differs from that of probe_tower"
            for i, key in enumerate(missing):
                features = {str(n): leaves[n][i].cpu().contiguous().clone() for n in output.used}
                found[key] = features
                cache.save(key, features)
        leaves = [None] * output.structure.num_leaves
        for n in output.used:
            leaves[n] = torch.stack([found[key][str(n)] for key in keys]).to(images.device)
        return tree_unflatten(leaves, output.structure)

    tower.forward = types.MethodType(forward, tower)


def _digest_tower(tower: nn.Module, output: TowerOutput) -> str:
    """A digest of what features depend on, apart from image and call: the weights, their dtypes, settings, versions."""
    settings = {name: value for name, value in settings_of(tower).items() if name != "_name_or_path"}
    written = json.dumps(settings, sort_keys=True, default=str)
    code = (transformers.__version__, type(tower).__name__, written, output.used)
    return digest(*code, *(item for pair in tower.state_dict().items() for item in pair))


def _describe_call(args: tuple, kwargs: dict[str, Any]) -> str:
    """A call as text, without its tensors and `use_cache`, which Trainer changes and a tower does not use."""
    kept = {name: value for name, value in sorted(kwargs.items()) if name != "use_cache"}
    return repr(tree_map_only(torch.Tensor, lambda _: None, (args, kept)))


def hash_images(images: torch.Tensor) -> list[list[int]]:
    """For each image of `images` `[N, …]` two numbers of 64 bits that stand for its bits, computed on its device.

    Each is a sum of its words, multiplied by random numbers, modulo 2⁶⁴. Two images that differ in words of 32 bits
    have the same number with a probability of 2⁻³² at most, and the same two with 2⁻⁶⁴ (multiply-shift hashing,
    Dietzfelbinger et al. 1997). The host waits once, for 16 bytes of each image, not for its pixels.
    """
    words = images.detach().contiguous().view(INTEGERS[images.element_size()]).flatten(1)
    factors = _random_numbers(words.shape[1], images.device)
    return torch.stack([(factors * image.long()).sum(dim=1) for image in words]).tolist()


@cache
def _random_numbers(count: int, device: torch.device) -> torch.Tensor:
    """`[2, count]`, always the same ones."""
    generator = torch.Generator().manual_seed(20240229)
    return torch.randint(-(2**63), 2**63 - 1, (2, count), generator=generator, dtype=torch.int64).to(device)


def digest(*items: Any) -> str:
    """40 hexadecimal digits that stand for `items`: tensors by shape, dtype and contents, others by their `repr`."""
    found = hashlib.blake2b(digest_size=20)
    for item in items:
        if isinstance(item, torch.Tensor):
            found.update(f"{item.dtype} {tuple(item.shape)}\0".encode())
            found.update(item.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
        else:
            found.update(f"{item!r}\0".encode())
    return found.hexdigest()


@dataclass
class FeatureCache:
    """Features by their key, one file each. A file is complete or missing; an unreadable one counts as missing.

    `full`: a write has failed, so nothing more is written.
    """

    path: Path
    full: bool = False

    @classmethod
    def open(cls, folder: str) -> "FeatureCache":
        """The cache in `folder`, which is made where it is missing. Raises `UserError` where that fails."""
        path = Path(folder).expanduser()
        with writing(f"{CACHE_OPTION} {folder}", "Choose another folder."):
            path.mkdir(parents=True, exist_ok=True)
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
            print0(
                f"Writing vision features to {self.path} failed ({error.strerror}). The run continues and writes none."
            )
        finally:
            with suppress(OSError):
                unfinished.unlink()

    def _file(self, key: str) -> Path:
        return self.path / key[:2] / f"{key[2:]}.safetensors"
