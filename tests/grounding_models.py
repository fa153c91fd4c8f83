"""Processors and tiny models of families that were trained on boxes, made in-process with their own special tokens."""

import transformers
from tiny_models import _TEXT, CORPUS, _ids, _image_processor

from tuning.demo.tokenizer import train_tokenizer

BOX_TOKENS = ["<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>", "<|box_end|>"]
LOCATIONS = [f"<loc{number:04}>" for number in range(1024)]
CHATML = """{% for m in messages %}<|im_start|>{{ m['role'] }}
{% for p in m['content'] %}{% if p['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}\
{{ p['text'] }}{% endif %}{% endfor %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
GEMMA = """{% for m in messages %}{% if m['role'] == 'user' %}{% for p in m['content'] %}{% if p['type'] == 'image' %}\
<image>{% endif %}{% endfor %}{% for p in m['content'] %}{% if p['type'] == 'text' %}{{ p['text'] }}{% endif %}\
{% endfor %}{{ '\\n' }}{% else %}{{ m['content'][0]['text'] }}<eos>{% endif %}{% endfor %}"""
QWEN = {"Qwen2VL": 14, "Qwen2_5_VL": 14, "Qwen3VL": 16}  # the patch size
FAMILIES = (*QWEN, "PaliGemma")


def build_processor(family: str):
    """The processor of a family, with the patch sizes and limits of its checkpoints."""
    return _build_paligemma() if family == "PaliGemma" else _build_qwen(family)


def build_config(family: str):
    """A model configuration of a family, for two layers."""
    tokenizer = build_processor(family).tokenizer
    if family == "PaliGemma":
        vision = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
        vision |= dict(image_size=224, patch_size=56, vision_use_head=False, projection_dim=32)
        return transformers.PaliGemmaConfig(
            text_config=transformers.GemmaConfig(**_TEXT, **_ids(tokenizer), head_dim=8).to_dict(),
            vision_config=transformers.SiglipVisionConfig(**vision).to_dict(),
            projection_dim=32,
            hidden_size=32,
            image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        )
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
    vision = dict(
        depth=2, hidden_size=32, intermediate_size=64, num_heads=4, patch_size=QWEN[family], spatial_merge_size=2
    )
    vision |= dict(temporal_patch_size=2, out_hidden_size=32, fullatt_block_indexes=[1], deepstack_visual_indexes=[0])
    vision |= dict(embed_dim=32, mlp_ratio=2) if family == "Qwen2VL" else {}
    return getattr(transformers, f"{family}Config")(
        text_config=dict(**_TEXT, **_ids(tokenizer), rope_parameters=rope),
        vision_config=vision,
        image_token_id=tokenizer.convert_tokens_to_ids("<|image_pad|>"),
        video_token_id=tokenizer.convert_tokens_to_ids("<|video_pad|>"),
        vision_start_token_id=tokenizer.convert_tokens_to_ids("<|vision_start|>"),
        vision_end_token_id=tokenizer.convert_tokens_to_ids("<|vision_end|>"),
    )


def _build_qwen(family: str):
    names = dict(image_token="<|image_pad|>", video_token="<|video_pad|>")
    names |= dict(vision_bos_token="<|vision_start|>", vision_eos_token="<|vision_end|>")
    tokenizer = train_tokenizer(
        CORPUS,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>", *BOX_TOKENS, *names.values()],
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        extra_special_tokens=names,
    )
    kind = type(f"{family}Processor", (getattr(transformers, f"{family}Processor"),), {})
    kind.check_argument_for_proper_class = lambda *_: None  # a video processor needs torchvision
    return kind(
        image_processor=_image_processor("Qwen2VLImageProcessor", patch_size=QWEN[family]),
        tokenizer=tokenizer,
        video_processor=None,
        chat_template=CHATML,
    )


def _build_paligemma():
    tokenizer = train_tokenizer(
        CORPUS,
        special_tokens=["<unk>", "<bos>", "<eos>", "<pad>", "<image>"],
        unk_token="<unk>",
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
        extra_special_tokens={"image_token": "<image>"},
    )
    tokenizer.add_tokens(LOCATIONS)  # not special, as in the published tokenizer
    image_processor = _image_processor("SiglipImageProcessor", size={"height": 224, "width": 224})
    image_processor.image_seq_length = 16
    return transformers.PaliGemmaProcessor(image_processor, tokenizer, chat_template=GEMMA)
