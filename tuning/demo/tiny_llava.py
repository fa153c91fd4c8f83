"""A LLaVA-layout model small enough to train from nothing on a laptop: random weights, its own tokenizer."""

import os

import torch
import transformers
from transformers import AutoModelForImageTextToText

from tuning.demo.tokenizer import train_tokenizer

IMAGE_SIZE, PATCH = 32, 8

CHAT_TEMPLATE = """\
{% for message in messages %}{{ message['role'] + ':\\n' }}
{%- for part in message['content'] if part['type'] == 'image' %}{{ '<image>' }}{% endfor %}
{%- for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}
{{- '</s>' if message['role'] == 'assistant' else '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ 'assistant:\\n' }}{% endif %}"""


def save_tiny_llava(folder: str | os.PathLike, texts: list[str], *, seed: int = 0) -> None:
    """Write a random model of about 400,000 parameters and its processor to `folder`, like a published checkpoint.

    The tokenizer is trained on `texts`. Layout: LLaVA-1.5 (https://arxiv.org/abs/2310.03744), CLIP tower and Llama.
    """
    tokenizer = train_tokenizer(
        texts,
        special_tokens=["<pad>", "<s>", "</s>", "<image>"],
        vocab_size=320,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        extra_special_tokens={"image_token": "<image>"},
    )
    size = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    processor = transformers.LlavaProcessor(
        transformers.CLIPImageProcessorPil(size={"shortest_edge": IMAGE_SIZE}, crop_size=size),
        tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )
    # Heads of 32 numbers: vLLM takes no fewer.
    shape = {"hidden_size": 96, "intermediate_size": 192, "num_attention_heads": 3}
    config = transformers.LlavaConfig(
        text_config=transformers.LlamaConfig(
            **shape,
            num_hidden_layers=2,
            vocab_size=len(tokenizer),
            max_position_embeddings=256,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        ),
        vision_config=transformers.CLIPVisionConfig(
            **shape, num_hidden_layers=3, image_size=IMAGE_SIZE, patch_size=PATCH
        ),
        image_token_index=tokenizer.image_token_id,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )
    torch.manual_seed(seed)
    AutoModelForImageTextToText.from_config(config).save_pretrained(folder)
    processor.save_pretrained(folder)
