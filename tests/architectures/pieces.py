"""Pieces of tiny random checkpoints: tokenizers, shrunken configs and weights. Nothing is downloaded."""

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

CORPUS = [
    "What is in the picture? A red square and a blue circle below it. How many? There are three: one, two, three.",
    "You are a helpful assistant who answers in few words. User: Assistant: USER: ASSISTANT: system user model",
    "Compare the two pictures. The first is darker than the second. Yes. No. It is a cat. Thank you! Describe this.",
]


def tokenizer(style, more=(), *, pad="<pad>", bos=None, eos=None, **named):
    """A byte-level BPE tokenizer with the style's control tokens, `more`, and `named` (attribute → token)."""
    bos = bos if bos is not None else ("<sop>" if style.bos.endswith("<sop>") else style.bos)
    strings = ["<unk>", pad, *([bos] if bos else []), *style.specials, style.eos, *named.values(), *more]
    strings = list(dict.fromkeys(strings))
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(
            vocab_size=400 + len(strings),
            special_tokens=strings,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    bpe.add_special_tokens([AddedToken(s, normalized=False, special=True) for s in strings])
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        unk_token="<unk>",
        pad_token=pad,
        **({"bos_token": bos} if bos else {}),
        eos_token=eos or style.eos,
        extra_special_tokens=named,
        model_max_length=4096,
    )


SMALL = dict(
    hidden_size=64,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    max_position_embeddings=4096,
    depth=2,
    num_heads=4,
    embed_dim=64,
    mlp_dim=64,
    moe_intermediate_size=32,
    shared_expert_intermediate_size=32,
    num_experts=4,
    n_routed_experts=4,
    num_local_experts=4,
    num_experts_per_tok=2,
    kv_lora_rank=16,
    q_lora_rank=16,
    qk_rope_head_dim=8,
    qk_nope_head_dim=8,
    v_head_dim=16,
    n_group=1,
    topk_group=1,
    first_k_dense_replace=1,
    linear_key_head_dim=8,
    linear_value_head_dim=8,
    linear_num_key_heads=2,
    linear_num_value_heads=4,
    out_hidden_size=64,
    projection_dim=64,
    moe_num_experts=4,
    moe_topk=2,
    moe_k=2,
    hidden_dropout_prob=0.0,
    attention_probs_dropout_prob=0.0,
    attention_dropout=0.0,
    dropout=0.0,
    projector_dropout=0.0,
    drop_path_rate=0.0,
    swa_head_dim=16,
    swa_num_attention_heads=4,
    swa_num_key_value_heads=2,
    index_head_dim=16,
    index_n_heads=2,
    index_topk=2048,
    projector_hidden_size=64,
    projection_hidden_size=64,
    sliding_window=24,
    resampler_depth=1,
    resampler_n_latents=4,
    resampler_n_heads=4,
    resampler_head_dim=16,
    laurel_rank=8,
    hidden_size_per_layer_input=8,
    initializer_range=0.1,
    q_dim=64,
)


def small(config_class, tok=None, **own):
    """`config_class` made small: what it has of SMALL, the tokenizer's ids, then `own` (None is kept)."""
    default = config_class()
    has = default.to_dict()
    values = {
        k: v for k, v in SMALL.items() if k in has and has[k] is not None and not isinstance(has[k], (list, dict))
    }
    if tok is not None:
        values |= dict(
            vocab_size=len(tok),
            bos_token_id=tok.bos_token_id,
            eos_token_id=tok.eos_token_id,
            pad_token_id=tok.pad_token_id,
        )
    values.update(own)
    for name in [k for k, v in values.items() if v == "drop"]:
        del values[name]
    return config_class(**values)


def fill(model, seed=0):
    """Random weights everywhere: nothing is left unwritten, no gate stays shut, and images matter."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _name, p in model.named_parameters():
            if p.dim() >= 2:
                p.copy_(torch.randn(p.shape, generator=g) * max(0.08, (p.numel() / p.shape[0]) ** -0.5))
            elif not p.isfinite().all() or not p.any():
                p.copy_(torch.rand(p.shape, generator=g) * 0.2 + (0.4 if p.numel() == 1 else 0.0))
        for _name, b in model.named_buffers():
            if b.is_floating_point() and not b.isfinite().all():
                b.copy_(torch.zeros_like(b))
    return model
