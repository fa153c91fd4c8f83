"""Checkpoints that are complete or not there, and that any number of processes can resume from, sharded or not."""

import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object, save_fsdp_model, save_fsdp_optimizer
from peft import PeftModel
from safetensors import SafetensorError
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
from transformers import Trainer, TrainerState
from transformers.trainer import TRAINING_ARGS_NAME
from transformers.trainer_callback import ExportableState

from tuning.console import print0
from tuning.distributed.processes import Processes
from tuning.distributed.zero3 import is_zero3_model
from tuning.errors import RunEnded, UserError, describe_failure, find_dead_worker, first_line, try_optional
from tuning.exit_codes import EXIT_INTERNAL_ERROR
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
from tuning.hub import RunRepo
from tuning.model.saved_weights import SavedWeights
from tuning.training.checkpoint_files import (
    commit_checkpoint,
    copy_model,
    find_complete,
    move_into_place,
    read_shards,
    remove_oldest,
    temp_dir_for,
)
from tuning.training.model_writer import ModelWriter
from tuning.training.read_back import find_setting_fault, find_shard_fault, find_tensor_fault, weights_on_disk
from tuning.training.trained_weights import gather_trained
from tuning.training.training_state import (
    gather_optimizer_state,
    load_optimizer_state,
    load_schedule,
    load_sharded_optimizer_state,
    optimizer_state,
    random_states,
    restore_random_states,
)

DISK_ERRORS = (OSError, SafetensorError, CheckpointException)  # of Python, of safetensors, of sharded saves


class ResumableTrainer(Trainer):
    """A `Trainer` that writes a checkpoint under a temporary name and renames it once it is complete.

    The model is loaded from a checkpoint where it is built, as an ordinary model or adapter. Only weights that FSDP
    sharded are read here.
    """

    fingerprint: dict[str, Any]
    processes: Processes
    hub: RunRepo | None = None
    writer: ModelWriter
    dtypes: dict[str, torch.dtype]  # of the weights before FSDP kept trained ones in float32, by name
    reads_back = True  # every checkpoint, before it gets its name
    seconds_to_save = 0.0
    _warned = False  # of settings that a checkpoint does not give back
    _last_saved: Path | None = None

    @property
    def _unwrapped(self) -> Any:
        return self.accelerator.unwrap_model(self.model)

    @property
    def _saves_shards(self) -> bool:
        """Whether every process saves its shard of the weights. Adapters are too small for that."""
        if not self.is_fsdp_enabled or isinstance(self._unwrapped, PeftModel):
            return False
        return "SHARDED" in str(self.accelerator.state.fsdp_plugin.state_dict_type)

    def _save_checkpoint(self, model: nn.Module, trial: Any = None) -> None:
        folder, started = Path(self.args.output_dir, f"checkpoint-{self.state.global_step}"), time.monotonic()
        if folder == self._last_saved:  # the loop saves the last step again at the end of the epoch
            return
        self.store_flos()
        if self.state.best_global_step:
            best = folder.with_name(f"checkpoint-{self.state.best_global_step}")
            if best == folder or best.is_dir():  # else the best of those that were saved stays
                self.state.best_model_checkpoint = str(best)
        writers: list[Callable[[Path], None]] = [self._write_model]
        if self.is_deepspeed_enabled:  # also with save_only_model: DeepSpeed resumes the model from its own files
            writers.insert(0, lambda temporary: self._save_optimizer_and_scheduler(str(temporary)))
        if not self.args.save_only_model:
            writers.append(self._write_training_state)
        writers += [self._write_trainer_state, lambda temporary: self._commit(temporary, folder)]
        for write in writers:
            with self._all_ranks_writing(folder, temp_dir_for(folder)):
                write(temp_dir_for(folder))
        self._last_saved = folder
        self._remove_oldest()
        if self.hub and self.args.should_save:
            self.hub.upload_checkpoint(folder, self.state.global_step)
        self.seconds_to_save = max(self.seconds_to_save, time.monotonic() - started)

    def _commit(self, temporary: Path, folder: Path) -> None:
        if self.args.should_save:
            commit_checkpoint(temporary, folder)

    def _remove_oldest(self) -> None:
        if self.args.should_save:
            kept = (self.state.best_model_checkpoint, self._last_saved, self.hub and self.hub.uploading)
            keep = {Path(folder) for folder in kept if folder}
            remove_oldest(Path(self.args.output_dir), self.args.save_total_limit, keep=keep)

    @contextmanager
    def _all_ranks_writing(self, folder: Path, temporary: Path) -> Iterator[None]:
        """Write on all processes. If one of them cannot, remove `temporary` and end all of them."""
        error: Exception | None = None
        try:
            yield
        except RunEnded as fault:
            error = fault
        except DISK_ERRORS as failure:
            if isinstance(failure, CheckpointException):  # of all processes that failed
                failure = next(iter(failure.failures.values()))[0]
            if find_dead_worker(failure):
                raise failure
            error = self._cannot_write(folder, failure)
        try:
            self.processes.raise_on_all_ranks(error)
        finally:
            if error:  # not before: other processes may still read there
                shutil.rmtree(temporary, ignore_errors=True)

    def _cannot_write(self, folder: Path, failure: BaseException) -> UserError:
        reason = getattr(failure, "strerror", None) or first_line(failure)
        return UserError(
            where=str(folder),
            problem=f"cannot be written: {reason}.",
            fix=(
                f"Make room (save_total_limit keeps fewer checkpoints) or check the permissions. {self._how_to_go_on()}"
            ),
        )

    def _how_to_go_on(self) -> str:
        complete = find_complete(Path(self.args.output_dir))
        start = f"continues from {complete[-1]}" if complete else "starts from the beginning"
        return f"Then run the same command again: it {start}."

    def _write_model(self, folder: Path) -> None:
        weights = None
        if self._saves_shards:
            save_fsdp_model(self.accelerator.state.fsdp_plugin, self.accelerator, self.model, str(folder))
            if self.args.should_save:
                self.writer.write_files(self._unwrapped, folder, next(iter(self.dtypes.values())))
                self._write_extras(folder)
        else:
            weights = self._write_whole_model(folder)
        if self.reads_back:
            self._read_back(folder, weights)

    def _read_back(self, folder: Path, weights: Mapping[str, torch.Tensor] | None) -> None:
        """Compare what this process wrote to `folder` with its model. Raises `RunEnded` where a weight is wrong.

        `weights`: those that were written, by name; None for those of the model.
        """
        checkpoint = f"the checkpoint of step {self.state.global_step}"
        found = try_optional(lambda: self._find_weight_fault(folder, weights), catch_user_errors=True)
        settings = try_optional(lambda: self._find_setting_fault(folder), catch_user_errors=True)
        problem = f"does not have the weights in memory: {found.value}" if found.value else ""
        if error := found.error or settings.error:
            problem = problem or f"cannot be read back ({describe_failure(error)})"
        if problem:
            raise RunEnded(
                f"{checkpoint.capitalize()} {problem}. It is deleted. Look at the disk of {folder.parent}."
                f" {self._how_to_go_on()}",
                EXIT_INTERNAL_ERROR,
            )
        if settings.value and not self._warned:
            print0(
                f"Warning: {checkpoint} does not load as it is in memory: {settings.value}. At the end of the run, such"
                " a model ends it with an error, unless verify_save is false."
            )
            self._warned = True

    def _find_weight_fault(self, folder: Path, weights: Mapping[str, torch.Tensor] | None) -> str:
        if self._saves_shards:
            return find_shard_fault(self.model, folder)
        if not self.args.should_save:
            return ""
        return find_tensor_fault(SavedWeights(folder), weights_on_disk(self.writer, self._unwrapped, weights))

    def _find_setting_fault(self, folder: Path) -> str:
        if not self.args.should_save:
            return ""
        return find_setting_fault(self.writer, self._unwrapped, folder)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save model or adapter as its base is published; under FSDP and ZeRO-3 gathered from all processes.

        The stock trainer saves nothing where FSDP's state dicts are sharded, and gathers all base weights with LoRA.
        Under ZeRO-3 it leaves the frozen weights of an adapter out, and depends on `zero3_save_16bit_model`.
        """
        self._write_whole_model(Path(output_dir or self.args.output_dir))

    def _write_whole_model(self, folder: Path) -> Mapping[str, torch.Tensor] | None:
        """Save model or adapter. Returns the gathered weights by name, or None where none had to be gathered."""
        if self.args.should_save:
            with suppress(OSError):  # writing meets it again, when no process waits for this one
                folder.mkdir(parents=True, exist_ok=True)
        weights, main = None, self.args.should_save
        if self.is_fsdp_enabled or is_zero3_model(self.model):
            weights = gather_trained(self.model, self.dtypes, is_main_process=main, folder=folder)
        if main:
            self.writer.write(self._unwrapped, folder, weights)
            self._write_extras(folder)
        return weights

    def _write_extras(self, folder: Path) -> None:
        torch.save(self.args, folder / TRAINING_ARGS_NAME)
        write_json(folder / FINGERPRINT_FILE, self.fingerprint)

    def _write_training_state(self, folder: Path) -> None:
        states, optimizer, main = gather_object([random_states()]), self.optimizer.optimizer, self.args.should_save
        if self._saves_shards:
            save_fsdp_optimizer(
                self.accelerator.state.fsdp_plugin, self.accelerator, optimizer, self.model, str(folder)
            )
        elif self.is_fsdp_enabled:
            state = gather_optimizer_state(self.model, optimizer, self.dtypes, is_main_process=main)
            if main:
                _save_tensors(state, folder / OPTIMIZER_FILE)
        elif main and not self.is_deepspeed_enabled:
            _save_tensors(optimizer_state(self._unwrapped, optimizer), folder / OPTIMIZER_FILE)
        if main:
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

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None or self.is_deepspeed_enabled:
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        folder, model, optimizer = Path(checkpoint), self._unwrapped, self.optimizer.optimizer
        if (folder / SHARDED_OPTIMIZER).is_dir():
            load_sharded_optimizer_state(folder, model, optimizer)
        elif (folder / OPTIMIZER_FILE).is_file():
            sharded, main = self.is_fsdp_enabled, self.processes.rank == 0
            load_optimizer_state(folder / OPTIMIZER_FILE, model, optimizer, sharded=sharded, is_main_process=main)
        else:
            print0(f"{folder} holds no state of the optimizer that can be read here: its averages start from zero.")
        load_schedule(folder / SCHEDULER_FILE, self.lr_scheduler, optimizer)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Read weights that FSDP sharded. All others were read where the model was built.

        The stock trainer calls `load_state_dict` with the names that weights have on disk. The model does not know
        them: it warns about missing keys, and training continues with the base model's weights.
        """
        folder = Path(resume_from_checkpoint) / SHARDED_MODEL
        if folder.is_dir():
            target = self.model if model is None else model
            state = {"model": get_model_state_dict(target)}
            read_shards(state, folder)
            set_model_state_dict(target, state["model"])

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Restore this process's random states. A process that the earlier run did not have keeps its own."""
        file = Path(checkpoint or "", RANDOM_FILE)
        if checkpoint and file.is_file():
            states = torch.load(file, weights_only=True)
            if self.processes.rank < len(states):
                restore_random_states(states[self.processes.rank])

    def _finalize_training(self, *args, **kwargs):
        """With a `save_total_limit` of 1, the stock method deletes the last checkpoint: a stopped run needs it."""
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            return super()._finalize_training(*args, **kwargs)
        finally:
            self.args.save_total_limit = limit

    def _load_best_model(self) -> None:
        """Load nothing: the final model is copied from the best checkpoint; see `save_final`."""

    def load_trainer_state(self, checkpoint: Path) -> None:
        """Take the state of a run whose training has come to its end."""
        self.state = TrainerState.load_from_json(str(checkpoint / STATE_FILE))

    @property
    def best_checkpoint(self) -> Path | None:
        """The checkpoint with the model of the best evaluation, if that is to be the final one."""
        best = self.state.best_model_checkpoint if self.args.load_best_model_at_end else None
        return Path(best) if best else None

    def save_final(self, target: Path, source: Path | None, add: Callable[[Path], None]) -> list[str]:
        """Save the model in memory, or that of the checkpoint `source`, to `target`. Returns the files' names.

        Every file is complete before it is moved to `target`. `add(folder)` writes more files to be moved with them.
        """
        temporary = target / ".saving"
        with self._all_ranks_writing(target, temporary):
            if self.args.should_save:
                shutil.rmtree(temporary, ignore_errors=True)  # of an interrupted save
            if source is None:
                self.save_model(str(temporary), _internal_call=True)
            elif self.args.should_save:
                copy_model(source, temporary)
                self.writer.complete_copy(self._unwrapped, source, temporary)
            if self.args.should_save:
                add(temporary)
        names = move_into_place(temporary, target) if self.args.should_save else []
        self._remove_oldest()  # an interruption may have come before it
        return names


def _save_tensors(value: Any, file: Path) -> None:
    """`torch.save` through a Python file, whose errors name the disk's fault."""
    with open(file, "wb") as stream:
        torch.save(value, stream)
