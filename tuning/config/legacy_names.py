"""Names of options that transformers 5 renamed or removed, and what each means today."""

from collections.abc import Callable
from typing import Any

from tuning.config.options import TRAINING_FIELDS


def _newest(*names: str) -> str:
    """The first of `names` that this version of transformers knows."""
    return next(name for name in names if name in TRAINING_FIELDS)


CHECKPOINTING = _newest("activation_checkpointing", "gradient_checkpointing")
CHECKPOINTING_KWARGS = f"{CHECKPOINTING}_kwargs"

# Old name → the name of today; the value stays.
RENAMED = {
    "torch_dtype": "dtype",
    "evaluation_strategy": "eval_strategy",
    "no_cuda": "use_cpu",
    "per_gpu_train_batch_size": "per_device_train_batch_size",
    "per_gpu_eval_batch_size": "per_device_eval_batch_size",
    "push_to_hub_token": "hub_token",
    "push_to_hub_model_id": "hub_model_id",
    "gradient_checkpointing": CHECKPOINTING,
    "gradient_checkpointing_kwargs": CHECKPOINTING_KWARGS,
    "activation_checkpointing": CHECKPOINTING,
    "activation_checkpointing_kwargs": CHECKPOINTING_KWARGS,
}

# Old name → what to do instead; its value has no counterpart.
REMOVED = {
    "past_index": "It has no effect on these models: remove it.",
    "half_precision_backend": "Use bf16 or fp16 alone.",
    "fp16_backend": "Use bf16 or fp16 alone.",
    "fp16_opt_level": "Apex is no longer supported: use bf16 or fp16 alone.",
    "sharded_ddp": "Use accelerate launch with fixtures/accelerate_fsdp_defaults.yaml.",
    "fsdp_min_num_params": 'Use fsdp_config: {"min_num_params": …}.',
    "fsdp_transformer_layer_cls_to_wrap": 'Use fsdp_config: {"transformer_layer_cls_to_wrap": …}.',
    "use_ipex": "Remove it: PyTorch's own CPU kernels are used.",
    "use_mps_device": "Remove it: Apple's GPU is used when there is one.",
    "jit_mode_eval": "Use torch_compile.",
    "torchdynamo": "Use torch_compile and torch_compile_backend.",
    "dispatch_batches": 'Use accelerator_config: {"dispatch_batches": …}.',
    "split_batches": 'Use accelerator_config: {"split_batches": …}.',
    "tpu_num_cores": "TPUs are not supported.",
    "include_inputs_for_metrics": 'Use include_for_metrics: ["inputs"].',
    "include_tokens_per_second": "Remove it: tokens_per_second is always in training_logs.jsonl.",
    "packing": "Batches have no padding anyway (padding_free); max_tokens_per_batch fills them to so many tokens.",
    "max_length": "Use max_seq_length.",
    "model_max_length": "Use max_seq_length.",
}

# What other tools call an option → our name, to suggest where the spelling is too far from it.
ELSEWHERE = {
    "rank": "r",
    "lora_r": "r",
    "lora_rank": "r",
    "alpha": "lora_alpha",
    "dropout": "lora_dropout",
    "lora_target": "target_modules",
    "lora_target_modules": "target_modules",
    "lr": "learning_rate",
    "vision_lr": "vision_tower_learning_rate",
    "vit_lr": "vision_tower_learning_rate",
    "merger_lr": "projector_learning_rate",
    "epochs": "num_train_epochs",
    "num_epochs": "num_train_epochs",
    "batch_size": "per_device_train_batch_size",
    "model": "model_name_or_path",
    "model_id": "model_name_or_path",
    "data_path": "training_data_path",
    "dataset": "training_data_path",
    "dataset_name": "training_data_path",
    "val_dataset": "validation_data_path",
    "eval_dataset": "validation_data_path",
    "template": "chat_template",
    "cutoff_len": "max_seq_length",
    "seq_length": "max_seq_length",
    "use_lora": "peft_method",
    "train_type": "peft_method",
    "finetuning_type": "peft_method",
    "load_in_4bit": "quantization",
    "freeze_vit": "freeze_vision_tower",
    "freeze_llm": "freeze_language_model",
}


def _warmup_ratio(value: Any) -> dict[str, Any]:
    # transformers 5 takes a float below 1 in warmup_steps as a share of all steps.
    return {"warmup_steps": float(value)}


def _truth(value: Any) -> bool:
    return str(value).lower() in ("true", "1", "yes")


# Old name → the options of today that express its value.
REEXPRESSED: dict[str, Callable[[Any], dict[str, Any]]] = {
    "warmup_ratio": _warmup_ratio,
    "group_by_length": lambda value: {"train_sampling_strategy": "group_by_length" if _truth(value) else "random"},
    "adafactor": lambda value: {"optim": "adafactor"} if _truth(value) else {},
    "save_safetensors": lambda value: {},
}
