"""Every option of a run, one documented line each; Hugging Face's own `TrainingArguments` stand beside ours."""

from dataclasses import dataclass, field, fields
from datetime import date
from typing import Any

from transformers import TrainingArguments
from transformers.trainer_pt_utils import AcceleratorConfig


def option(default: Any, help: str):
    """A dataclass field with its line of documentation."""
    if isinstance(default, (dict, list)):
        return field(default_factory=default.copy, metadata={"help": help})
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class ModelSource:
    """Which model, and how it is loaded."""

    model_name_or_path: str = option("", "Base model: a local folder or a hub id.")
    dtype: str = option("auto", "Precision of the weights: auto (the checkpoint's own), float32, bfloat16 or float16.")
    use_flash_attn: bool = option(True, "Use the fastest attention this machine and model support; false: plain SDPA.")
    attn_implementation: str | None = option(
        None, "A named attention of transformers instead, such as sdpa, eager or flash_attention_2."
    )
    quantization: str | None = option(
        None, "4bit or 8bit: keep the language model's frozen weights quantised through bitsandbytes (QLoRA)."
    )
    trust_remote_code: bool = option(False, "Run Python code that comes with the checkpoint.")
    chat_template: str | None = option(None, "Chat template that replaces the model's: a Jinja file or its text.")
    processor_kwargs: dict[str, Any] = option({}, "Image processor settings to change and save, as a JSON object.")


@dataclass(frozen=True)
class ModelArguments(ModelSource):
    keep_master_weights: bool = option(
        True,
        "Train 16-bit weights by float32 copies; false: half the memory, and updates too small for 16 bits are lost.",
    )
    freeze_vision_tower: bool | None = option(None, "Keep the vision tower as it is (default: only with LoRA).")
    freeze_multi_modal_projector: bool | None = option(None, "Keep the projector as it is (default: only with LoRA).")
    freeze_language_model: bool | None = option(None, "Keep the language model as it is, adapters included.")
    cache_vision_features: str | None = option(
        None, "Folder to keep the frozen vision tower's features in, so that it runs once an image, in all runs."
    )


@dataclass(frozen=True)
class LoraArguments:
    peft_method: str | None = option(None, "lora, or none for full fine-tuning.")
    r: int = option(8, "Rank of the LoRA matrices.")
    lora_alpha: int = option(32, "LoRA scaling numerator: updates are scaled by lora_alpha / r.")
    lora_dropout: float = option(0.05, "Dropout on the input of the LoRA matrices.")
    target_modules: list[str] | str | None = option(
        None, "Modules to adapt: names, all-linear, or a regular expression."
    )
    bias: str = option("none", "Biases to train: none, all or lora_only.")
    modules_to_save: list[str] | None = option(None, "Modules trained in full and saved with the adapter.")
    use_rslora: bool = option(False, "Scale by lora_alpha / sqrt(r) (rank-stabilised LoRA).")
    use_dora: bool = option(False, "Weight-decomposed LoRA.")


@dataclass(frozen=True)
class RowArguments:
    """How rows are read."""

    dataset_text_field: str = option("messages", "Column with the messages.")
    dataset_image_field: str = option("images", "Column with the image or images.")
    dataset_split: str | None = option(None, "Split to read (default: train).")
    dataset_config_name: str | None = option(None, "Configuration of a hub dataset.")
    max_seq_length: int | None = option(None, "Longest row in tokens, image tokens included (default: the model's).")
    on_bad_row: str = option("error", "What to do with a row that cannot be used: error or skip.")
    max_images_per_sample: int | None = option(
        None, "Use only so many images of a row (default: what the model takes)."
    )
    image_folder: str | None = option(None, "Where relative image paths start (default: the data file's folder).")
    allow_outside_paths: bool = option(False, "Read image files outside image_folder, too.")
    allow_remote_images: bool = option(False, "Fetch images whose path is an http(s) address.")
    max_image_pixels: int = option(100_000_000, "Largest image in pixels.")
    max_image_megabytes: float = option(100.0, "Largest stored image in MB (10⁶ bytes).")
    max_messages_per_row: int = option(1000, "Most messages in a row.")
    date_string: str | None = option(None, "The date that templates write as today's (default: the day the run began).")

    @property
    def run_date(self) -> str:
        """The date that templates write as today's, if the run begins today."""
        return self.date_string or date.today().strftime("%d %b %Y")


@dataclass(frozen=True)
class DataArguments(RowArguments):
    training_data_path: str | list[Any] | None = option(
        None, "A .json, .jsonl, .parquet or .arrow file, a folder, a hub id, or a list of {path, weight, split}."
    )
    validation_data_path: str | None = option(None, "Data for evaluation, in the same forms.")
    dataset_kwargs: dict[str, Any] = option({}, "Accepted for compatibility; skip_prepare_dataset is always true.")
    padding_free: bool | str = option(
        "auto", "Lay a batch's rows end to end instead of padding them; auto: where the model gives the same results."
    )
    max_tokens_per_batch: int | None = option(
        None, "Most tokens in a process's batch, padding included, instead of per_device_train_batch_size rows."
    )
    overlong_rows: str = option(
        "error", "What to do with a longer row: error, drop, or truncate_text (shortens answers, never images)."
    )
    max_bad_fraction: float = option(0.05, "With on_bad_row skip: stop when more than this share of the rows is bad.")
    streaming: bool = option(False, "Read rows one after the other instead of converting files first; needs max_steps.")
    assistant_only_loss: bool = option(True, "Train on the assistant's words and end tokens only; false: on all text.")


@dataclass(frozen=True)
class AnswerArguments:
    """How validation rows are answered during training."""

    eval_generate_rows: int = option(
        0, "At every evaluation, answer so many validation rows by generation and log the scores (eval_metrics)."
    )
    eval_metrics: list[str] | str = option("exact_match", "Scores of these answers, such as exact_match or anls.")
    eval_max_new_tokens: int = option(64, "Longest answer in tokens, for validation rows and for those in report.html.")
    report_samples: int = option(4, "Rows to answer before and after training, shown in report.html.")
    early_stopping_patience: int | None = option(
        None, "Stop after so many evaluations without a better metric_for_best_model."
    )

    @property
    def metric_names(self) -> list[str]:
        return [self.eval_metrics] if isinstance(self.eval_metrics, str) else self.eval_metrics


@dataclass(frozen=True)
class CheckArguments:
    """Only `vlm-tuning check` heeds these."""

    max_rows: int | None = option(None, "Check only so many rows (default: all).")
    decode_images: bool = option(False, "Decode every image in full instead of reading its header.")
    sample_rows: int = option(8, "Rows shown in full in check.html.")


@dataclass(frozen=True)
class RunArguments:
    save_model_dir: str | None = option(None, "Where the final model goes (default: output_dir).")
    overwrite_output_dir: bool = option(False, "Start over: delete the checkpoints of an earlier run in output_dir.")
    vision_tower_learning_rate: float | None = option(None, "Learning rate of the vision tower.")
    projector_learning_rate: float | None = option(None, "Learning rate of the projector.")
    save_before_walltime: float | None = option(
        None, "Minutes the queue allows: save, and stop with exit code 143, while a step and a checkpoint still fit."
    )
    verify_save: bool | None = option(
        None,
        "Read the saved model back and compare weights and logits (default: load it if a second one fits into memory).",
    )
    logging_dir: str | None = option(None, "Folder for TensorBoard's files (default: output_dir/runs).")
    accelerate_launch_args: dict[str, Any] = option({}, "Options of `accelerate launch` (JSON only).")


@dataclass(frozen=True)
class RunConfig:
    """One run, checked and complete. `notes` are the sentences to tell the user about what was adjusted.

    `group_by_length`: whether batches are of rows of similar length; None: where they are padded.
    """

    model: ModelArguments
    lora: LoraArguments
    data: DataArguments
    answers: AnswerArguments
    run: RunArguments
    check: CheckArguments
    training: TrainingArguments
    notes: tuple[str, ...] = ()
    group_by_length: bool | None = None

    @property
    def save_model_dir(self) -> str:
        return self.run.save_model_dir or self.training.output_dir

    def to_dict(self) -> dict[str, Any]:
        """Flat and JSON-ready, under the names a config file uses: a run can be repeated from it."""
        flat = {}
        for section in (self.model, self.lora, self.data, self.answers, self.run):
            flat.update({entry.name: getattr(section, entry.name) for entry in fields(section)})
        settable = {entry.name for entry in fields(TrainingArguments) if entry.init}
        training = {name: value for name, value in self.training.to_dict().items() if name in settable}
        unsaid = {"hub_token", "local_rank"}
        unsaid |= {"train_sampling_strategy"} if self.group_by_length is None else set()
        unsaid |= {"per_device_train_batch_size"} if self.data.max_tokens_per_batch else set()
        return flat | {name: value for name, value in training.items() if name not in unsaid}


SECTIONS = {
    "model": ModelArguments,
    "lora": LoraArguments,
    "data": DataArguments,
    "answers": AnswerArguments,
    "run": RunArguments,
    "check": CheckArguments,
}

# Defaults of ours that differ from TrainingArguments', with the reason.
TRAINING_DEFAULTS = {
    "logging_steps": 10,  # 500 hides the loss curve of most fine-tunings
    "remove_unused_columns": False,  # rows are encoded in the workers: no column may be taken away before
    "dataloader_persistent_workers": True,  # do not start the workers anew every epoch
    "report_to": "none",
    "ddp_find_unused_parameters": False,  # what gets no gradient is frozen, and every batch has an image
    "ddp_broadcast_buffers": False,  # they never change
    "logging_nan_inf_filter": False,  # a loss that is no number ends the run: nothing to hide, and one wait less
}


def default_options() -> dict[str, Any]:
    """Every option's default by name, as `RunConfig.to_dict` has it."""
    own = {entry.name: entry for kind in SECTIONS.values() for entry in fields(kind)}
    values = {}
    for entry in (*fields(TrainingArguments), *own.values()):
        values[entry.name] = entry.default_factory() if callable(entry.default_factory) else entry.default
    accelerator = AcceleratorConfig().to_dict()
    del accelerator["use_configured_state"]  # TrainingArguments takes it out
    return values | TRAINING_DEFAULTS | {"accelerator_config": accelerator}
