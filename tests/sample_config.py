"""The documented sample config, without its model, data and output."""

SAMPLE = {
    "dataset_text_field": "messages",
    "dataset_image_field": "images",
    "num_train_epochs": 1.0,
    "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 2,
    "learning_rate": 1e-4,
    "bf16": True,
    "torch_dtype": "bfloat16",
    "use_flash_attn": True,
    "remove_unused_columns": False,
    "dataset_kwargs": {"skip_prepare_dataset": True},
    "gradient_checkpointing": True,
    "gradient_checkpointing_kwargs": {"use_reentrant": False},
    "accelerate_launch_args": {"fsdp_transformer_layer_cls_to_wrap": "GraniteDecoderLayer"},
}
