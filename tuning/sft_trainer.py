"""Fine-tune a vision-language model: options → data → model → train → save, on one page.

Run it by path, as `python -m tuning.sft_trainer`, or call `tuning.train(config)`.
"""

import sys
from functools import partial
from pathlib import Path

if not __package__:  # run by path: Python puts this folder first, where `tuning` cannot be found
    sys.path[0] = str(Path(__file__).resolve().parents[1])


import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import set_seed

from tuning.config.options import RunConfig
from tuning.config.parse import build_config, check_options, describe_options, read_json, read_options
from tuning.console import print0
from tuning.data.dataset import EncodingCollator
from tuning.data.dummy_samples import dummy_samples
from tuning.data.from_config import (
    check_first_rows,
    dummy_batch,
    encode_training,
    encode_validation,
    make_collator,
    make_encoder,
    open_rows,
)
from tuning.distributed.failures import name_killed_worker
from tuning.distributed.launch import SCRIPT, check_launcher, choose_launch_options, configure_libraries, launch
from tuning.distributed.processes import exit_process
from tuning.errors import UserError
from tuning.exit_codes import exit_code_of, on_interrupt_say
from tuning.files import REPORT_FILE
from tuning.hub import open_hub, upload_finished
from tuning.metrics import check_metrics
from tuning.model import load
from tuning.model.build import make_model, pick_attention, plan_model
from tuning.model.parts import find_parts
from tuning.training.evaluation import make_examiner
from tuning.training.final_model import save_final_model
from tuning.training.resume import (
    Progress,
    describe_kept,
    find_progress,
    prepare_output,
    print_changed_options,
    run_fingerprint,
)
from tuning.training.run_summary import write_run_info
from tuning.training.trackers import make_trackers
from tuning.training.trainer import SupervisedTrainer, options_of_trainer

USAGE = "vlm-tuning train config.json | --name value …    (also: python tuning/sft_trainer.py)"


@dataclass(frozen=True)
class TrainingResult:
    """Where a run ended. `metrics` are Hugging Face's of the training, and of the last evaluation if there was one."""

    model_dir: Path
    global_step: int
    metrics: dict[str, float]


def train(config: RunConfig | Mapping[str, Any] | str | os.PathLike) -> TrainingResult:
    """The whole run. Raises `UserError` where the input is at fault, before the model is loaded if possible."""
    config = _as_run_config(config)
    for note in config.notes:
        print0(note)
    check_launcher(config)
    if config.answers.eval_generate_rows:
        check_metrics(config.answers.metric_names, "eval_metrics")
    config = configure_libraries(config)
    set_seed(config.training.seed)

    model_config = load.load_config(config.model)
    processor = load.load_processor(config.model, model_config)
    source = open_rows(config)
    fingerprint = run_fingerprint(config, rows=source.fingerprint(), architecture=load.describe(model_config))
    progress = find_progress(config, fingerprint)
    if progress.finished_steps is not None:
        print0(f"This run is already finished after {progress.finished_steps} steps: see {config.save_model_dir}.")
        print_changed_options(config)
        if config.training.push_to_hub:
            upload_finished(config, progress.files)
        return TrainingResult(Path(config.save_model_dir), progress.finished_steps, {})
    fingerprint["date_string"] = progress.date_string or fingerprint["date_string"]

    encoder = make_encoder(config.data, processor, model_config, fingerprint["date_string"])
    padding = make_collator(encoder, config.training)
    skip = config.data.on_bad_row == "skip"
    check_first_rows(source, encoder, skip)
    training_rows = encode_training(source, config, encoder, progress.global_step)
    validation_rows = encode_validation(config, encoder, skip) if config.data.validation_data_path else None

    plan = plan_model(config, model_config, partial(dummy_batch, encoder))
    if plan.idle is None and config.training.ddp_find_unused_parameters is False:
        print0("What of this model gets no gradient could not be told beforehand: ddp_find_unused_parameters is true.")
        config.training.ddp_find_unused_parameters = True
    trackers, hub = make_trackers(config), open_hub(config)
    model = make_model(config, model_config, plan, progress.resume_from)
    lock = prepare_output(config, progress, fingerprint)
    trainer = SupervisedTrainer(
        model=model,
        train_dataset=training_rows,
        eval_dataset=validation_rows,
        data_collator=EncodingCollator(encoder, padding, skip) if config.data.streaming else padding,
        collator=padding,
        processing_class=processor,
        parts=find_parts(model),
        fingerprint=fingerprint,
        attention=pick_attention(config, model_config),
        dummy_samples=partial(dummy_samples, encoder),
        wrap_classes=plan.wrap_classes,
        image_limit=encoder.max_images,
        padded_before=progress.padded,
        examiner=make_examiner(config, encoder, padding, validation_rows or training_rows),
        callbacks=trackers,
        **options_of_trainer(config),
    )
    trainer.hub = hub
    write_run_info(config, trainer, encoder, source.files, goes_on=progress.resume_from is not None)
    with lock, trainer.report:
        return run(trainer, config, progress)


def _as_run_config(config: RunConfig | Mapping[str, Any] | str | os.PathLike) -> RunConfig:
    if isinstance(config, RunConfig):
        return config
    return build_config(config if isinstance(config, Mapping) else read_json(config))


def run(trainer: SupervisedTrainer, config: RunConfig, progress: Progress) -> TrainingResult:
    """Train from where an earlier run stopped, if one did, and save the model."""
    metrics: dict[str, float] = {}
    if len(set(trainer.processes.share([progress.global_step])[:, 0].tolist())) > 1:
        where = f"output_dir {config.training.output_dir}"
        raise UserError(
            where=where, problem="the machines find different checkpoints here.", fix="Give one that all of them share."
        )
    if progress.resume_from and progress.trained_to_end:
        print0(f"{progress.resume_from} is the end of training: only the final model remains to be saved.")
        trainer.load_trainer_state(progress.resume_from)
    else:
        if progress.resume_from:
            print0(f"Continuing from {progress.resume_from}.")
        told = on_interrupt_say(lambda: describe_kept(Path(config.training.output_dir)))
        lost = trainer.processes.name_lost_process()
        with told, trainer.interruption, trainer.workers, lost, trainer.raise_friendly_oom(), name_killed_worker():
            checkpoint = str(progress.resume_from) if progress.resume_from else None
            metrics = trainer.train(resume_from_checkpoint=checkpoint).metrics
        metrics |= next((line for line in reversed(trainer.state.log_history) if "eval_loss" in line), {})
        trainer.end_if_stopped()
    trainer.rows.report()
    save_final_model(trainer, config, progress)
    report = Path(config.training.output_dir, REPORT_FILE)
    print0(f"Done: {config.save_model_dir} holds the model after {trainer.state.global_step} steps. Look at {report}.")
    return TrainingResult(Path(config.save_model_dir), trainer.state.global_step, metrics)


def start(arguments: Sequence[str], *, all_gpus: bool = False) -> None:
    """Train in this process, or in as many as the options ask for."""
    options = read_options(arguments)
    values, _ = check_options(options)
    asked = values.get("accelerate_launch_args", {})
    if launch_args := choose_launch_options(asked, all_gpus=all_gpus and not values.get("use_cpu")):
        launch(launch_args, [str(SCRIPT), *arguments])
    else:
        train(build_config(options))


def main(argv: Sequence[str] | None = None, *, all_gpus: bool = False) -> int:
    """The command: returns its exit code. `all_gpus`: use all of this machine's, where the options name no number."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if any(argument in ("-h", "--help") for argument in arguments):
        print(describe_options(USAGE))
        return 0
    return exit_code_of(lambda: start(arguments, all_gpus=all_gpus))


if __name__ == "__main__":
    exit_process(main())
