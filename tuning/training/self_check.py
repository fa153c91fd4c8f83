"""After the first steps: does every part that should train really train, and does the rest stay as it is?"""

import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback

from tuning.console import print0
from tuning.errors import UserError
from tuning.model.parts import LANGUAGE_MODEL, PARTS, PROJECTOR
from tuning.training.optimizer import HALF, MASTER, holds_master_weights

TRIES = 4  # times that the vision tower or the projector may be without a gradient though a row has an image
ROW = 4093  # numbers of 8 bytes that are summed before they are weighed; prime, so that no matrix has rows of that size


@dataclass(frozen=True)
class StepEffect:
    """What one optimizer step did to a part, on all processes.

    `gradient`: some number of it has a gradient. `moved`: some trained number changed. `frozen_changed`: some frozen
    number changed. `stepped`: its learning rate is above 0. `should_move`: the step was large enough to change
    a number.
    """

    gradient: bool
    moved: bool
    frozen_changed: bool
    stepped: bool
    should_move: bool


class SelfCheck(TrainerCallback):
    """Looks at the first steps, until every part that trains has had a gradient and has moved.

    Stops the run where a part has neither though it should, or where a frozen number changed. A step whose rows have
    no image says nothing of the vision tower and the projector, one with a learning rate of 0 (warmup) nothing of
    movement, and one without a supervised token nothing at all. After that it costs nothing.
    """

    def __init__(self, trainer: Any):
        self.trainer = weakref.proxy(trainer)  # see `LoopCallback`
        self.trainable_parts: set[str] = set()
        self.fine: list[str] = []
        self._gradients: dict[str, bool] = {}
        self._tries_left = TRIES
        self._before: dict[str, int] = {}  # empty where the step is not looked at
        self._gates: dict[str, bool] = {}

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        if self.trainer.is_deepspeed_enabled or self.trainer.steps_in_backward:
            print0("No self-check after the first step: its optimizer keeps gradients and weights to itself.")
            return
        self.trainable_parts = {self.trainer.parts.of(name) for name, p in model.named_parameters() if p.requires_grad}
        self.fine, self._tries_left = [], TRIES

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self._before = {}
        tells = self.trainer.step_is_supervised and (
            self.trainer.step_has_images or LANGUAGE_MODEL in self.trainable_parts
        )
        if self.trainable_parts and tells:
            trained = [(self.trainer.parts.of(name), p) for name, p in model.named_parameters() if p.requires_grad]
            self._gradients = {part: any(has_gradient(p) for of, p in trained if of == part) for part in PARTS}
            self._before = fingerprints(stepped_weights(model, self._optimizer))
            self._gates = closed_gates(model)

    def on_optimizer_step(self, args, state, control, model=None, **kwargs):
        if not self._before or self.trainer.accelerator.optimizer_step_was_skipped:  # by fp16's scaling of gradients
            return
        after = fingerprints(stepped_weights(model, self._optimizer))
        changed = {name for name, value in after.items() if value != self._before[name]}
        mine = [self._look(part, model, changed) for part in PARTS]
        shared = self.trainer.processes.share([flag for seen in mine for flag in vars(seen).values()]).amax(dim=0)
        self._before = {}
        for part, found in zip(PARTS, shared.view(len(PARTS), -1).bool().tolist(), strict=True):
            self._judge(part, StepEffect(*found), model, changed, state.global_step + 1)
        if self.fine and not self.trainable_parts:
            self._report(model)

    def on_train_end(self, args, state, control, **kwargs):
        if left := " and ".join(f"the {words(part)}" for part in PARTS if part in self.trainable_parts):
            print0(f"Self-check: nothing is known of {left}: no step had both an image and a learning rate for it.")
        self.trainable_parts = set()

    @property
    def _optimizer(self) -> torch.optim.Optimizer:
        return getattr(self.trainer.optimizer, "optimizer", self.trainer.optimizer)  # accelerate's holds it

    def _look(self, part: str, model: nn.Module, changed: set[str]) -> StepEffect:
        """What this process saw of the step; a parameter that the optimizer does not know counts as one it steps."""
        groups = self._optimizer.param_groups
        rates = {p: float(group["lr"]) for group in groups for p in group["params"]}
        fastest = max(rates.values())
        named = {name: p for name, p in model.named_parameters() if self.trainer.parts.of(name) == part}
        trained = {name: (p, rates.get(p, fastest)) for name, p in named.items() if p.requires_grad}
        moved, masters = not changed.isdisjoint(trained), holds_master_weights(self._optimizer)
        return StepEffect(
            gradient=self._gradients[part],
            moved=moved,
            frozen_changed=not changed.isdisjoint(named.keys() - trained.keys()),
            stepped=any(rate > 0 for _, rate in trained.values()),
            should_move=not moved and any(has_to_move(p, rate, masters=masters) for p, rate in trained.values()),
        )

    def _judge(self, part: str, seen: StepEffect, model: nn.Module, changed: set[str], step: int) -> None:
        """Close the part's case, leave it open for another step, or stop the run."""
        of_part = {name: p.requires_grad for name, p in model.named_parameters() if self.trainer.parts.of(name) == part}
        first = next((name for name, trains in of_part.items() if trains), "")
        if seen.frozen_changed:
            mine = [name for name, trains in of_part.items() if name in changed and not trains]
            advice = "Something beside the optimizer writes to it, such as code that comes with the model"
            error = broken(part, f"is frozen, but changed in step {step}", mine[0], advice) if mine else None
            self.trainer.processes.raise_on_all_ranks(error)
        if part not in self.trainable_parts:
            return
        if not seen.gradient:
            if part != LANGUAGE_MODEL and not self.trainer.step_has_images:
                return
            gates = {name: trains for name, trains in self._gates.items() if self.trainer.parts.of(name) != part}
            if not gates and part != LANGUAGE_MODEL and self._tries_left:  # its images may all come after the answers
                self._tries_left -= 1
                return
            if not gates:
                advice = "Freeze it, or find what cuts it off from the loss"
                raise broken(part, f"should train, but got no gradient in step {step}", first, advice)
            self._close(part, explain_gates(part, gates))
        elif seen.moved:
            self._close(part)
        elif seen.should_move:
            advice = "The optimizer leaves it out: look at optim and its options"
            raise broken(part, f"has a gradient, but did not change in step {step}", first, advice)
        elif seen.stepped:
            self._close(part, f"the {words(part)} has a gradient, but step {step} was too small to change its weights")
        elif self._wanted_rate(part) == 0:
            self._close(part, f"the {words(part)} stays as it is: its learning rate is 0")

    def _wanted_rate(self, part: str) -> float:
        own = self.trainer.learning_rates.get(part)
        return self.trainer.args.learning_rate if own is None else own

    def _close(self, part: str, remark: str = "") -> None:
        self.trainable_parts.discard(part)
        if remark:
            print0(f"Self-check: {remark}.")
        else:
            self.fine.append(part)

    def _report(self, model: nn.Module) -> None:
        parts = [(self.trainer.parts.of(name), p.requires_grad) for name, p in model.named_parameters()]
        frozen = {part for part, _ in parts} - {part for part, trains in parts if trains}
        learn = " and ".join(f"the {words(part)}" for part in PARTS if part in self.fine)
        stay = " and ".join(f"the {words(part)}" for part in PARTS if part in frozen)
        print0(f"Self-check: training moves {learn}{f', and nothing moves {stay}' if stay else ''}.")


def words(part: str) -> str:
    """A part's name in a sentence."""
    return "projector" if part == PROJECTOR else part.replace("_", " ")


def broken(part: str, what: str, first: str, advice: str) -> UserError:
    return UserError(where="self-check", problem=f"the {words(part)} {what} (first: {first}).", fix=f"{advice}.")


def local(tensor: torch.Tensor) -> torch.Tensor:
    """What of a tensor this process holds."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def has_gradient(parameter: torch.Tensor) -> bool:
    return parameter.grad is not None and bool(local(parameter.grad).count_nonzero())


def stepped_weights(model: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, torch.Tensor]]:
    """Name → what the optimizer steps of a parameter on this process: its master weight, where it has or will have one.

    After one small step a 16-bit weight may be the same rounding of another master.
    """
    masters = holds_master_weights(optimizer)
    for name, parameter in model.named_parameters():
        if masters and parameter.requires_grad and parameter.dtype in HALF:
            kept = optimizer.state[parameter].get(MASTER) if parameter in optimizer.state else None
            yield name, local(parameter.detach().float() if kept is None else kept)
        else:
            yield name, local(parameter.detach())


def fingerprints(weights: Iterator[tuple[str, torch.Tensor]]) -> dict[str, int]:
    """Name → `fingerprint`, one by one. The numbers travel from each device together."""
    found: dict[torch.device, dict[str, torch.Tensor]] = {}
    for name, tensor in weights:
        found.setdefault(tensor.device, {})[name] = fingerprint(tensor)
    return {
        name: number
        for sums in found.values()
        for name, number in zip(sums, torch.stack(list(sums.values())).tolist(), strict=True)
    }


@torch.no_grad()
def fingerprint(tensor: torch.Tensor) -> torch.Tensor:
    """A whole number, `[]`, that changes with any number of `tensor`, and mostly where numbers change places.

    It is the sum of the bits, read as 64-bit numbers, in rows with odd weights. Nothing is copied, and nothing
    converted, which would take ten times as long.
    """
    data = tensor.contiguous().view(-1).view(torch.uint8)
    data = data if data.storage_offset() % 8 == 0 else data.clone()
    cut = len(data) // (8 * ROW) * (8 * ROW)
    rows, few = data[:cut].view(torch.int64).view(-1, ROW), data[cut:]
    few = torch.cat([few, few.new_zeros(-len(few) % 8)]).view(torch.int64)
    sums = torch.cat([rows.sum(dim=1), few.sum()[None]])
    return (sums * torch.arange(1, 2 * len(sums), 2, device=data.device)).sum()


def has_to_move(parameter: torch.Tensor, rate: float, *, masters: bool) -> bool:
    """Whether a step of `rate` × gradient, at most `rate`, exceeds the rounding of some number four times.

    Optimizers take steps of about `rate` whatever the gradient (Adam), or of `rate` × gradient (SGD).
    """
    if parameter.grad is None or not rate:
        return False
    limits = torch.finfo(torch.float32 if masters else parameter.dtype)
    size, step = local(parameter.detach()).float().abs(), local(parameter.grad).float().abs().clamp(max=1) * rate
    return bool((step > 4 * limits.eps * size + limits.tiny).any())


def closed_gates(model: nn.Module) -> dict[str, bool]:
    """Names of single numbers that are 0 and shut off what they are multiplied with, and whether they train.

    Mllama begins so: its cross-attention is multiplied by tanh of a parameter that is 0 (`cross_attn_attn_gate`). One
    that trains has a gradient itself, if the loss reaches it.
    """
    gates = {}
    for name, parameter in model.named_parameters():
        if parameter.numel() == 1 and not whole(parameter).count_nonzero():
            gradient = parameter.grad
            if not parameter.requires_grad or (gradient is not None and whole(gradient).count_nonzero()):
                gates[name] = parameter.requires_grad
    return gates


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def explain_gates(part: str, gates: dict[str, bool]) -> str:
    """Why a part without gradient is no mistake."""
    names = f"{next(iter(gates))}{f' and {len(gates) - 1} more' if len(gates) > 1 else ''}"
    if any(gates.values()):
        return f"the {words(part)} gets no gradient yet, because {names} begins at 0; as it trains, it lets it in"
    return (
        f"Warning: the {words(part)} gets no gradient and never will, because {names} is 0 and frozen; add it to"
        " modules_to_save, or tune in full"
    )
