"""The builders by the name of their architecture, and the names that are no chat models.

A builder returns (config, processor, style[, options]). Options: `single` (at most one image a row), `needs_image` (no
row without one), `system` False (no system turn), `multi` False (one turn only).
"""

ARCHS = {}


def arch(*names):
    def keep(build):
        for name in names:
            ARCHS[name] = build
        return build

    return keep


def sub(config_class, part):
    """The class of a sub-configuration: `sub_configs` names it, or the default instance has it."""
    known = config_class.sub_configs[part]
    return known if known.__name__ != "AutoConfig" else type(getattr(config_class(), part))


def ids(tok, *tokens):
    return [tok.convert_tokens_to_ids(t) for t in tokens]


def square(n):
    return {"height": n, "width": n}


NOT_CHAT = {
    "blip": "captioning, encoder-decoder text",
    "blip-2": "no chat template, Q-Former captioning",
    "instructblip": "no chat template, second tokenizer",
    "instructblipvideo": "video only",
    "git": "captioning",
    "pix2struct": "encoder-decoder",
    "florence2": "encoder-decoder with task prompts",
    "kosmos-2": "grounded captioning, no chat",
    "kosmos-2.5": "document reader, no chat",
    "udop": "encoder-decoder",
    "vision-encoder-decoder": "encoder-decoder",
    "pp_formulanet": "encoder-decoder",
    "pi0": "robot actions",
    "evolla": "proteins",
    "t5gemma2": "encoder-decoder",
    "diffusion_gemma": "diffusion, no next-token loss",
    "shieldgemma2": "classifier",
    "mistral4": "text model in the mapping",
    "cosmos3_omni": "no processor of its own",
}
