"""Resuming a run: what must be the same as before, and which checkpoint to resume from."""

import json
import math
import os
import shutil
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tuning.config.options import BATCH_SIZE, RunConfig, default_options
from tuning.console import print0
from tuning.data.batch_sampler import data_seed
from tuning.distributed.processes import Processes
from tuning.errors import RunEnded, UserError, writing
from tuning.exit_codes import EXIT_INTERNAL_ERROR
from tuning.files import COMPLETE_FILE, CONFIG_FILE, FINGERPRINT_FILE, SKIPPED_FILE, STATE_FILE, read_json, write_json
from tuning.training.checkpoint_files import (
    find_complete,
    find_leftovers,
    is_complete,
    list_checkpoints,
    lock_output_dir,
    remove_earlier_run,
)

SAME_DATA = (
    *("training_data_path", "dataset_text_field", "dataset_image_field", "dataset_split", "dataset_config_name"),
    *("streaming", "on_bad_row", "image_folder", "validation_split"),
)
SAME_ENCODING = (
    *("max_seq_length", "overlong_rows", "max_images_per_sample", "assistant_only_loss", "chat_template"),
    *("chat_template_kwargs", "train_on", "train_empty_thoughts", "bbox_format"),
)
SAME_MODEL = ("model_name_or_path", "dtype", "quantization", "processor_kwargs")
SAME_FREEZING = ("freeze_vision_tower", "freeze_multi_modal_projector", "freeze_language_model")
SAME_LORA = ("peft_method", "r", "lora_alpha", "target_modules", "bias", "modules_to_save", "use_rslora", "use_dora")
ROWS_OF_A_STEP = "per_device_train_batch_size × processes × gradient_accumulation_steps"
BATCHES_OF_A_STEP = "processes × gradient_accumulation_steps"
SCHEDULE = ("num_train_epochs", "max_steps")
PADDED = "padded batches"  # known only once the model has run; the order of rows may depend on it
COST = "cost of a row"  # by which batches are balanced; a version that counts otherwise must not change the order
NOT_COMPARED = ("schedule", "date_string", PADDED, COST)
START_OVER = "Give another output_dir, or set overwrite_output_dir true to start over."


def run_fingerprint(config: RunConfig, rows: list, architecture: str) -> dict[str, Any]:
    """What must stay the same for a run to be resumed, and its schedule. `rows`: from `Source.fingerprint`."""
    options = config.to_dict()
    lora = SAME_LORA if config.lora.peft_method else ("peft_method",)
    same = {name: options[name] for name in (*SAME_MODEL, *SAME_FREEZING, *lora, *SAME_DATA, *SAME_ENCODING)}
    if config.data.validation_split is not None:
        same["seed of validation_split"] = data_seed(config.training)
    same |= _rows_of_a_step(config)
    schedule = {name: options[name] for name in SCHEDULE}
    same |= {"rows": rows, "architecture": architecture, "schedule": schedule, "date_string": config.data.run_date}
    return json.loads(json.dumps(same))  # as it is read from disk: tuples are lists


def _rows_of_a_step(config: RunConfig) -> dict[str, Any]:
    """What decides which rows a step has: a resumed run counts in steps how much of its data is done."""
    training, budget = config.training, config.data.max_tokens_per_batch
    by_padding = config.group_by_length is None and not budget
    same: dict[str, Any] = {
        "train_sampling_strategy": "by padding" if by_padding else training.train_sampling_strategy,
        "max_tokens_per_batch": budget,
    }
    if by_padding or budget:
        same["padding_free"] = config.data.padding_free
    batches = training.world_size * training.gradient_accumulation_steps
    if budget is None and BATCH_SIZE in config.auto:  # the checkpoint tells, see `Progress`
        return same
    if budget is None:
        return same | {ROWS_OF_A_STEP: training.train_batch_size * batches}
    same["train_sampling_strategy"] = "group_by_length"
    end = SCHEDULE[training.max_steps > 0]  # with max_steps there is no short step at the end of an epoch
    return same | {BATCHES_OF_A_STEP: batches, "what ends the run": end}


def check_fingerprint(folder: Path, before: dict[str, Any], now: dict[str, Any]) -> None:
    """Raises `UserError` that names what changed since `folder` was written."""
    before = {**default_options(), **before}  # an earlier version did not write the options that are new
    changed = [name for name in now if name not in NOT_COMPARED and before.get(name) != now[name]]
    if not changed:
        return
    listed = "; ".join(f"{name} was {_brief(before.get(name))}, is {_brief(now[name])}" for name in changed)
    raise UserError(
        where=str(folder),
        problem=f"this run cannot be resumed, because {listed}.",
        fix="Change it back, give another output_dir, or set overwrite_output_dir true to start over.",
    )


def _brief(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else f"{text[:39]}…{text[-40:]}"  # a row count is at the end


@dataclass(frozen=True)
class Progress:
    """How far an earlier run in the same output_dir came.

    `resume_from`: its last complete checkpoint, after step `global_step`. `finished_steps`: the steps of a finished
    run, whose model consists of `files`. `trained_to_end`: only the final model must be saved. `padded`: whether its
    batches were padded. `row_cost`: what balanced them, see `RowCost`. `rows_of_step`: rows of an optimizer step, with
    which a batch size that is auto stays what it was. `notes`: sentences to print. `fingerprint`: this run's, with the
    date of the earlier one.
    """

    resume_from: Path | None = None
    global_step: int = 0
    finished_steps: int | None = None
    trained_to_end: bool = False
    date_string: str | None = None
    padded: bool | None = None
    row_cost: tuple[int, int, int] | None = None
    rows_of_step: int | None = None
    notes: tuple[str, ...] = ()
    files: tuple[str, ...] = ()
    fingerprint: dict[str, Any] = field(default_factory=dict)


def find_progress(config: RunConfig, fingerprint: dict[str, Any]) -> Progress:
    """How far the run is. Raises `UserError` when it cannot be resumed from what is in output_dir."""
    progress = _read_progress(config, fingerprint)
    if config.training.deepspeed_plugin is not None and progress.resume_from and not progress.trained_to_end:
        check_deepspeed_states(progress.resume_from, config.training.world_size)
    date = progress.date_string or fingerprint["date_string"]
    return replace(progress, fingerprint=fingerprint | {"date_string": date})


def check_deepspeed_states(checkpoint: Path, processes: int) -> None:
    """Raises `UserError` unless a checkpoint has DeepSpeed's own file for each process: it reads no others."""
    states = list(checkpoint.glob("global_step*/*zero_pp_rank_*_optim_states.pt"))
    if len(states) == processes:
        return
    what = f"holds DeepSpeed's states of {len(states)} processes" if states else "was not written under DeepSpeed"
    raise UserError(
        where=str(checkpoint),
        problem=f"{what}, and {processes} processes of DeepSpeed are to go on with it.",
        fix=f"Continue the run as it began. To train on with its weights only: model_name_or_path {checkpoint}, and "
        "another output_dir.",
    )


def check_same_progress(processes: Processes, config: RunConfig, progress: Progress) -> None:
    """Raises `UserError` where machines do not share output_dir, and so see different checkpoints."""
    require_same_steps(config, processes.all_gather_ints([progress.global_step])[:, 0].tolist())


def require_same_steps(config: RunConfig, steps: Sequence[int]) -> None:
    """Raises `UserError` unless all processes go on after the same step."""
    if len(set(steps)) > 1:
        raise UserError(
            where=f"output_dir {config.training.output_dir}",
            problem="the machines find different checkpoints here.",
            fix="Give a folder that all of them share.",
        )


def _read_progress(config: RunConfig, fingerprint: dict[str, Any]) -> Progress:
    resume, patience = config.training.resume_from_checkpoint, config.answers.early_stopping_patience
    output_dir = Path(config.training.output_dir)
    if isinstance(resume, str):
        if not is_complete(Path(resume)):
            raise UserError(
                where=f"resume_from_checkpoint {resume}",
                problem="is not a complete checkpoint.",
                fix="Give a checkpoint-N folder of a run, or leave resume_from_checkpoint out.",
            )
        return _progress_at(Path(resume), fingerprint, patience)
    complete = find_complete(output_dir)
    partial = [folder for folder in list_checkpoints(output_dir) if folder not in complete]
    broken = [*find_leftovers(output_dir), *partial]
    notes = tuple(f"{folder} was not written completely and is ignored." for folder in broken)
    if config.run.overwrite_output_dir:
        return Progress(notes=notes)
    if resume is False and (complete or (output_dir / COMPLETE_FILE).exists()):
        raise UserError(
            where=str(output_dir),
            problem="holds an earlier run, and resume_from_checkpoint is false.",
            fix="Give another output_dir, set overwrite_output_dir true to start over, or let the run continue.",
        )
    if finished := read_json(output_dir / COMPLETE_FILE):
        check_fingerprint(output_dir, finished, fingerprint)
        if finished["schedule"] == fingerprint["schedule"]:
            return Progress(finished_steps=finished["global_step"], files=tuple(finished.get("files", ())))
        if not complete:
            raise UserError(
                where=str(output_dir),
                problem=f"holds a finished run with another {' or '.join(SCHEDULE)}, and no checkpoint to resume from.",
                fix=START_OVER,
            )
    if complete:
        return _progress_at(complete[-1], fingerprint, patience, notes)
    if resume:
        raise UserError(
            where=str(output_dir),
            problem="resume_from_checkpoint is true, but there is no complete checkpoint.",
            fix="Leave resume_from_checkpoint out to start from the beginning.",
        )
    return Progress(notes=notes)


def _progress_at(
    folder: Path, fingerprint: dict[str, Any], patience: int | None, notes: tuple[str, ...] = ()
) -> Progress:
    before, state = read_json(folder / FINGERPRINT_FILE), read_json(folder / STATE_FILE) or {}
    if before is None:  # the stock trainer wrote it: nothing to compare
        return Progress(folder, state["global_step"], notes=notes)
    check_fingerprint(folder, before, fingerprint)
    check_schedule(folder, state, before["schedule"], fingerprint["schedule"])
    at_end = state["global_step"] >= state["max_steps"] or has_stopped_early(state, patience)
    at_end = before["schedule"] == fingerprint["schedule"] and at_end
    return Progress(
        folder,
        state["global_step"],
        trained_to_end=at_end,
        date_string=before["date_string"],
        padded=before.get(PADDED),
        row_cost=tuple(cost) if (cost := before.get(COST)) else None,
        rows_of_step=before.get(ROWS_OF_A_STEP),
        notes=notes,
    )


def check_schedule(folder: Path, state: dict[str, Any], before: dict[str, Any], now: dict[str, Any]) -> None:
    """Raises `UserError` where the run would now end before the step of the checkpoint `folder`."""
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
    """Whether early stopping has ended the run with this trainer state."""
    kept = (state.get("stateful_callbacks") or {}).get("EarlyStopping") or {}
    counted = kept.get("attributes", {}).get("early_stopping_patience_counter", 0)
    return patience is not None and counted >= patience


def describe_kept(output_dir: Path) -> str:
    """A sentence that says where the next run in `output_dir` would start."""
    complete = find_complete(output_dir)
    start = f"resume from {complete[-1]}" if complete else "start again: no checkpoint was written yet (save_steps)"
    return f"The same command would {start}."


def print_changed_options(config: RunConfig) -> None:
    """Warn about options that changed after the run finished."""
    before = read_json(Path(config.training.output_dir, CONFIG_FILE)) or {}
    now = json.loads(json.dumps(config.to_dict(), default=str))
    changed = [name for name, value in now.items() if name in before and before[name] != value]
    changed = [name for name in changed if name not in ("overwrite_output_dir", "accelerate_launch_args")]
    if changed:
        print0(
            f"Changed since then, without effect: {', '.join(changed)}. To train again, set overwrite_output_dir true."
        )


def prepare_output(config: RunConfig, progress: Progress) -> AbstractContextManager:
    """Lock output_dir and remove what must not stay there. Returns the lock, to be held as long as the run lasts.

    Call this once everything that can be wrong with the input has been checked. Only the first process does something.
    """
    output_dir = Path(config.training.output_dir)
    if os.environ.get("RANK", "0") != "0":
        return nullcontext()
    with writing(f"output_dir {output_dir}"):
        lock = lock_output_dir(output_dir)
        if find_progress(config, progress.fingerprint) != progress:
            raise RunEnded(
                f"Another run was at work in {output_dir} until now. Run the same command again.", EXIT_INTERNAL_ERROR
            )
        for note in progress.notes:
            print0(note)
        if config.run.overwrite_output_dir:
            remove_earlier_run(output_dir)
        for leftover in find_leftovers(output_dir):
            shutil.rmtree(leftover)
        if progress.resume_from is None:
            (output_dir / SKIPPED_FILE).unlink(missing_ok=True)
        write_json(output_dir / CONFIG_FILE, config.to_dict())
        return lock
