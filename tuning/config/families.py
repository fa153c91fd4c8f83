"""The only table of model names, for what no configuration file states."""

from dataclasses import dataclass

from transformers import PretrainedConfig


@dataclass(frozen=True)
class Family:
    """`max_images`: the most images per row that the model was trained with; None for any number."""

    max_images: int | None = None


# (model_type, model_type of the text model) → family
FAMILIES = {
    ("llava", "llama"): Family(max_images=1),  # LLaVA-1.5: https://arxiv.org/abs/2310.03744
    ("llava_next", "granite"): Family(max_images=1),  # Granite Vision 3.2: https://arxiv.org/abs/2502.09927
}

# Text models whose logits are multiplied by `logits_scaling`. All others divide by it.
MULTIPLIES_LOGITS_SCALING = ("hyperclovax",)


def find_family(config: PretrainedConfig) -> Family:
    """The family of a model, or one without limits if the table does not have it."""
    return FAMILIES.get((config.model_type, config.get_text_config().model_type), Family())
