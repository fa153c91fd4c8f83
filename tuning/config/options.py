"""Every option of a run: its default, one line of help, and what it may be.

`TrainingArguments` of Hugging Face come on top: all of them are options, too.
"""

from dataclasses import dataclass, field, fields
from datetime import date
from multiprocessing import get_all_start_methods
from typing import Any

from transformers import TrainingArguments
from transformers.trainer_pt_utils import AcceleratorConfig
from transformers.training_args import trainer_log_levels

from tuning.config.box_formats import BOX_FORMATS


def option(
    default: Any,
    help: str,
    *,
    choices: tuple[Any, ...] = (),
    minimum: float | None = None,
    maximum: float | None = None,
    above: float | None = None,
    below: float | None = None,
    required: bool = False,
    positional: str = "",
) -> Any:
    """A dataclass field with its line of help and with what `find_value_problems` checks.

    `choices`: the values it may have. `minimum`, `maximum`: the least and the greatest number; `above`, `below`: the
    same without the limit itself. `positional`: the name in the usage of a command whose option needs no flag.
    """
    limits = {"choices": choices, "minimum": minimum, "maximum": maximum, "above": above, "below": below}
    metadata = {"help": help, "required": required, "positional": positional, **limits}
    if isinstance(default, (dict, list)):
        return field(default_factory=default.copy, metadata=metadata)
    return field(default=default, metadata=metadata)


AUTO, BATCH_SIZE = "auto", "per_device_train_batch_size"
DTYPES = (AUTO, "float32", "bfloat16", "float16")


@dataclass(frozen=True)
class ModelSource:
    """Which model, and how it is loaded."""

    model_name_or_path: str = option("", "Base model: a local folder or a hub id.", required=True)
    dtype: str = option("auto", "Precision of the weights; auto: as the checkpoint stores them.", choices=DTYPES)
    use_flash_attn: bool = option(True, "Use the fastest attention of this machine and model; false: SDPA.")
    attn_implementation: str | None = option(
        None, "Use this attention of transformers instead, such as sdpa, eager or flash_attention_2."
    )
    quantization: str | None = option(None, "Quantize the frozen language model (QLoRA).", choices=("4bit", "8bit"))
    trust_remote_code: bool = option(False, "Run Python code that comes with the checkpoint.")
    chat_template: str | None = option(None, "Chat template instead of the model's: a Jinja file or its text.")
    chat_template_kwargs: dict[str, Any] = option(
        {}, 'Variables for the chat template, as a JSON object, such as {"enable_thinking": false}.'
    )
    processor_kwargs: dict[str, Any] = option(
        {}, "Settings of the image processor to change, as a JSON object; they are saved with the model."
    )


@dataclass(frozen=True)
class ServerArguments:
    """Which model of a server, and how it is asked."""

    server_url: str | None = option(
        None, "OpenAI-compatible server (vLLM, SGLang, llama.cpp, Ollama, …), such as http://localhost:8000/v1."
    )
    model: str | None = option(None, "Name of the model on the server (default: its only one).")
    request_options: dict[str, Any] = option(
        {}, 'Fields to add to every request, as a JSON object, such as {"add_special_tokens": true}.'
    )
    request_timeout: float = option(600.0, "Seconds that the server may take for one answer.", above=0)


@dataclass(frozen=True)
class ModelArguments(ModelSource):
    keep_master_weights: bool = option(
        True, "Keep a float32 copy of trained 16-bit weights; false: half the memory, but small updates are lost."
    )
    freeze_vision_tower: bool | None = option(None, "Do not train the vision tower (default: only with LoRA).")
    freeze_multi_modal_projector: bool | None = option(None, "Do not train the projector (default: only with LoRA).")
    freeze_language_model: bool | None = option(None, "Do not train the language model, nor adapters in it.")
    cache_vision_features: str | None = option(
        None, "Folder for the features of a frozen vision tower: it then runs once per image, over all runs."
    )


@dataclass(frozen=True)
class LoraArguments:
    peft_method: str | None = option(None, "Fine-tuning method: lora, or none for full fine-tuning.")
    r: int = option(8, "Rank of the LoRA matrices.", minimum=1)
    lora_alpha: int = option(32, "Scale LoRA updates by lora_alpha / r.", minimum=1)
    lora_dropout: float = option(0.05, "Dropout on the input of the LoRA matrices.", minimum=0, below=1)
    target_modules: list[str] | str | None = option(None, "Modules to adapt: names, all-linear, or a regex.")
    bias: str = option("none", "Biases to train.", choices=("none", "all", "lora_only"))
    modules_to_save: list[str] | None = option(None, "Modules to train in full and save with the adapter.")
    use_rslora: bool = option(False, "Scale by lora_alpha / sqrt(r) instead (rank-stabilized LoRA).")
    use_dora: bool = option(False, "Train weight-decomposed LoRA (DoRA).")
    lora_dtype: str = option(
        "float32",
        "Precision of LoRA matrices; auto: that of the weights, with float32 copies in the optimizer.",
        choices=("float32", "auto"),
    )


@dataclass(frozen=True)
class SourceArguments:
    """How rows are read from files or the Hub, and which images they may use."""

    dataset_text_field: str = option("messages", "Column with the messages.")
    dataset_image_field: str = option("images", "Column with the image or images.")
    dataset_split: str | None = option(None, "Split to read, or a part of one, such as train[:50%] (default: train).")
    dataset_config_name: str | None = option(None, "Configuration of a hub dataset.")
    image_folder: str | None = option(None, "Folder that relative image paths start from (default: the data file's).")
    allow_outside_paths: bool = option(False, "Also read image files that lie outside image_folder.")
    allow_remote_images: bool = option(False, "Download images whose path is an http(s) address.")
    max_image_pixels: int = option(
        100_000_000, "Refuse an image with more pixels, as stored or as resized for the model.", minimum=1
    )
    max_image_megabytes: float = option(100.0, "Refuse an image whose file has more MB (10⁶ bytes).", above=0)


@dataclass(frozen=True)
class RowArguments(SourceArguments):
    """How rows are read and encoded."""

    max_seq_length: int | None = option(
        None, "Most tokens in a row, images included (default: the model's).", minimum=1
    )
    on_bad_row: str = option("error", "What to do with a row that cannot be used.", choices=("error", "skip"))
    max_images_per_sample: int | None = option(
        None, "Use at most N images per row (default: what the model takes).", minimum=1
    )
    max_messages_per_row: int = option(1000, "Most messages in a row.", minimum=1)
    date_string: str | None = option(None, "Today's date in chat templates (default: the day the run began).")
    bbox_format: str | None = option(
        None, "How to write the boxes of the column objects (default: as the model does).", choices=(*BOX_FORMATS,)
    )

    @property
    def run_date(self) -> str:
        """The date that templates write as today's, if the run begins today."""
        return self.date_string or date.today().strftime("%d %b %Y")


@dataclass(frozen=True)
class DataArguments(RowArguments):
    training_data_path: str | list[Any] | None = option(
        None,
        "A file (.jsonl, .json, .csv, .tsv, .parquet, .arrow, .tar), a folder, a hub id, or a list of"
        " {path, weight, split}.",
        required=True,
    )
    validation_data_path: str | None = option(None, "Data for evaluation: a file, a folder or a hub id.")
    validation_split: float | None = option(
        None, "Hold out this share (below 1) or number of the training rows for evaluation.", above=0
    )
    dataset_kwargs: dict[str, Any] = option({}, "Accepted for compatibility; skip_prepare_dataset is always true.")
    padding_free: bool | str = option(
        "auto",
        "Join the rows of a batch end to end instead of padding them; auto: if the model's results stay the same.",
        choices=("auto", True, False),
    )
    max_tokens_per_batch: int | None = option(
        None, "Fill a batch to N tokens, padding included; replaces per_device_train_batch_size.", minimum=1
    )
    overlong_rows: str = option(
        "error",
        "What to do with a row above max_seq_length; truncate_text shortens answers, never images.",
        choices=("error", "drop", "truncate_text"),
    )
    max_bad_fraction: float = option(
        0.05, "With on_bad_row skip: stop if more than this share of the rows is bad.", minimum=0, maximum=1
    )
    streaming: bool = option(False, "Read rows one after another instead of converting files first; needs max_steps.")
    assistant_only_loss: bool = option(True, "Train on answers and their end tokens only; false: on all text.")
    train_on: str = option("all", "Which answers of a row to train.", choices=("all", "last_turn"))
    train_empty_thoughts: bool = option(
        False, "Also train the empty thought that a template writes before an answer without a thought."
    )


@dataclass(frozen=True)
class AnswerArguments:
    """How the model answers rows during training."""

    eval_generate_rows: int = option(
        0, "At each evaluation, answer N validation rows and log their scores (eval_metrics).", minimum=0
    )
    eval_metrics: list[str] | str = option("exact_match", "Scores of these answers, such as exact_match or anls.")
    eval_max_new_tokens: int = option(64, "Most tokens in these answers, and in those of report.html.", minimum=1)
    report_samples: int = option(4, "Rows to answer before and after training, for report.html.", minimum=0)
    early_stopping_patience: int | None = option(
        None, "Stop after N evaluations without a better metric_for_best_model.", minimum=1
    )

    @property
    def metric_names(self) -> list[str]:
        return [self.eval_metrics] if isinstance(self.eval_metrics, str) else self.eval_metrics


@dataclass(frozen=True)
class CheckArguments:
    """Options that only `vlm-tuning check` uses."""

    max_rows: int | None = option(None, "Check at most N rows (default: all).", minimum=1)
    decode_images: bool = option(False, "Decode each image in full instead of reading its header.")
    sample_rows: int = option(8, "Rows to show in full in check.html.", minimum=0)


@dataclass(frozen=True)
class RunArguments:
    save_model_dir: str | None = option(None, "Folder for the final model (default: output_dir).")
    overwrite_output_dir: bool = option(False, "Start again: delete the checkpoints of an earlier run in output_dir.")
    vision_tower_learning_rate: float | None = option(
        None, "Learning rate of the vision tower (default: learning_rate).", minimum=0
    )
    projector_learning_rate: float | None = option(
        None, "Learning rate of the projector (default: learning_rate).", minimum=0
    )
    save_before_walltime: float | None = option(
        None, "Minutes that the queue allows; the run saves and ends with exit code 143 before they are over.", above=0
    )
    max_memory_gb: float | None = option(
        None, "GB (10⁹ bytes) of each device that auto may fill (default: what is free there).", above=0
    )
    verify_save: bool | None = option(
        None,
        "Compare what is saved with the model in memory, and the final logits (default: those if a second model fits).",
    )
    logging_dir: str | None = option(None, "Folder for TensorBoard's files (default: output_dir/runs).")
    accelerate_launch_args: dict[str, Any] = option({}, "Options of `accelerate launch`, as a JSON object.")


@dataclass(frozen=True)
class RunConfig:
    """One run, checked and complete. `notes`: sentences to print, about options that were set or ignored.

    `group_by_length`: whether a batch has rows of similar length; None: only if batches are padded. `auto`: the options
    that the run decides itself, by its memory (`checking/memory_plan.py`) or its checkpoint (`model/precision.py`).
    `recomputed_layers`: what gradient_checkpointing auto was decided to be; None until then, and where it is not auto.
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
    auto: frozenset[str] = frozenset()
    recomputed_layers: int | None = None

    @property
    def save_model_dir(self) -> str:
        return self.run.save_model_dir or self.training.output_dir

    def to_dict(self) -> dict[str, Any]:
        """Flat and JSON-ready, under the names of a config file: the same run can be started from it."""
        flat = {}
        for section in (self.model, self.lora, self.data, self.answers, self.run):
            flat.update({entry.name: getattr(section, entry.name) for entry in fields(section)})
        left_out = {"hub_token", "local_rank"}
        left_out |= {"train_sampling_strategy"} if self.group_by_length is None else set()
        left_out |= {"per_device_train_batch_size"} if self.data.max_tokens_per_batch else set()
        training = self.training.to_dict()
        flat |= {name: training[name] for name in TRAINING_FIELDS if name in training and name not in left_out}
        older = {"gradient_checkpointing"} if "activation_checkpointing" in self.auto else set()  # has the same value
        return flat | dict.fromkeys(self.auto | older, AUTO)


SECTIONS = {
    "model": ModelArguments,
    "lora": LoraArguments,
    "data": DataArguments,
    "answers": AnswerArguments,
    "run": RunArguments,
    "check": CheckArguments,
}
OWN_OPTIONS = {entry.name: entry for kind in SECTIONS.values() for entry in fields(kind)}
TRAINING_FIELDS = {entry.name: entry for entry in fields(TrainingArguments) if entry.init}

# Defaults of ours that differ from those of TrainingArguments, with the reason.
TRAINING_DEFAULTS = {
    "logging_steps": 10,  # 500 hides the loss curve of most fine-tunings
    "remove_unused_columns": False,  # data workers encode the rows and need all columns
    "dataloader_persistent_workers": True,  # do not start the workers again every epoch
    "report_to": "none",
    "ddp_find_unused_parameters": False,  # what gets no gradient is frozen, and every batch has an image
    "ddp_broadcast_buffers": False,  # buffers never change
    "logging_nan_inf_filter": False,  # a loss that is NaN or infinite ends the run: nothing to hide, one sync less
}

# What options of TrainingArguments may be, by the names of `option`. Others are left to transformers.
TRAINING_LIMITS: dict[str, dict[str, Any]] = {
    "num_train_epochs": {"above": 0},
    "max_steps": {"minimum": -1},
    "per_device_train_batch_size": {"minimum": 1},
    "per_device_eval_batch_size": {"minimum": 1},
    "gradient_accumulation_steps": {"minimum": 1},
    "eval_accumulation_steps": {"minimum": 1},
    "learning_rate": {"minimum": 0},
    "warmup_steps": {"minimum": 0},
    "weight_decay": {"minimum": 0},
    "adam_beta1": {"minimum": 0, "below": 1},
    "adam_beta2": {"minimum": 0, "below": 1},
    "adam_epsilon": {"minimum": 0},
    "max_grad_norm": {"minimum": 0},
    "neftune_noise_alpha": {"minimum": 0},
    "seed": {"minimum": 0, "maximum": 2**32 - 1},  # NumPy takes no other
    "data_seed": {"minimum": 0, "maximum": 2**63 - 1},
    "logging_steps": {"minimum": 0},
    "eval_steps": {"minimum": 0},
    "eval_delay": {"minimum": 0},
    "save_steps": {"minimum": 0},
    "save_total_limit": {"minimum": 0},
    "torch_empty_cache_steps": {"minimum": 1},
    "dataloader_num_workers": {"minimum": 0},
    "dataloader_prefetch_factor": {"minimum": 1},
    "dataloader_multiprocessing_context": {"choices": tuple(get_all_start_methods())},
    "ddp_bucket_cap_mb": {"minimum": 1},
    "ddp_timeout": {"minimum": 1},
    "log_level": {"choices": tuple(trainer_log_levels)},
    "log_level_replica": {"choices": tuple(trainer_log_levels)},
}


def default_options() -> dict[str, Any]:
    """Every option's default by name, as `RunConfig.to_dict` has it."""
    values = {}
    for entry in (*fields(TrainingArguments), *OWN_OPTIONS.values()):
        values[entry.name] = entry.default_factory() if callable(entry.default_factory) else entry.default
    accelerator = AcceleratorConfig().to_dict()
    del accelerator["use_configured_state"]  # TrainingArguments removes it
    return values | TRAINING_DEFAULTS | {"accelerator_config": accelerator}
