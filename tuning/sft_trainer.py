"""Fine-tune a vision-language model: options → data → model → train → save, on one page.

Run it by path, as `python -m tuning.sft_trainer`, or call `tuning.train(config)`.
"""

import itertools
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if not __package__:  # run by path: Python puts this folder first, where `tuning` cannot be found
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from PIL import Image
from transformers import PreTrainedConfig, PreTrainedModel, TrainingArguments, set_seed

from tuning.config.arguments import RunConfig
from tuning.config.parse import build_config, describe_options, read_json, read_options
from tuning.console import say
from tuning.data.chat import ChatFormat
from tuning.data.collator import probe_collator
from tuning.data.dataset import EncodedRows, EncodingCollator, StreamedRows, encode_row
from tuning.data.encode import Encoder
from tuning.data.images import ImageRules
from tuning.data.sources import Mixture, Source, Stream
from tuning.data_paths import open_rows, open_validation_rows
from tuning.errors import UserError, exit_code_of
from tuning.model import load
from tuning.model.attention import choose_attention
from tuning.model.cross_attention import keep_rows_apart
from tuning.model.families import find_family
from tuning.model.lora import add_lora, check_modules_to_save, resolve_targets
from tuning.model.parts import LANGUAGE_MODEL, PROJECTOR, VISION_TOWER, find_parts, freeze_parts, parameter_table
from tuning.training.callbacks import SKIPPED_FILE
from tuning.training.checkpoint import (
    COMPLETE_FILE,
    Progress,
    find_progress,
    move_into_place,
    remove_earlier_run,
    run_identity,
    write_json,
)
from tuning.training.loss import install_supervised_loss
from tuning.training.trainer import SupervisedTrainer

ROWS_CHECKED_FIRST = 4
TYPICAL_IMAGE = (1024, 768)


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
    use_one_device(config.training)
    set_seed(config.training.seed)

    model_config = load.load_config(config.model)
    processor = load.load_processor(config.model, model_config)
    source = open_rows(config)
    identity = run_identity(config, rows=source.identity(), architecture=load.describe(model_config))
    progress = find_progress(config, identity)
    if progress.finished_steps is not None:
        say(f"This run is already finished after {progress.finished_steps} steps: see {config.save_model_dir}.")
        return TrainingResult(Path(config.save_model_dir), progress.finished_steps, {})
    identity["date_string"] = progress.date_string or identity["date_string"]

    encoder = make_encoder(config, processor, model_config, identity["date_string"])
    padding = probe_collator(processor)
    skip = config.data.on_bad_row == "skip"
    check_first_rows(source, encoder, skip)
    training_rows = (
        stream_rows(source, config, progress)
        if isinstance(source, Stream)
        else EncodedRows(source, encoder, skip_bad_rows=skip)
    )
    validation_rows = None
    if config.data.validation_data_path:
        validation_source = open_validation_rows(config)
        check_first_rows(validation_source, encoder, skip)
        validation_rows = EncodedRows(validation_source, encoder, skip_bad_rows=skip)

    model = make_model(config, model_config)
    prepare_output(config, progress)
    trainer = SupervisedTrainer(
        model=model,
        args=config.training,
        train_dataset=training_rows,
        eval_dataset=validation_rows,
        data_collator=EncodingCollator(encoder, padding, skip) if config.data.streaming else padding,
        eval_collator=padding,
        processing_class=processor,
        parts=find_parts(_base(model)),
        learning_rates={
            VISION_TOWER: config.run.vision_tower_learning_rate,
            PROJECTOR: config.run.projector_learning_rate,
        },
        identity=identity,
        image_limit=encoder.max_images,
        max_bad_fraction=config.data.max_bad_fraction,
    )
    return run(trainer, config, progress)


def _as_run_config(config: RunConfig | Mapping[str, Any] | str | os.PathLike) -> RunConfig:
    if isinstance(config, RunConfig):
        return config
    return build_config(config if isinstance(config, Mapping) else read_json(config))


def use_one_device(training: TrainingArguments) -> None:
    """Without a launcher a run uses one device: `nn.DataParallel`, transformers' choice, is slow and wrong here."""
    if training.n_gpu > 1:
        say(
            f"Using one of {training.n_gpu} GPUs. To use all: accelerate launch --num_processes={training.n_gpu}"
            " --config_file fixtures/accelerate_fsdp_defaults.yaml tuning/sft_trainer.py …"
        )
        training._n_gpu = 1


def check_launcher(config: RunConfig) -> None:
    """One process cannot become several by itself."""
    processes = config.run.accelerate_launch_args.get("num_processes", 1)
    if str(processes) != "1" and "WORLD_SIZE" not in os.environ:
        raise UserError(
            f"num_processes {processes} needs a launcher.",
            "accelerate_launch_args",
            f"Run accelerate launch --num_processes={processes} tuning/sft_trainer.py with the same options.",
        )


def stream_rows(stream: Stream, config: RunConfig, progress: Progress) -> StreamedRows:
    """The training rows as they come, from where an earlier run stopped."""
    training = config.training
    seed = training.seed if training.data_seed is None else training.data_seed
    rows = StreamedRows(stream, block=training.train_batch_size * training.world_size, seed=seed)
    rows.start = progress.global_step * training.gradient_accumulation_steps
    return rows


def make_encoder(config: RunConfig, processor: Any, model_config: PreTrainedConfig, date_string: str) -> Encoder:
    """How rows are encoded for this model; says what is done to them."""
    data, chat = config.data, ChatFormat(processor, date_string=date_string)
    if chat.adds_end_token:
        say(f"The chat template writes nothing after an answer; {chat.end_of_turn} is added, so that the model stops.")
    context = getattr(model_config.get_text_config(), "max_position_embeddings", None)
    family = find_family(model_config)
    encoder = Encoder(
        processor,
        chat,
        max_seq_length=data.max_seq_length or context or processor.tokenizer.model_max_length,
        max_images=data.max_images_per_sample or family.max_images,
        max_messages=data.max_messages_per_row,
        assistant_only_loss=data.assistant_only_loss,
        overlong_rows=data.overlong_rows,
        image_rules=ImageRules(
            folder=data.image_folder,
            allow_outside=data.allow_outside_paths,
            allow_remote=data.allow_remote_images,
            max_pixels=data.max_image_pixels,
            max_bytes=round(data.max_image_megabytes * 1e6),
        ),
    )
    tokens = encoder.count_image_tokens(Image.new("RGB", TYPICAL_IMAGE))
    width, height = TYPICAL_IMAGE
    say(f"A {width}×{height} image costs {tokens} image tokens; a row may have {encoder.max_seq_length} tokens.")
    return encoder


def check_first_rows(source: Source | Mixture | Stream, encoder: Encoder, skip_bad_rows: bool) -> None:
    """Encode a few rows here and now: most mistakes in a dataset show in its first rows."""
    for row in itertools.islice(source, ROWS_CHECKED_FIRST):
        encoded = encode_row(row, encoder, skip_bad_rows)
        if isinstance(encoded, UserError):
            raise encoded


def make_model(config: RunConfig, model_config: PreTrainedConfig):
    """Load the model, choose what trains, and give it the supervised loss."""
    targets = find_lora_targets(config, model_config) if config.lora.peft_method else []
    attention, reason = pick_attention(config, model_config)
    say(reason)
    dtype = load.choose_dtype(config.model, model_config)
    model = load.load_model(config.model, model_config, dtype=dtype, attention=attention)
    parts = find_parts(model)
    model = prepare_model(model, config, targets)
    say(parameter_table(model, parts))
    return model


def pick_attention(config: RunConfig, model_config: PreTrainedConfig) -> tuple[str, str]:
    """The attention for this run, and a sentence on why."""
    return choose_attention(
        load.model_class(model_config),
        use_flash_attn=config.model.use_flash_attn,
        dtype=load.choose_dtype(config.model, model_config),
        device_type=config.training.device.type,
    )


def prepare_model(model: PreTrainedModel, config: RunConfig, lora_targets: list[str]):
    """Give a model, or a skeleton of it, the supervised loss and let train what the config says."""
    keep_rows_apart(model)
    install_supervised_loss(model)
    if config.lora.peft_method:
        return add_lora(model, config.lora, lora_targets)
    frozen = {
        VISION_TOWER: config.model.freeze_vision_tower,
        PROJECTOR: config.model.freeze_multi_modal_projector,
        LANGUAGE_MODEL: config.model.freeze_language_model,
    }
    freeze_parts(model, find_parts(model), {part for part, freeze in frozen.items() if freeze})
    return model


def find_lora_targets(config: RunConfig, model_config: PreTrainedConfig) -> list[str]:
    """The modules LoRA adapts, found on a skeleton so that a wrong name is reported before the weights are read."""
    skeleton = load.build_skeleton(model_config)
    parts = find_parts(skeleton)
    open_parts = {LANGUAGE_MODEL} if not config.model.freeze_language_model else set()
    open_parts |= {VISION_TOWER} if config.model.freeze_vision_tower is False else set()
    open_parts |= {PROJECTOR} if config.model.freeze_multi_modal_projector is False else set()
    check_modules_to_save(skeleton, config.lora.modules_to_save)
    return resolve_targets(skeleton, parts, config.lora, open_parts)


def _base(model):
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def prepare_output(config: RunConfig, progress: Progress) -> None:
    """Make output_dir ready: everything that can be wrong with the input has been found by now."""
    output_dir = Path(config.training.output_dir)
    for note in progress.notes:
        say(note)
    if os.environ.get("RANK", "0") != "0":
        return
    try:
        if config.run.overwrite_output_dir:
            remove_earlier_run(output_dir)
        if progress.folder is None:
            (output_dir / SKIPPED_FILE).unlink(missing_ok=True)
        write_json(output_dir / "resolved_config.json", config.to_dict())
    except OSError as error:
        raise UserError(f"cannot be written: {error.strerror}.", f"output_dir {output_dir}") from error


def run(trainer: SupervisedTrainer, config: RunConfig, progress: Progress) -> TrainingResult:
    """Train from where an earlier run stopped, if one did, and save the model."""
    metrics: dict[str, float] = {}
    if progress.folder and progress.trained_to_end:
        say(f"{progress.folder} is the end of training: only the final model remains to be saved.")
        trainer.restore(progress.folder)
    else:
        if progress.folder:
            say(f"Continuing from {progress.folder}.")
        metrics = trainer.train(resume_from_checkpoint=str(progress.folder) if progress.folder else None).metrics
        metrics |= next((line for line in reversed(trainer.state.log_history) if "eval_loss" in line), {})
    trainer.report_rows()
    save(trainer, config)
    say(f"Done: {config.save_model_dir} holds the model after {trainer.state.global_step} steps.")
    return TrainingResult(Path(config.save_model_dir), trainer.state.global_step, metrics)


def save(trainer: SupervisedTrainer, config: RunConfig) -> None:
    """Save the final model beside its place, move it there, and only then mark the run as finished."""
    target, output_dir = Path(config.save_model_dir), Path(config.training.output_dir)
    trainer.save_model(str(target / ".saving"), _internal_call=True)
    if trainer.args.should_save:
        move_into_place(target / ".saving", target)
        write_json(output_dir / COMPLETE_FILE, {**trainer.identity, "global_step": trainer.state.global_step})
    trainer.accelerator.wait_for_everyone()
    if config.training.push_to_hub:
        trainer.push_to_hub()


def main(argv: Sequence[str] | None = None) -> int:
    """The command: returns its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if any(argument in ("-h", "--help") for argument in arguments):
        print(describe_options())
        return 0
    return exit_code_of(lambda: train(build_config(read_options(arguments))))


if __name__ == "__main__":
    sys.exit(main())
