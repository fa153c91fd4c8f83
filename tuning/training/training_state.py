"""What a checkpoint holds in addition to the model: states of the optimizer, the schedule and the random generators.

The optimizer's state has one of three formats: PyTorch's own with the parameters' names (`optimizer.pt`), which any
number of processes can load, sharded or not; the same without names, as the stock trainer writes it; and one shard a
process (`optimizer_0/`, written by accelerate).
"""

import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from tuning.errors import UserError
from tuning.files import SHARDED_MODEL, SHARDED_OPTIMIZER
from tuning.training.checkpoint_files import read_shards
from tuning.training.optimizer import MASTER, holds_master_weights
from tuning.training.trained_weights import gather_tensor, plain_name

GATHERED = StateDictOptions(full_state_dict=True, cpu_offload=True)  # on the main process
BROADCAST = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
BROADCAST_SOME = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True, strict=False)


def trained_names(model: nn.Module, optimizer: Optimizer) -> list[str]:
    """Names of the optimizer's parameters, in its order."""
    names = {parameter: plain_name(name) for name, parameter in model.named_parameters()}
    return [names[parameter] for group in optimizer.param_groups for parameter in group["params"]]


def optimizer_state(model: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
    """PyTorch's own state of the optimizer, with parameters by number, and the parameters' `names`."""
    return {**optimizer.state_dict(), "names": trained_names(model, optimizer)}


def gather_optimizer_state(
    model: nn.Module, optimizer: Optimizer, dtypes: Mapping[str, torch.dtype], *, is_main_process: bool
) -> dict[str, Any]:
    """What `optimizer_state` returns, of an FSDP model. Every process must call this; only the main process gets it.

    FSDP trains float32 weights where `dtypes` has 16-bit ones. They go among the states, where the optimizer of an
    unsharded run has its master weights.
    """
    by_name = get_optimizer_state_dict(model, optimizer, options=GATHERED)
    names, masters = trained_names(model, optimizer), {}
    for name, parameter in model.named_parameters():
        if parameter.dtype != dtypes[plain_name(name)]:
            master = gather_tensor(parameter.detach())
            if is_main_process:
                masters[plain_name(name)] = master.cpu()
    if not is_main_process:
        return {}
    numbers = {name: number for number, name in enumerate(names)}
    groups = [{**group, "params": [numbers[name] for name in group["params"]]} for group in by_name["param_groups"]]
    state = {numbers[name]: state for name, state in by_name["state"].items()}
    for name, master in masters.items():
        state.setdefault(numbers[name], {})[MASTER] = master
    return {"state": state, "param_groups": groups, "names": names}


def load_optimizer_state(
    file: Path, model: nn.Module, optimizer: Optimizer, *, sharded: bool, is_main_process: bool
) -> None:
    """Load what `optimizer_state` or `gather_optimizer_state` returned.

    `sharded`: FSDP shards the model. The main process then sends the states, which the others leave unread in the file.
    """
    names = trained_names(model, optimizer)
    saved = torch.load(file, map_location="cpu", mmap=sharded, weights_only=True)
    groups, stored = saved["param_groups"], saved.get("names", names)  # the stock trainer stores no names
    _check_parameters(file, groups, stored, optimizer, names)
    by_name = {stored[number]: state for number, state in saved["state"].items()}
    if not holds_master_weights(optimizer):
        masters = {name: state.pop(MASTER) for name, state in by_name.items() if MASTER in state}
        by_name = {name: state for name, state in by_name.items() if state}
        if masters and sharded:
            set_model_state_dict(model, masters if is_main_process else {}, options=BROADCAST_SOME)
    if sharded and by_name:
        groups = [{**group, "params": [stored[number] for number in group["params"]]} for group in groups]
        full = {"state": by_name, "param_groups": groups} if is_main_process else {}
        set_optimizer_state_dict(model, optimizer, full, options=BROADCAST)
    else:
        current = optimizer.state_dict()["param_groups"]
        groups = [{**group, "params": now["params"]} for group, now in zip(groups, current, strict=True)]
        by_number = {number: by_name[name] for number, name in enumerate(names) if name in by_name}
        optimizer.load_state_dict({"state": by_number, "param_groups": groups})


def _check_parameters(
    file: Path, groups: list[dict], stored: list[str], optimizer: Optimizer, names: list[str]
) -> None:
    """Raises `UserError` where a stored state is of other parameters, or of other groups, than `optimizer`'s."""
    if sorted(stored) != sorted(names) or sum(len(group["params"]) for group in groups) != len(names):
        raise UserError(
            where=str(file),
            problem="holds the state of other parameters than are trained now.",
            fix="Train the same parts of the model as before, or give another output_dir.",
        )
    if len(groups) != len(optimizer.param_groups):
        raise UserError(
            where=str(file),
            problem=f"has {len(groups)} groups of parameters, this run has {len(optimizer.param_groups)}.",
            fix="Keep vision_tower_learning_rate, projector_learning_rate and weight_decay as they were.",
        )


def load_sharded_optimizer_state(checkpoint: Path, model: nn.Module, optimizer: Optimizer) -> None:
    """Load the state of which every process wrote its shard, into any number of processes."""
    state = get_optimizer_state_dict(model, optimizer)
    masters = {name: own.pop(MASTER) for name, own in state["state"].items() if MASTER in own}
    read_shards({"optimizer": state}, checkpoint / SHARDED_OPTIMIZER)
    if masters:  # the sharded weights are float32
        read_shards({"model": masters}, checkpoint / SHARDED_MODEL)
        for name, master in masters.items():
            state["state"][name][MASTER] = master
    set_optimizer_state_dict(model, optimizer, state)


def load_schedule(file: Path, scheduler: LRScheduler, optimizer: Optimizer) -> None:
    """Resume the schedule at its step, with the rates of this run's schedule, which may be longer now."""
    scheduler.load_state_dict(torch.load(file, weights_only=True))
    rates = scheduler.get_last_lr()
    if isinstance(scheduler, LambdaLR):
        factors = [factor(scheduler.last_epoch) for factor in scheduler.lr_lambdas]
        rates = [base * factor for base, factor in zip(scheduler.base_lrs, factors, strict=True)]
        scheduler._last_lr = rates
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate


def random_states() -> dict[str, Any]:
    """The states of all random generators of this process, in types that `torch.load` takes with `weights_only`."""
    legacy: Any = np.random.get_state()
    name, keys, *rest = legacy
    numpy_state = (name, torch.from_numpy(keys.astype(np.int64)), *rest)
    states = {"python": random.getstate(), "numpy": numpy_state, "cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def restore_random_states(states: dict[str, Any]) -> None:
    """Set the generators to what `random_states` returned."""
    random.setstate(states["python"])
    name, keys, *rest = states["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(states["cpu"])
    if torch.cuda.is_available() and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"])
