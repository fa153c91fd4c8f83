"""The only table of model names, for what no configuration file states."""

from dataclasses import dataclass

from transformers import PretrainedConfig


@dataclass(frozen=True)
class Family:
    """What a model was trained with.

    `max_images`: the most images per row; None for any number. `bbox_format`: how it writes boxes, a key of
    `BOX_FORMATS`, whose comments name the sources; None where that is not known.
    """

    max_images: int | None = None
    bbox_format: str | None = None


# (model_type, model_type of the text model) → family
FAMILIES = {
    ("llava", "llama"): Family(max_images=1),  # LLaVA-1.5: https://arxiv.org/abs/2310.03744
    ("llava_next", "granite"): Family(max_images=1),  # Granite Vision 3.2: https://arxiv.org/abs/2502.09927
    ("qwen2_vl", "qwen2_vl_text"): Family(bbox_format="qwen2_vl"),
    ("qwen2_5_vl", "qwen2_5_vl_text"): Family(bbox_format="resized_pixels"),
    ("qwen3_vl", "qwen3_vl_text"): Family(bbox_format="norm1000"),
    ("qwen3_vl_moe", "qwen3_vl_moe_text"): Family(bbox_format="norm1000"),
    ("paligemma", "gemma"): Family(bbox_format="paligemma"),
    ("paligemma", "gemma2"): Family(bbox_format="paligemma"),  # PaliGemma 2: https://arxiv.org/abs/2412.03555
}


def find_family(config: PretrainedConfig) -> Family:
    """The family of a model, or one without limits if the table does not have it."""
    return FAMILIES.get((config.model_type, config.get_text_config().model_type), Family())
