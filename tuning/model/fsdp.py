"""Which modules FSDP wraps: the transformer layers that a model really has."""

from torch import nn
from transformers import PreTrainedModel


def find_wrap_classes(model: PreTrainedModel) -> list[str]:
    """Class names of the layers to wrap, in the model's order.

    The sets in `_no_split_modules` also name classes that are not instantiated (`SiglipTextEmbeddings`), at which
    accelerate's own search fails: only names with a module, inside a list of layers, are taken.
    """
    named = {name for module in model.modules() for name in getattr(module, "_no_split_modules", None) or ()}
    layers = [layer for module in model.modules() if isinstance(module, nn.ModuleList) for layer in module]
    return list(dict.fromkeys(type(layer).__name__ for layer in layers if type(layer).__name__ in named))
