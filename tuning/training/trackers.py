"""Experiment trackers: Hugging Face's callbacks, with all options of a run, and one run across its restarts."""

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
from tuning.errors import UserError, first_line
from tuning.files import RUNS_FILE, read_json, write_json


class AllOptions(TrainingArguments):
    """`TrainingArguments` that a tracker records as all options of the run, those of LoRA and of the data included."""

    def __init__(self, training: TrainingArguments, options: dict[str, Any]):
        self.__dict__.update(vars(training), options=options)

    def to_dict(self) -> dict[str, Any]:
        return self.options


def make_trackers(config: RunConfig) -> list[TrainerCallback]:
    """The callbacks of `report_to`. Raises `UserError` where one cannot be used.

    They report from the first process. A resumed run continues its run in MLflow and Weights & Biases by the id that
    output_dir keeps, in TensorBoard by its folder, in Trackio by `run_name`. In Aim every start is a run of its own.
    """
    return [_make_tracker(name, config) for name in config.training.report_to or []]


def _make_tracker(name: str, config: RunConfig) -> TrainerCallback:
    try:
        tracker = _make_aim() if name == AIM else INTEGRATION_TO_CALLBACK[name]()
    except (RuntimeError, ImportError) as error:
        raise _cannot_be_used(name, error) from error
    if name == "tensorboard":  # the stock callback would make a folder for every start
        folder = Path(config.training.output_dir, "runs", config.training.run_name or "run")
        tracker.logging_dir = config.run.logging_dir or tracker.logging_dir or str(folder)
    patch_on_train_begin(tracker, name, config.to_dict())
    return tracker


def _make_aim() -> Any:
    """Aim's callback. Its defaults record every environment variable, and begin a run before training does."""
    tracker = importlib.import_module("aim.hugging_face").AimCallback(log_system_params=False)
    tracker.on_init_end = TrainerCallback().on_init_end
    return tracker


def patch_on_train_begin(tracker: Any, name: str, options: dict[str, Any]) -> None:
    """Let a tracker record all `options`, and continue the run of an earlier start, when training begins."""
    tracker.on_train_begin = functools.partial(_begin, name, tracker, tracker.on_train_begin, options)


def _begin(name: str, tracker: Any, begin: Any, options: dict[str, Any], args, state, control, **kwargs) -> None:
    file = Path(args.output_dir, RUNS_FILE)
    runs = read_json(file) or {} if state.global_step else {}
    if name == "tensorboard" and state.is_world_process_zero:
        tracker.tb_writer = _open_events(tracker.logging_dir, state.global_step)
    if name == AIM:
        kwargs.pop("model", None)  # it stores a model's settings, but fails at those that have parts
    try:
        with environment(_settings_to_continue(name, runs.get(name))):
            begin(AllOptions(args, options), state, control, **kwargs)
    except _errors_of(name) as error:
        raise _cannot_be_used(name, error) from error
    run = _find_run(name) if state.is_world_process_zero else None
    if run:
        write_json(file, (read_json(file) or {}) | {name: run})


def _open_events(folder: str, step: int) -> Any:
    """TensorBoard's writer. It hides what an earlier start wrote after `step`: those steps are trained again."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        from tensorboardX import SummaryWriter
    return SummaryWriter(log_dir=os.path.expanduser(folder), purge_step=step + 1)


def _settings_to_continue(name: str, run: str | None) -> dict[str, str]:
    """Environment variables with which a tracker continues its `run`, if there is one."""
    if run and name == "mlflow":
        return {"MLFLOW_RUN_ID": run, "MLFLOW_MAX_LOG_PARAMS": "0"}  # parameters cannot be changed
    return {"WANDB_RUN_ID": run, "WANDB_RESUME": "allow"} if run and name == "wandb" else {}


def _find_run(name: str) -> str | None:
    """The id of the run that a tracker has begun, by which it can be continued."""
    if name == "mlflow":
        run = importlib.import_module(name).active_run()
        return run and run.info.run_id
    if name == "wandb":
        run = importlib.import_module(name).run
        return run and run.id
    return None


def _cannot_be_used(name: str, error: BaseException) -> UserError:
    return UserError(
        where="report_to",
        problem=f"{name} cannot be used: {first_line(error)}.",
        fix=f"Fix that, or leave {name} out.",
    )


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
            os.environ.pop(name, None)  # MLflow has removed its own
