"""Tiny random models of real architectures that are not plain causal decoders, and how each takes packed rows."""

import functools

import pytest
import tiny_models
import torch
import transformers
from sample_batches import try_rows
from tiny_models import CORPUS
from transformers import AutoModelForImageTextToText

from tuning.data.chat_template import ChatFormat
from tuning.data.encode import Encoder
from tuning.demo.tokenizer import train_tokenizer
from tuning.model.attention import choose_attention, set_decoder_attention
from tuning.model.loss import patch_supervised_loss
from tuning.model.packed_attention import PACKED, PACKED_MASKED
from tuning.model.padding_free import Packing

TEXT = tiny_models._TEXT
VISION = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
TEMPLATE = """{{ bos_token }}{% for m in messages %}<|{{ m['role'] }}|>{% for p in m['content'] %}\
{% if p['type'] == 'image' %}IMAGE{% else %}{{ p['text'] }}{% endif %}{% endfor %}<|end|>{% endfor %}\
{% if add_generation_prompt %}<|assistant|>{% endif %}"""


def make_tokenizer(*extra: str, **names: str):
    tokens = ["<unk>", "<bos>", "<|end|>", "<pad>", "<|user|>", "<|assistant|>", "<|system|>", *extra]
    main = dict(unk_token="<unk>", bos_token="<bos>", eos_token="<|end|>", pad_token="<pad>")
    return train_tokenizer(CORPUS, special_tokens=tokens, **main, extra_special_tokens=names)


def gemma3():
    """Image tokens see each other both ways: https://arxiv.org/abs/2503.19786."""
    names = dict(image_token="<image_soft_token>", boi_token="<start_of_image>", eoi_token="<end_of_image>")
    tokenizer = make_tokenizer(*names.values(), **names)
    size = {"height": 32, "width": 32}
    processor = transformers.Gemma3Processor(
        tiny_models._image_processor("Gemma3ImageProcessor", size=size, do_pan_and_scan=False),
        tokenizer,
        image_seq_length=4,
        chat_template=TEMPLATE.replace("IMAGE", "<start_of_image>"),
    )
    layers = ["sliding_attention", "full_attention"]
    text = transformers.Gemma3TextConfig(
        **TEXT, **tiny_models._ids(tokenizer), head_dim=8, sliding_window=64, layer_types=layers
    )
    vision = transformers.SiglipVisionConfig(**VISION, image_size=32, patch_size=8, vision_use_head=False)
    ids = [tokenizer.convert_tokens_to_ids(token) for token in names.values()]
    config = transformers.Gemma3Config(
        text_config=text.to_dict(),
        vision_config=vision.to_dict(),
        mm_tokens_per_image=4,
        image_token_id=ids[0],
        boi_token_index=ids[1],
        eoi_token_index=ids[2],
    )
    return config, processor


def paligemma():
    """Tokens of the whole prompt see each other both ways, and every row must have an image."""
    tokenizer = make_tokenizer("<image>", image_token="<image>")
    image_processor = tiny_models._image_processor("SiglipImageProcessor", size={"height": 32, "width": 32})
    image_processor.image_seq_length = 16
    template = TEMPLATE.replace("IMAGE", "<image>").replace("{{ bos_token }}", "")
    processor = transformers.PaliGemmaProcessor(image_processor, tokenizer, chat_template=template)
    vision = dict(**VISION, image_size=32, patch_size=8, vision_use_head=False, projection_dim=32)
    config = transformers.PaliGemmaConfig(
        text_config=transformers.GemmaConfig(**TEXT, **tiny_models._ids(tokenizer), head_dim=8).to_dict(),
        vision_config=transformers.SiglipVisionConfig(**vision).to_dict(),
        projection_dim=32,
        hidden_size=32,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
    )
    return config, processor


def qwen2_5_vl():
    """Positions in three dimensions: https://arxiv.org/abs/2409.12191."""
    names = dict(image_token="<|image_pad|>", video_token="<|video_pad|>")
    names |= dict(vision_bos_token="<|vision_start|>", vision_eos_token="<|vision_end|>")
    tokenizer = make_tokenizer(*names.values(), **names)
    kind = type("Qwen2_5_VLProcessor", (transformers.Qwen2_5_VLProcessor,), {})
    kind.check_argument_for_proper_class = lambda *_: None  # a video processor needs torchvision
    sizes = dict(patch_size=4, merge_size=2, temporal_patch_size=2, min_pixels=64, max_pixels=4096)
    processor = kind(
        image_processor=tiny_models._image_processor("Qwen2VLImageProcessor", **sizes),
        tokenizer=tokenizer,
        video_processor=None,
        chat_template=TEMPLATE.replace("IMAGE", "<|vision_start|><|image_pad|><|vision_end|>"),
    )
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
    vision = dict(depth=2, hidden_size=32, out_hidden_size=32, intermediate_size=64, num_heads=4, patch_size=4)
    vision |= dict(spatial_merge_size=2, temporal_patch_size=2, window_size=16, fullatt_block_indexes=[1])
    ids = [tokenizer.convert_tokens_to_ids(token) for token in names.values()]
    config = transformers.Qwen2_5_VLConfig(
        text_config=dict(**TEXT, **tiny_models._ids(tokenizer), rope_parameters=rope),
        vision_config=vision,
        image_token_id=ids[0],
        video_token_id=ids[1],
        vision_start_token_id=ids[2],
        vision_end_token_id=ids[3],
    )
    return config, processor


def in_llava(kind: str, **settings):
    """LLaVA-1.5's layout around another text model."""
    base, processor = tiny_models._build_llava15()
    text = {name: value for name, value in TEXT.items() if kind != "Lfm2" or name != "attention_dropout"}
    known = dict(**text, **tiny_models._ids(processor.tokenizer), **settings)
    config_class = getattr(transformers, f"{kind}Config")
    image = dict(image_token_index=processor.tokenizer.image_token_id)
    layers = dict(vision_feature_layer=-2, vision_feature_select_strategy="default")
    text_config = config_class(**known)
    return transformers.LlavaConfig(
        text_config=text_config, vision_config=base.vision_config, **image, **layers
    ), processor


CONV = dict(layer_types=["conv", "full_attention"], block_ff_dim=64, conv_L_cache=3, block_auto_adjust_ff_dim=False)
CHUNKED = dict(
    **dict(head_dim=8, attention_chunk_size=64, num_local_experts=2, num_experts_per_tok=1),
    **dict(interleave_moe_layer_step=2, intermediate_size_mlp=64, layer_types=["chunked_attention", "full_attention"]),
)
ARCHITECTURES = {
    "Gemma 3": (gemma3, Packing(PACKED_MASKED, masked=True)),
    "PaliGemma": (paligemma, Packing(PACKED_MASKED, first_position=1)),
    "Qwen2.5-VL": (qwen2_5_vl, Packing(PACKED)),
    "LFM2's convolutions": (functools.partial(in_llava, "Lfm2", **CONV), Packing(PACKED, ("layers.0",))),
    "Llama 4's chunks": (functools.partial(in_llava, "Llama4Text", **CHUNKED), Packing(PACKED_MASKED)),
    "Qwen3's text": (functools.partial(in_llava, "Qwen3", head_dim=8), Packing(PACKED)),
    "Mistral's with a window": (functools.partial(in_llava, "Mistral", head_dim=8, sliding_window=9), Packing(PACKED)),
}


def try_model(config, processor, dtype: torch.dtype) -> Packing:
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config, attn_implementation="sdpa").to(dtype)
    for parameter in model.parameters():  # experts of Llama 4 are made of unwritten memory
        torch.nn.init.normal_(parameter, std=0.1) if not parameter.isfinite().all() else None
    settings = dict(use_flash_attn=True, attn_implementation=None, dtype=dtype, device_type="cpu")
    attention = choose_attention(type(model), **settings)
    patch_supervised_loss(model)

    def forward(**batch):
        return model(**{k: v.to(dtype) if "pixel" in k else v for k, v in batch.items()})

    encoder = Encoder(processor, ChatFormat(processor), 4096)
    return try_rows(model, forward, encoder, attention, half=dtype == torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_each_is_packed_in_its_own_way(name, dtype):
    build, expected = ARCHITECTURES[name]
    assert try_model(*build(), dtype) == expected


def test_windows_and_softcapping_are_the_same_packed_and_alone():
    """In rows longer than the window, unlike those of the trial. Gemma 2: https://arxiv.org/abs/2408.00118."""
    config, _ = in_llava("Gemma2", head_dim=8, sliding_window=16)
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config, attn_implementation="eager").double().eval()
    ids = torch.randint(8, 60, (1, 200))
    bounds = torch.tensor([0, 90, 200], dtype=torch.int32)
    alone = torch.cat([model(input_ids=ids[:, :90]).logits, model(input_ids=ids[:, 90:]).logits], dim=1)
    set_decoder_attention(model, PACKED)
    positions = torch.cat([torch.arange(90), torch.arange(110)])[None]
    packed = model(input_ids=ids, position_ids=positions, cu_seq_lens_q=bounds, use_cache=False).logits
    assert (packed - alone).norm() / alone.norm() < 1e-5  # eager attention computes its softmax in float32
