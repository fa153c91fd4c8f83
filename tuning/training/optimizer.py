"""The optimizer: learning rates of their own for parts, and float32 copies of 16-bit weights (master weights).

Without a master weight, an update that is small compared with its weight is lost in rounding.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from transformers import Trainer, TrainingArguments
from transformers.optimization import Adafactor, get_scheduler
from transformers.trainer_optimizer import is_optimizer_factory

from tuning.config.options import RunArguments
from tuning.errors import UserError, describe_failure, first_line, try_optional
from tuning.model.parts import PROJECTOR, VISION_TOWER, Parts

MASTER = "master"  # the name of the master weight in the optimizer's state
HALF = {torch.bfloat16, torch.float16}
NUMBERS_AT_ONCE = 2**26  # how many numbers have a gradient in float32 at the same time: 0.27 GB

Shares = list[list[torch.Tensor]]  # parameters, one list per parameter group


def in_half(parameters: Iterable[torch.Tensor]) -> list[torch.Tensor]:
    """The 16-bit ones among `parameters`."""
    return [parameter for parameter in parameters if parameter.dtype in HALF]


def explain_updates(model: nn.Module, *, kept: bool, sharded: bool) -> str:
    """A sentence on what happens to small updates of trained 16-bit weights; "" where `model` has none.

    `kept`: they have float32 copies. `sharded`: by FSDP. An update of less than half a rounding step is lost. The
    rounding step of a weight w is w × ε / 2 to w × ε.
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
    """Make `optimizer` step float32 copies of its 16-bit parameters, and round the copies to the parameters.

    It remains the optimizer of the parameters themselves. They keep their storage, so DDP's buckets and tied weights
    see every step. The copy is `state[parameter]["master"]`. It is made at the first step, and saved and loaded with
    the other states, which are float32 as well. Without 16-bit parameters nothing changes.
    """
    if not holds_master_weights(optimizer) and in_half(
        parameter for group in optimizer.param_groups for parameter in group["params"]
    ):
        kind = type(optimizer)
        optimizer.__class__ = type(f"{kind.__name__}WithMasters", (_WithMasters, kind), {})
    return optimizer


def holds_master_weights(optimizer: Optimizer) -> bool:
    """Whether `patch_master_weights` has changed this optimizer."""
    return isinstance(optimizer, _WithMasters)


class _WithMasters(Optimizer):
    """Mixed in before an optimizer's class: during its own calls, copies stand in for the 16-bit parameters."""

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Step one share of the parameters after another, so that few gradients are in float32 at once."""
        assert closure is None
        stays = [group["params"] for group in self.param_groups]
        for shares in _split(stays, NUMBERS_AT_ONCE if _steps_each_alone(self) else math.inf):
            masters = {parameter: self._master_of(parameter) for share in shares for parameter in in_half(share)}
            self._stand_in(masters, shares)
            super().step()
            self._stand_back(masters, stays)
            torch._foreach_copy_(list(masters), list(masters.values()))

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load states in float32: PyTorch would cast them to the dtype of their parameter."""
        stays = [group["params"] for group in self.param_groups]
        halves = in_half(parameter for params in stays for parameter in params)
        empty = {parameter: torch.empty(0, device=parameter.device) for parameter in halves}
        self._stand_in(empty, stays)
        super().load_state_dict(state_dict)
        self._stand_back(empty, stays)

    def _master_of(self, parameter: torch.Tensor) -> torch.Tensor:
        """Take a parameter's copy, with its gradient, out of its state: PyTorch makes its own where that is empty."""
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
            if master.grad is not None:  # it stood in for a step, not for loading
                state[MASTER], master.grad = master, None
            if state:
                self.state[parameter] = state


def _steps_each_alone(optimizer: Optimizer) -> bool:
    """Whether stepping some parameters, then the others, equals one step: no state is shared between parameters."""
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


def check_optimizer(training: TrainingArguments) -> None:
    """Make the optimizer and the schedule of a run for one small weight. Raises `UserError` where that fails.

    A package may be missing, or an argument may be none of theirs. The run itself makes them after it has loaded the
    model. Optimizers that look into the model are made there only.
    """
    if training.deepspeed:  # makes its own
        return
    asked = try_optional(lambda: Trainer.get_optimizer_cls_and_kwargs(training))
    looks_into_model = any(name in str(training.optim) for name in ("galore", "apollo", "lomo"))
    if looks_into_model and not isinstance(asked.error, ImportError):
        return
    where = f"optim {getattr(training.optim, 'value', training.optim)}"
    if asked.value is None:
        raise _cannot_be_made(where, asked.error)
    kind, options = asked.value
    if is_optimizer_factory(kind):
        return
    made = try_optional(lambda: kind([nn.Parameter(torch.zeros(2, 2))], **options))
    if made.value is None:
        raise _cannot_be_made(where, made.error)
    steps = training.max_steps if training.max_steps > 0 else 100
    schedule = try_optional(
        lambda: get_scheduler(
            training.lr_scheduler_type,
            made.value,
            num_warmup_steps=training.get_warmup_steps(steps),
            num_training_steps=steps,
            scheduler_specific_kwargs=training.lr_scheduler_kwargs,
        )
    )
    if schedule.error:
        name = getattr(training.lr_scheduler_type, "value", training.lr_scheduler_type)
        raise _cannot_be_made(f"lr_scheduler_type {name}, lr_scheduler_kwargs", schedule.error)


def _cannot_be_made(where: str, error: Exception | None) -> UserError:
    assert error is not None
    reason = first_line(error) if isinstance(error, (ValueError, ImportError)) else describe_failure(error)
    made = UserError(where=where, problem=f"cannot be used: {reason}.", fix="Correct the option, or leave it out.")
    made.__cause__ = error
    return made


def steps_in_backward(optim: Any) -> bool:
    """Whether this `optim` steps each weight as soon as its gradient arrives."""
    return "lomo" in str(optim).lower() or "layerwise" in str(optim).lower()


def part_learning_rates(run: RunArguments) -> dict[str, float]:
    """The learning rates of the parts that have one of their own."""
    rates = {VISION_TOWER: run.vision_tower_learning_rate, PROJECTOR: run.projector_learning_rate}
    return {part: rate for part, rate in rates.items() if rate is not None}


def set_learning_rates(optimizer: Optimizer, model: nn.Module, parts: Parts, rates: Mapping[str, float]) -> None:
    """Split the optimizer's parameter groups so that every part in `rates` gets its learning rate."""
    if not rates:
        return
    part_of: dict[torch.Tensor, str] = {parameter: parts.of(name) for name, parameter in model.named_parameters()}
    split = []
    for group in optimizer.param_groups:
        by_rate: dict[float, list] = {}
        for parameter in group["params"]:
            by_rate.setdefault(rates.get(part_of[parameter], group["lr"]), []).append(parameter)
        split += [{**group, "params": parameters, "lr": rate} for rate, parameters in by_rate.items()]
    optimizer.param_groups[:] = split
