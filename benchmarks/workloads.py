"""Make the models and rows that the benchmarks measure, from seeds and without a download.

The chat templates here have `{% generation %}` marks, which TRL and the stock pipeline need to find the answers. Ours
gets the same templates without them, as they are published.
"""

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from families import BUILDERS, SCALES, WORDS, make_tokenizer

MARKS = re.compile(r"\{% (?:end)?generation %\}")
GRANITE_TEMPLATE = """\
{%- for message in messages if message['role'] == 'system' %}{% else %}<|system|>
A chat between a curious user and an artificial intelligence assistant.
{% endfor %}
{%- for message in messages %}
{%- if message['role'] == 'user' %}<|user|>
 {% for part in message['content'] if part['type'] == 'image' %}{{ '<image>\\n' }}{% endfor %}
{%- for part in message['content'] if part['type'] == 'text' %}{{ part['text'] + '\\n' }}{% endfor %}
{%- elif message['role'] == 'assistant' %}{{ '<|assistant|>\\n' }}{% generation %}\
{{ message['content'][0]['text'] + '<|end_of_text|>' }}{% endgeneration %}
{%- endif %}
{%- if loop.last and add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}
{%- endfor %}"""
PLAIN_TEMPLATE = """\
{{- bos_token }}
{%- for message in messages %}{{ message['role'].upper() + ':\\n' }}
{%- for part in message['content'] if part['type'] == 'image' %}{{ IMAGE }}{% endfor %}
{%- if message['role'] == 'assistant' %}{% generation %}\
{{ message['content'][0]['text'] + eos_token }}{% endgeneration %}
{%- else %}
{%- for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}{{ '\\n' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ 'ASSISTANT:\\n' }}{% endif %}"""
TEMPLATES = {
    "granite_vision": GRANITE_TEMPLATE,
    **{
        layout: PLAIN_TEMPLATE.replace("IMAGE", "'<image>\\n'")
        for layout in ("llava15", "llava_next_vicuna", "llava16_mistral")
    },
    "mllama": PLAIN_TEMPLATE.replace("IMAGE", "'<|image|>'"),
}
LAYOUTS = (*TEMPLATES, *BUILDERS)
LARGE_PICTURES = [(700, 350), (1100, 384), (400, 500), (700, 700)]  # with Granite's tiles 2.2 to 3.7 thousand tokens
# By layout, pictures of documents, and None for rows without one. They are chosen so that the logits of the stock
# forward, which holds four or five copies for the whole padded batch, take at most 3 GB each.
MIXED_PICTURES = {
    "qwen2_5_vl": [(700, 350), (1100, 384), (1000, 700), None, None],
    "qwen3_vl": [(700, 350), (1100, 384), (1000, 1000), None, None],
    "qwen3_5": [(700, 350), (1000, 700), None, None],
    "gemma3": [(700, 350), (1100, 384), (1000, 700), (1400, 1000), None, None],
    "internvl": [(700, 350), (1100, 384), None, None],
    "smolvlm2": [(700, 350), (1100, 384), (1000, 700), (1400, 1000), None, None],
}
SMALL_PICTURES = [(40, 40), (90, 30), (30, 80), (60, 60)]
SMALL_MIXED = [(40, 40), (90, 30), None, None]
# Granite Vision 3.2: every grid of at most ten tiles of 384 pixels.
GRANITE_PINPOINTS = [[384 * high, 384 * wide] for high in range(1, 11) for wide in range(1, 11) if high * wide <= 10]


@dataclass(frozen=True)
class Shape:
    """The sizes of a Granite Vision or LLaVA model; `text` and `vision` are arguments of the two configurations."""

    text: dict = field(default_factory=dict)
    vision: dict = field(default_factory=dict)
    vision_layers: list | int = -2
    pinpoints: list | None = None


def shape(hidden: int, layers: int, heads: int, inner: int, **more) -> dict:
    return dict(
        hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads, intermediate_size=inner, **more
    )


TINY_VISION = dict(image_size=32, patch_size=8)
SHAPES = {
    # 20 million parameters with the published layout, vocabulary, tiles and logits_scaling.
    ("granite_vision", "20m"): Shape(
        shape(256, 4, 4, 1024, num_key_value_heads=2, vocab_size=49156, attention_multiplier=0.015625),
        shape(256, 4, 4, 512, image_size=384, patch_size=14),
        [-4, -3, -2, -1],
        GRANITE_PINPOINTS,
    ),
    # https://huggingface.co/ibm-granite/granite-vision-3.2-2b (config.json), SigLIP so400m.
    ("granite_vision", "2b"): Shape(
        shape(2048, 40, 32, 8192, num_key_value_heads=8, vocab_size=49156, attention_multiplier=0.015625),
        shape(1152, 27, 16, 4304, image_size=384, patch_size=14),
        [-24, -20, -12, -1],
        GRANITE_PINPOINTS,
    ),
    # The published image settings with a very small model, to measure only how images are read.
    ("granite_vision", "pictures"): Shape(
        shape(16, 1, 1, 32, num_key_value_heads=1, vocab_size=1024, attention_multiplier=0.25),
        shape(16, 4, 1, 32, image_size=384, patch_size=14),
        [-4, -3, -2, -1],
        GRANITE_PINPOINTS,
    ),
    ("llava15", "pictures"): Shape(
        shape(16, 1, 1, 32, num_key_value_heads=1, vocab_size=1024),
        shape(16, 2, 1, 32, image_size=336, patch_size=14),
    ),
    ("granite_vision", "tiny"): Shape(
        shape(64, 2, 4, 128, num_key_value_heads=2, vocab_size=1024, attention_multiplier=0.25),
        shape(64, 4, 4, 128, **TINY_VISION),
        [-4, -3, -2, -1],
        [[32, 64], [64, 32], [64, 64]],
    ),
    # https://huggingface.co/llava-hf/llava-1.5-7b-hf (config.json), CLIP ViT-L/14 at 336 pixels.
    ("llava15", "7b"): Shape(
        shape(4096, 32, 32, 11008, num_key_value_heads=32, vocab_size=32064),
        shape(1024, 24, 16, 4096, image_size=336, patch_size=14, projection_dim=768),
    ),
    ("llava15", "20m"): Shape(
        shape(256, 4, 4, 1024, num_key_value_heads=4, vocab_size=32064),
        shape(256, 4, 4, 512, image_size=336, patch_size=14),
    ),
    ("llava15", "tiny"): Shape(
        shape(64, 2, 4, 128, num_key_value_heads=2, vocab_size=1024), shape(64, 4, 4, 128, **TINY_VISION)
    ),
}


def is_large(layout: str) -> bool:
    """Whether the layout has a size with the published vocabulary and image settings."""
    return layout in BUILDERS or (layout, "20m") in SHAPES


def make_config_and_processor(layout: str, size: str, vocab_size: int | None = None):
    """The configuration and the processor of `layout` in `size`; "tests" is the size of the test suite's models.

    `vocab_size` replaces that of the size; the tokenizer uses only its first few hundred ids.
    """
    if layout in BUILDERS:
        config, processor = BUILDERS[layout](SCALES[size])
    elif size == "tests":
        from tiny_models import _BUILDERS

        config, processor = _BUILDERS[layout]()
    elif layout == "granite_vision":
        config, processor = _granite_vision(SHAPES[layout, size])
    else:
        config, processor = _llava15(SHAPES[layout, size])
    processor.chat_template = TEMPLATES.get(layout, processor.chat_template)
    if vocab_size:
        config.get_text_config().vocab_size = vocab_size
    return config, processor


def _ids(tokenizer) -> dict:
    return {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}


def _granite_vision(shape: Shape):
    import transformers

    tokenizer = make_tokenizer(
        ["<|end_of_text|>", "<|system|>", "<|user|>", "<|assistant|>", "<image>"],
        end="<|end_of_text|>",
        image_token="<image>",
    )
    side = shape.vision["image_size"]
    size = {"height": side, "width": side}
    processor = transformers.LlavaNextProcessor(
        transformers.LlavaNextImageProcessorPil(
            size=size,
            crop_size=size,
            image_grid_pinpoints=shape.pinpoints,
            image_mean=[0.5] * 3,
            image_std=[0.5] * 3,
        ),
        tokenizer,
        patch_size=shape.vision["patch_size"],
        vision_feature_select_strategy="full",
    )
    text = transformers.GraniteConfig(
        **shape.text,
        **_ids(tokenizer),
        max_position_embeddings=131072,
        tie_word_embeddings=True,
        logits_scaling=8.0,
        embedding_multiplier=12.0,
        residual_multiplier=0.22,
        rope_parameters={"rope_type": "default", "rope_theta": 300000.0},
    )
    config = transformers.LlavaNextConfig(
        text_config=text,
        vision_config=transformers.SiglipVisionConfig(**shape.vision),
        image_token_index=tokenizer.image_token_id,
        vision_feature_layer=shape.vision_layers,
        vision_feature_select_strategy="full",
        image_grid_pinpoints=shape.pinpoints,
        tie_word_embeddings=True,
    )
    return config, processor


def _llava15(shape: Shape):
    import transformers

    tokenizer = make_tokenizer(["<s>", "</s>", "<image>"], end="</s>", image_token="<image>")
    side = shape.vision["image_size"]
    processor = transformers.LlavaProcessor(
        transformers.CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size={"height": side, "width": side}),
        tokenizer,
        patch_size=shape.vision["patch_size"],
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )
    config = transformers.LlavaConfig(
        text_config=transformers.LlamaConfig(**shape.text, **_ids(tokenizer), max_position_embeddings=4096),
        vision_config=transformers.CLIPVisionConfig(**shape.vision),
        image_token_index=tokenizer.image_token_id,
        vision_feature_layer=shape.vision_layers,
        vision_feature_select_strategy="default",
    )
    return config, processor


def save_model(
    folder: Path,
    layout: str,
    size: str,
    *,
    dtype: str = "float32",
    device: str = "cpu",
    vocab_size: int | None = None,
    logits_scaling: float | None = None,
) -> Path:
    """Write a random model and its processor like a published checkpoint, with a template without marks.

    `marked.jinja` in the same folder is the template with marks. Equal arguments give equal weights. `logits_scaling`
    replaces Granite's.
    """
    import torch
    from architectures.pieces import fill
    from transformers import AutoModelForImageTextToText

    config, processor = make_config_and_processor(layout, size, vocab_size)
    if logits_scaling is not None:
        config.text_config.logits_scaling = logits_scaling
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForImageTextToText.from_config(config, dtype=getattr(torch, dtype))
    if layout in BUILDERS:  # larger weights: with those of transformers, pictures and masks hardly change the loss
        fill(model)
    model.save_pretrained(folder)
    marked = processor.chat_template
    processor.chat_template = MARKS.sub("", marked)
    processor.save_pretrained(folder)
    (folder / "marked.jinja").write_text(marked)
    return folder


def write_benchmark_rows(path: Path, layout: str, size: str) -> Path:
    """Write the rows of a batch for `step.py`: four pictures, or pictures and two rows without one."""
    large = size == "20m"
    if layout not in MIXED_PICTURES:
        return write_rows(path, LARGE_PICTURES if large else SMALL_PICTURES, words=[12], answer_words=[7, 9, 6, 10])
    pictures = MIXED_PICTURES[layout] if large else SMALL_MIXED
    texts = (100, 500 if layout != "gemma3" else 250) if large else (12, 40)
    words = [*[12] * (len(pictures) - 2), *texts]
    return write_rows(path, pictures, words=words, answer_words=[7, 9, 6, 10])


def write_rows(
    path: Path,
    sizes: Iterable[tuple[int, int] | None],
    *,
    words: Sequence[int] = (12,),
    answer_words: Sequence[int] = (5,),
) -> Path:
    """Write a .jsonl with a question and an answer per row about an image of noise.

    `sizes` has (width, height) for each row, and None for a row without an image. The questions have `words` words and
    the answers `answer_words`, by row, repeated as needed. The images are JPEG files in the same folder.
    """
    random, lines = np.random.default_rng(0), []
    path.parent.mkdir(parents=True, exist_ok=True)
    for number, size in enumerate(sizes):
        images = [_draw(path.parent / f"{path.stem}_{number}.jpg", size, random)] if size else []
        question, answer = (
            " ".join(random.choice(WORDS, lengths[number % len(lengths)])) for lengths in (words, answer_words)
        )
        content = [*({"type": "image"} for _ in images), {"type": "text", "text": question}]
        messages = [
            {"role": "user", "content": content},
            {"role": "assistant", "content": [{"type": "text", "text": answer}]},
        ]
        lines.append(json.dumps({"messages": messages, "images": images}))
    path.write_text("\n".join(lines) + "\n")
    return path


def _draw(file: Path, size: tuple[int, int], random: np.random.Generator) -> str:
    """Save an image of noise, and return the name of its file."""
    from PIL import Image

    width, height = size
    noise = random.integers(0, 255, (max(1, height // 16), max(1, width // 16), 3), dtype=np.uint8)
    Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC).save(file)
    return file.name


def read_rows(path: Path):
    """The same rows as a `datasets.Dataset` with decoded images, as TRL documents them."""
    from datasets import Dataset, Features, Image, List, Value

    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for row in rows:
        row["images"] = [str(path.parent / name) for name in row["images"]]
    part = {"type": Value("string"), "text": Value("string")}
    features = Features({"messages": List({"role": Value("string"), "content": List(part)}), "images": List(Image())})
    return Dataset.from_list(rows, features=features)
