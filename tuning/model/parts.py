"""The parts of a model (vision tower, projector, language model), found from its structure, and their sizes."""

from dataclasses import dataclass

import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

LANGUAGE_MODEL, PROJECTOR, VISION_TOWER = "language_model", "multi_modal_projector", "vision_tower"
PARTS = (VISION_TOWER, PROJECTOR, LANGUAGE_MODEL)


@dataclass(frozen=True)
class Parts:
    """Module names of the language model (with its head) and of the vision tower; the rest is the projector."""

    language_model: tuple[str, ...]
    vision_tower: tuple[str, ...]

    def of(self, name: str) -> str:
        """The part that a parameter or module with this name belongs to; PEFT's prefix is ignored."""
        name = name.removeprefix("base_model.model.")
        if _is_inside(name, self.vision_tower):
            return VISION_TOWER
        return LANGUAGE_MODEL if _is_inside(name, self.language_model) else PROJECTOR


def _is_inside(name: str, roots: tuple[str, ...]) -> bool:
    return any(name == root or name.startswith(f"{root}.") for root in roots)


def find_parts(model: PreTrainedModel | PeftModel) -> Parts:
    """Find the parts through `get_decoder`, `get_output_embeddings` and `get_encoder(modality="image")`.

    For a model with adapters, these are the parts of its base.
    """
    model = model.get_base_model() if isinstance(model, PeftModel) else model
    names = {id(module): name for name, module in model.named_modules()}
    language = [model.get_decoder(), model.get_output_embeddings()]
    vision = model.get_encoder(modality="image")
    return Parts(
        language_model=tuple(names[id(module)] for module in language if id(module) in names and names[id(module)]),
        vision_tower=(names[id(vision)],) if names.get(id(vision)) else (),
    )


def freeze_parts(model: PreTrainedModel, parts: Parts, frozen: set[str]) -> None:
    """Freeze the parameters of the parts in `frozen`, and train all others."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(parts.of(name) not in frozen)


def freeze_parameters(model: nn.Module, names: set[str]) -> None:
    """Freeze the parameters with these names."""
    for name, parameter in model.named_parameters():
        if name in names:
            parameter.requires_grad_(False)


def count_numbers(parameter: torch.Tensor) -> int:
    """How many numbers a parameter stands for: 4-bit weights are packed, and weights sharded by DeepSpeed are empty."""
    packed = getattr(parameter, "quant_state", None)  # set by bitsandbytes
    return packed.shape.numel() if packed is not None else getattr(parameter, "ds_numel", parameter.numel())


@dataclass(frozen=True)
class PartSize:
    """How many parameters a part has, and how many of them train."""

    part: str
    parameters: int
    trained: int


def count_parameters(model: nn.Module, parts: Parts) -> list[PartSize]:
    """The size of each part, in the order of `PARTS`. Shared parameters count once."""
    total, trained = dict.fromkeys(PARTS, 0), dict.fromkeys(PARTS, 0)
    for name, parameter in model.named_parameters():
        size = count_numbers(parameter)
        total[parts.of(name)] += size
        trained[parts.of(name)] += size if parameter.requires_grad else 0
    return [PartSize(part, total[part], trained[part]) for part in PARTS]


def parameter_table(model: nn.Module, parts: Parts) -> str:
    """A table in plain text: total and trainable parameters of each part."""
    rows = count_parameters(model, parts)
    rows.append(PartSize("all", sum(row.parameters for row in rows), sum(row.trained for row in rows)))
    lines = [f"{'part':<22} {'parameters':>15} {'trainable':>15} {'':>8}"]
    for row in rows:
        share = row.trained / max(row.parameters, 1)
        lines.append(f"{row.part:<22} {row.parameters:>15,} {row.trained:>15,} {share:>8.2%}")
    return "\n".join(lines)
