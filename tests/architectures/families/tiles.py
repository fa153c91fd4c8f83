"""InternVL, Ovis, GOT, Llama: pictures in tiles."""

import transformers as T
from architectures.pieces import small, tokenizer
from architectures.registry import arch, ids, square, sub
from architectures.styles import chatml, llama3
from transformers.models.auto.configuration_auto import CONFIG_MAPPING


@arch("internvl", "qianfan_ocr")
def internvl(name):
    kind = CONFIG_MAPPING[name]
    named = dict(
        start_image_token="<img>", end_image_token="</img>", context_image_token="<IMG_CONTEXT>", video_token="<video>"
    )
    style = chatml("<IMG_CONTEXT>\n" if name == "internvl" else "<image>\n")
    tok = tokenizer(style, ("<image>",), **named)
    image = T.GotOcr2ImageProcessor(size=square(32), crop_to_patches=True, max_patches=4)
    if name == "internvl":
        proc = T.InternVLProcessor(
            image, tok, T.InternVLVideoProcessor(size=square(32)), image_seq_length=4, chat_template=style.jinja()
        )
    else:
        proc = T.QianfanOCRProcessor(image, tok, image_seq_length=4, chat_template=style.jinja())
    vision = small(sub(kind, "vision_config"), image_size=[32, 32], patch_size=[8, 8])
    text = small(T.Qwen2Config if name == "internvl" else T.Qwen3Config, tok)
    return (
        kind(
            text_config=text.to_dict(),
            vision_config=vision.to_dict(),
            image_token_id=ids(tok, "<IMG_CONTEXT>")[0],
            image_seq_length=4,
        ),
        proc,
        style,
    )


@arch("ovis2")
def ovis2(name):
    style = chatml("<image>\n")
    indicators = tuple(f"<IMG_{i}>" for i in ("START", "GRID", "COL", "ROW", "END"))
    tok = tokenizer(style, ("<image>", *indicators, "<IMG_ATOM>"))
    proc = T.Ovis2Processor(
        T.Ovis2ImageProcessor(size=square(32), crop_to_patches=True, max_patches=4),
        tok,
        image_seq_length=4,
        chat_template=style.jinja(),
    )
    vision = small(
        T.models.ovis2.configuration_ovis2.Ovis2VisionConfig,
        image_size=32,
        patch_size=8,
        vocab_size=64,
        hidden_stride=2,
        num_visual_indicator_tokens=5,
    )
    return (
        T.Ovis2Config(
            text_config=small(T.Qwen2Config, tok).to_dict(),
            vision_config=vision.to_dict(),
            image_token_id=ids(tok, "<IMG_ATOM>")[0],
            visual_indicator_token_ids=ids(tok, *indicators),
            vocab_size=len(tok),
            hidden_size=64,
        ),
        proc,
        style,
    )


@arch("got_ocr2", "pp_chart2table")
def got_ocr2(name):
    kind = CONFIG_MAPPING[name]
    pads = "<imgpad>" * (1 if name == "got_ocr2" else 256)  # PP-Chart2Table's published template writes all of them
    style = chatml(f"<img>{pads}</img>\n")
    tok = tokenizer(style, ("<img>", "</img>", "<imgpad>"))
    if name == "got_ocr2":
        proc = T.GotOcr2Processor(T.GotOcr2ImageProcessor(size=square(256)), tok, chat_template=style.jinja())
    else:
        proc = T.PPChart2TableProcessor(
            T.PPChart2TableImageProcessor(size=square(256)), tok, chat_template=style.jinja()
        )
    vision = small(
        sub(kind, "vision_config"),
        image_size=256,
        patch_size=4,
        global_attn_indexes=[],
        window_size=4,
        output_channels=16,
    )
    return (
        kind(
            text_config=small(T.Qwen2Config, tok).to_dict(),
            vision_config=vision.to_dict(),
            image_token_index=ids(tok, "<imgpad>")[0],
            image_seq_length=256,
        ),
        proc,
        style,
        dict(needs_image=True),
    )


@arch("llama4")
def llama4(name):
    style = llama3("<|image|>", ("<|header_start|>", "<|header_end|>", "<|eot|>"))
    special = (
        "<|image|>",
        "<|patch|>",
        "<|image_start|>",
        "<|image_end|>",
        "<|tile_x_separator|>",
        "<|tile_y_separator|>",
    )
    tok = tokenizer(style, special)
    proc = T.Llama4Processor(
        T.Llama4ImageProcessor(size=square(32), max_patches=4),
        tok,
        patch_size=8,
        pixel_shuffle_ratio=0.5,
        chat_template=style.jinja(),
    )
    text = small(
        T.Llama4TextConfig,
        tok,
        layer_types=["chunked_attention", "full_attention"],
        attention_chunk_size=32,
        num_experts_per_tok=1,
        intermediate_size_mlp=64,
        no_rope_layers=[1, 0],
        moe_layers=[1],
    )
    vision = small(
        T.Llama4VisionConfig,
        image_size=32,
        patch_size=8,
        vision_output_dim=64,
        projector_input_dim=64,
        projector_output_dim=64,
        intermediate_size=256,
    )
    patch, start, end = ids(tok, "<|patch|>", "<|image_start|>", "<|image_end|>")
    return (
        T.Llama4Config(
            text_config=text.to_dict(),
            vision_config=vision.to_dict(),
            image_token_index=patch,
            boi_token_index=start,
            eoi_token_index=end,
        ),
        proc,
        style,
    )


@arch("mllama")
def mllama(name):
    style = llama3("<|image|>")
    tok = tokenizer(style)
    size = len(tok)
    tok.add_special_tokens({"additional_special_tokens": ["<|image|>"]})
    proc = T.MllamaProcessor(
        T.MllamaImageProcessor(size=square(32), max_image_tiles=4), tok, chat_template=style.jinja()
    )
    text = small(
        sub(T.MllamaConfig, "text_config"), tok, vocab_size=size, num_hidden_layers=3, cross_attention_layers=[1]
    )
    vision = small(
        sub(T.MllamaConfig, "vision_config"),
        num_global_layers=1,
        attention_heads=4,
        image_size=32,
        patch_size=8,
        vision_output_dim=64 * 3,
        intermediate_layers_indices=[0, 1],
    )
    return (
        T.MllamaConfig(
            text_config=text.to_dict(), vision_config=vision.to_dict(), image_token_index=ids(tok, "<|image|>")[0]
        ),
        proc,
        style,
    )


@arch("step3p7")
def step3p7(name):
    style = chatml("<im_patch>")
    tok = tokenizer(style, ("<im_patch>", "<im_start>", "<im_end>", "<patch_start>", "<patch_end>", "<patch_newline>"))
    image = T.Step3p7ImageProcessor(size=square(32), patch_size=16)
    image.vision_patch_size, image.downsampler_stride, image.max_image_size = 4, 4, 128
    proc = T.Step3p7Processor(image, tok, chat_template=style.jinja())
    text = small(
        T.Step3p7TextConfig,
        tok,
        layer_types=["full_attention", "sliding_attention"],
        mlp_layer_types=["dense", "sparse"],
        share_expert_dim=32,
        num_sliding_attention_heads=4,
        query_pre_attn_scalar=16,
        rope_parameters={
            "full_attention": {"rope_type": "default", "rope_theta": 10000.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
        },
        sliding_window=24,
    )
    vision = small(T.Step3p7VisionConfig, image_size=32, patch_size=4, mlp_ratio=2.0, max_position_embeddings=64)
    return (
        T.Step3p7Config(
            text_config=text.to_dict(), vision_config=vision.to_dict(), image_token_id=ids(tok, "<im_patch>")[0]
        ),
        proc,
        style,
    )
