"""Run a model that has no weights, to see what its structure does before any weights are loaded."""

import math
import warnings
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

META = torch.device("meta")
MAX_MASK_SIZE = 2**28  # elements of a real mask; see DryRun

_aten = torch.ops.aten
_INDEXING = {_aten.index, _aten.index_put, _aten.index_put_, _aten._index_put_impl_, _aten._unsafe_index}
_SIZED_BY_MASK = {*_INDEXING, _aten.masked_select, _aten.nonzero}  # the size of their result depends on a mask


def find_idle_parameters(model: nn.Module, batch: dict[str, torch.Tensor]) -> set[str]:
    """Names of the trainable parameters that get no gradient, because the loss of `batch` does not depend on them.

    `model` is a skeleton on the meta device, prepared as for training. `batch` holds the tensors that the collator
    made. Raises whatever a model raises that does not run without weights: it needs an operation that the meta device
    lacks, or its Python code reads a number that is not there.
    """
    reached = find_leaves(run_without_weights(model, batch))
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    return {name for name, parameter in trained.items() if id(parameter) not in reached}


def run_without_weights(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """The loss of `batch`, without a value but with its graph; see `find_idle_parameters`."""
    inputs = {name: value.to(META) if value.is_floating_point() else value for name, value in batch.items()}
    with warnings.catch_warnings(), DryRun():
        warnings.simplefilter("ignore")
        return model(**inputs, num_items_in_batch=1).loss


def find_leaves(loss: torch.Tensor) -> set[int]:
    """Ids (`id(tensor)`) of the tensors at the leaves of the graph of `loss`."""
    reached, seen, nodes = set(), set(), [loss.grad_fn]
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):  # leaves of the graph hold their parameter
            reached.add(id(node.variable))
        nodes += [following for following, _ in node.next_functions]
    return reached


class DryRun(TorchDispatchMode):
    """Inside, models on the meta device run, and the numbers that decide shapes are real.

    Floats have no values, on the meta device. Integers and booleans that follow from the batch alone are real, on the
    CPU, whatever device the model asks for: token ids, masks, positions. So a mask selects as many rows as it does in
    training. An operation on both kinds uses only the shapes of the real ones. Masks of more than `MAX_MASK_SIZE`
    elements (of every token for every other) have no values either, or a check of long rows would fill this machine.
    """

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return _run_operation(func, args, kwargs or {})


def _run_operation(func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    """Run `func` on floats without values and real integers; see `DryRun`."""
    tensors = [value for value in tree_leaves((args, kwargs)) if isinstance(value, torch.Tensor)]
    unknown = [tensor for tensor in tensors if tensor.device == META]
    if not unknown and kwargs.get("device") == META:
        return _make(func, args, kwargs, copies=bool(tensors))
    if unknown and "device" in kwargs:  # a move of a mask without values to the CPU: there are no values to move
        kwargs = {**kwargs, "device": META}
    if len(unknown) == len(tensors) or not (unknown or _makes_huge_mask(func, args, kwargs, tensors)):
        return func(*args, **kwargs)
    if func._schema.is_mutable and tensors[0].device != META:
        raise NotImplementedError(f"{func} would write unknown values into a tensor with known ones")
    if func.overloadpacket in _INDEXING:
        args = (args[0], _as_positions(args[1]), *args[2:])
    if func is _aten.masked_select.default:
        return args[0].new_empty(int(args[1].expand(args[0].shape).sum()))
    return func(*_drop_values(args), **_drop_values(kwargs))


def _makes_huge_mask(func: Any, args: tuple, kwargs: dict[str, Any], tensors: list[torch.Tensor]) -> bool:
    if func.overloadpacket in _SIZED_BY_MASK or math.prod(tensor.numel() for tensor in tensors) <= MAX_MASK_SIZE:
        return False
    made = func(*_drop_values(args), **_drop_values(kwargs))
    return isinstance(made, torch.Tensor) and made.numel() > MAX_MASK_SIZE


def _drop_values(value: Any) -> Any:
    return tree_map_only(torch.Tensor, lambda tensor: tensor.to(META), value)


def _make(func: Any, args: tuple, kwargs: dict[str, Any], *, copies: bool) -> Any:
    """A new tensor (with `copies`, of a real one): real if it holds integers, else without values."""
    real = {**kwargs, "device": torch.device("cpu")}
    made = func(*args, **(real if copies else kwargs))
    if made.is_floating_point():
        return made.to(META)
    return made if copies else func(*args, **real)


def _as_positions(indices: list[torch.Tensor | None]) -> list[torch.Tensor | None]:
    """The indices with each mask replaced by the positions where it is true, one tensor per dimension of the mask."""
    positions: list[torch.Tensor | None] = []
    for index in indices:
        if index is not None and index.dtype in (torch.bool, torch.uint8):
            positions += index.nonzero().unbind(1)
        else:
            positions.append(index)
    return positions
