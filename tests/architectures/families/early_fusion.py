"""Chameleon, Emu, Aria, Fuyu, Molmo."""

import transformers as T
from architectures.pieces import small, tokenizer
from architectures.registry import arch, ids, square
from architectures.styles import Style, chatml


@arch("chameleon")
def chameleon(name):
    """Its processor ends a prompt itself, with the separator."""
    style = Style(
        "<s>",
        {"system": ("", "\n"), "user": ("", ""), "assistant": ("", "</s>")},
        "</s>",
        "<image>",
        specials=("</s>", "<reserved08706>"),
    )
    tok = tokenizer(
        style,
        ("<racm3:break>", "<eoss>", *(f"IMGIMG{chr(65 + i // 10)}{chr(65 + i % 10)}Z" for i in range(32))),
        image_token="<image>",
    )
    tok.sep_token = "<reserved08706>"
    proc = T.ChameleonProcessor(
        T.ChameleonImageProcessor(size={"shortest_edge": 32}, crop_size=square(32)),
        tok,
        image_seq_length=16,
        image_token="<image>",
    )
    proc.chat_template = style.jinja()
    vq = T.ChameleonVQVAEConfig(
        embed_dim=16,
        num_embeddings=32,
        latent_channels=16,
        resolution=32,
        base_channels=32,
        channel_multiplier=[1, 1, 2, 2],
        num_res_blocks=1,
    )
    vocab = tok.get_vocab()
    return (
        small(
            T.ChameleonConfig,
            tok,
            vq_config=vq.to_dict(),
            vocabulary_map=dict(vocab.items()),
            image_token_id=ids(tok, "<image>")[0],
        ),
        proc,
        style,
        dict(multi=False),
    )


@arch("emu3")
def emu3(name):

    style = Style(
        "<|extra_203|>",
        {"system": ("", " "), "user": ("USER: ", " "), "assistant": ("ASSISTANT: ", "<|extra_204|>")},
        "<|extra_204|>",
        "<image>",
        images_first=True,
        specials=("<|extra_204|>",),
    )
    named = dict(
        image_token="<image>",
        boi_token="<|image start|>",
        eoi_token="<|image end|>",
        image_wrapper_token="<|image token|>",
        eof_token="<|extra_201|>",
        eol_token="<|extra_200|>",
    )
    tok = tokenizer(style, tuple(f"<|visual token {i:06}|>" for i in range(32)), **named)
    image = T.Emu3ImageProcessor(min_pixels=32 * 32, max_pixels=64 * 64, spatial_factor=8)
    proc = T.Emu3Processor(image, tok, chat_template=style.jinja())
    vq = T.Emu3VQVAEConfig(
        codebook_size=32,
        embed_dim=4,
        latent_channels=4,
        base_channels=32,
        channel_multiplier=[1, 1, 1, 1],
        num_res_blocks=1,
        attn_resolutions=[3],
        hidden_size=32,
        num_attention_heads=1,
    )
    return (
        T.Emu3Config(
            text_config=small(T.Emu3TextConfig, tok).to_dict(),
            vq_config=vq.to_dict(),
            vocabulary_map=tok.get_vocab(),
            image_token_id=ids(tok, "<image>")[0],
        ),
        proc,
        style,
    )


@arch("aria")
def aria(name):
    style = chatml("<fim_prefix><|img|><fim_suffix>")
    tok = tokenizer(style, ("<fim_prefix>", "<fim_suffix>"), image_token="<|img|>")
    proc = T.AriaProcessor(
        T.AriaImageProcessor(max_image_size=980, min_image_size=32), tok, chat_template=style.jinja()
    )
    vision = small(T.Idefics3VisionConfig, image_size=980, patch_size=70)
    return (
        T.AriaConfig(
            text_config=small(T.AriaTextConfig, tok, moe_num_shared_experts=1).to_dict(),
            vision_config=vision.to_dict(),
            projector_patch_to_query_dict={196: 256, 49: 128},
            image_token_index=ids(tok, "<|img|>")[0],
        ),
        proc,
        style,
    )


@arch("fuyu")
def fuyu(name):

    style = Style(
        "",
        {"system": ("", "\n"), "user": ("", "\n<0x04>"), "assistant": ("", "|ENDOFTEXT|")},
        "|ENDOFTEXT|",
        "",
        images_first=True,
        specials=("|ENDOFTEXT|", "<0x04>"),
    )
    tok = tokenizer(style, ("|SPEAKER|", "|NEWLINE|", "<0x00>", "<0x01>", "<0x02>", "<0x03>"), bos="<s>")
    proc = T.FuyuProcessor(T.FuyuImageProcessor(size=square(64), patch_size=square(8)), tok)
    proc.chat_template = style.jinja()
    return (
        T.FuyuConfig(
            text_config=small(
                T.PersimmonConfig,
                tok,
                rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
                head_dim="drop",
            ).to_dict(),
            image_size=64,
            patch_size=8,
            image_token_id=ids(tok, "|SPEAKER|")[0],
        ),
        proc,
        style,
        dict(needs_image=False),
    )


@arch("molmo2")
def molmo2(name):
    style = chatml("<|image|>")
    special = (
        "<im_start>",
        "<im_end>",
        "<im_patch>",
        "<im_col>",
        "<low_res_im_start>",
        "<frame_start>",
        "<frame_end>",
        "<im_low>",
    )
    tok = tokenizer(style, special, image_token="<|image|>", video_token="<|video|>")
    proc = T.Molmo2Processor(
        T.Molmo2ImageProcessor(size=square(32), patch_size=8, max_crops=2, pooling_size=[2, 2], overlap_margins=[1, 1]),
        T.Molmo2VideoProcessor(size=square(32), patch_size=8),
        tok,
        chat_template=style.jinja(),
    )
    text = small(T.Molmo2TextConfig, tok, additional_vocab_size=8, rope_scaling_layers="drop")
    vision = small(T.Molmo2VisionConfig, image_size=[32, 32], patch_size=8, num_position_embeddings=16)
    adapter = small(T.Molmo2AdapterConfig, vision_feature_layer=[1, 0], text_hidden_size=64)
    s, e, p, _c, low, fs, fe, _ = ids(tok, *special)
    return (
        T.Molmo2Config(
            text_config=text.to_dict(),
            vision_config=vision.to_dict(),
            adapter_config=adapter.to_dict(),
            image_start_token_id=s,
            low_res_image_start_token_id=low,
            image_end_token_id=e,
            image_patch_id=p,
            frame_start_token_id=fs,
            frame_end_token_id=fe,
        ),
        proc,
        style,
    )
