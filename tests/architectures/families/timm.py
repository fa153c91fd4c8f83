"""Towers of timm."""

import transformers as T
from architectures.pieces import small, tokenizer
from architectures.registry import arch, ids, square
from architectures.styles import chatml, llama3


@arch("perception_lm")
def perception_lm(name):
    style = llama3("<|image|>")
    tok = tokenizer(style, image_token="<|image|>", video_token="<|video|>")
    proc = T.PerceptionLMProcessor(
        T.PerceptionLMVideoProcessor(size=square(32)),
        T.PerceptionLMImageProcessor(tile_size=32, max_num_tiles=4, size=square(32)),
        tok,
        patch_size=8,
        pooling_ratio=1,
        chat_template=style.jinja(),
    )
    vision = T.TimmWrapperConfig(
        architecture="vit_pe_core_tiny_patch16_384",
        do_pooling=False,
        num_classes=0,
        global_pool="map",
        initializer_range=0.02,
        model_args=dict(
            embed_dim=64,
            img_size=[32, 32],
            depth=2,
            num_heads=4,
            patch_size=8,
            use_rot_pos_emb=True,
            ref_feat_shape=[4, 4],
            global_pool="",
            use_post_transformer_norm=False,
            init_values=0.1,
            class_token=True,
        ),
    )
    image, video = ids(tok, "<|image|>", "<|video|>")
    return (
        T.PerceptionLMConfig(
            text_config=small(T.LlamaConfig, tok).to_dict(),
            vision_config=vision.to_dict(),
            image_token_id=image,
            video_token_id=video,
            projector_pooling_ratio=1,
            vision_use_cls_token=True,
        ),
        proc,
        style,
        dict(single=True),  # the stock processor cannot join pictures of different numbers of tiles
    )


@arch("fast_vlm")
def fast_vlm(name):
    style = chatml("<image>\n", images_first=True)
    tok = tokenizer(style, image_token="<image>")
    proc = T.LlavaProcessor(
        T.CLIPImageProcessor(size={"shortest_edge": 128}, crop_size=square(128)),
        tok,
        patch_size=64,
        vision_feature_select_strategy="full",
        num_additional_image_tokens=0,
        chat_template=style.jinja(),
    )
    vision = T.TimmWrapperConfig(
        architecture="fastvit_mci3",
        do_pooling=True,
        global_pool="avg",
        hidden_size=256,
        num_classes=0,
        model_args=dict(
            inference_mode=True,
            layers=[1, 1, 1, 1, 1],
            embed_dims=[8, 16, 32, 64, 128],
            mlp_ratios=[2, 2, 2, 2, 2],
            token_mixers=["repmixer", "repmixer", "repmixer", "attention", "attention"],
            pos_embs=[None, None, None, None, None],
            downsamples=[False, True, True, True, True],
            se_downsamples=[False] * 5,
        ),
    )
    return (
        T.FastVlmConfig(
            text_config=small(T.Qwen2Config, tok).to_dict(),
            vision_config=vision.to_dict(),
            image_token_index=ids(tok, "<image>")[0],
            image_seq_length=4,
        ),
        proc,
        style,
    )
