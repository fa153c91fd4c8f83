"""After the first steps: does every part that should train really train, and does the rest stay as it is?"""

import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback

from tuning.console import say
from tuning.errors import UserError
from tuning.model.parts import LANGUAGE_MODEL, PARTS, PROJECTOR
from tuning.training.master_weights import HALF, MASTER

BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class Seen:
    """What one optimizer step did to a part, on all processes.

    `gradient`: some number of it has a gradient; `moved`: some trained number changed; `touched`: some frozen one did.
    `stepped`: its learning rate is above 0. `rounded`: it is in 16 bits, where a small update may change nothing.
    """

    gradient: bool
    moved: bool
    touched: bool
    stepped: bool
    rounded: bool


class SelfCheck(TrainerCallback):
    """Looks at the first steps, until every part that trains has had a gradient and has moved.

    Stops the run where a part has neither though it should, or where a frozen number changed. A step whose rows have
    no image says nothing of the vision tower and the projector, one with a learning rate of 0 (warmup) nothing of
    movement. After that it costs nothing.
    """

    def __init__(self, trainer: Any):
        self.trainer = weakref.proxy(trainer)  # see `LoopCallback`
        self.open_parts: set[str] = set()
        self.fine: list[str] = []
        self._gradients: dict[str, bool] = {}
        self._looking = self._has_images = False
        self._before: dict[str, int] = {}
        self._gates: dict[str, bool] = {}

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        if self.trainer.is_deepspeed_enabled or self.trainer.steps_in_backward:
            say("No self-check after the first step: its optimizer keeps gradients and weights to itself.")
            return
        self.open_parts = {self.trainer.parts.of(name) for name, p in model.named_parameters() if p.requires_grad}
        self.fine = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self._looking = False
        if not self.open_parts:
            return
        images = sum(facts.rows_with_images for facts in self.trainer.batches_of_step)
        self._has_images = bool(self.trainer.processes.share([images]).any())
        self._looking = self._has_images or LANGUAGE_MODEL in self.open_parts
        if self._looking:
            self._gradients = {name: has_gradient(p) for name, p in model.named_parameters() if p.requires_grad}
            self._before, self._gates = fingerprints(model), closed_gates(model)

    def on_optimizer_step(self, args, state, control, model=None, **kwargs):
        if not self._looking or self.trainer.accelerator.optimizer_step_was_skipped:  # by fp16's scaling of gradients
            return
        mine = self._look(model, fingerprints(model))
        flags = [list(vars(mine[part]).values()) for part in PARTS]
        seen = self.trainer.processes.share([flag for part in flags for flag in part]).amax(dim=0)
        for part, found in zip(PARTS, seen.view(len(PARTS), -1).bool().tolist(), strict=True):
            self._judge(part, Seen(*found), state.global_step + 1)
        self._before = {}
        if not self.open_parts:
            self._report()

    def _look(self, model: nn.Module, after: dict[str, int]) -> dict[str, Seen]:
        """What this process saw of the step, part by part."""
        optimizer = self.trainer.optimizer
        rates = {p: group["lr"] for group in optimizer.param_groups for p in group["params"]}
        flags = {part: dict.fromkeys(Seen.__dataclass_fields__, False) for part in PARTS}
        for name, parameter in model.named_parameters():
            part = flags[self.trainer.parts.of(name)]
            changed = after[name] != self._before[name]
            if not parameter.requires_grad:
                part["touched"] |= changed
                continue
            part["gradient"] |= self._gradients[name]
            part["moved"] |= changed or master_moved(parameter, optimizer)
            part["stepped"] |= rates.get(parameter) != 0
            part["rounded"] |= parameter.dtype in HALF
        return {part: Seen(**values) for part, values in flags.items()}

    def _judge(self, part: str, seen: Seen, step: int) -> None:
        """Close the part's case, leave it open for another step, or stop the run."""
        if seen.touched:
            raise broken(part, f"is frozen, but changed in step {step}", "Something else than this run writes to it")
        if part not in self.open_parts:
            return
        if not seen.gradient:
            if part != LANGUAGE_MODEL and not self._has_images:
                return
            gates = {name: trains for name, trains in self._gates.items() if self.trainer.parts.of(name) != part}
            if not gates:
                cause = "Freeze it, or find what cuts it off from the loss"
                raise broken(part, f"should train, but got no gradient in step {step}", cause)
            self._close(part, explain_gates(part, gates))
        elif seen.moved:
            self._close(part)
        elif seen.rounded and seen.stepped:
            self._close(part, f"the {words(part)} has a gradient, but its 16-bit weights did not change in step {step}")
        elif seen.stepped:
            cause = "Look at the optimizer and its learning rate for it"
            raise broken(part, f"has a gradient, but did not change in step {step}", cause)
        elif self.trainer.learning_rates.get(part) == 0:
            self._close(part, f"the {words(part)} stays as it is: its learning rate is 0")

    def _close(self, part: str, remark: str = "") -> None:
        self.open_parts.discard(part)
        if remark:
            say(f"Self-check: {remark}.")
        else:
            self.fine.append(part)

    def _report(self) -> None:
        parts = [(self.trainer.parts.of(name), p.requires_grad) for name, p in self.trainer.model.named_parameters()]
        frozen = {part for part, _ in parts} - {part for part, trains in parts if trains}
        learn = " and ".join(f"the {words(part)}" for part in PARTS if part in self.fine)
        stay = " and ".join(f"the {words(part)}" for part in PARTS if part in frozen)
        verdicts = [f"training moves {learn}" if learn else "", f"nothing moves {stay}" if stay else ""]
        say(f"Self-check: {', and '.join(filter(None, verdicts)) or 'done'}.")


def words(part: str) -> str:
    """A part's name in a sentence."""
    return "projector" if part == PROJECTOR else part.replace("_", " ")


def broken(part: str, what: str, advice: str) -> UserError:
    return UserError(f"the {words(part)} {what}.", "self-check", f"{advice}.")


def local(tensor: torch.Tensor) -> torch.Tensor:
    """What of a tensor this process holds."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def has_gradient(parameter: torch.Tensor) -> bool:
    return parameter.grad is not None and bool(local(parameter.grad).count_nonzero())


def fingerprints(model: nn.Module) -> dict[str, int]:
    """Name → the sum of the bits of this process's share of a parameter, read as whole numbers.

    Reads all weights once and copies none; the numbers travel from the device together.
    """
    names, sums = list[str](), list[torch.Tensor]()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            mine = local(parameter.detach()).contiguous()
            names.append(name)
            sums.append(mine.view(BITS[mine.element_size()]).sum(dtype=torch.int64))
    by_device: dict[torch.device, list[int]] = {}
    for number, value in enumerate(sums):
        by_device.setdefault(value.device, []).append(number)
    found = [0] * len(sums)
    for numbers in by_device.values():
        for number, value in zip(numbers, torch.stack([sums[n] for n in numbers]).tolist(), strict=True):
            found[number] = value
    return dict(zip(names, found, strict=True))


def master_moved(parameter: torch.Tensor, optimizer: Any) -> bool:
    """Whether a 16-bit parameter's float32 copy went where its own rounding cannot follow."""
    state = getattr(optimizer, "optimizer", optimizer).state
    master = state[parameter].get(MASTER) if parameter in state else None
    return master is not None and bool((local(master) != local(parameter).float()).any())


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
