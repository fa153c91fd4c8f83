"""Float32 copies of 16-bit weights, held and stepped by their optimizer: small updates do not vanish in rounding."""

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from transformers.optimization import Adafactor

from tuning.model.parts import Parts

MASTER = "master"  # the copy's name in the optimizer's state
HALF = {torch.bfloat16, torch.float16}
NUMBERS_AT_ONCE = 2**26  # whose gradients are in float32 at the same time: 0.27 GB

Shares = list[list[torch.Tensor]]  # parameters, one list a group


def in_half(parameters: Iterable[torch.Tensor]) -> list[torch.Tensor]:
    """Those of `parameters` whose updates a 16-bit weight would round away."""
    return [parameter for parameter in parameters if parameter.dtype in HALF]


def explain_updates(model: nn.Module, *, kept: bool, sharded: bool) -> str:
    """How trained 16-bit weights of `model` take up small updates, as a sentence; nothing where there are none.

    An update of less than half a rounding step is lost: of a weight w the step is w × ε / 2 to w × ε.
    """
    half = in_half(parameter for parameter in model.parameters() if parameter.requires_grad)
    if not half:
        return ""
    numbers, dtype = sum(parameter.numel() for parameter in half), half[0].dtype
    what = f"{numbers:,} trained numbers are {str(dtype).removeprefix('torch.')}"
    if not kept:
        lost = round(4 / torch.finfo(dtype).eps)
        return f"Warning: {what}, without master weights: an update below 1/{lost} of a number has no effect on it."
    if sharded:
        return f"{what}: FSDP shards them in float32 and computes in {str(dtype).removeprefix('torch.')}."
    return f"{what}: the optimizer steps float32 copies, {4 * numbers / 1e9:.2g} GB (keep_master_weights)."


def patch_master_weights(optimizer: Optimizer) -> Optimizer:
    """Let `optimizer` step float32 copies of its 16-bit parameters, which become the copies' rounding.

    It stays the optimizer of the parameters themselves, which keep their storage (DDP's buckets and tied weights see
    every step). Each one's copy is `state[parameter]["master"]`, made of the parameter at the first step and saved and
    loaded with the other states, which are float32 as well. Without 16-bit parameters nothing changes.
    """
    if not holds_master_weights(optimizer) and in_half(
        parameter for group in optimizer.param_groups for parameter in group["params"]
    ):
        kind = type(optimizer)
        optimizer.__class__ = type(f"{kind.__name__}WithMasters", (_WithMasters, kind), {})
    return optimizer


def holds_master_weights(optimizer: Optimizer) -> bool:
    """Whether `patch_master_weights` found something to do."""
    return isinstance(optimizer, _WithMasters)


class _WithMasters(Optimizer):
    """What goes before an optimizer's class: for the time of a call of its own, copies stand in for parameters."""

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Step a share of the parameters at a time, so that few gradients are in float32 at once."""
        assert closure is None
        stays = [group["params"] for group in self.param_groups]
        for shares in _split(stays, NUMBERS_AT_ONCE if _steps_each_alone(self) else math.inf):
            masters = {parameter: self._master_of(parameter) for share in shares for parameter in in_half(share)}
            self._stand_in(masters, shares)
            super().step()
            self._stand_back(masters, stays)
            torch._foreach_copy_(list(masters), list(masters.values()))

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load states in float32: PyTorch casts them to their parameter's dtype."""
        stays = [group["params"] for group in self.param_groups]
        halves = in_half(parameter for params in stays for parameter in params)
        empty = {parameter: torch.empty(0, device=parameter.device) for parameter in halves}
        self._stand_in(empty, stays)
        super().load_state_dict(state_dict)
        self._stand_back(empty, stays)

    def _master_of(self, parameter: torch.Tensor) -> torch.Tensor:
        """Take a parameter's copy out of its state (PyTorch's own states are made where it is empty), with gradient."""
        master = self.state[parameter].pop(MASTER, None)
        master = parameter.detach().float() if master is None else master
        master.grad = parameter.grad.float()
        return master

    def _stand_in(self, masters: dict[torch.Tensor, torch.Tensor], shares: Shares) -> None:
        for group, share in zip(self.param_groups, shares, strict=True):
            group["params"] = [masters.get(parameter, parameter) for parameter in share]
        for parameter, master in masters.items():
            if parameter in self.state:
                self.state[master] = self.state.pop(parameter)

    def _stand_back(self, masters: dict[torch.Tensor, torch.Tensor], stays: Shares) -> None:
        for group, parameters in zip(self.param_groups, stays, strict=True):
            group["params"] = parameters
        for parameter, master in masters.items():
            state = self.state.pop(master, {})
            if master.grad is not None:  # else it stood in for loading only
                state[MASTER], master.grad = master, None
            if state:
                self.state[parameter] = state


def _steps_each_alone(optimizer: Optimizer) -> bool:
    """Whether a step of some parameters, then of the others, is a step of all: nothing in it counts steps of all."""
    kind = type(optimizer).__bases__[1]
    return kind is Adafactor or kind.__module__.startswith("torch.optim.")


def _split(groups: Shares, limit: float) -> Iterator[Shares]:
    """The parameters that have gradients, in shares of at most `limit` numbers (or a single parameter)."""
    share: Shares = [[] for _ in groups]
    size = 0
    for number, parameters in enumerate(groups):
        for parameter in parameters:
            if parameter.grad is None:
                continue
            if size and size + parameter.numel() > limit:
                yield share
                share, size = [[] for _ in groups], 0
            share[number].append(parameter)
            size += parameter.numel()
    yield share


def parameter_groups(
    model: nn.Module, parts: Parts, groups: list[dict], learning_rates: dict[str, float | None]
) -> list[dict]:
    """Split an optimizer's parameter groups so that each part with a learning rate of its own gets it.

    `groups` are the optimizer's, `learning_rates` maps parts to rates; parts without one stay as they were.
    """
    part_of: dict[torch.Tensor, str] = {parameter: parts.of(name) for name, parameter in model.named_parameters()}
    split = []
    for group in groups:
        by_rate: dict[float, list] = {}
        for parameter in group["params"]:
            rate = learning_rates.get(part_of[parameter])
            by_rate.setdefault(group["lr"] if rate is None else rate, []).append(parameter)
        split += [{**group, "params": parameters, "lr": rate} for rate, parameters in by_rate.items()]
    return split
