"""Layers that could mix packed rows, run row by row: with a state along the row, or attention of their own."""

import types
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten
from transformers.modeling_layers import GradientCheckpointingLayer

BOUNDS = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")  # arguments that say where rows end


RUNNING: ContextVar[torch.Tensor | None] = ContextVar("bounds of packed rows", default=None)
"""`PackedRows.bounds` of the model whose forward runs."""


class PackedRows:
    """Where the packed rows of the batch that a model runs begin, and where the last one ends; None if it is padded.

    `bounds` is `cu_seq_lens_q`. It is kept after the forward: gradient checkpointing runs layers again in the backward.
    """

    bounds: torch.Tensor | None = None

    @property
    def ends(self) -> list[int] | None:
        """The bounds as numbers."""
        return row_ends(self.bounds)

    @contextmanager
    def running(self, bounds: torch.Tensor | None) -> Iterator[None]:
        """Run the model on packed rows with these bounds, or on a padded batch without any."""
        self.bounds = bounds
        token = RUNNING.set(bounds)
        try:
            yield
        finally:
            RUNNING.reset(token)


@dataclass(frozen=True)
class PerRow:
    """What a layer returned for each row, where it cannot be joined. Layers after it take their part."""

    parts: tuple[Any, ...]

    def for_row(self, number: int) -> Any:
        return self.parts[number]


def row_ends(bounds: torch.Tensor | None) -> list[int] | None:
    """`cu_seq_lens_q` as numbers. They are read from the device once, and kept on the tensor."""
    if bounds is None:
        return None
    if not hasattr(bounds, "as_numbers"):
        bounds.as_numbers = bounds.tolist()  # type: ignore[attr-defined]
    return bounds.as_numbers  # type: ignore[attr-defined]


def find_layers(decoder: nn.Module) -> dict[str, nn.Module]:
    """The layers of a language model by name, in their order. transformers marks them for gradient checkpointing."""
    layers: dict[str, nn.Module] = {}
    for name, module in decoder.named_modules():
        if isinstance(module, GradientCheckpointingLayer) and not any(name.startswith(f"{known}.") for known in layers):
            layers[name] = module
    return layers


@contextmanager
def layers_by_row(decoder: nn.Module, names: Collection[str], rows: PackedRows) -> Iterator[None]:
    """Run the layers called `names` row by row while inside."""
    layers = [decoder.get_submodule(name) for name in names]
    before = [vars(layer).get("forward") for layer in layers]
    run_layers_by_row(decoder, names, rows)
    try:
        yield
    finally:
        for layer, forward in zip(layers, before, strict=True):
            del layer.forward
            if forward is not None:
                layer.forward = forward


def run_layers_by_row(decoder: nn.Module, names: Collection[str], rows: PackedRows) -> None:
    """Run the layers called `names` row by row from now on, wherever the batch is packed.

    Only the `forward` of these instances is replaced, so that wrappers (FSDP, gradient checkpointing) act on a layer
    once for all its rows. It can go once such layers take the bounds of rows: Qwen3.5's do where the package `fla` is
    installed, LFM2's where `causal_conv1d` is (transformers 5.24).
    """
    for name in names:
        layer = decoder.get_submodule(name)
        layer.forward = types.MethodType(_by_row(layer.forward, rows), layer)


def _by_row(stock_forward: Callable[..., Any], rows: PackedRows) -> Callable[..., Any]:
    @torch.compiler.disable(recursive=False)
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        ends = rows.ends
        if ends is None:
            return stock_forward(*args, **kwargs)
        inputs = args, {name: value for name, value in kwargs.items() if name not in BOUNDS}
        outputs = []
        for number in range(len(ends) - 1):
            own_args, own_kwargs = tree_map(row_cutter(number, ends), inputs)
            outputs.append(stock_forward(*own_args, **own_kwargs))
        return join_outputs(outputs)

    return forward


def row_cutter(number: int, ends: Sequence[int]) -> Callable[[Any], Any]:
    """A function that cuts what belongs to a row out of what belongs to all."""
    start, end, total = ends[number], ends[number + 1], ends[-1]

    def cut(value: Any) -> Any:
        """The part of a row: `[B, T, …]`, `[axes, B, T, …]`, `[T, …]`, or of pairs of tokens `[…, T, T]`."""
        if hasattr(value, "for_row"):
            return value.for_row(number)
        if not isinstance(value, torch.Tensor):
            return value
        sizes = list(value.shape)
        may_be_states = len(sizes) == 3 and value.is_floating_point()  # [B, T, H]
        if sizes[-2:] == [total, total] and not may_be_states:
            return value[..., start:end, start:end]
        dim = next((dim for dim in [*range(1, len(sizes)), 0] if sizes and sizes[dim] == total), None)
        return value if dim is None else value.narrow(dim, start, end - start)

    return cut


def join_outputs(outputs: list[Any]) -> Any:
    """What a layer returned for each row, as one output: tensors `[B, T, …]`, or `[T, …]`, are concatenated."""
    leaves, structures = zip(*(tree_flatten(output) for output in outputs), strict=True)
    return tree_unflatten([join_tensors(parts) for parts in zip(*leaves, strict=True)], structures[0])


def join_tensors(parts: tuple[Any, ...]) -> Any:
    """See `join_outputs`."""
    if not isinstance(parts[0], torch.Tensor):
        return parts[0]
    dim = 1 if parts[0].dim() > 2 else 0
    others = {(*part.shape[:dim], *part.shape[dim + 1 :]) for part in parts}
    return torch.cat(parts, dim=dim) if len(others) == 1 else PerRow(parts)
