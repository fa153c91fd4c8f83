"""Checkpoints that are whole or not there, and that any number of processes, sharded or not, can go on from."""

import random
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed.checkpoint as dcp
from accelerate.utils import gather_object, save_fsdp_model, save_fsdp_optimizer
from peft import PeftModel
from safetensors import SafetensorError
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.tensor import DTensor
from torch.optim.lr_scheduler import LambdaLR
from transformers import Trainer, TrainerState
from transformers.trainer import TRAINING_ARGS_NAME
from transformers.trainer_callback import ExportableState

from tuning.console import print0
from tuning.distributed.processes import Processes
from tuning.errors import UserError
from tuning.files import (
    FINGERPRINT_FILE,
    OPTIMIZER_FILE,
    RANDOM_FILE,
    SCHEDULER_FILE,
    SHARDED_MODEL,
    SHARDED_OPTIMIZER,
    STATE_FILE,
    write_json,
)
from tuning.hub import HubRepo
from tuning.training.checkpoint_files import (
    commit_checkpoint,
    copy_model,
    is_complete,
    list_checkpoints,
    move_into_place,
    read_shards,
    remove_oldest,
    step_of,
    temp_dir_for,
)
from tuning.training.optimizer import MASTER, holds_master_weights

CANNOT_WRITE = (OSError, SafetensorError, dcp.api.CheckpointException)
FULL = StateDictOptions(full_state_dict=True, cpu_offload=True)  # gathered on the first process
SENT = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
SENT_IN_PART = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True, strict=False)


class ResumableTrainer(Trainer):
    """A `Trainer` whose checkpoints are written beside their place and moved there once they are whole.

    The weights to go on from are read where the model is made, since they are an ordinary model or adapter; only
    those that FSDP sharded are read here. Optimizer states are stored under the names of their parameters.
    """

    fingerprint: dict[str, Any]
    processes: Processes
    hub: HubRepo | None = None
    dtypes: dict[str, torch.dtype]  # of the weights before FSDP kept trained ones in float32, by name
    seconds_to_save = 0.0
    _last_saved: Path | None = None

    @property
    def _saves_shards(self) -> bool:
        """Adapters are small: they are never saved in shards."""
        if not self.is_fsdp_enabled or isinstance(self.accelerator.unwrap_model(self.model), PeftModel):
            return False
        return "SHARDED" in str(self.accelerator.state.fsdp_plugin.state_dict_type)

    def _save_checkpoint(self, model: nn.Module, trial: Any = None) -> None:
        folder, started = Path(self.args.output_dir, f"checkpoint-{self.state.global_step}"), time.monotonic()
        if folder == self._last_saved:  # asked for twice: at the last step, and at the end of the epoch
            return
        self.store_flos()
        if self.state.best_global_step:
            best = folder.with_name(f"checkpoint-{self.state.best_global_step}")
            if best == folder or best.is_dir():  # else the best of those that were saved stays
                self.state.best_model_checkpoint = str(best)
        staging = temp_dir_for(folder)
        if self.is_deepspeed_enabled:
            self._write_together(lambda: self._save_optimizer_and_scheduler(str(staging)), staging, folder)
        self._write_together(lambda: self._write_model(staging), staging, folder)
        if not self.args.save_only_model:
            self._write_together(lambda: self._write_training_state(staging), staging, folder)
        self._write_together(lambda: self._write_trainer_state(staging), staging, folder)
        self._write_together(
            lambda: commit_checkpoint(staging, folder) if self.args.should_save else None, staging, folder
        )
        self._last_saved = folder
        self._remove_oldest()
        if self.hub and self.args.should_save:
            self.hub.upload_checkpoint(folder, self.state.global_step)
        self.seconds_to_save = max(self.seconds_to_save, time.monotonic() - started)

    def _remove_oldest(self) -> None:
        if self.args.should_save:
            kept = (self.state.best_model_checkpoint, self._last_saved, self.hub and self.hub.uploading)
            keep = {Path(folder) for folder in kept if folder}
            remove_oldest(Path(self.args.output_dir), self.args.save_total_limit, keep=keep)

    def _write_together(self, write: Callable[[], None], staging: Path, folder: Path) -> None:
        """Let all processes `write`; where one cannot, nothing half-written stays, and all of them end."""
        error = None
        try:
            write()
        except CANNOT_WRITE as failure:
            error = self._cannot_write(folder, failure)
            shutil.rmtree(staging, ignore_errors=True)
        self.processes.raise_on_all_ranks(error)

    def _cannot_write(self, folder: Path, failure: Exception) -> UserError:
        complete = [folder for folder in list_checkpoints(Path(self.args.output_dir)) if is_complete(folder)]
        if isinstance(failure, dcp.api.CheckpointException):  # of all processes that failed
            failure = next(iter(failure.failures.values()))[0]
        reason = getattr(failure, "strerror", None) or str(failure).splitlines()[0]
        return UserError(
            where=str(folder),
            problem=f"cannot be written: {reason}.",
            fix=(
                "Make room (save_total_limit keeps fewer checkpoints), or see to the permissions; then run the same"
                f" command again: it {f'continues from {complete[-1]}' if complete else 'starts anew'}."
            ),
        )

    def _write_model(self, folder: Path) -> None:
        if not self._saves_shards:
            self.save_model(str(folder), _internal_call=True)
            return
        save_fsdp_model(self.accelerator.state.fsdp_plugin, self.accelerator, self.model, str(folder))
        if self.args.should_save:
            self.model.config.save_pretrained(folder)
            self.processing_class.save_pretrained(folder)
            torch.save(self.args, folder / TRAINING_ARGS_NAME)
            self._save_extras(folder)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save model or adapter as plain transformers and PEFT load it, once, under FSDP gathered from all processes.

        Stock, nothing at all is saved where FSDP's state dicts are sharded, and with LoRA all base weights travel.
        """
        if not self.is_fsdp_enabled:
            super().save_model(output_dir, _internal_call)
            return
        if isinstance(self.model, PeftModel):
            weights = _gather_adapter(self.model)
        else:
            weights = get_model_state_dict(self.model, options=FULL)
        for name in _second_names(self.model):  # once gathered, tied weights no longer show that they are
            weights.pop(name, None)
        for name, tensor in weights.items():  # trained ones may be float32 here
            weights[name] = tensor.to(self.dtypes.get(name, tensor.dtype))
        self._save(output_dir, state_dict=weights)
        if self.args.should_save and not isinstance(self.model, PeftModel):
            self.model.config.dtype = next(iter(self.dtypes.values()))
            self.model.config.save_pretrained(output_dir or self.args.output_dir)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """Add to Hugging Face's files what a checkpoint needs to be complete."""
        super()._save(output_dir, state_dict)
        if self.args.should_save:
            self._save_extras(Path(output_dir or self.args.output_dir))

    def _save_extras(self, folder: Path) -> None:
        self.accelerator.unwrap_model(self.model).generation_config.save_pretrained(folder)
        write_json(folder / FINGERPRINT_FILE, self.fingerprint)

    def _write_training_state(self, folder: Path) -> None:
        states = gather_object([random_states()])
        if self._saves_shards:
            save_fsdp_optimizer(
                self.accelerator.state.fsdp_plugin, self.accelerator, self.optimizer.optimizer, self.model, str(folder)
            )
        elif not self.is_deepspeed_enabled:
            optimizer = self._optimizer_state()
            if self.args.should_save:
                _save_tensors(optimizer, folder / OPTIMIZER_FILE)
        if self.args.should_save:
            _save_tensors(states, folder / RANDOM_FILE)
            self._save_scaler(str(folder))

    def _write_trainer_state(self, folder: Path) -> None:
        if not self.args.should_save:
            return
        if not self.is_deepspeed_enabled:
            _save_tensors(self.lr_scheduler.state_dict(), folder / SCHEDULER_FILE)
        for exported in [*self.callback_handler.callbacks, self.control]:
            if isinstance(exported, ExportableState):
                kept = self.state.stateful_callbacks.get(type(exported).__name__)
                if isinstance(kept, list):
                    kept.append(exported.state())
                else:
                    self.state.stateful_callbacks[type(exported).__name__] = exported.state()
        self.state.save_to_json(str(folder / STATE_FILE))

    def _optimizer_state(self) -> dict[str, Any]:
        """PyTorch's own state of the optimizer, parameters by number, and their `names`. Empty but on the first.

        The float32 weights that FSDP trains are put among the states, where other runs have their master weights.
        """
        if not self.is_fsdp_enabled:
            return {**self.optimizer.optimizer.state_dict(), "names": self._trained_names()}
        by_name = get_optimizer_state_dict(self.model, self.optimizer.optimizer, options=FULL)
        names, masters = self._trained_names(), self._gather_masters()
        numbers = {name: number for number, name in enumerate(names)}
        if not self.args.should_save:
            return {}
        groups = [{**group, "params": [numbers[name] for name in group["params"]]} for group in by_name["param_groups"]]
        state = {numbers[name]: state for name, state in by_name["state"].items()}
        for name, master in masters.items():
            state.setdefault(numbers[name], {})[MASTER] = master
        return {"state": state, "param_groups": groups, "names": names}

    def _gather_masters(self) -> dict[str, torch.Tensor]:
        """The float32 weights that FSDP trains instead of 16-bit ones, by name; whole, on the first process."""
        masters = {}
        for name, parameter in self.model.named_parameters():
            if parameter.dtype != self.dtypes[plain_name(name)]:
                whole = parameter.detach().full_tensor()
                if self.args.should_save:
                    masters[plain_name(name)] = whole.cpu()
        return masters

    def _trained_names(self) -> list[str]:
        """Names of the optimizer's parameters, in its order."""
        model = self.accelerator.unwrap_model(self.model)
        names = {parameter: name for name, parameter in model.named_parameters()}
        groups = self.optimizer.param_groups
        return [plain_name(names[parameter]) for group in groups for parameter in group["params"]]

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None or self.is_deepspeed_enabled:
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        folder = Path(checkpoint)
        if (folder / SHARDED_OPTIMIZER).is_dir():
            self._load_sharded_optimizer(folder)
        elif (folder / OPTIMIZER_FILE).is_file():
            self._load_optimizer(folder / OPTIMIZER_FILE)
        else:
            print0(f"{folder} holds no state of the optimizer (save_only_model): its averages start anew.")
        self.lr_scheduler.load_state_dict(torch.load(folder / SCHEDULER_FILE, weights_only=True))
        rates = self.lr_scheduler.get_last_lr()
        if isinstance(self.lr_scheduler, LambdaLR):  # of this run's schedule, which may be a longer one now
            made = zip(self.lr_scheduler.base_lrs, self.lr_scheduler.lr_lambdas, strict=True)
            self.lr_scheduler._last_lr = rates = [base * factor(self.lr_scheduler.last_epoch) for base, factor in made]
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate

    def _load_optimizer(self, file: Path) -> None:
        """Under FSDP the first process sends the states, which the others leave unread in their file."""
        optimizer, names = self.optimizer.optimizer, self._trained_names()
        saved = torch.load(file, map_location="cpu", mmap=self.is_fsdp_enabled, weights_only=True)
        groups, stored = saved["param_groups"], saved.get("names", names)  # another tool's go by number alone
        if sorted(stored) != sorted(names) or sum(len(group["params"]) for group in groups) != len(names):
            raise UserError(where=str(file), problem="holds the state of other parameters than are trained now.")
        by_name = {stored[number]: state for number, state in saved["state"].items()}
        if not holds_master_weights(optimizer):
            masters = {name: state.pop(MASTER) for name, state in by_name.items() if MASTER in state}
            by_name = {name: state for name, state in by_name.items() if state}
            if masters and self.is_fsdp_enabled:
                set_model_state_dict(self.model, masters if self.processes.rank == 0 else {}, options=SENT_IN_PART)
        if len(groups) != len(optimizer.param_groups):
            raise UserError(
                where=str(file),
                problem=f"has {len(groups)} groups of parameters, this run has {len(optimizer.param_groups)}.",
                fix="Keep vision_tower_learning_rate, projector_learning_rate and weight_decay as they were.",
            )
        if self.is_fsdp_enabled and by_name:
            groups = [{**group, "params": [stored[number] for number in group["params"]]} for group in groups]
            whole = {"state": by_name, "param_groups": groups} if self.processes.rank == 0 else {}
            set_optimizer_state_dict(self.model, optimizer, whole, options=SENT)
        else:
            mine = optimizer.state_dict()["param_groups"]
            groups = [{**group, "params": own["params"]} for group, own in zip(groups, mine, strict=True)]
            by_number = {number: by_name[name] for number, name in enumerate(names) if name in by_name}
            optimizer.load_state_dict({"state": by_number, "param_groups": groups})

    def _load_sharded_optimizer(self, folder: Path) -> None:
        model, optimizer = self.model_wrapped, self.optimizer.optimizer
        state = get_optimizer_state_dict(model, optimizer)
        masters = {name: own.pop(MASTER) for name, own in state["state"].items() if MASTER in own}
        read_shards({"optimizer": state}, folder / SHARDED_OPTIMIZER)
        if masters:  # the sharded weights are float32
            read_shards({"model": masters}, folder / SHARDED_MODEL)
            for name, master in masters.items():
                state["state"][name][MASTER] = master
        set_optimizer_state_dict(model, optimizer, state)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Read weights that FSDP sharded; all others were read where the model was made.

        Stock, `load_state_dict` is given the published names of the weights, which it does not know: it warns about
        missing keys and training goes on with the base model's.
        """
        folder = Path(resume_from_checkpoint) / SHARDED_MODEL
        if folder.is_dir():
            target = self.model if model is None else model
            state = {"model": get_model_state_dict(target)}
            read_shards(state, folder)
            set_model_state_dict(target, state["model"])

    def _finalize_training(self, *args, **kwargs):
        """Stock, a `save_total_limit` of 1 deletes the last checkpoint here, which a run that was stopped needs."""
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            return super()._finalize_training(*args, **kwargs)
        finally:
            self.args.save_total_limit = limit

    def _load_best_model(self) -> None:
        """Nothing to load: the final model is a copy of the best checkpoint's; see `save_final`."""

    def load_trainer_state(self, checkpoint: Path) -> None:
        """Take the state of a run whose training has come to its end."""
        self.state = TrainerState.load_from_json(str(checkpoint / STATE_FILE))

    def final_source(self, checkpoint: Path | None) -> Path | None:
        """The checkpoint whose model is the final one; None where it is the model as it is now. See `save_final`."""
        best = self.state.best_model_checkpoint if self.args.load_best_model_at_end else None
        return Path(best) if best else checkpoint

    @property
    def lost_best(self) -> int | None:
        """The step of the best evaluation where its model was to be the final one, but was not saved."""
        best, source = self.state.best_global_step, self.final_source(None)
        is_kept = source is not None and step_of(source) == best
        return best if self.args.load_best_model_at_end and best and not is_kept else None

    def save_final(
        self, target: Path, checkpoint: Path | None = None, add: Callable[[Path], None] = lambda saved: None
    ) -> list[str]:
        """Save the model of this run to `target`, file by file in one piece each. Returns their names.

        It is the best checkpoint's where that was asked for, that of `checkpoint` where one is given, else the model
        as it is now. `add` puts more files beside it, before it is moved.
        """
        source, staging = self.final_source(checkpoint), target / ".saving"

        def write() -> None:
            if self.args.should_save:
                shutil.rmtree(staging, ignore_errors=True)  # of an interrupted save
            if source is None:
                self.save_model(str(staging), _internal_call=True)
            elif self.args.should_save:
                copy_model(source, staging)
            if self.args.should_save:
                add(staging)

        self._write_together(write, staging, target)
        names = move_into_place(staging, target) if self.args.should_save else []
        self._remove_oldest()  # an interruption may have come before it
        return names

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Every process goes on from its own random states; one that had no predecessor keeps its own."""
        file = Path(checkpoint or "", RANDOM_FILE)
        if checkpoint and file.is_file():
            states = torch.load(file, weights_only=True)
            if self.processes.rank < len(states):
                restore_random_states(states[self.processes.rank])


def plain_name(name: str) -> str:
    """A parameter's name without what checkpointing and compiling wrappers put into it."""
    for wrapper in ("_checkpoint_wrapped_module.", "_orig_mod."):
        name = name.replace(wrapper, "")
    return name


def _gather_adapter(model: PeftModel) -> dict[str, torch.Tensor]:
    """Everything of a sharded model that its adapter consists of, whole, on every process."""
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    mine = {
        name: tensor
        for name, tensor in model.state_dict().items()
        if name in trained or f".{model.active_adapter}." in name
    }
    return {
        name: tensor.full_tensor().cpu() if isinstance(tensor, DTensor) else tensor for name, tensor in mine.items()
    }


def _second_names(model: nn.Module) -> set[str]:
    """Every name but the first of parameters that have several."""
    every = {plain_name(name) for name, _ in model.named_parameters(remove_duplicate=False)}
    return every - {plain_name(name) for name, _ in model.named_parameters()}


def _save_tensors(value: Any, file: Path) -> None:
    """`torch.save` through a Python file, whose errors say what was wrong with the disk."""
    with open(file, "wb") as stream:
        torch.save(value, stream)


def random_states() -> dict[str, Any]:
    """As they are now, as `torch.save` takes them."""
    legacy: Any = np.random.get_state()
    name, keys, *rest = legacy
    numpy_state = (name, torch.from_numpy(keys.astype(np.int64)), *rest)
    states = {"python": random.getstate(), "numpy": numpy_state, "cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def restore_random_states(states: dict[str, Any]) -> None:
    """Undo of `random_states`."""
    random.setstate(states["python"])
    name, keys, *rest = states["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(states["cpu"])
    if torch.cuda.is_available() and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"])
