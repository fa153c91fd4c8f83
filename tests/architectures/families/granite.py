"""IBM's Granite."""

import transformers as T
from architectures.families.gemma import SIGLIP
from architectures.families.llava import PINPOINTS
from architectures.pieces import small, tokenizer
from architectures.registry import arch, ids, square
from architectures.styles import granite


@arch("granite4_vision")
def granite4_vision(name):
    style = granite("<image>\n")
    tok = tokenizer(style, image_token="<image>")
    proc = T.Granite4VisionProcessor(
        T.LlavaNextImageProcessor(size=square(32), crop_size=square(32), image_grid_pinpoints=PINPOINTS),
        tok,
        patch_size=8,
        vision_feature_select_strategy="full",
        num_additional_image_tokens=0,
        downsample_rate="1/2",
        chat_template=style.jinja(),
    )
    text = small(
        T.Granite4VisionTextConfig,
        tok,
        logits_scaling=8.0,
        embedding_multiplier=12.0,
        residual_multiplier=0.22,
        attention_multiplier=0.25,
        num_hidden_layers=3,
        head_dim="drop",
    )
    qformer = small(T.Blip2QFormerConfig, encoder_hidden_size=64, num_hidden_layers=1, num_attention_heads=4)
    return (
        T.Granite4VisionConfig(
            text_config=text.to_dict(),
            vision_config=small(T.SiglipVisionConfig, **SIGLIP, num_hidden_layers=3).to_dict(),
            qformer_config=qformer.to_dict(),
            image_token_index=ids(tok, "<image>")[0],
            vision_feature_select_strategy="full",
            image_grid_pinpoints=PINPOINTS,
            downsample_rate="1/2",
            deepstack_layer_map=[[-2, 0], [-1, 1]],
            spatial_vision_layer=-1,
            spatial_target_layers=[2],
            projector_dropout=0.0,
        ),
        proc,
        style,
    )


@arch("granite_docling")
def granite_docling(name):
    style = granite("<image>")
    tok = tokenizer(
        style,
        (
            "<fake_token_around_image>",
            "<global-img>",
            *(f"<row_{i}_col_{j}>" for i in range(1, 9) for j in range(1, 9)),
        ),
        image_token="<image>",
    )
    proc = T.GraniteDoclingProcessor(
        T.GraniteDoclingImageProcessor(size=square(32), max_patches=4),
        tok,
        image_seq_len=4,
        chat_template=style.jinja(),
    )
    text = small(T.GraniteDoclingTextConfig, tok, logits_scaling=4.0, attention_multiplier=0.25, head_dim="drop")
    vision = small(
        T.GraniteDoclingVisionConfig, image_size=32, patch_size=8, scale_factor=2, deepstack_visual_indexes=[0]
    )
    return (
        T.GraniteDoclingConfig(
            text_config=text.to_dict(),
            vision_config=vision.to_dict(),
            image_token_id=ids(tok, "<image>")[0],
            pad_token_id=tok.pad_token_id,
        ),
        proc,
        style,
    )
