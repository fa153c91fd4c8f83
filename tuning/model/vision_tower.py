"""How a frozen vision tower runs: without a graph, a few images at a time, and, with a cache, once per image."""

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
from tuning.errors import UserError, describe_failure, try_optional, writing
from tuning.model.dry_run import find_leaves, run_without_weights
from tuning.model.parts import find_parts

CACHE_OPTION = "cache_vision_features"
CHUNK_PIXELS = 2**22
"""Pixels that go through the tower at once: 28 tiles of 384×384, which cost a tower like so400m 0.6 GB in float32 on
top of its output. On a CPU twice as many take 4 % less time, half as many 30 % more.
"""


def find_tower(model: PreTrainedModel | PeftModel) -> nn.Module | None:
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    names = find_parts(base).vision_tower
    return base.get_submodule(names[0]) if names else None


# --- without a graph, a few images at a time ---


def patch_frozen_tower(model: PreTrainedModel | PeftModel, *, sharded: bool) -> None:
    """Replace the tower's `forward`: a call in which nothing trains builds no graph and takes few images at a time.

    PEFT and gradient checkpointing make the output of its embeddings require a gradient, so that a frozen tower would
    be recomputed and differentiated for nothing. Call this once it is decided what trains. It can go once
    `enable_input_require_grads` leaves frozen towers alone (it does not in transformers 5.23). `sharded`: FSDP or
    DeepSpeed need every process to run the layers equally often, so all images go through at once.
    """
    tower = find_tower(model)
    if tower is None:
        return
    stock_forward = tower.forward
    all_at_once = sharded or bool(_describe_randomness(tower))

    def forward(self, *args, **kwargs):
        if _needs_gradient(self, (args, kwargs)):
            return stock_forward(*args, **kwargs)
        with torch.no_grad():
            images = _only_images((args, kwargs))
            if all_at_once or images is None:
                return stock_forward(*args, **kwargs)
            return _run_in_chunks(lambda chunk: _call_with_images(stock_forward, chunk, args, kwargs), images)

    tower.forward = types.MethodType(forward, tower)


def patch_frozen_statistics(model: nn.Module) -> None:
    """Keep frozen batch normalisation in evaluation mode, whatever mode the model is set to.

    Otherwise each step moves its running statistics, though its weights are frozen, and a row depends on its batch.
    PyTorch's `requires_grad` does not reach buffers, and `Trainer` sets the whole model to training mode in every step.
    Call this once it is decided what trains.
    """
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and is_frozen(model, name):
            module.eval()
            module.train = types.MethodType(lambda self, mode=True: self, module)


def is_frozen(model: nn.Module, name: str) -> bool:
    """Whether nothing trains in the module `name`, or in the one around it where it has no parameter itself."""
    parameters = list(model.get_submodule(name).parameters())
    parameters = parameters or list(model.get_submodule(name.rpartition(".")[0]).parameters())
    return not any(parameter.requires_grad for parameter in parameters)


def _needs_gradient(tower: nn.Module, arguments: Any) -> bool:
    """Whether something trains in the tower, or before it."""
    inputs = (value for value in tree_leaves(arguments) if isinstance(value, torch.Tensor))
    return any(tensor.requires_grad for tensors in (inputs, tower.parameters()) for tensor in tensors)


def _only_images(arguments: Any) -> torch.Tensor | None:
    """The images `[N, C, H, W]` of a call; None where it has other tensors, which would have to be split as well."""
    tensors = [value for value in tree_leaves(arguments) if isinstance(value, torch.Tensor)]
    return tensors[0] if len(tensors) == 1 and tensors[0].dim() == 4 else None


def _call_with_images(tower: Callable, images: torch.Tensor, args: tuple, kwargs: dict[str, Any]) -> Any:
    """Call `tower` with `images` in place of the images among its arguments."""
    args, kwargs = tree_map_only(torch.Tensor, lambda _: images, (args, kwargs))
    return tower(*args, **kwargs)


def _run_in_chunks(run: Callable[[torch.Tensor], Any], images: torch.Tensor) -> Any:
    """`run(images)` in chunks of `CHUNK_PIXELS`, joined; at once where the first output dimension is not the images."""
    # Two at least: with one image every first dimension of 1 would look like the images.
    size = max(2, CHUNK_PIXELS // (images.shape[2] * images.shape[3]))
    if len(images) <= size:
        return run(images)
    joined: list[Any] = []
    done = 0
    for chunk in images.split(size):
        leaves, structure = tree_flatten(run(chunk))
        if not done:
            if not _has_row_per_image(leaves, len(chunk)):
                return run(images)
            joined = [leaf.new_empty(len(images), *leaf.shape[1:]) if _is_tensor(leaf) else leaf for leaf in leaves]
        for whole, leaf in zip(joined, leaves, strict=True):
            if _is_tensor(leaf):
                whole[done : done + len(chunk)] = leaf
        done += len(chunk)
    return tree_unflatten(joined, structure)


def _is_tensor(value: Any) -> bool:
    return isinstance(value, torch.Tensor)


def _has_row_per_image(leaves: Iterable[Any], images: int) -> bool:
    return all(leaf.shape[:1] == (images,) for leaf in leaves if _is_tensor(leaf))


def _describe_randomness(tower: nn.Module) -> str:
    """What makes features depend on more than image and weights: dropout, batch normalisation; "" if nothing does."""
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


# --- once per image: features from a cache ---


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
    if randomness := _describe_randomness(tower):
        raise _cannot_cache(f"the features of an image are not always the same: {randomness}.")
    outputs: list[tuple[TreeSpec, bool]] = []
    detached: list[Any] = []

    def detach_output(_, args, kwargs, output):
        leaves, structure = tree_flatten(output)
        images = _only_images((args, kwargs))
        outputs.append((structure, images is not None and _has_row_per_image(leaves, len(images))))
        detached[:] = [leaf.detach().requires_grad_() if _is_tensor(leaf) else leaf for leaf in leaves]
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
        images = _only_images((args, kwargs))
        if images is None or _needs_gradient(self, (args, kwargs)):
            return stock_forward(*args, **kwargs)
        if not weights_digest:
            weights_digest.append(_digest_tower(self, output))
        device = images.device.type
        precision = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        call = (weights_digest[0], precision, _describe_call(args, kwargs))
        keys = [digest(*call, image) for image in images.cpu()]
        found = {key: cache.load(key) for key in dict.fromkeys(keys)}
        missing = [key for key, features in found.items() if features is None]
        if missing:
            new_images = images[[keys.index(key) for key in missing]]
            leaves = tree_leaves(_call_with_images(stock_forward, new_images, args, kwargs))
            assert all(_is_tensor(leaves[n]) for n in output.used), "the output differs from that of probe_tower"
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
    settings = {name: value for name, value in _settings(tower).items() if name != "_name_or_path"}
    written = json.dumps(settings, sort_keys=True, default=str)
    code = (transformers.__version__, type(tower).__name__, written, output.used)
    return digest(*code, *(item for pair in tower.state_dict().items() for item in pair))


def _describe_call(args: tuple, kwargs: dict[str, Any]) -> str:
    """A call as text, without its tensors and `use_cache`, which Trainer changes and a tower does not use."""
    kept = {name: value for name, value in sorted(kwargs.items()) if name != "use_cache"}
    return repr(tree_map_only(torch.Tensor, lambda _: None, (args, kept)))


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
