"""Fine-tune a vision-language model: the whole story of a run, from its options to the saved model.

Run it by path, as `python -m tuning.sft_trainer`, or call `tuning.train(config)`.
"""

import sys
from functools import partial
from pathlib import Path

if not __package__:  # run by path: Python puts this folder first on its path, and does not find `tuning` there
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    import tuning.data.torchvision_import  # before transformers imports torchvision  # noqa: F401

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import set_seed

from tuning.config.describe import describe_command
from tuning.config.options import RunConfig
from tuning.config.parse import check_options, make_config, read_options, resolve
from tuning.console import print0
from tuning.data.from_config import dummy_batch, open_data, open_rows
from tuning.distributed.failures import name_killed_worker
from tuning.distributed.launch import SCRIPT, check_launcher, choose_launch_options, configure_libraries, launch
from tuning.distributed.processes import exit_process
from tuning.exit_codes import on_interrupt_say, run_command
from tuning.files import REPORT_FILE
from tuning.hub import open_hub, upload_finished
from tuning.metrics import check_metrics
from tuning.model import load
from tuning.model.build import build_model, plan_model
from tuning.model.precision import decide_dtype
from tuning.training import resume
from tuning.training.final_model import save_final_model
from tuning.training.memory_fit import fit_to_memory
from tuning.training.optimizer import check_optimizer
from tuning.training.run_summary import describe_run, write_run_info
from tuning.training.trackers import make_trackers
from tuning.training.trainer import SupervisedTrainer

USAGE = "vlm-tuning train config.json | --name value …    (also: python tuning/sft_trainer.py)"


@dataclass(frozen=True)
class TrainingResult:
    """Where a run ended. `metrics`: Hugging Face's of the training, and of the last evaluation if there was one."""

    model_dir: Path
    global_step: int
    metrics: dict[str, float]


def train(config: RunConfig | Mapping[str, Any] | str | os.PathLike) -> TrainingResult:
    """Run one fine-tuning. Raises `UserError` where the input is at fault, if possible before the weights are read."""
    config = resolve(config)
    configure(config)
    model_config = load.load_config(config.model)
    processor = load.load_processor(config.model, model_config)
    rows = open_rows(config)
    fingerprint = resume.run_fingerprint(config, rows.train.fingerprint(), load.describe(model_config))
    progress = resume.find_progress(config, fingerprint)  # fresh, resumed or finished
    if progress.finished_steps is not None:
        return report_finished(config, progress)
    date, done = progress.fingerprint["date_string"], progress.global_step
    tokens = load.read_tokens(config.model, processor, model_config)
    data = open_data(config, rows, processor, model_config, tokens=tokens, date_string=date, steps_done=done)

    config = decide_dtype(config, model_config)
    plan = plan_model(config, model_config, partial(dummy_batch, data.encoder))
    config = fit_to_memory(config, model_config, plan, data, progress)
    trackers, hub = make_trackers(config), open_hub(config)
    model = build_model(config, model_config, plan, progress.resume_from)
    with resume.prepare_output(config, progress):
        trainer = SupervisedTrainer(config, model, data, progress, trackers, hub)
        summary = describe_run(config, model, data, hub, resumed=progress.resume_from is not None)
        write_run_info(summary, config.training)
        with trainer.report:
            metrics = train_model(trainer, config, progress)
            trainer.report_rows()
            save_final_model(trainer, config, progress, summary)
            steps, report = trainer.state.global_step, Path(config.training.output_dir, REPORT_FILE)
            print0(f"Done: {config.save_model_dir} holds the model after {steps} steps. Look at {report}.")
    return TrainingResult(Path(config.save_model_dir), steps, metrics)


def configure(config: RunConfig) -> None:
    """Print what was adjusted, check what needs no data, and configure the libraries."""
    for note in config.notes:
        print0(note)
    check_launcher(config)
    if config.answers.eval_generate_rows:
        check_metrics(config.answers.metric_names, "eval_metrics")
    check_optimizer(config.training)
    configure_libraries(config.training)
    set_seed(config.training.seed)


def report_finished(config: RunConfig, progress: resume.Progress) -> TrainingResult:
    """Print that the run is finished, and upload its model if that has failed before."""
    assert progress.finished_steps is not None
    print0(f"This run is already finished after {progress.finished_steps} steps: see {config.save_model_dir}.")
    resume.print_changed_options(config)
    if config.training.push_to_hub:
        upload_finished(config, progress.files)
    return TrainingResult(Path(config.save_model_dir), progress.finished_steps, {})


def train_model(trainer: SupervisedTrainer, config: RunConfig, progress: resume.Progress) -> dict[str, float]:
    """Train to the end, from the last checkpoint if there is one. Returns the metrics of the training."""
    resume.check_same_progress(trainer.processes, config, progress)
    checkpoint = progress.resume_from
    if checkpoint and progress.trained_to_end:
        print0(f"{checkpoint} is the end of training: only the final model remains to be saved.")
        trainer.load_trainer_state(checkpoint)
        return {}
    if checkpoint:
        print0(f"Continuing from {checkpoint}.")
    with (
        on_interrupt_say(lambda: resume.describe_kept(Path(config.training.output_dir))),
        trainer.interruption,
        trainer.loading.workers,
        trainer.processes.name_lost_process(),
        trainer.guard.raise_friendly_oom(),
        name_killed_worker(),
    ):
        metrics = trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None).metrics
    trainer.guard.raise_if_stopped(trainer.state)
    return metrics | next((line for line in reversed(trainer.state.log_history) if "eval_loss" in line), {})


def start(arguments: Sequence[str], *, all_gpus: bool = False) -> None:
    """Train in this process, or in as many as the options ask for."""
    options = check_options(read_options(arguments))
    asked, use_cpu = options.values.get("accelerate_launch_args", {}), options.values.get("use_cpu")
    if launch_args := choose_launch_options(asked, all_gpus=all_gpus and not use_cpu):
        launch(launch_args, [str(SCRIPT), *arguments])
    else:
        train(make_config(options))


def main(argv: Sequence[str] | None = None, *, all_gpus: bool = False) -> int:
    """The command: returns its exit code. `all_gpus`: use all local GPUs, unless the options say how many."""
    return run_command(partial(start, all_gpus=all_gpus), lambda: describe_command(USAGE, RunConfig), argv)


if __name__ == "__main__":
    exit_process(main())
