"""How a frozen vision tower runs: without a graph, and a few images at a time."""

import functools
import inspect
import types
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map_only, tree_unflatten
from transformers import PreTrainedModel

from tuning.model.parts import find_parts

AT_ONCE = 2  # images at least: with one, a first dimension of 1 would look like the images
CHUNK_PIXELS = 2**22
"""Pixels that go through the tower at once: 28 tiles of 384×384, which cost a tower like so400m 0.6 GB in float32 on
top of its output. On a CPU twice as many take 4 % less time, half as many 30 % more.
"""


def find_tower(model: PreTrainedModel | PeftModel) -> nn.Module | None:
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    names = find_parts(base).vision_tower
    return base.get_submodule(names[0]) if names else None


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
    all_at_once = sharded or bool(describe_randomness(tower))

    def forward(self, *args, **kwargs):
        nonlocal all_at_once
        if needs_gradient(self, (args, kwargs)):
            return stock_forward(*args, **kwargs)
        with torch.no_grad():
            chunks = None if all_at_once else _split_images((args, kwargs)) or _split_patches(self, (args, kwargs))
            if chunks is None:
                return stock_forward(*args, **kwargs)
            joined = _run_in_chunks(lambda chunk: call_with(stock_forward, chunk, args, kwargs), chunks)
            if joined is None:  # nor will later calls be
                all_at_once = True
                return stock_forward(*args, **kwargs)
            return joined

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


def needs_gradient(tower: nn.Module, arguments: Any) -> bool:
    """Whether something trains in the tower, or before it."""
    inputs = (value for value in tree_leaves(arguments) if isinstance(value, torch.Tensor))
    return any(tensor.requires_grad for tensors in (inputs, tower.parameters()) for tensor in tensors)


def only_images(arguments: Any) -> torch.Tensor | None:
    """The images `[N, C, H, W]` of a call; None where it has other tensors, which would have to be split as well."""
    tensors = [value for value in tree_leaves(arguments) if isinstance(value, torch.Tensor)]
    return tensors[0] if len(tensors) == 1 and tensors[0].dim() == 4 else None


def call_with(tower: Callable, tensors: Sequence[torch.Tensor], args: tuple, kwargs: dict[str, Any]) -> Any:
    """Call `tower` with `tensors` in place of those among its arguments, in their order."""
    left = iter(tensors)
    args, kwargs = tree_map_only(torch.Tensor, lambda _: next(left), (args, kwargs))
    return tower(*args, **kwargs)


@dataclass(frozen=True)
class _Chunks:
    """A call of a tower in parts. `parts`: the tensors among its arguments, for each part.

    `sizes`: the rows (images, or patches) of each part. `merges`: how many rows may become one row of the output.
    """

    parts: list[tuple[torch.Tensor, ...]]
    sizes: list[int]
    merges: frozenset[int] = frozenset({1})


def _split_images(arguments: Any) -> _Chunks | None:
    """Images `[N, C, H, W]` in parts of `CHUNK_PIXELS`; None where there are few, or other tensors."""
    images = only_images(arguments)
    if images is None:
        return None
    size = max(AT_ONCE, CHUNK_PIXELS // (images.shape[2] * images.shape[3]))
    parts = images.split(size)
    return _Chunks([(part,) for part in parts], [len(part) for part in parts]) if len(parts) > 1 else None


def _split_patches(tower: nn.Module, arguments: Any) -> _Chunks | None:
    """Patches `[P, …]` of pictures that `tower` keeps apart, in parts of whole pictures of about `CHUNK_PIXELS`.

    `arguments` have the grid `[N, 3]` of each picture, and no other tensor. None where there are few, or they have.
    """
    tensors = [value for value in tree_leaves(arguments) if isinstance(value, torch.Tensor)]
    if len(tensors) != 2 or not keeps_pictures_apart(tower):
        return None
    patches, grids = sorted(tensors, key=lambda tensor: not tensor.is_floating_point())
    most = 3 * CHUNK_PIXELS // max(1, patches[:1].numel())  # numbers, of three colours
    if grids.is_floating_point() or grids.shape[1:] != (3,) or len(grids) <= AT_ONCE or len(patches) <= most:
        return None
    sizes = grids.prod(dim=1).tolist()
    if sum(sizes) != len(patches):
        return None
    pictures = _group(sizes, most)
    rows = [sum(group) for group in pictures]
    parts = zip(patches.split(rows), grids.split([len(group) for group in pictures]), strict=True)
    in_order = tensors[0] is patches
    merge = int(getattr(getattr(tower, "config", None), "spatial_merge_size", 1)) ** 2
    return _Chunks([part if in_order else part[::-1] for part in parts], rows, frozenset({1, merge}))


def _group(sizes: Sequence[int], most: int) -> list[list[int]]:
    """Neighbouring sizes in groups whose sum is at most `most`, or that have no more than `AT_ONCE`."""
    groups: list[list[int]] = [[]]
    for size in sizes:
        if len(groups[-1]) >= AT_ONCE and sum(groups[-1]) + size > most:
            groups.append([])
        groups[-1].append(size)
    return groups


def keeps_pictures_apart(tower: nn.Module) -> bool:
    """Whether some layer of a tower takes the lengths of pictures."""
    kinds: set[Any] = {type(module) for module in tower.modules()}
    return any(_takes_lengths(kind) for kind in kinds)


@functools.cache
def _takes_lengths(kind: Any) -> bool:
    try:
        return "cu_seq_lens_q" in inspect.getsource(kind)
    except (OSError, TypeError):  # a class without source
        return False


def _run_in_chunks(run: Callable[[tuple[torch.Tensor, ...]], Any], chunks: _Chunks) -> Any:
    """`run(part)` for each part, joined; None where the first dimension of the output is not made of the rows."""
    joined: list[Any] = []
    merges: list[int] = []
    done = 0
    for part, size in zip(chunks.parts, chunks.sizes, strict=True):
        leaves, structure = tree_flatten(run(part))
        if not done:
            merges = [size // max(1, len(leaf)) if is_tensor(leaf) and leaf.dim() else 1 for leaf in leaves]
            tensors = [(leaf, merge) for leaf, merge in zip(leaves, merges, strict=True) if is_tensor(leaf)]
            if not all(merge in chunks.merges and leaf.shape[:1] == (size // merge,) for leaf, merge in tensors):
                return None
            rows = [sum(chunks.sizes) // merge for merge in merges]
            joined = [
                leaf.new_empty(number, *leaf.shape[1:]) if is_tensor(leaf) else leaf
                for leaf, number in zip(leaves, rows, strict=True)
            ]
        for whole, leaf, merge in zip(joined, leaves, merges, strict=True):
            if is_tensor(leaf):
                whole[done // merge : (done + size) // merge] = leaf
        done += size
    return tree_unflatten(joined, structure)


def is_tensor(value: Any) -> bool:
    return isinstance(value, torch.Tensor)


def has_row_per_image(leaves: Iterable[Any], images: int) -> bool:
    return all(leaf.shape[:1] == (images,) for leaf in leaves if is_tensor(leaf))


def describe_randomness(tower: nn.Module) -> str:
    """What makes features depend on more than image and weights: dropout, batch normalisation; "" if nothing does."""
    settings = settings_of(tower).items()
    found = [f"{name} {value}" for name, value in settings if "drop" in name and isinstance(value, float) and value > 0]
    for module in tower.modules():
        if isinstance(module, nn.Dropout) and module.p > 0:
            found.append(f"dropout {module.p}")
        elif isinstance(module, nn.modules.batchnorm._BatchNorm):
            found.append("batch normalisation")
    return ", ".join(dict.fromkeys(found))


def settings_of(tower: nn.Module) -> dict[str, Any]:
    config: Any = getattr(tower, "config", None)
    return config.to_dict() if hasattr(config, "to_dict") else {}
