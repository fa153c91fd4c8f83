"""Inputs on a GPU whose numbers the host knows, so that code which reads them does not wait for the GPU.

Model code asks for the numbers of its inputs all the time: how many image tokens there are, how large each picture is,
where rows end. Each `.tolist()`, `.item()`, `if` or boolean mask stops the host until the GPU has done all its work.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch._C._functorch import peek_interpreter_stack
from torch.utils._pytree import tree_leaves, tree_map_only

MOST_NUMBERS = 2**17
"""Larger tensors are not kept on the host: computing with them there would take longer than a wait."""
READS = {
    *("tolist", "item", "numpy", "__array__", "is_nonzero", "__contains__"),
    *("__bool__", "__int__", "__float__", "__index__", "__format__", "__repr__"),
}
IN_PLACE = ("add", "sub", "mul", "floordiv", "mod", "and", "or", "xor", "lshift", "rshift")
CHANGES = {"__setitem__", *(f"__i{name}__" for name in IN_PLACE)}
RANDOM = ("rand", "bernoulli", "multinomial", "poisson")


class KnownTensor(torch.Tensor):
    """Integers or booleans on a device, and the same numbers on the host, as `host`.

    What is computed of such tensors alone is computed on the host, sent, and known in turn. Results with floats, and
    those of other tensors, too, are the device's, as ever.
    https://docs.pytorch.org/docs/stable/notes/extending.html#extending-torch-python-api
    """

    host: torch.Tensor

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, getattr(function, "__name__", "")
        with torch._C.DisableTorchFunctionSubclass():
            if peek_interpreter_stack() is not None:  # inside vmap, which has tensors without memory
                return function(*args, **kwargs)
            if name in READS:
                return function(*_on_host(args), **_on_host(kwargs))
            if name in CHANGES or (name.endswith("_") and not name.endswith("__")) or "out" in kwargs:
                return _change(function, args, kwargs)
            if not _all_known((args, kwargs)):
                return _compute_with_others(function, name, args, kwargs)
            return _compute(function, name, args, kwargs)


def send(batch: torch.Tensor, device: torch.device, *, known: bool = True) -> torch.Tensor:
    """A tensor of the host on `device`, without a wait where its memory is pinned. `known`: as a `KnownTensor`, if
    it is small and has no floats.
    """
    sent = batch.to(device, non_blocking=batch.is_pinned())
    return pair(sent, batch.clone()) if known and _can_be_known(batch) else sent


def pair(on_device: torch.Tensor, host: torch.Tensor) -> KnownTensor:
    """A `KnownTensor` of the two."""
    paired = on_device.as_subclass(KnownTensor)
    paired.host = host
    return paired


def _can_be_known(tensor: torch.Tensor) -> bool:
    return not (tensor.is_floating_point() or tensor.is_complex()) and tensor.numel() <= MOST_NUMBERS


def _on_host(tree: Any) -> Any:
    """`tree` with the host's numbers for known tensors, and the CPU where a device is named."""
    if isinstance(tree, dict) and tree.get("device") is not None:
        tree = {**tree, "device": torch.device("cpu")}
    tree = tree_map_only(torch.device, lambda _: torch.device("cpu"), tree)
    return tree_map_only(KnownTensor, lambda tensor: tensor.host, tree)


def _all_known(tree: Any) -> bool:
    """Whether every tensor is known, or a number on the CPU, which has no device of its own in PyTorch either."""
    tensors = (leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor))
    return all(isinstance(tensor, KnownTensor) or (tensor.is_cpu and tensor.dim() == 0) for tensor in tensors)


def _compute(function: Callable, name: str, args: tuple, kwargs: dict[str, Any]) -> Any:
    """The result of known tensors: known, if it can be."""
    if name in ("to", "cpu"):
        return _move(function, name, args, kwargs)
    device = next(leaf.device for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, KnownTensor))
    if any(word in name for word in RANDOM):
        return function(*args, **kwargs)
    try:
        on_host = function(*_on_host(args), **_on_host(kwargs))
    except (RuntimeError, TypeError, ValueError):  # the host cannot do it, or the device will say what is wrong
        return function(*args, **kwargs)
    results = [leaf for leaf in tree_leaves(on_host) if isinstance(leaf, torch.Tensor)]
    if not results or not all(map(_can_be_known, results)):
        return function(*args, **kwargs)
    if torch.device(kwargs.get("device") or device).type != device.type:
        return on_host
    given = {leaf.host.untyped_storage().data_ptr() for leaf in tree_leaves((args, kwargs)) if _is_known(leaf)}
    if any(result.numel() and result.untyped_storage().data_ptr() in given for result in results):  # a view
        return _pair_all(function(*args, **kwargs), on_host)
    return tree_map_only(torch.Tensor, lambda result: pair(_upload(result, device), result), on_host)


def _is_known(leaf: Any) -> bool:
    return isinstance(leaf, KnownTensor)


def _upload(host: torch.Tensor, device: torch.device) -> torch.Tensor:
    return (host.pin_memory() if device.type == "cuda" else host).to(device, non_blocking=True, copy=True)


def _pair_all(on_device: Any, on_host: Any) -> Any:
    """The results of both, paired. Their structures are alike."""
    if isinstance(on_device, torch.Tensor):
        return pair(on_device, on_host)
    if isinstance(on_device, (tuple, list)):
        pairs = [_pair_all(*both) for both in zip(on_device, on_host, strict=True)]
        return type(on_device)(pairs) if type(on_device) in (tuple, list) else type(on_device)(*pairs)
    return on_device


def _move(function: Callable, name: str, args: tuple, kwargs: dict[str, Any]) -> Any:
    """`Tensor.to` and `Tensor.cpu`."""
    targets = [leaf for leaf in (*args[1:], kwargs.get("device")) if isinstance(leaf, (str, torch.device))]
    if name == "cpu" or any(torch.device(target).type == "cpu" for target in targets):
        return function(*_on_host(args), **_on_host(kwargs)).clone()
    moved = function(*args, **kwargs)
    return pair(moved, args[0].host.to(moved.dtype)) if _can_be_known(moved) else moved


def _change(function: Callable, args: tuple, kwargs: dict[str, Any]) -> Any:
    """Change a tensor, and what the host knows of it."""
    changed = kwargs.get("out", args[0] if args else None)
    if not isinstance(changed, KnownTensor):
        return _compute_with_others(function, function.__name__, args, kwargs)
    result = function(*args, **kwargs)
    if _all_known((args, kwargs)) and function.__name__ != "requires_grad_":
        function(*_on_host(args), **_on_host(kwargs))
    else:
        changed.host.copy_(changed.as_subclass(torch.Tensor))
    return result


def _compute_with_others(function: Callable, name: str, args: tuple, kwargs: dict[str, Any]) -> Any:
    """The result of known tensors and others. Boolean masks become positions, which need no count on the device."""
    if name in ("__getitem__", "__setitem__") and isinstance(args[0], torch.Tensor):
        index = args[1] if isinstance(args[1], tuple) else (args[1],)
        args = (args[0], tuple(position for part in index for position in _as_positions(part)), *args[2:])
    if name == "expand_as" and _is_known(args[0]):
        return pair(args[0].expand(args[1].shape), args[0].host.expand(args[1].shape))
    if name == "masked_scatter" and not kwargs and _is_mask_of_rows(*args[:2]):
        rows, mask, source = args
        positions = _upload(mask.host[..., 0].flatten().nonzero().squeeze(1), rows.device)
        width = rows.shape[-1]
        source = source.reshape(-1, width)[: len(positions)]
        return rows.reshape(-1, width).index_copy(0, positions, source).view(rows.shape)
    return function(*args, **kwargs)


def _as_positions(part: Any) -> tuple[Any, ...]:
    """A boolean mask as indices, one for each dimension; anything else as it is."""
    if not isinstance(part, KnownTensor) or part.dtype != torch.bool or not part.dim():
        return (part,)
    return tuple(_upload(positions, part.device) for positions in part.host.nonzero(as_tuple=True))


def _is_mask_of_rows(rows: Any, mask: Any) -> bool:
    """Whether `mask` `[…, 1]`, or the same expanded, says which of the rows `[…, H]` are replaced."""
    if not _is_known(mask) or mask.shape[:-1] != rows.shape[:-1]:
        return False
    return mask.shape[-1] == 1 or (mask.host.stride(-1) == 0 and mask.shape == rows.shape)
