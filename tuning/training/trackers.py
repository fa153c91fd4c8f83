"""Experiment trackers: Hugging Face's, told all options of a run, and of one run across its restarts."""

import functools
import importlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainingArguments
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

from tuning.config.options import RunConfig
from tuning.config.rules import AIM
from tuning.errors import UserError
from tuning.files import RUNS_FILE, read_json, write_json


class AllOptions(TrainingArguments):
    """`TrainingArguments` that trackers record as all options of the run: of LoRA and of the data, too."""

    def __init__(self, training: TrainingArguments, options: dict[str, Any]):
        self.__dict__.update(vars(training), options=options)

    def to_dict(self) -> dict[str, Any]:
        return self.options


def make_trackers(config: RunConfig) -> list[TrainerCallback]:
    """The callbacks of `report_to`. Raises `UserError` where one cannot be used.

    They report from the first process. A run that goes on continues its run in TensorBoard, MLflow, Weights & Biases
    and Aim by the id that is kept in `output_dir`, in Trackio by `run_name`.
    """
    trackers = []
    for name in config.training.report_to or []:
        try:
            tracker = _make_aim() if name == AIM else INTEGRATION_TO_CALLBACK[name]()
        except (RuntimeError, ImportError) as error:
            raise UserError(
                where="report_to",
                problem=f"{name} cannot be used: {str(error).strip()}",
                fix="Mend that, or leave it out.",
            ) from error
        if name == "tensorboard":  # stock, every start has a folder of its own
            folder = Path(config.training.output_dir, "runs", config.training.run_name or "run")
            tracker.logging_dir = config.run.logging_dir or tracker.logging_dir or str(folder)
        tracker.on_train_begin = functools.partial(_begin, name, tracker, tracker.on_train_begin, config.to_dict())
        trackers.append(tracker)
    return trackers


def _make_aim() -> Any:
    """Aim's callback. By itself it records every environment variable, and begins a run before one can go on."""
    tracker = importlib.import_module("aim.hugging_face").AimCallback(log_system_params=False)
    tracker.on_init_end = TrainerCallback().on_init_end
    return tracker


def _begin(name: str, tracker: Any, begin: Any, options: dict[str, Any], args, state, control, **kwargs) -> None:
    """Let a tracker begin, or go on with, its run."""
    file = Path(args.output_dir, RUNS_FILE)
    runs = read_json(file) or {} if state.global_step else {}
    settings = _continue_run(name, tracker, runs.get(name), state.global_step)
    if name == AIM:
        kwargs.pop("model", None)  # it stores a model's settings, but not those that have parts
    try:
        with environment(settings):
            begin(AllOptions(args, options), state, control, **kwargs)
    except _errors_of(name) as error:
        raise UserError(
            where="report_to", problem=f"{name} cannot be used: {str(error).strip()}", fix="Mend that, or leave it out."
        ) from error
    run = _find_run(name, tracker) if state.is_world_process_zero else None
    if run:
        write_json(file, (read_json(file) or {}) | {name: run})


def _continue_run(name: str, tracker: Any, run: str | None, step: int) -> dict[str, str]:
    """Make a tracker go on with the run of an earlier start. Returns environment variables to begin with."""
    if name == "tensorboard":  # what was written of later steps is trained again
        tracker._SummaryWriter = functools.partial(tracker._SummaryWriter, purge_step=step + 1)
    if run and name == AIM:
        tracker._run_hash = run
    if run and name == "mlflow":
        return {"MLFLOW_RUN_ID": run, "MLFLOW_MAX_LOG_PARAMS": "0"}  # parameters cannot be changed
    return {"WANDB_RUN_ID": run, "WANDB_RESUME": "allow"} if run and name == "wandb" else {}


def _find_run(name: str, tracker: Any) -> str | None:
    """The id of the run that a tracker has begun, by which it can be continued."""
    if name == "mlflow":
        run = importlib.import_module(name).active_run()
        return run and run.info.run_id
    if name == "wandb":
        run = importlib.import_module(name).run
        return run and run.id
    return tracker._run_hash if name == AIM else None


def _errors_of(name: str) -> tuple[type[Exception], ...]:
    """What a tracker raises where its settings are at fault, its server does not answer, or a package is missing."""
    errors = {"mlflow": "MlflowException", "wandb": "Error"}
    own = [getattr(importlib.import_module(name), errors[name])] if name in errors else []
    return (ImportError, *own)


@contextmanager
def environment(settings: dict[str, str]) -> Iterator[None]:
    """Set environment variables that the user has not set, for as long as this lasts."""
    new = {name: value for name, value in settings.items() if name not in os.environ}
    os.environ.update(new)
    try:
        yield
    finally:
        for name in new:
            os.environ.pop(name, None)  # MLflow has taken its own
