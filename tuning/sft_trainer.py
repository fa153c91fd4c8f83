"""Fine-tune a vision-language model: options → data → model → train → save, on one page.

Run it by path, as `python -m tuning.sft_trainer`, or call `tuning.train(config)`.
"""

import copy
import itertools
import json
import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

if not __package__:  # run by path: Python puts this folder first, where `tuning` cannot be found
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    import tuning  # noqa: F401 - before the others: it silences what they import

import datasets
import torch.distributed as dist
import transformers
from torch.distributed.distributed_c10d import _set_pg_timeout
from transformers import TrainingArguments, set_seed

from tuning.answers import right_answers
from tuning.card_facts import gather_facts
from tuning.config.arguments import RunConfig
from tuning.config.parse import build_config, check_options, describe_options, read_json, read_options
from tuning.console import say
from tuning.data.collator import Collator, probe_collator
from tuning.data.dataset import EncodedRows, EncodingCollator, StreamedRows, encode_row
from tuning.data.encode import Encoder
from tuning.data.sources import Mixture, Source, Stream
from tuning.data_paths import make_encoder, open_rows, open_validation_rows
from tuning.errors import EXIT_INTERNAL_ERROR, RunEnded, UserError, exit_code_of, tell_what_is_kept, was_launched
from tuning.files import CONFIG_FILE, REPORT_FILE, SKIPPED_FILE, write_json
from tuning.files import read_json as read_json_file
from tuning.launch import check_processes, launch, wanted_launch
from tuning.model import load
from tuning.model.fsdp import give_up_fsdp_on_cpu, is_fsdp_asked_for
from tuning.model.parts import (
    PROJECTOR,
    VISION_TOWER,
    find_parts,
)
from tuning.model_card import put_card, write_card
from tuning.model_plan import make_model, pick_attention, plan_model
from tuning.run_facts import write_facts
from tuning.scoring import check_metrics, check_right_answers
from tuning.training.answering import Examiner
from tuning.training.checkpoint import (
    COMPLETE_FILE,
    Progress,
    describe_kept,
    find_leftovers,
    find_progress,
    lock_folder,
    remove_earlier_run,
    run_identity,
)
from tuning.training.faults import worker_killed
from tuning.training.hub import HubRepo
from tuning.training.interruption import Interruption
from tuning.training.processes import leave
from tuning.training.trackers import make_trackers
from tuning.training.trainer import SupervisedTrainer
from tuning.training.verify import verify_saved

USAGE = "vlm-tuning train config.json | --name value …    (also: python tuning/sft_trainer.py)"
ROWS_CHECKED_FIRST = 4


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
        say(note)
    check_launcher(config)
    if config.answers.eval_generate_rows:
        check_metrics(config.answers.metric_names, "eval_metrics")
    settle_libraries(config.training)
    set_seed(config.training.seed)

    model_config = load.load_config(config.model)
    processor = load.load_processor(config.model, model_config)
    source = open_rows(config)
    identity = run_identity(config, rows=source.identity(), architecture=load.describe(model_config))
    progress = find_progress(config, identity)
    if progress.finished_steps is not None:
        say(f"This run is already finished after {progress.finished_steps} steps: see {config.save_model_dir}.")
        say_what_changed(config)
        if config.training.push_to_hub:
            upload_finished(config, progress.files)
        return TrainingResult(Path(config.save_model_dir), progress.finished_steps, {})
    identity["date_string"] = progress.date_string or identity["date_string"]

    encoder = make_encoder(config.data, processor, model_config, identity["date_string"])
    padding = make_collator(encoder, config.training)
    skip = config.data.on_bad_row == "skip"
    check_first_rows(source, encoder, skip)
    training_rows = encode_training(source, config, encoder, progress)
    validation_rows = encode_validation(config, encoder, skip) if config.data.validation_data_path else None

    plan = plan_model(config, model_config, encoder)
    if plan.idle is None and config.training.ddp_find_unused_parameters is False:
        say("What of this model gets no gradient could not be told beforehand: ddp_find_unused_parameters is true.")
        config.training.ddp_find_unused_parameters = True
    trackers, hub = make_trackers(config), open_hub(config)
    model = make_model(config, model_config, plan, progress)
    lock = prepare_output(config, progress, identity)
    trainer = SupervisedTrainer(
        model=model,
        train_dataset=training_rows,
        eval_dataset=validation_rows,
        data_collator=EncodingCollator(encoder, padding, skip) if config.data.streaming else padding,
        collator=padding,
        processing_class=processor,
        parts=find_parts(model),
        identity=identity,
        attention=pick_attention(config, model_config),
        probes=encoder.probes,
        wrap_classes=plan.wrap_classes,
        image_limit=encoder.max_images,
        padded_before=progress.padded,
        examiner=make_examiner(config, encoder, padding, validation_rows or training_rows),
        callbacks=trackers,
        **options_of_trainer(config),
    )
    trainer.hub = hub
    write_facts(config, trainer, encoder, source.parts, goes_on=progress.folder is not None)
    with lock, trainer.report:
        return run(trainer, config, progress)


def _as_run_config(config: RunConfig | Mapping[str, Any] | str | os.PathLike) -> RunConfig:
    if isinstance(config, RunConfig):
        return config
    return build_config(config if isinstance(config, Mapping) else read_json(config))


def say_what_changed(config: RunConfig) -> None:
    """Of a finished run: options that are others now, which has no effect."""
    before = read_json_file(Path(config.training.output_dir, CONFIG_FILE)) or {}
    now = json.loads(json.dumps(config.to_dict(), default=str))
    changed = [name for name, value in now.items() if name in before and before[name] != value]
    changed = [name for name in changed if name not in ("overwrite_output_dir", "accelerate_launch_args")]
    if changed:
        say(f"Without effect: {', '.join(changed)} changed since; overwrite_output_dir true would train anew.")


def settle_libraries(training: TrainingArguments) -> None:
    """Say and mend what the libraries would do by themselves with this machine's devices, and with progress bars.

    Without a launcher a run uses one device: `nn.DataParallel`, transformers' choice, is slow and wrong here.
    """
    if give_up_fsdp_on_cpu():
        say("FSDP shards over accelerators, and there is none: the processes train whole copies of the model (DDP).")
    if dist.is_initialized() and training.use_cpu:  # transformers passes ddp_timeout on for accelerators only
        _set_pg_timeout(training.ddp_timeout_delta)
    if training.n_gpu > 1:
        say(
            f"Using one of {training.n_gpu} GPUs. To use all: vlm-tuning train …, or accelerate launch"
            f" --num_processes={training.n_gpu} --config_file fixtures/accelerate_fsdp_defaults.yaml"
            " tuning/sft_trainer.py …"
        )
        training._n_gpu = 1
    if training.disable_tqdm:  # the trainer hides its own bar only
        datasets.disable_progress_bars()
        transformers.utils.logging.disable_progress_bar()


def check_launcher(config: RunConfig) -> None:
    """One process cannot become several by itself, and several must know of each other."""
    processes = config.run.accelerate_launch_args.get("num_processes", 1)
    check_processes(config.training.world_size)
    if str(processes) != "1" and not was_launched():
        raise UserError(
            where="accelerate_launch_args",
            problem=f"num_processes {processes} needs a launcher.",
            fix=f"Run accelerate launch --num_processes={processes} tuning/sft_trainer.py with the same options.",
        )


def encode_training(
    source: Source | Mixture | Stream, config: RunConfig, encoder: Encoder, progress: Progress
) -> EncodedRows | StreamedRows:
    """The training rows; those that are streamed come as they are, from where an earlier run stopped."""
    training = config.training
    if not isinstance(source, Stream):
        return EncodedRows(source, encoder, skip_bad_rows=config.data.on_bad_row == "skip")
    return StreamedRows(
        source,
        batch_size=training.train_batch_size,
        seed=training.seed if training.data_seed is None else training.data_seed,
        rank=training.process_index,
        world=training.world_size,
        start=progress.global_step * training.gradient_accumulation_steps,
    )


def encode_validation(config: RunConfig, encoder: Encoder, skip_bad_rows: bool) -> EncodedRows:
    """The validation rows, of which the first are tried."""
    source = open_validation_rows(config)
    check_first_rows(source, encoder, skip_bad_rows)
    return EncodedRows(source, encoder, skip_bad_rows=skip_bad_rows)


def make_collator(encoder: Encoder, training: TrainingArguments) -> Collator:
    """How rows become batches; on several processes every batch has an image. See `Encoder.filler`."""
    filler = encoder.filler() if training.world_size > 1 else None
    return replace(probe_collator(encoder.processor), filler=filler)


def make_examiner(
    config: RunConfig, encoder: Encoder, collator: Collator, rows: EncodedRows | StreamedRows
) -> Examiner:
    """What answers the first rows by generation: those of the validation data, where there are any."""
    answers, source = config.answers, rows.stream if isinstance(rows, StreamedRows) else rows.source
    asked = answers.eval_generate_rows if config.data.validation_data_path else 0
    most = max(asked, answers.report_samples)
    first = [row for row in itertools.islice(source, most) if not isinstance(row, UserError)]
    if asked:
        check_right_answers(answers.metric_names, right_answers(first))
    return Examiner(
        encoder,
        collator,
        rows=first[:asked],
        samples=first[: answers.report_samples],
        metrics=answers.metric_names,
        max_new_tokens=answers.eval_max_new_tokens,
        batch_size=config.training.eval_batch_size,
        skip_bad_rows=config.data.on_bad_row == "skip",
        folder=Path(config.training.output_dir),
        show_progress=not config.training.disable_tqdm,
    )


def check_first_rows(source: Source | Mixture | Stream, encoder: Encoder, skip_bad_rows: bool) -> None:
    """Encode a few rows here and now: most mistakes in a dataset show in its first rows."""
    for row in itertools.islice(source, ROWS_CHECKED_FIRST):
        encoded = encode_row(row, encoder, skip_bad_rows)
        if isinstance(encoded, UserError):
            raise encoded


def prepare_output(config: RunConfig, progress: Progress, identity: dict[str, Any]) -> AbstractContextManager:
    """Make output_dir ready: everything that can be wrong with the input has been found by now. Returns its lock."""
    output_dir = Path(config.training.output_dir)
    if os.environ.get("RANK", "0") != "0":
        return nullcontext()
    try:
        lock = lock_folder(output_dir)
        if find_progress(config, identity) != progress:
            raise RunEnded(
                f"Another run was at work in {output_dir} until now. Run the same command again.", EXIT_INTERNAL_ERROR
            )
        for note in progress.notes:
            say(note)
        if config.run.overwrite_output_dir:
            remove_earlier_run(output_dir)
        for leftover in find_leftovers(output_dir):
            shutil.rmtree(leftover)
        if progress.folder is None:
            (output_dir / SKIPPED_FILE).unlink(missing_ok=True)
        write_json(output_dir / CONFIG_FILE, config.to_dict())
        return lock
    except OSError as error:
        raise UserError(where=f"output_dir {output_dir}", problem=f"cannot be written: {error.strerror}.") from error


def options_of_trainer(config: RunConfig) -> dict[str, Any]:
    """What the trainer is told of the config.

    Its arguments are without what is done here instead: the Hub, whose token would be in every checkpoint, and the
    trackers.
    """
    training, data, run = config.training, config.data, config.run
    args = copy.copy(training)
    args.push_to_hub, args.hub_token, args.report_to = False, None, []
    if is_fsdp_asked_for() or args.fsdp:  # else every process adds up the gradient of the whole model
        args.accelerator_config = copy.copy(args.accelerator_config)
        wanted = args.accelerator_config.gradient_accumulation_kwargs or {}
        args.accelerator_config.gradient_accumulation_kwargs = {"sync_each_batch": True} | wanted
    return {
        "args": args,
        "learning_rates": {
            VISION_TOWER: run.vision_tower_learning_rate,
            PROJECTOR: run.projector_learning_rate,
        },
        "padding_free": data.padding_free,
        "interruption": Interruption(run.save_before_walltime),
        "max_bad_fraction": data.max_bad_fraction,
        "group_by_length": config.group_by_length,
        "max_tokens_per_batch": data.max_tokens_per_batch,
        "keep_master_weights": config.model.keep_master_weights,
        "early_stopping_patience": config.answers.early_stopping_patience,
    }


def open_hub(config: RunConfig) -> HubRepo | None:
    """The repository to upload to, if any: whether we may is known before training."""
    if not config.training.push_to_hub:
        return None
    hub = HubRepo(config.training)
    if os.environ.get("RANK", "0") == "0":
        hub.open()
    return hub


def upload_finished(config: RunConfig, files: Sequence[str]) -> None:
    """Upload the model that an earlier run saved, if that could not."""
    hub = open_hub(config)
    if hub and config.training.should_save:
        hub.upload_final(Path(config.save_model_dir), files, Path(config.training.output_dir))


def run(trainer: SupervisedTrainer, config: RunConfig, progress: Progress) -> TrainingResult:
    """Train from where an earlier run stopped, if one did, and save the model."""
    metrics: dict[str, float] = {}
    if len(set(trainer.processes.share([progress.global_step])[:, 0].tolist())) > 1:
        where = f"output_dir {config.training.output_dir}"
        raise UserError(
            where=where, problem="the machines find different checkpoints here.", fix="Give one that all of them share."
        )
    if progress.folder and progress.trained_to_end:
        say(f"{progress.folder} is the end of training: only the final model remains to be saved.")
        trainer.take_state(progress.folder)
    else:
        if progress.folder:
            say(f"Continuing from {progress.folder}.")
        told = tell_what_is_kept(lambda: describe_kept(Path(config.training.output_dir)))
        lost = trainer.processes.blame_lost()
        with told, trainer.interruption, trainer.workers, lost, trainer.explain_memory(), worker_killed():
            metrics = trainer.train(resume_from_checkpoint=str(progress.folder) if progress.folder else None).metrics
        metrics |= next((line for line in reversed(trainer.state.log_history) if "eval_loss" in line), {})
        trainer.end_if_stopped()
    trainer.rows.report()
    save(trainer, config, progress)
    report = Path(config.training.output_dir, REPORT_FILE)
    say(f"Done: {config.save_model_dir} holds the model after {trainer.state.global_step} steps. Look at {report}.")
    return TrainingResult(Path(config.save_model_dir), trainer.state.global_step, metrics)


def save(trainer: SupervisedTrainer, config: RunConfig, progress: Progress) -> None:
    """Save the final model beside its place, move it there, and only then mark the run as finished."""
    target, output_dir = Path(config.save_model_dir), Path(config.training.output_dir)
    if lost := trainer.lost_best:
        say(f"Warning: the best step, {lost}, was not saved; let save_steps be eval_steps to keep it.")
    card = write_card(gather_facts(trainer, config))
    checkpoint = progress.folder if progress.trained_to_end else None
    files = trainer.save_final(target, checkpoint, lambda saved: put_card(card, saved, target))
    verify_saved(trainer, target, trainer.final_source(checkpoint), config.model, wanted=config.run.verify_save)
    if trainer.args.should_save:
        end = {"global_step": trainer.state.global_step, "files": files}
        write_json(output_dir / COMPLETE_FILE, {**trainer.identity, **end})
    trainer.accelerator.wait_for_everyone()
    if trainer.hub and trainer.args.should_save:
        trainer.hub.upload_final(target, files, output_dir)


def start(arguments: Sequence[str], *, all_gpus: bool = False) -> None:
    """Train in this process, or in as many as the options ask for."""
    options = read_options(arguments)
    values, _ = check_options(options)
    asked = values.get("accelerate_launch_args", {})
    if launch_args := wanted_launch(asked, all_gpus=all_gpus and not values.get("use_cpu")):
        launch(launch_args, arguments)
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
    leave(main())
