"""What an adapter makes of its base model's weights, by PEFT's own arithmetic, a layer at a time."""

import contextlib
import functools
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from peft import LoraConfig, PeftConfig, PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from tuning.errors import UserError
from tuning.export.safetensors_files import (
    DTYPES,
    Checkpoint,
    Stored,
    WeightTarget,
    find_places,
    publish_name,
    read_header,
    read_tensor,
)
from tuning.model import load
from tuning.model.lora import ADAPTER_WEIGHTS, Adapter, load_adapter, wrap

NAME = "default"
PLAIN_STARTS = ("gaussian", "eva", "orthogonal", "mica", "lora_ga")
"""Ways to begin an adapter that leave the base model as it is; PiSSA, OLoRA, CorDA and LoftQ change it (PEFT 0.21)."""
IN_MEMORY = "Load base and adapter with PEFT, merge_and_unload() them and save_pretrained() the result."


@dataclass(frozen=True)
class Entry:
    """A tensor of the merged checkpoint. `source`: the base's tensor it is made from; `name`: the weight it becomes.

    `change`: None where it stays, else the layer to merge, or the value to take.
    """

    source: Stored
    name: str
    change: LoraLayer | torch.Tensor | None


@dataclass(frozen=True)
class Merge:
    """How an adapter changes its base: file name → published key → entry. `untied`: weights that no longer are one."""

    base: Checkpoint
    adapted: PeftModel
    shards: dict[str, dict[str, Entry]]
    untied: list[str]

    @functools.cached_property
    def layers(self) -> dict[str, dict[str, Stored]]:
        """Module name → parameter → where the base model has it stored."""
        found: dict[str, dict[str, Stored]] = defaultdict(dict)
        for shard in self.shards.values():
            for entry in shard.values():
                layer, _, end = entry.name.rpartition(".")
                found[layer][end] = entry.source
        return found


def plan_merge(base: Checkpoint, config: PreTrainedConfig, adapter: Adapter) -> Merge:
    """Find what `adapter` changes in `base`, without loading any of its weights.

    Raises `UserError` for an adapter that does not fit, or that cannot be written in the base's own layout.
    """
    skeleton = load.build_skeleton(config)
    places, tied = find_places(skeleton, base.tensors), find_tied(skeleton)
    names = {name for name, _ in skeleton.named_parameters(remove_duplicate=False)}
    adapted = adapt_skeleton(skeleton, adapter).float().eval()
    changes = find_changes(adapted)
    assert changes.keys() <= names, f"no weights of the model: {changes.keys() - names}"
    shards = {
        file: {key: Entry(stored, places[key].name, changes.get(places[key].name)) for key, stored in shard.items()}
        for file, shard in base.shards.items()
    }
    broken = [group for group in tied if breaks_tie(group, changes)]
    for group in broken:
        _give_own_tensors(shards, group, load.build_skeleton(config), places, changes)
    for shard in shards.values():
        for key, entry in shard.items():
            if entry.change is not None:
                check_storage(key, entry, converted=key in places and places[key].converted)
    stored = {entry.name for shard in shards.values() for entry in shard.values()}
    tied_names = {name for group in tied for name in group}
    if lost := sorted(changes.keys() - stored - tied_names):
        raise UserError(
            where=str(base.folder),
            problem=f"the checkpoint has no weights for what the adapter changes: {', '.join(lost[:3])}.",
        )
    return Merge(base, adapted, shards, untied=[name for group in broken for name in sorted(group)])


def adapt_skeleton(skeleton: PreTrainedModel, adapter: Adapter) -> PeftModel:
    """Put an adapter with its weights on a model without any. Raises `UserError` where it does not fit."""
    check_mergeable(adapter)
    own = {name for name, _ in skeleton.named_parameters(remove_duplicate=False)}
    adapted = wrap(skeleton, adapter)
    saved = read_header(adapter.folder / ADAPTER_WEIGHTS)
    made: dict[int, nn.Parameter] = {}
    for name, parameter in list(adapted.named_parameters(remove_duplicate=False)):
        plain = name.removeprefix("base_model.model.").replace(".base_layer.", ".").replace(".original_module.", ".")
        if plain not in own or name in saved:
            parent, _, end = name.rpartition(".")
            empty = nn.Parameter(torch.empty_like(parameter, device="cpu"), requires_grad=False)
            setattr(adapted.get_submodule(parent), end, made.setdefault(id(parameter), empty))
    load_adapter(adapted, adapter.folder)
    return adapted


def find_tied(model: PreTrainedModel) -> list[set[str]]:
    """Groups of names of one and the same parameter."""
    groups: dict[int, set[str]] = defaultdict(set)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        groups[id(parameter)].add(name)
    return [group for group in groups.values() if len(group) > 1]


def breaks_tie(group: set[str], changes: dict[str, LoraLayer | torch.Tensor]) -> bool:
    """Whether weights that were one are no longer equal: PEFT may adapt the embedding and leave the head as it was."""
    changed = [changes[name] for name in group if name in changes]
    if len(changed) < len(group):
        return bool(changed)
    values = [change for change in changed if isinstance(change, torch.Tensor)]
    return len(values) < len(changed) or not all(torch.equal(values[0], value) for value in values[1:])


def _give_own_tensors(
    shards: dict[str, dict[str, Entry]],
    group: set[str],
    skeleton: PreTrainedModel,
    places: dict[str, WeightTarget],
    changes: dict[str, LoraLayer | torch.Tensor],
) -> None:
    """Store every weight of a broken tie, right after the one that stood for all of them."""
    file, shared = next((file, key) for file, shard in shards.items() for key in shard if shard[key].name in group)
    grown = {}
    for key, entry in shards[file].items():
        grown[key] = entry
        if key == shared:
            for name in sorted(group - {place.name for place in places.values()}):
                grown[publish_name(skeleton, name, places)] = Entry(entry.source, name, changes.get(name))
    shards[file] = grown


def check_mergeable(adapter: Adapter) -> None:
    """Raises `UserError` for kinds of adapters that are no plain change of weights."""
    config = PeftConfig.from_pretrained(str(adapter.folder))
    where = f"{adapter.folder}/adapter_config.json"
    if not isinstance(config, LoraConfig):
        raise UserError(where=where, problem=f"peft_type {config.peft_type} cannot be merged; only LoRA can.")
    if changes_base(config.init_lora_weights):
        raise UserError(
            where=where,
            problem=f"init_lora_weights {config.init_lora_weights} changed the base model when training began.",
            fix="Turn it into a plain adapter first: PEFT's save_pretrained, path_initial_model_for_weight_conversion.",
        )
    if config.layer_replication or getattr(config, "alora_invocation_tokens", None):
        raise UserError(where=where, problem="layer_replication and activated LoRA cannot be merged.")


def changes_base(init: bool | str | None) -> bool:
    """Whether an adapter that began this way belongs to a changed base model."""
    return isinstance(init, str) and init.lower() not in PLAIN_STARTS


def check_storage(key: str, entry: Entry, *, converted: bool) -> None:
    """Raises `UserError` where a tensor that changes cannot take the base's place as it is stored."""
    if converted:
        raise UserError(
            where=key,
            problem=f"the adapter changes {entry.name}, which this checkpoint stores in another layout.",
            fix=IN_MEMORY,
        )
    if entry.source.dtype not in DTYPES:
        raise UserError(
            where=f"{entry.source.file}, {key}",
            problem=f"is stored as {entry.source.dtype}: a quantised checkpoint cannot take up an adapter.",
            fix="Give the unquantised base model with --base.",
        )
    if isinstance(entry.change, torch.Tensor) and tuple(entry.change.shape) != entry.source.shape:
        what = f"the adapter has {tuple(entry.change.shape)} for it, the base model {entry.source.shape}."
        raise UserError(
            where=entry.name, problem=what, fix="It was trained on another model: name the right one with --base."
        )


def find_changes(adapted: PeftModel) -> dict[str, LoraLayer | torch.Tensor]:
    """Name of a weight of the base model → the layer that adapts it, or the value that training gave it.

    `adapted` is a skeleton: what is not on the meta device came with the adapter. Raises `UserError` for what is
    neither LoRA on a weight nor a module that was saved in full.
    """
    changes: dict[str, LoraLayer | torch.Tensor] = {}
    taken: list[str] = []
    model = adapted.get_base_model()
    for name, module in model.named_modules():
        if name.startswith(tuple(taken)):
            continue
        if isinstance(module, ModulesToSaveWrapper):
            changes |= {f"{name}.{end}": value for end, value in module.modules_to_save[NAME].state_dict().items()}
        elif isinstance(module, LoraLayer) and isinstance(
            getattr(module.get_base_layer(), "weight", None), nn.Parameter
        ):
            base = dict(module.get_base_layer().named_parameters(recurse=False))
            changes[f"{name}.weight"] = module
            if module.lora_bias[NAME]:
                changes[f"{name}.bias"] = module
            elif "bias" in base and not base["bias"].is_meta:
                changes[f"{name}.bias"] = base["bias"].detach()
        elif isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
            raise UserError(
                where=name,
                problem=f"an adapter of the kind {type(module).__name__} cannot be merged here.",
                fix=IN_MEMORY,
            )
        else:
            own = module.named_parameters(prefix=name, recurse=False)
            changes |= {end: value.detach() for end, value in own if not value.is_meta}
            continue
        taken.append(f"{name}.")
    return changes


@contextlib.contextmanager
def holding(layer: LoraLayer, weights: dict[str, torch.Tensor]) -> Iterator[nn.Module]:
    """The base layer with `weights` in float32. Afterwards it is as before.

    A skeleton does not know its buffers, such as the factor of Gemma's embedding: they become 1 for base and adapter.
    """
    base = layer.get_base_layer()
    kept = dict(base.named_parameters(recurse=False))
    for name in kept:
        setattr(base, name, nn.Parameter(weights[name].float(), requires_grad=False))
    for name, buffer in base.named_buffers(recurse=False):
        if buffer.is_meta:
            setattr(base, name, torch.ones_like(buffer, dtype=torch.float32, device="cpu"))
    try:
        yield base
    finally:
        layer.merged_adapters.clear()
        for name, parameter in kept.items():
            setattr(base, name, parameter)


def merge_layer(layer: LoraLayer, weights: dict[str, torch.Tensor], name: str) -> dict[str, torch.Tensor]:
    """Merge `layer` into its base weights, in float32. Raises `UserError` where the result is no number."""
    with holding(layer, weights) as base:
        try:
            layer.merge(safe_merge=True, adapter_names=[NAME])  # in a copy: `weights` stay as they are
        except (ValueError, NotImplementedError, RuntimeError) as error:
            raise UserError(where=name, problem=f"cannot be merged: {error}") from error
        return {end: parameter.detach() for end, parameter in base.named_parameters(recurse=False)}


def value_of(merge: Merge, entry: Entry) -> torch.Tensor:
    """What the adapter makes of a tensor, in float32."""
    if not isinstance(entry.change, LoraLayer):
        assert entry.change is not None
        return entry.change.float()
    layer_name, _, end = entry.name.rpartition(".")
    return merge_layer(entry.change, read_layer(merge, entry), layer_name)[end]


def read_layer(merge: Merge, entry: Entry) -> dict[str, torch.Tensor]:
    """The parameters of the base layer that `entry` belongs to, before merging: the base's, or the adapter's own."""
    assert isinstance(entry.change, LoraLayer)
    layer_name, _, end = entry.name.rpartition(".")
    stored = {**merge.layers[layer_name], end: entry.source}
    parameters = entry.change.get_base_layer().named_parameters(recurse=False)
    return {name: read_tensor(stored[name]) if own.is_meta else own.detach() for name, own in parameters}
