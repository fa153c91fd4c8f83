"""Seeded two-layer models of the documented layouts, with processors and tokenizers made in-process.

Nothing is downloaded. The chat templates were written for these tests after the published ones and keep their
behaviour: which content shapes they take, where blanks and end tokens stand, what they drop.
"""

import functools
import os
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

from tuning.demo.tokenizer import train_tokenizer

IMAGE_SIZE = 32
PATCH = 8
CORPUS = [
    "What is in the picture? A red square on a white ground, and a blue circle below it.",
    "How many are there? There are three of them: one, two, three.",
    "You are a helpful assistant who answers in few words. USER: ASSISTANT: system user assistant",
    "Yes. No. It is a cat. Describe this image in detail. Thank you! The chart shows sales of 42.5 % in 2024.",
]

GRANITE_TEMPLATE = """\
{%- for message in messages if message['role'] == 'system' %}{% else %}<|system|>
A chat between a curious user and an artificial intelligence assistant.
{% endfor %}
{%- for message in messages %}
{%- if message['role'] == 'system' %}{{ '<|system|>\\n' + message['content'][0]['text'] + '\\n' }}
{%- elif message['role'] == 'user' %}<|user|>
 {% for part in message['content'] if part['type'] == 'image' %}{{ '<image>\\n' }}{% endfor %}
{%- for part in message['content'] if part['type'] == 'text' %}{{ part['text'] + '\\n' }}{% endfor %}
{%- elif message['role'] == 'assistant' %}{{ '<|assistant|>\\n' + message['content'][0]['text'] + '<|end_of_text|>' }}
{%- endif %}
{%- if loop.last and add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}
{%- endfor %}"""

# Published without an end-of-turn token, and with generation markers.
VICUNA_TEMPLATE = """\
{% for message in messages %}
{%- if message['role'] == 'system' %}{{ message['content'][0]['text'] + ' ' }}
{%- else %}{{ message['role'].upper() + ': ' }}{% endif %}
{%- for part in message['content'] if part['type'] == 'image' %}{{ '<image>\\n' }}{% endfor %}
{%- if message['role'] == 'assistant' %}
{%- for part in message['content'] if part['type'] == 'text' %}
{%- generation %}{{ part['text'] + ' ' }}{% endgeneration %}{% endfor %}
{%- elif message['role'] == 'user' %}
{%- for part in message['content'] if part['type'] == 'text' %}{{ part['text'] + ' ' }}{% endfor %}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"""

MISTRAL_TEMPLATE = """\
{% for message in messages %}
{%- if message['role'] == 'system' %}{{ '<<SYS>>\\n' + message['content'][0]['text'] + '\\n<</SYS>>\\n\\n' }}
{%- elif message['role'] == 'user' %}{{ '[INST] ' }}
{%- for part in message['content'] if part['type'] == 'image' %}{{ '<image>\\n' }}{% endfor %}
{%- for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}{{ ' [/INST]' }}
{%- elif message['role'] == 'assistant' %}{{ ' ' + message['content'][0]['text'] + '</s> ' }}
{%- else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}
{%- endfor %}"""

# Takes a string system message only, drops it when the conversation has images, and else writes today's date.
LLAMA32_TEMPLATE = """\
{{- bos_token }}
{%- if not date_string is defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}
{%- if messages[0]['role'] == 'system' %}
{%- set system_message = messages[0]['content'] | trim %}{% set messages = messages[1:] %}{% set has_system = true %}
{%- else %}{% set system_message = '' %}{% set has_system = false %}{% endif %}
{%- set seen = namespace(images=false) %}
{%- for message in messages if message['content'] is not string %}
{%- for part in message['content'] if part['type'] == 'image' %}{% set seen.images = true %}{% endfor %}
{%- endfor %}
{%- if seen.images and has_system %}
{{- raise_exception('Prompting with images is incompatible with system messages.') }}{% endif %}
{%- if not seen.images %}{{- '<|start_header_id|>system<|end_header_id|>\\n\\nToday Date: ' + date_string + '\\n\\n' }}
{{- system_message + '<|eot_id|>' }}{% endif %}
{%- for message in messages %}
{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
{%- if message['content'] is string %}{{- message['content'] }}
{%- else %}
{%- for part in message['content'] %}
{%- if part['type'] == 'image' %}{{- '<|image|>' }}{% elif part['type'] == 'text' %}{{- part['text'] }}{% endif %}
{%- endfor %}{% endif %}
{{- '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"""

LAYOUTS = ("granite_vision", "llava15", "llava_next_vicuna", "llava16_mistral", "mllama")
PINPOINTS = [[32, 64], [64, 32], [64, 64]]

_TEXT = dict(
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=2048,
    attention_dropout=0.0,
    initializer_range=0.1,
)
_VISION = dict(
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=4,
    num_attention_heads=4,
    image_size=IMAGE_SIZE,
    patch_size=PATCH,
    initializer_range=0.1,
)


def _image_processor(name: str, **kwargs):
    return getattr(transformers, name)(**kwargs)


def _llama2_tokenizer():
    return train_tokenizer(
        CORPUS,
        special_tokens=["<unk>", "<s>", "</s>", "<pad>", "<image>"],
        sentencepiece=True,
        prepend_bos=True,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        extra_special_tokens={"image_token": "<image>"},
    )


def _ids(tokenizer) -> dict:
    return dict(
        vocab_size=len(tokenizer),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def _build_granite_vision():
    end = "<|end_of_text|>"
    tokenizer = train_tokenizer(
        CORPUS,
        special_tokens=[end, "<|system|>", "<|user|>", "<|assistant|>", "<image>"],
        bos_token=end,
        eos_token=end,
        pad_token=end,
        extra_special_tokens={"image_token": "<image>"},
    )
    processor = transformers.LlavaNextProcessor(
        _image_processor(
            "LlavaNextImageProcessor",
            size={"height": IMAGE_SIZE, "width": IMAGE_SIZE},
            crop_size={"height": IMAGE_SIZE, "width": IMAGE_SIZE},
            image_grid_pinpoints=PINPOINTS,
        ),
        tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="full",
        chat_template=GRANITE_TEMPLATE,
    )
    text = transformers.GraniteConfig(
        **_TEXT,
        **_ids(tokenizer),
        tie_word_embeddings=True,
        logits_scaling=8.0,
        embedding_multiplier=12.0,
        residual_multiplier=0.22,
        attention_multiplier=0.25,
    )
    config = transformers.LlavaNextConfig(
        text_config=text,
        vision_config=transformers.SiglipVisionConfig(**_VISION),
        image_token_index=tokenizer.image_token_id,
        vision_feature_layer=[-4, -3, -1],
        vision_feature_select_strategy="full",
        image_grid_pinpoints=PINPOINTS,
        tie_word_embeddings=True,
    )
    return config, processor


def _clip_image_processor(name: str, **kwargs):
    size = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    return _image_processor(name, size={"shortest_edge": IMAGE_SIZE}, crop_size=size, **kwargs)


def _build_llava15():
    tokenizer = _llama2_tokenizer()
    processor = transformers.LlavaProcessor(
        _clip_image_processor("CLIPImageProcessor"),
        tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=VICUNA_TEMPLATE,
    )
    config = transformers.LlavaConfig(
        text_config=transformers.LlamaConfig(**_TEXT, **_ids(tokenizer)),
        vision_config=transformers.CLIPVisionConfig(**_VISION),
        image_token_index=tokenizer.image_token_id,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )
    return config, processor


def _build_llava_next(text_config_class, chat_template: str):
    tokenizer = _llama2_tokenizer()
    processor = transformers.LlavaNextProcessor(
        _clip_image_processor("LlavaNextImageProcessor", image_grid_pinpoints=PINPOINTS),
        tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=chat_template,
    )
    config = transformers.LlavaNextConfig(
        text_config=text_config_class(**_TEXT, **_ids(tokenizer)),
        vision_config=transformers.CLIPVisionConfig(**_VISION),
        image_token_index=tokenizer.image_token_id,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        image_grid_pinpoints=PINPOINTS,
    )
    return config, processor


def _build_mllama():
    tokenizer = train_tokenizer(
        CORPUS,
        special_tokens=[
            "<|begin_of_text|>",
            "<|end_of_text|>",
            "<|start_header_id|>",
            "<|end_header_id|>",
            "<|eot_id|>",
            "<|finetune_right_pad_id|>",
            "<|python_tag|>",
        ],
        prepend_bos=True,
        bos_token="<|begin_of_text|>",
        eos_token="<|eot_id|>",
        pad_token="<|finetune_right_pad_id|>",
        model_max_length=2048,
    )
    vocab_size = len(tokenizer)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|image|>"]})  # outside the output vocabulary
    processor = transformers.MllamaProcessor(
        _image_processor("MllamaImageProcessor", size={"height": IMAGE_SIZE, "width": IMAGE_SIZE}, max_image_tiles=4),
        tokenizer,
        chat_template=LLAMA32_TEMPLATE,
    )
    text = {**_TEXT, **_ids(tokenizer), "vocab_size": vocab_size, "num_hidden_layers": 3, "cross_attention_layers": [1]}
    text.pop("attention_dropout")
    config = transformers.MllamaConfig(
        text_config=transformers.models.mllama.configuration_mllama.MllamaTextConfig(**text),
        vision_config=transformers.models.mllama.configuration_mllama.MllamaVisionConfig(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_global_layers=1,
            attention_heads=4,
            image_size=IMAGE_SIZE,
            patch_size=PATCH,
            vision_output_dim=32 * 3,
            intermediate_layers_indices=[0, 1],
            initializer_range=0.1,
        ),
        image_token_index=tokenizer.convert_tokens_to_ids("<|image|>"),
    )
    return config, processor


_BUILDERS = {
    "granite_vision": _build_granite_vision,
    "llava15": _build_llava15,
    "llava_next_vicuna": functools.partial(_build_llava_next, transformers.LlamaConfig, VICUNA_TEMPLATE),
    "llava16_mistral": functools.partial(_build_llava_next, transformers.MistralConfig, MISTRAL_TEMPLATE),
    "mllama": _build_mllama,
}


def build_processor(layout: str):
    """The processor of `layout`, made afresh."""
    return _BUILDERS[layout]()[1]


def build_model(layout: str, *, seed: int = 0, dtype: torch.dtype = torch.float32):
    """A random model of `layout`; equal seeds give equal weights."""
    config, _ = _BUILDERS[layout]()
    torch.manual_seed(seed)
    model = AutoModelForImageTextToText.from_config(config)
    for name, parameter in model.named_parameters():
        if name.endswith(("cross_attn_attn_gate", "cross_attn_mlp_gate", "gate_attn", "gate_ffn")):
            # Mllama starts with closed gates, tanh(0): its vision part would have no gradient at all.
            torch.nn.init.constant_(parameter, 0.5)
    return model.to(dtype)


def save_layout(layout: str, folder: str | os.PathLike, *, dtype: torch.dtype = torch.float32) -> Path:
    """Write model and processor of `layout` to `folder` as a published checkpoint would be. Returns `folder`.

    Its towers have a level, `vision_model`, that transformers 5 does not write.
    """
    folder = Path(folder)
    build_model(layout, dtype=dtype).save_pretrained(folder)
    weights = load_file(folder / "model.safetensors")
    published = {key.replace("vision_tower.", "vision_tower.vision_model."): weight for key, weight in weights.items()}
    save_file(published, folder / "model.safetensors", metadata={"format": "pt"})
    build_processor(layout).save_pretrained(folder)
    return folder
