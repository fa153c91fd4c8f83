"""Running a model that has no weights: what its structure does, found without loading it."""

import math
import warnings
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

META = torch.device("meta")
TOO_MANY = 2**28  # numbers of a mask; see DryRun
# What running a model without weights raises: no meta kernel, or a Python decision by the value of an unknown number.
CANNOT_SIMULATE = (NotImplementedError, RuntimeError)

_aten = torch.ops.aten
_INDEXES = {_aten.index, _aten.index_put, _aten.index_put_, _aten._index_put_impl_, _aten._unsafe_index}
_CHOOSES = {*_INDEXES, _aten.masked_select, _aten.nonzero}  # the size of the result depends on a mask


class DryRun(TorchDispatchMode):
    """Inside, models on the meta device run, and numbers that decide shapes are real ones.

    Floats are without contents, on the meta device; integers and truth values that follow from the batch alone are
    real, on the CPU, whatever device they are asked for: token ids, masks, positions. So a mask selects as many rows
    as it does in training. An operation on both takes the real ones for their shape. Masks of more than `TOO_MANY`
    numbers (of every token for every other) are without contents too, or checking long rows would fill this machine.
    """

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {})


def find_idle_parameters(model: nn.Module, batch: dict[str, torch.Tensor]) -> set[str]:
    """Names of trainable parameters that the loss of `batch` does not depend on: they can receive no gradient.

    `model` is a skeleton on the meta device, prepared as for training; `batch` is what the collator made, without its
    facts. Raises one of `CANNOT_SIMULATE` for a model that does not run without weights.
    """
    reached = find_leaves(run_without_weights(model, batch))
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    return {name for name, parameter in trained.items() if id(parameter) not in reached}


def run_without_weights(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """The loss of `batch`, without contents but with its graph; see `find_idle_parameters`."""
    inputs = {name: value.to(META) if value.is_floating_point() else value for name, value in batch.items()}
    with warnings.catch_warnings(), DryRun():
        warnings.simplefilter("ignore")
        return model(**inputs, num_items_in_batch=1).loss


def find_leaves(loss: torch.Tensor) -> set[int]:
    """Ids of the tensors that the graph of `loss` begins with."""
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


def _run(func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    """`func` on floats without contents and real integers; see `DryRun`."""
    tensors = [value for value in tree_leaves((args, kwargs)) if isinstance(value, torch.Tensor)]
    emptied = [tensor for tensor in tensors if tensor.device == META]
    if not emptied and kwargs.get("device") == META:
        return _make(func, args, kwargs, copies=bool(tensors))
    if emptied and "device" in kwargs:  # a mask asked for where a real one is: it has nothing to bring there
        kwargs = {**kwargs, "device": META}
    if len(emptied) == len(tensors) or not (emptied or _makes_too_many(func, args, kwargs, tensors)):
        return func(*args, **kwargs)
    if func._schema.is_mutable and tensors[0].device != META:
        raise NotImplementedError(f"{func} would write an unknown number into a known tensor")
    if func.overloadpacket in _INDEXES:
        args = (args[0], _as_positions(args[1]), *args[2:])
    if func is _aten.masked_select.default:
        return args[0].new_empty(int(args[1].expand(args[0].shape).sum()))
    return func(*_emptied(args), **_emptied(kwargs))


def _makes_too_many(func: Any, args: tuple, kwargs: dict[str, Any], tensors: list[torch.Tensor]) -> bool:
    if func.overloadpacket in _CHOOSES or math.prod(tensor.numel() for tensor in tensors) <= TOO_MANY:
        return False
    made = func(*_emptied(args), **_emptied(kwargs))
    return isinstance(made, torch.Tensor) and made.numel() > TOO_MANY


def _emptied(value: Any) -> Any:
    return tree_map_only(torch.Tensor, lambda tensor: tensor.to(META), value)


def _make(func: Any, args: tuple, kwargs: dict[str, Any], *, copies: bool) -> Any:
    """A new tensor, a copy of a real one or out of nothing: real if it holds integers, else without contents."""
    real = {**kwargs, "device": torch.device("cpu")}
    made = func(*args, **(real if copies else kwargs))
    if made.is_floating_point():
        return made.to(META)
    return made if copies else func(*args, **real)


def _as_positions(indices: list[torch.Tensor | None]) -> list[torch.Tensor | None]:
    """Indices with every mask replaced by the positions where it is true, one tensor per dimension of the mask."""
    positions: list[torch.Tensor | None] = []
    for index in indices:
        if index is not None and index.dtype in (torch.bool, torch.uint8):
            positions += index.nonzero().unbind(1)
        else:
            positions.append(index)
    return positions
