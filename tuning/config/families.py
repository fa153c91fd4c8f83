"""The one table of model names: what cannot be read from a model's structure."""

from dataclasses import dataclass

from transformers import PretrainedConfig


@dataclass(frozen=True)
class Family:
    """`max_images`: images a row that the model was trained to take; None for any number."""

    max_images: int | None = None


# (model_type, text model_type) -> family
FAMILIES = {
    ("llava", "llama"): Family(max_images=1),  # LLaVA-1.5: https://arxiv.org/abs/2310.03744
    ("llava_next", "granite"): Family(max_images=1),  # Granite Vision 3.2: https://arxiv.org/abs/2502.09927
}

# Text models that multiply by `logits_scaling`, which every other one divides by.
MULTIPLIES_LOGITS_SCALING = ("hyperclovax",)


def find_family(config: PretrainedConfig) -> Family:
    """The family of a model by its configuration; models not in the table are taken as they are."""
    return FAMILIES.get((config.model_type, config.get_text_config().model_type), Family())
