"""Checks after the first steps that every part that should train does train, and that nothing else changes."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback

from tuning.console import print0
from tuning.distributed import zero3
from tuning.distributed.processes import Processes
from tuning.errors import UserError
from tuning.model.parts import LANGUAGE_MODEL, PARTS, PROJECTOR, Parts, count_numbers
from tuning.model.vision_tower import is_frozen
from tuning.training.optimizer import HALF, MASTER, holds_master_weights, steps_in_backward
from tuning.training.step_guard import StepState
from tuning.training.trained_weights import gather_gradient, gather_tensor

TRIES = 4  # steps in which the vision tower or the projector may lack a gradient though a row has an image
ROW = 4093  # integers of 8 bytes that are summed before the sum gets a weight; prime: no matrix has rows of that size


@dataclass(frozen=True)
class StepEffect:
    """What one optimizer step did to a part, on any process.

    `gradient`: a parameter has a gradient that is not 0. `moved`: a trained number changed. `frozen_changed`: a frozen
    number changed. `stepped`: its learning rate is above 0. `should_move`: the step was large enough to change one.
    """

    gradient: bool
    moved: bool
    frozen_changed: bool
    stepped: bool
    should_move: bool


class SelfCheck(TrainerCallback):
    """Looks at the first steps until every trained part has had a gradient and has moved. Then it costs nothing.

    It ends the run if a part has no gradient or does not move though it should, or if a frozen number changed. Some
    steps cannot show that: one whose rows have no image (the vision tower and the projector), one with a learning rate
    of 0 (movement, in a warmup), and one without a supervised token (all of it). It waits for another step then.

    `learning_rates`: of the parts that have one of their own.
    """

    def __init__(self, step: StepState, parts: Parts, learning_rates: Mapping[str, float], processes: Processes):
        self.step, self.parts, self.learning_rates, self.processes = step, parts, learning_rates, processes
        self.open_parts: set[str] = set()
        self.fine: list[str] = []
        self._gradients: dict[str, bool] = {}
        self._tries_left = TRIES
        self._before: dict[str, int] = {}  # empty where the step is not looked at
        self._buffers_before: dict[str, int] = {}
        self._gates: dict[str, bool] = {}

    def on_train_begin(self, args, state, control, model=None, optimizer=None, **kwargs):
        is_deepspeed, is_zero3 = args.deepspeed_plugin is not None, zero3.is_zero3_model(model)
        if steps_in_backward(args.optim) or (is_deepspeed and not is_zero3):
            print0("No self-check of the first step: this optimizer does not show its gradients and weights.")
            return
        if is_zero3:
            zero3.patch_zero3_step(_unwrap(optimizer), lambda: self._remember(model, _unwrap(optimizer)))
        self.open_parts = {self.parts.of(name) for name, p in model.named_parameters() if p.requires_grad}
        self.fine, self._tries_left = [], TRIES

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        self._buffers_before = fingerprints(saved_buffers(model)) if self.open_parts else {}  # forwards move them

    def on_pre_optimizer_step(self, args, state, control, model=None, optimizer=None, **kwargs):
        if args.deepspeed_plugin is None:  # else the step is over
            self._remember(model, _unwrap(optimizer))

    def _remember(self, model: nn.Module, optimizer: Any) -> None:
        """Before the optimizer's step, look at gradients and weights, if the step can show something."""
        self._before = {}
        shows_a_part = self.step.has_images or LANGUAGE_MODEL in self.open_parts
        if self.open_parts and self.step.is_supervised and shows_a_part:
            trained = [(self.parts.of(name), p) for name, p in model.named_parameters() if p.requires_grad]
            self._gradients = {part: any(has_gradient(p) for of, p in trained if of == part) for part in PARTS}
            self._before = fingerprints(stepped_weights(model, optimizer)) | self._buffers_before
            self._gates = closed_gates(model)

    def on_optimizer_step(self, args, state, control, model=None, optimizer=None, **kwargs):
        was_skipped = self.processes.accelerator.optimizer_step_was_skipped  # by the gradient scaler of fp16
        if not self._before or was_skipped:
            return
        after = fingerprints(stepped_weights(model, _unwrap(optimizer))) | fingerprints(saved_buffers(model))
        changed = {name for name, value in after.items() if value != self._before.get(name, value)}
        mine = [self._look(part, model, _unwrap(optimizer), changed) for part in PARTS]
        shared = self.processes.all_gather_ints([flag for effect in mine for flag in vars(effect).values()]).amax(dim=0)
        self._before = {}
        for part, found in zip(PARTS, shared.view(len(PARTS), -1).bool().tolist(), strict=True):
            self._judge(part, StepEffect(*found), model, changed, args.learning_rate)
        if self.fine and not self.open_parts:
            self._report(model)

    def on_train_end(self, args, state, control, **kwargs):
        if left := " and ".join(f"the {words(part)}" for part in PARTS if part in self.open_parts):
            print0(f"Self-check: nothing is known of {left}: no step had both an image and a learning rate for it.")
        self.open_parts = set()

    def _look(self, part: str, model: nn.Module, optimizer: torch.optim.Optimizer, changed: set[str]) -> StepEffect:
        """What this process saw of the step. A parameter that the optimizer lacks counts as one that it steps."""
        rates = zero3.find_learning_rates(optimizer)
        fastest = max(rates.values())
        named = {name: p for name, p in model.named_parameters() if self.parts.of(name) == part}
        trained = {name: (p, rates.get(p, fastest)) for name, p in named.items() if p.requires_grad}
        moved, masters = not changed.isdisjoint(trained), holds_master_weights(optimizer)
        return StepEffect(
            gradient=self._gradients[part],
            moved=moved,
            frozen_changed=not changed.isdisjoint(
                [*(named.keys() - trained.keys()), *frozen_buffers(model, self.parts, part)]
            ),
            stepped=any(rate > 0 for _, rate in trained.values()),
            should_move=not moved and any(has_to_move(p, rate, masters=masters) for p, rate in trained.values()),
        )

    def _judge(self, part: str, effect: StepEffect, model: nn.Module, changed: set[str], learning_rate: float) -> None:
        """Close the part, leave it open for another step, or end the run. `learning_rate`: of most parts."""
        of_part = {name: p.requires_grad for name, p in model.named_parameters() if self.parts.of(name) == part}
        first, step = next((name for name, trains in of_part.items() if trains), ""), self.step.number
        if effect.frozen_changed:
            frozen = [name for name, trains in of_part.items() if not trains]
            mine = [name for name in [*frozen, *frozen_buffers(model, self.parts, part)] if name in changed]
            advice = "Find what writes to it besides the optimizer, such as code that comes with the model"
            error = broken(part, f"is frozen, but changed in step {step}", mine[0], advice) if mine else None
            self.processes.raise_on_all_ranks(error)
        if part not in self.open_parts:
            return
        if not effect.gradient:
            if part != LANGUAGE_MODEL and not self.step.has_images:
                return
            gates = {name: trains for name, trains in self._gates.items() if self.parts.of(name) != part}
            if not gates and part != LANGUAGE_MODEL and self._tries_left:  # its images may all come after the answers
                self._tries_left -= 1
                return
            if not gates:
                advice = "Freeze it, or find what cuts it off from the loss"
                raise broken(part, f"should train, but got no gradient in step {step}", first, advice)
            self._close(part, explain_gates(part, gates))
        elif effect.moved:
            self._close(part)
        elif effect.should_move:
            advice = "Look at optim and its options: the optimizer leaves it out"
            raise broken(part, f"has a gradient, but did not change in step {step}", first, advice)
        elif effect.stepped:
            self._close(part, f"the {words(part)} has a gradient, but step {step} was too small to change its weights")
        elif self.learning_rates.get(part, learning_rate) == 0:
            self._close(part, f"the {words(part)} does not change: its learning rate is 0")

    def _close(self, part: str, remark: str = "") -> None:
        self.open_parts.discard(part)
        if remark:
            print0(f"Self-check: {remark}.")
        else:
            self.fine.append(part)

    def _report(self, model: nn.Module) -> None:
        parts = [(self.parts.of(name), p.requires_grad) for name, p in model.named_parameters()]
        frozen = {part for part, _ in parts} - {part for part, trains in parts if trains}
        learn = " and ".join(f"the {words(part)}" for part in PARTS if part in self.fine)
        stay = " and ".join(f"the {words(part)}" for part in PARTS if part in frozen)
        print0(f"Self-check: training moves {learn}{f', and nothing moves {stay}' if stay else ''}.")


def _unwrap(optimizer: Any) -> torch.optim.Optimizer:
    return getattr(optimizer, "optimizer", optimizer)  # accelerate wraps it


def words(part: str) -> str:
    """A part's name in a sentence."""
    return "projector" if part == PROJECTOR else part.replace("_", " ")


def broken(part: str, what: str, first: str, advice: str) -> UserError:
    """The error for a part. `first`: the name of the first parameter that is concerned."""
    return UserError(where="self-check", problem=f"the {words(part)} {what} (first: {first}).", fix=f"{advice}.")


def local(tensor: torch.Tensor) -> torch.Tensor:
    """The share of a tensor that this process holds."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def local_weight(parameter: torch.Tensor) -> torch.Tensor:
    """The share of a parameter that this process holds, and that the optimizer steps where it trains."""
    return zero3.local_weight(parameter) if zero3.is_zero3(parameter) else local(parameter.detach())


def local_gradient(parameter: torch.Tensor) -> torch.Tensor | None:
    """The share of a gradient that this process holds."""
    if zero3.is_zero3(parameter):
        return zero3.local_gradient(parameter)
    return None if parameter.grad is None else local(parameter.grad)


def has_gradient(parameter: torch.Tensor) -> bool:
    gradient = local_gradient(parameter)
    return gradient is not None and bool(gradient.count_nonzero())


def stepped_weights(model: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, torch.Tensor]]:
    """By name, the tensors that the optimizer steps on this process: parameters, or their master weights.

    After one small step a 16-bit weight may still be the same, as the rounding of another master weight.
    """
    masters = holds_master_weights(optimizer)
    for name, parameter in model.named_parameters():
        if masters and parameter.requires_grad and parameter.dtype in HALF:
            kept = optimizer.state[parameter].get(MASTER) if parameter in optimizer.state else None
            yield name, local(parameter.detach().float() if kept is None else kept)
        else:
            yield name, local_weight(parameter)


def saved_buffers(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """By name, the buffers that a checkpoint has, such as running statistics. Others may move, such as a rope's."""
    for prefix, module in model.named_modules():
        for name, buffer in module.named_buffers(prefix, recurse=False):
            if name.rpartition(".")[2] not in module._non_persistent_buffers_set:  # PyTorch has no public way
                yield name, local(buffer)


def frozen_buffers(model: nn.Module, parts: Parts, part: str) -> list[str]:
    """Names of the saved buffers of a part that belong to modules in which nothing trains."""
    of_part = (name for name, _ in saved_buffers(model) if parts.of(name) == part)
    return [name for name in of_part if is_frozen(model, name.rpartition(".")[0])]


def fingerprints(weights: Iterator[tuple[str, torch.Tensor]]) -> dict[str, int]:
    """The `fingerprint` of each tensor by name. All of a device are copied to the CPU at once."""
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
    """An integer, `[]`, that differs if any number of `tensor` differs, and mostly if numbers are swapped.

    It is a sum over the bits, read as 64-bit integers, in rows with odd weights. Nothing is copied or converted: that
    would take ten times as long.
    """
    data = tensor.contiguous().view(-1).view(torch.uint8)
    data = data if data.storage_offset() % 8 == 0 else data.clone()
    cut = len(data) // (8 * ROW) * (8 * ROW)
    rows, few = data[:cut].view(torch.int64).view(-1, ROW), data[cut:]
    few = torch.cat([few, few.new_zeros(-len(few) % 8)]).view(torch.int64)
    sums = torch.cat([rows.sum(dim=1), few.sum()[None]])
    return (sums * torch.arange(1, 2 * len(sums), 2, device=data.device)).sum()


def has_to_move(parameter: torch.Tensor, rate: float, *, masters: bool) -> bool:
    """Whether a step of `rate` × gradient, at most `rate`, exceeds the rounding error of a number four times.

    Optimizers take steps of about `rate` for any gradient (Adam), or of `rate` × gradient (SGD).
    """
    weight, gradient = local_weight(parameter), local_gradient(parameter)
    if gradient is None or not rate:
        return False
    limits = torch.finfo(torch.float32 if masters else weight.dtype)
    size, step = weight.float().abs(), gradient.float().abs().clamp(max=1) * rate
    return bool((step > 4 * limits.eps * size + limits.tiny).any())


def closed_gates(model: nn.Module) -> dict[str, bool]:
    """Gates: parameters of a single number that is 0, by name, and whether they train.

    What a gate multiplies gets no gradient. A new Mllama has such gates: it multiplies its cross-attention by the tanh
    of a parameter that is 0 (`cross_attn_attn_gate`). A gate that trains has a gradient, if the loss reaches it.
    """
    gates = {}
    for name, parameter in model.named_parameters():
        if count_numbers(parameter) == 1 and not gather_tensor(parameter).count_nonzero():
            gradient = gather_gradient(parameter) if parameter.requires_grad else None
            if not parameter.requires_grad or (gradient is not None and gradient.count_nonzero()):
                gates[name] = parameter.requires_grad
    return gates


def explain_gates(part: str, gates: dict[str, bool]) -> str:
    """Why it is no mistake that a part has no gradient."""
    names = f"{next(iter(gates))}{f' and {len(gates) - 1} more' if len(gates) > 1 else ''}"
    if any(gates.values()):
        return f"the {words(part)} gets no gradient yet, because {names} is still 0. Training will change that"
    return (
        f"Warning: the {words(part)} gets no gradient and never will, because {names} is 0 and frozen; add it to"
        " modules_to_save, or train in full"
    )
