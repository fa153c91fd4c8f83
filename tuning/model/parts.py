"""The parts of a model (vision tower, projector, language model), found from its structure, and their sizes."""

from dataclasses import dataclass, replace

import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

LANGUAGE_MODEL, PROJECTOR, VISION_TOWER = "language_model", "multi_modal_projector", "vision_tower"
PARTS = (VISION_TOWER, PROJECTOR, LANGUAGE_MODEL)
MAPS = (nn.Linear, nn.Conv2d, nn.Conv3d)


PROJECTOR_NAMES = ("merger", "projector", "resampler", "aligner", "connector", "downsample")
"""How transformers names what follows the last layer of a tower, where it is a child of the tower."""


@dataclass(frozen=True)
class Parts:
    """Module names of the language model (with its head) and of the towers, the one for images first.

    `projector`: modules inside a tower that belong to the projector, like the merger of Qwen-VL. So does whatever is
    neither in the language model nor in a tower.
    """

    language_model: tuple[str, ...]
    vision_tower: tuple[str, ...]
    projector: tuple[str, ...] = ()

    def of(self, name: str) -> str:
        """The part that a parameter or module with this name belongs to; PEFT's prefix is ignored."""
        name = name.removeprefix("base_model.model.")
        if _is_inside(name, self.projector):
            return PROJECTOR
        if _is_inside(name, self.vision_tower):
            return VISION_TOWER
        return LANGUAGE_MODEL if _is_inside(name, self.language_model) else PROJECTOR


def _is_inside(name: str, roots: tuple[str, ...]) -> bool:
    return any(name == root or name.startswith(f"{root}.") for root in roots)


def find_parts(model: PreTrainedModel | PeftModel) -> Parts:
    """Find the parts from what the model says of itself: `get_decoder`, `get_output_embeddings`, `get_encoder`.

    A model may have a second tower (SAM beside CLIP, audio). Where all that maps features to the language model is
    inside the tower, it is found there, see `find_inner_projectors`. For a model with adapters, these are the parts of
    its base.
    """
    model = model.get_base_model() if isinstance(model, PeftModel) else model
    names = {id(module): name for name, module in model.named_modules()}
    language = [names.get(id(module)) for module in (model.get_decoder(), model.get_output_embeddings())]
    first = names.get(id(model.get_encoder(modality="image"))) or ""
    towers = [first] if first else []
    towers += [name for name in _find_other_towers(model, names) if not _is_inside(name, tuple(towers))]
    parts = Parts(tuple(name for name in language if name), tuple(towers))
    outside = (module for name, module in model.named_modules() if name and parts.of(name) == PROJECTOR)
    if not first or any(isinstance(module, MAPS) for module in outside):
        return parts
    inside = find_inner_projectors(model.get_submodule(first), model.config.get_text_config().hidden_size)
    return replace(parts, projector=tuple(f"{first}.{name}" for name in inside))


def _find_other_towers(model: PreTrainedModel, names: dict[int, str]) -> list[str]:
    """Models inside `model` that take pictures or sounds, the outermost first."""
    audio = names.get(id(model.get_encoder(modality="audio")))
    towers = [audio] if audio else []
    for name, module in model.named_modules():
        is_tower = isinstance(module, PreTrainedModel) and module.main_input_name not in ("input_ids", "inputs_embeds")
        if name and is_tower and not _is_inside(name, tuple(towers)):
            towers.append(name)
    return towers


def find_inner_projectors(tower: nn.Module, width: int) -> list[str]:
    """Names of the modules of `tower` that follow its layers and map their features to the language model's `width`.

    These are modules beside the layers, or beside something that holds them, that are named so, or whose last product
    has this width, unless the layers have it, too.
    """
    lists = {name: module for name, module in tower.named_modules() if isinstance(module, nn.ModuleList)}
    lists = {name: module for name, module in lists.items() if not _is_named_projector(name)}
    if not lists:
        return []
    layers = max(lists, key=lambda name: sum(count_numbers(parameter) for parameter in lists[name].parameters()))
    told_by_width = _output_width(lists[layers]) != width
    holders = {"", *(layers.rsplit(".", depth)[0] for depth in range(1, layers.count(".") + 1))}
    found = []
    for name, module in tower.named_modules():
        parent, _, child = name.rpartition(".")
        if not name or parent not in holders or name in (*holders, layers):
            continue
        if _is_named_projector(child) or (told_by_width and _output_width(module) == width):
            found.append(name)
    return found


def _is_named_projector(name: str) -> bool:
    return any(word in name for word in PROJECTOR_NAMES)


def _output_width(module: nn.Module) -> int | None:
    """How many numbers per token the last matrix product of a module makes."""
    products = [part for part in module.modules() if isinstance(part, MAPS)]
    if not products:
        return None
    last = products[-1]
    return last.out_features if isinstance(last, nn.Linear) else last.out_channels


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
