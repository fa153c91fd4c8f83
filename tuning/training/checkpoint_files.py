"""Folders and files of output_dir: checkpoints that are complete or not there, the lock, the finished model."""

import errno
import fcntl
import os
import re
import shutil
import time
import warnings
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedModel

from tuning.console import print0
from tuning.errors import RunEnded, describe_failure
from tuning.exit_codes import EXIT_INTERNAL_ERROR
from tuning.files import COMPLETE_FILE, LOCK_FILE, NOT_OF_A_MODEL, SHARDED_MODEL, STATE_FILE, read_json

ADAPTER_FILES = {"adapter_config.json", "adapter_model.safetensors"}
PROCESSOR_FILES = {
    *("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "merges.txt", "chat_template.jinja", "chat_template.json", "generation_config.json"),
    *("processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json"),
}
MODEL_FILE = re.compile(r"model(-\d+-of-\d+)?\.safetensors(\.index\.json)?")
LOCK_PATIENCE = 120  # seconds; a network file system may keep the lock of a dead machine for 90
WRITING, DELETING = ".incomplete-", ".leaving-"  # before the names of folders that are being written or deleted


def list_checkpoints(output_dir: Path) -> list[Path]:
    """The `checkpoint-N` folders of `output_dir`, by step."""
    found = output_dir.glob("checkpoint-*") if output_dir.is_dir() else ()
    numbered = [folder for folder in found if re.fullmatch(r"checkpoint-\d+", folder.name)]
    return sorted(numbered, key=step_of)


def step_of(checkpoint: Path) -> int:
    """The step after which a `checkpoint-N` folder was saved."""
    return int(checkpoint.name.partition("-")[2])


def is_complete(folder: Path) -> bool:
    """Whether the file that is written last can be read."""
    return read_json(folder / STATE_FILE) is not None


def find_complete(output_dir: Path) -> list[Path]:
    """The complete checkpoints of `output_dir`, by step."""
    return [folder for folder in list_checkpoints(output_dir) if is_complete(folder)]


def temp_dir_for(folder: Path) -> Path:
    """Where the checkpoint `folder` is written until it is complete."""
    return folder.with_name(WRITING + folder.name)


def find_leftovers(output_dir: Path) -> list[Path]:
    """What an interrupted process left half-written or half-deleted."""
    return sorted(folder for start in (WRITING, DELETING) for folder in output_dir.glob(f"{start}checkpoint-*"))


def commit_checkpoint(temporary: Path, folder: Path) -> None:
    """Rename a complete checkpoint to `folder`, once its contents are on the disk, in place of an earlier one."""
    for file in [*(file for file in temporary.rglob("*") if file.is_file()), temporary]:
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
    remove_folder(folder)
    os.replace(temporary, folder)


def remove_folder(folder: Path) -> None:
    """Delete a checkpoint so that an interruption leaves no half of it under its name."""
    if folder.exists():
        deleting = folder.with_name(DELETING + folder.name)
        shutil.rmtree(deleting, ignore_errors=True)
        os.replace(folder, deleting)
        shutil.rmtree(deleting, ignore_errors=True)  # what cannot be deleted now is deleted at the next start


def remove_oldest(output_dir: Path, limit: int | None, keep: set[Path]) -> None:
    """Delete complete checkpoints, oldest first, until `limit` are left, but never one of `keep`."""
    for folder in find_complete(output_dir)[:-limit] if limit else []:
        if folder not in keep:
            remove_folder(folder)


def copy_model(folder: Path, target: Path) -> None:
    """Copy the model, adapter and processor of a checkpoint, but not weights that FSDP sharded."""
    shutil.copytree(folder, target, ignore=_only_the_model, dirs_exist_ok=True)


def load_checkpoint(folder: Path) -> PreTrainedModel:
    """The model of a checkpoint, read by this process alone."""
    if (folder / SHARDED_MODEL).is_dir():
        return join_shards(folder)
    return AutoModelForImageTextToText.from_pretrained(folder)


def join_shards(folder: Path) -> PreTrainedModel:
    """The model of a checkpoint that FSDP sharded, read by this process alone."""
    model = AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(folder))
    state = {"model": model.state_dict()}
    read_shards(state, folder / SHARDED_MODEL, no_dist=True)
    model.load_state_dict(state["model"])
    return model


def read_shards(state: dict[str, Any], folder: Path, *, no_dist: bool = False) -> None:
    """Fill the tensors of `state` from a sharded checkpoint: all processes together, or with `no_dist` this one.

    Raises `OSError` where that fails, `FileNotFoundError` where a file is missing.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # it is not needed
        try:
            dcp.load(state, checkpoint_id=folder, no_dist=no_dist or not dist.is_initialized())
        except CheckpointException as failed:  # not an `Exception`: it holds those of all processes
            error = next(iter(failed.failures.values()))[0]
            kind = FileNotFoundError if isinstance(error, FileNotFoundError) else OSError
            raise kind(f"{folder} cannot be read ({describe_failure(error)})") from failed


def _only_the_model(folder: str, names: list[str]) -> list[str]:
    return [name for name in names if name in NOT_OF_A_MODEL or Path(folder, name).is_dir()]


def lock_output_dir(folder: Path) -> ExitStack:
    """Make `folder` and lock it, so that no other process trains there. Close what is returned to unlock it.

    The lock ends with this process, however the process ends; on a network file system up to a minute later. Raises
    `RunEnded` where another process holds it: a queue may try again, which it does not after a `UserError`. On a file
    system without locks nothing is locked.
    """
    folder.mkdir(parents=True, exist_ok=True)
    unlock, path, deadline, waited = ExitStack(), folder / LOCK_FILE, time.monotonic() + LOCK_PATIENCE, False
    while (lock := _try_to_lock(path)) is None:
        if time.monotonic() > deadline:
            raise RunEnded(
                f"Another run is still at work in {folder}, and two would overwrite each other. Wait for its end, or"
                f" give another output_dir. If there is no other run, delete {path}.",
                EXIT_INTERNAL_ERROR,
            )
        if not waited:
            print0(f"Another run is at work in {folder}, or has just died: waiting {LOCK_PATIENCE} s for its end.")
        waited = True
        time.sleep(1)
    unlock.enter_context(lock)
    unlock.callback(path.unlink, missing_ok=True)
    return unlock


def _try_to_lock(path: Path) -> IO[str] | None:
    """The file at `path`, locked and open, or None where another process has locked it.

    By lockf, not by flock (as the package filelock does): forked data workers inherit a flock, and one that outlives
    a killed run would keep its folder locked.
    """
    file = open(path, "a", encoding="utf-8")  # noqa: SIM115 - open as long as it is locked
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            file.close()
            return None
    if os.fstat(file.fileno()).st_nlink == 0:  # a run that has just ended removed it
        file.close()
        return None
    return file


def remove_earlier_run(output_dir: Path) -> None:
    """Delete the checkpoints of an earlier run and its mark of completion. Its model is overwritten at the end."""
    for folder in [*find_leftovers(output_dir), *list_checkpoints(output_dir)]:
        shutil.rmtree(folder)
    (output_dir / COMPLETE_FILE).unlink(missing_ok=True)


def move_into_place(saved: Path, target: Path) -> list[str]:
    """Move every file of `saved` into `target`, weights last, and remove `saved`. Returns the files' names.

    What is there of an earlier model is deleted where it would be loaded instead of these files, or on top of them.
    """
    target.mkdir(parents=True, exist_ok=True)
    files = sorted(saved.iterdir(), key=lambda file: file.suffix == ".safetensors")
    names = {file.name for file in files}
    if not names & ADAPTER_FILES:  # an adapter may be saved in the folder of its base
        for file in target.iterdir():
            old = file.name in ADAPTER_FILES | PROCESSOR_FILES or MODEL_FILE.fullmatch(file.name)
            if old and file.name not in names:
                file.unlink()
    for file in files:
        os.replace(file, target / file.name)
    saved.rmdir()
    return [file.name for file in files]
