"""What is on disk between runs: complete checkpoints, what they were trained from, and the finished model."""

import errno
import fcntl
import json
import math
import os
import re
import shutil
import time
import warnings
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import IO, Any

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedModel

from tuning.config.arguments import RunConfig
from tuning.console import say
from tuning.errors import EXIT_INTERNAL_ERROR, RunEnded, UserError
from tuning.files import COMPLETE_FILE, read_json

IDENTITY_FILE = "run_identity.json"
STATE_FILE = "trainer_state.json"  # without it a checkpoint is not complete
OPTIMIZER_FILE, SCHEDULER_FILE, RANDOM_FILE = "optimizer.pt", "scheduler.pt", "random_states.pt"
SHARDED_MODEL, SHARDED_OPTIMIZER = "pytorch_model_fsdp_0", "optimizer_0"  # folders that accelerate writes
NOT_OF_A_MODEL = (STATE_FILE, OPTIMIZER_FILE, SCHEDULER_FILE, RANDOM_FILE, "scaler.pt")
ADAPTER_FILES = {"adapter_config.json", "adapter_model.safetensors"}
MODEL_FILE = re.compile(r"model(-\d+-of-\d+)?\.safetensors(\.index\.json)?")
LOCK_FILE = ".lock"
LOCK_PATIENCE = 120  # seconds; a network file system may keep the lock of a dead machine for 90
STAGING, LEAVING = ".incomplete-", ".leaving-"  # before the names of folders that are being written or deleted

SAME_DATA = (
    *("training_data_path", "dataset_text_field", "dataset_image_field", "dataset_split", "dataset_config_name"),
    *("streaming", "on_bad_row", "image_folder"),
)
SAME_ENCODING = ("max_seq_length", "overlong_rows", "max_images_per_sample", "assistant_only_loss", "chat_template")
SAME_MODEL = ("model_name_or_path", "dtype", "quantization", "processor_kwargs")
SAME_FREEZING = ("freeze_vision_tower", "freeze_multi_modal_projector", "freeze_language_model")
SAME_LORA = ("peft_method", "r", "lora_alpha", "target_modules", "bias", "modules_to_save", "use_rslora", "use_dora")
ROWS_OF_A_STEP = "per_device_train_batch_size × processes × gradient_accumulation_steps"
BATCHES_OF_A_STEP = "processes × gradient_accumulation_steps"
SCHEDULE = ("num_train_epochs", "max_steps")
PADDED = "padded batches"  # known only once the model was tried; the order of rows may follow from it
FREE_TO_CHANGE = ("schedule", "date_string", PADDED)


def run_identity(config: RunConfig, *, rows: list, architecture: str) -> dict[str, Any]:
    """What must stay the same for a run to be continued, and its schedule; `rows` from `Source.identity`."""
    options = config.to_dict()
    lora = SAME_LORA if config.lora.peft_method else ("peft_method",)
    same = {name: options[name] for name in (*SAME_MODEL, *SAME_FREEZING, *lora, *SAME_DATA, *SAME_ENCODING)}
    same |= _rows_of_a_step(config)
    schedule = {name: options[name] for name in SCHEDULE}
    same |= {"rows": rows, "architecture": architecture, "schedule": schedule, "date_string": run_date(config)}
    return json.loads(json.dumps(same))  # as it comes back from disk: tuples are lists


def _rows_of_a_step(config: RunConfig) -> dict[str, Any]:
    """What decides which rows are in which step: how far a run is in its data is counted in steps."""
    training, budget = config.training, config.data.max_tokens_per_batch
    by_padding = config.group_by_length is None and not budget
    same: dict[str, Any] = {
        "train_sampling_strategy": "by padding" if by_padding else training.train_sampling_strategy,
        "max_tokens_per_batch": budget,
    }
    if by_padding or budget:
        same["padding_free"] = config.data.padding_free
    batches = training.world_size * training.gradient_accumulation_steps
    if budget is None:
        return same | {ROWS_OF_A_STEP: training.train_batch_size * batches}
    same["train_sampling_strategy"] = "group_by_length"
    end = SCHEDULE[training.max_steps > 0]  # with max_steps there is no short step at the end of an epoch
    return same | {BATCHES_OF_A_STEP: batches, "what ends the run": end}


def run_date(config: RunConfig) -> str:
    """The date that templates write as today's: the user's, else today's."""
    return config.data.date_string or date.today().strftime("%d %b %Y")


def check_identity(folder: Path, before: dict[str, Any], now: dict[str, Any]) -> None:
    """Raises `UserError` naming what changed since `folder` was written."""
    changed = [name for name in now if name not in FREE_TO_CHANGE and before.get(name) != now[name]]
    if not changed:
        return
    listed = "; ".join(f"{name} was {_brief(before.get(name))}, is {_brief(now[name])}" for name in changed)
    raise UserError(
        where=str(folder),
        problem=f"this run cannot be continued, because {listed}.",
        fix="Restore it, give another output_dir, or set overwrite_output_dir true to start over.",
    )


def _brief(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else f"{text[:39]}…{text[-40:]}"  # a row count stands at the end


@dataclass(frozen=True)
class Progress:
    """How far an earlier run in the same output_dir came. `folder`: its last complete checkpoint, if any. `padded`:
    whether its batches were. `files`: names of those of the finished model.
    """

    folder: Path | None = None
    global_step: int = 0
    finished_steps: int | None = None
    trained_to_end: bool = False
    date_string: str | None = None
    padded: bool | None = None
    notes: tuple[str, ...] = ()
    files: tuple[str, ...] = ()


def find_progress(config: RunConfig, identity: dict[str, Any]) -> Progress:
    """Where to go on. Raises `UserError` when the run cannot be continued from what is there."""
    wanted, patience = config.training.resume_from_checkpoint, config.answers.early_stopping_patience
    output_dir = Path(config.training.output_dir)
    if isinstance(wanted, str):
        if not is_complete(Path(wanted)):
            raise UserError(where=f"resume_from_checkpoint {wanted}", problem="is not a complete checkpoint.")
        return _progress_at(Path(wanted), identity, patience)
    checkpoints = list_checkpoints(output_dir)
    complete = [folder for folder in checkpoints if is_complete(folder)]
    broken = [*find_leftovers(output_dir), *(folder for folder in checkpoints if folder not in complete)]
    notes = tuple(f"{folder} was not written completely and is ignored." for folder in broken)
    if config.run.overwrite_output_dir:
        return Progress(notes=notes)
    if wanted is False and (complete or (output_dir / COMPLETE_FILE).exists()):
        raise UserError(
            where=str(output_dir),
            problem="holds an earlier run, and resume_from_checkpoint is false.",
            fix="Give another output_dir, set overwrite_output_dir true to start over, or let the run continue.",
        )
    if finished := read_json(output_dir / COMPLETE_FILE):
        check_identity(output_dir, finished, identity)
        if finished["schedule"] == identity["schedule"]:
            return Progress(finished_steps=finished["global_step"], files=tuple(finished.get("files", ())))
        if not complete:
            raise UserError(
                where=str(output_dir),
                problem=f"holds a finished run with another {' or '.join(SCHEDULE)}, and no checkpoint to go on from.",
                fix="Give another output_dir, or set overwrite_output_dir true to start over.",
            )
    if complete:
        return _progress_at(complete[-1], identity, patience, notes)
    if wanted:
        raise UserError(
            where=str(output_dir), problem="resume_from_checkpoint is true, but there is no complete checkpoint."
        )
    return Progress(notes=notes)


def _progress_at(folder: Path, identity: dict[str, Any], patience: int | None, notes: tuple[str, ...] = ()) -> Progress:
    before, state = read_json(folder / IDENTITY_FILE), read_json(folder / STATE_FILE) or {}
    if before is None:  # written by another tool: nothing to compare
        return Progress(folder, state["global_step"], notes=notes)
    check_identity(folder, before, identity)
    check_schedule(folder, state, before["schedule"], identity["schedule"])
    at_end = state["global_step"] >= state["max_steps"] or has_stopped_early(state, patience)
    at_end = before["schedule"] == identity["schedule"] and at_end
    return Progress(
        folder,
        state["global_step"],
        trained_to_end=at_end,
        date_string=before["date_string"],
        padded=before.get(PADDED),
        notes=notes,
    )


def check_schedule(folder: Path, state: dict[str, Any], before: dict[str, Any], now: dict[str, Any]) -> None:
    """Raises `UserError` where the run would now end before the step that the checkpoint `folder` is of."""
    if before == now:
        return
    step, name = state["global_step"], SCHEDULE[now["max_steps"] > 0]
    end = now[name] if name == "max_steps" else math.ceil(now[name] * step / state["epoch"] - 1e-6)
    if step > end:
        raise UserError(
            where=str(folder),
            problem=f"is past the end that {name} {now[name]} sets, step {end}.",
            fix=f"Let {name} be greater, remove the checkpoints after step {end}, or give another output_dir.",
        )


def has_stopped_early(state: dict[str, Any], patience: int | None) -> bool:
    """Whether a trainer's state is that of a run which early stopping has ended."""
    kept = (state.get("stateful_callbacks") or {}).get("EarlyStopping") or {}
    counted = kept.get("attributes", {}).get("early_stopping_patience_counter", 0)
    return patience is not None and counted >= patience


def list_checkpoints(output_dir: Path) -> list[Path]:
    """The `checkpoint-N` folders of `output_dir`, by step."""
    found = output_dir.glob("checkpoint-*") if output_dir.is_dir() else ()
    numbered = [folder for folder in found if re.fullmatch(r"checkpoint-\d+", folder.name)]
    return sorted(numbered, key=step_of)


def step_of(checkpoint: Path) -> int:
    """The step that a `checkpoint-N` folder is of."""
    return int(checkpoint.name.partition("-")[2])


def is_complete(folder: Path) -> bool:
    """Whether the file that is written last is there and whole."""
    return read_json(folder / STATE_FILE) is not None


def describe_kept(output_dir: Path) -> str:
    """In words: where the next run in `output_dir` begins."""
    complete = [folder for folder in list_checkpoints(output_dir) if is_complete(folder)]
    start = f"go on from {complete[-1]}" if complete else "start again: no checkpoint was written yet (save_steps)"
    return f"The same command would {start}."


def staging_of(folder: Path) -> Path:
    """Where the checkpoint `folder` is written, until it is whole."""
    return folder.with_name(STAGING + folder.name)


def find_leftovers(output_dir: Path) -> list[Path]:
    """What an interrupted process left half-written or half-deleted."""
    return sorted(folder for start in (STAGING, LEAVING) for folder in output_dir.glob(f"{start}checkpoint-*"))


def put_in_place(staging: Path, folder: Path) -> None:
    """Give a whole checkpoint its name, once its contents are on the disk; an earlier one of that name goes."""
    for file in [*(file for file in staging.rglob("*") if file.is_file()), staging]:
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
    remove_folder(folder)
    os.replace(staging, folder)


def remove_folder(folder: Path) -> None:
    """Delete a checkpoint so that an interruption leaves no half of it under its name."""
    if folder.exists():
        leaving = folder.with_name(LEAVING + folder.name)
        shutil.rmtree(leaving, ignore_errors=True)
        os.replace(folder, leaving)
        shutil.rmtree(leaving, ignore_errors=True)  # what cannot be deleted now is at the next start


def remove_oldest(output_dir: Path, limit: int | None, keep: set[Path]) -> None:
    """Delete complete checkpoints, oldest first, until `limit` are left; never one of `keep`."""
    complete = [folder for folder in list_checkpoints(output_dir) if is_complete(folder)]
    for folder in complete[:-limit] if limit else []:
        if folder not in keep:
            remove_folder(folder)


def copy_model(folder: Path, target: Path) -> None:
    """Copy the model, adapter or processor of a checkpoint; weights that FSDP sharded are put together."""
    shutil.copytree(folder, target, ignore=_only_the_model, dirs_exist_ok=True)
    if (folder / SHARDED_MODEL).is_dir():
        join_shards(folder).save_pretrained(target)


def join_shards(folder: Path) -> PreTrainedModel:
    """The model of a checkpoint that FSDP sharded, put together by this process alone."""
    model = AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(folder))
    state = {"model": model.state_dict()}
    read_shards(state, folder / SHARDED_MODEL, alone=True)
    model.load_state_dict(state["model"])
    return model


def read_shards(state: dict[str, Any], folder: Path, *, alone: bool = False) -> None:
    """Fill the tensors of `state` from what processes wrote together; read by all of this run, or by one `alone`."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # it is not needed
        dcp.load(state, checkpoint_id=folder, no_dist=alone or not dist.is_initialized())


def _only_the_model(folder: str, names: list[str]) -> list[str]:
    return [name for name in names if name in NOT_OF_A_MODEL or Path(folder, name).is_dir()]


def lock_folder(folder: Path) -> ExitStack:
    """Make `folder`, and keep other processes from training there too, until what is returned is left as a context.

    The lock ends with this process, however that ends, and its children do not inherit it; over a network it may last
    a minute longer. Raises `RunEnded` where another process keeps it: unlike the user's errors, to be tried again by a
    queue. A file system without locks has none.
    """
    folder.mkdir(parents=True, exist_ok=True)
    held, path, deadline, waited = ExitStack(), folder / LOCK_FILE, time.monotonic() + LOCK_PATIENCE, False
    while (lock := _try_to_lock(path)) is None:
        if time.monotonic() > deadline:
            raise RunEnded(
                f"Another run is still at work in {folder}, and two would overwrite each other. Wait for its end, or"
                f" give another output_dir. If there is no other run, delete {path}.",
                EXIT_INTERNAL_ERROR,
            )
        if not waited:
            say(f"Another run is at work in {folder}, or has just died: waiting {LOCK_PATIENCE} s for its end.")
        waited = True
        time.sleep(1)
    held.enter_context(lock)
    held.callback(path.unlink, missing_ok=True)
    return held


def _try_to_lock(path: Path) -> IO[str] | None:
    """The file at `path`, locked and open; None where another process has it."""
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
    """Delete the checkpoints and marks of an earlier run; the models it saved are overwritten at the end."""
    for folder in [*find_leftovers(output_dir), *list_checkpoints(output_dir)]:
        shutil.rmtree(folder)
    (output_dir / COMPLETE_FILE).unlink(missing_ok=True)


def move_into_place(saved: Path, target: Path) -> list[str]:
    """Move every file of `saved` into `target`, weights last, and remove `saved`. Returns the files' names.

    Weights of an earlier model in `target` go where they would be loaded instead of these, or on top of them.
    """
    target.mkdir(parents=True, exist_ok=True)
    files = sorted(saved.iterdir(), key=lambda file: file.suffix == ".safetensors")
    names = {file.name for file in files}
    if not names & ADAPTER_FILES:  # an adapter may lie beside its base
        for file in target.iterdir():
            if file.name not in names and (file.name in ADAPTER_FILES or MODEL_FILE.fullmatch(file.name)):
                file.unlink()
    for file in files:
        os.replace(file, target / file.name)
    saved.rmdir()
    return [file.name for file in files]
