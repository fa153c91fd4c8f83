"""What an adapter makes of its base model's weights, by PEFT's own arithmetic, one layer at a time."""

import contextlib
import functools
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import ParamWrapper
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from tuning.errors import UserError, first_line
from tuning.export.checkpoint_keys import KeyRules, WeightTarget
from tuning.export.stored_group import StoredGroup, added_to, can_add
from tuning.model.load import build_skeleton
from tuning.model.lora import ADAPTER_NAME, Adapter, load_adapter, read_adapter_config, wrap
from tuning.model.saved_weights import SavedWeights, StoredTensor, open_weights

FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""The formats that weights are merged in and cast to. Tensors in any other format are copied."""
BASE_KEPT = ("gaussian", "eva", "orthogonal", "mica", "lora_ga")
"""Values of init_lora_weights that do not change the base model. PiSSA, OLoRA, CorDA and LoftQ do (PEFT 0.21)."""
MERGE_IN_MEMORY = "Load base and adapter with PEFT, merge_and_unload() them and save_pretrained() the result."


@dataclass(frozen=True)
class AdaptedSkeleton:
    """`model`: a base model with `adapter` on it. The base's weights are on the meta device, the adapter's are loaded.

    `key_rules`: which weight a key of the base's checkpoint becomes. `tied`: groups of names of the same weight.
    """

    model: PeftModel
    adapter: Adapter
    key_rules: KeyRules
    tied: list[set[str]]


@dataclass(frozen=True)
class Entry:
    """A tensor of the merged checkpoint: it is stored under `key` in `format` and becomes the model's weight `name`.

    `source`: the base's tensor that it is made from. `change`: None where it stays as it is, else the layer to merge,
    the value that training gave it, or the group of tensors that it is merged with.
    """

    key: str
    name: str
    source: StoredTensor
    change: LoraLayer | torch.Tensor | StoredGroup | None
    format: str

    @property
    def shape(self) -> tuple[int, ...]:
        return self.source.shape

    @property
    def is_copy(self) -> bool:
        return self.change is None and self.format == self.source.format

    @property
    def nbytes(self) -> int:
        if self.format == self.source.format:
            return self.source.nbytes
        return torch.Size(self.source.shape).numel() * FLOATS[self.format].itemsize


@dataclass(frozen=True)
class Merge:
    """A planned merge: the entries of each file of the merged checkpoint.

    `untied`: names of weights that are one in the base model and differ in the merged one.
    """

    base: SavedWeights
    shards: dict[str, list[Entry]]
    untied: list[str]

    @property
    def entries(self) -> list[Entry]:
        return [entry for shard in self.shards.values() for entry in shard]

    @functools.cached_property
    def sources(self) -> dict[str, StoredTensor]:
        """Weight of the model → the base's tensor."""
        return {entry.name: entry.source for entry in self.entries}

    def tensors(self, entries: Sequence[Entry]) -> Iterator[tuple[Entry, torch.Tensor]]:
        """Make the tensors one after the other, so that no more than one layer is in memory."""
        for entry in entries:
            yield entry, self.make(entry)

    def make(self, entry: Entry) -> torch.Tensor:
        """The tensor that is stored for an entry. A changed weight is computed in float32 and rounded once."""
        if entry.is_copy:
            return entry.source.read()
        if isinstance(entry.change, StoredGroup):
            value = entry.source.read().float() + added_to(entry.change)[entry.source.key]
        elif isinstance(entry.change, LoraLayer):
            layer, _, parameter = entry.name.rpartition(".")
            value = merge_layer(entry.change, self.base_weights(entry), layer)[parameter]
        else:
            value = entry.source.read() if entry.change is None else entry.change
        return value.to(FLOATS[entry.format])

    def base_weights(self, entry: Entry) -> dict[str, torch.Tensor]:
        """The parameters of the layer that `entry` belongs to before merging: the base's, or the adapter's own."""
        assert isinstance(entry.change, LoraLayer)
        layer = entry.name.rpartition(".")[0]
        parameters = entry.change.get_base_layer().named_parameters(recurse=False)
        return {
            name: self.sources[f"{layer}.{name}"].read() if own.is_meta else own.detach() for name, own in parameters
        }


def adapt_skeleton(config: PreTrainedConfig, adapter: Adapter) -> AdaptedSkeleton:
    """Put an adapter with its weights on a model without any. Raises `UserError` where it does not fit."""
    check_mergeable(adapter)
    skeleton = build_skeleton(config)
    own = {name for name, _ in skeleton.named_parameters(remove_duplicate=False)}
    rules, tied = KeyRules(skeleton), find_tied(skeleton)
    adapted = wrap(skeleton, adapter)
    saved = open_weights(adapter.folder)
    made: dict[int, nn.Parameter] = {}
    for name, parameter in list(adapted.named_parameters(remove_duplicate=False)):
        plain = re.sub(r"\.(base_layer|original_module)(?=\.)", "", name.removeprefix("base_model.model."))
        if plain not in own or name in saved:  # the adapter's weights need memory
            parent, _, end = name.rpartition(".")
            empty = nn.Parameter(torch.empty_like(parameter, device="cpu"), requires_grad=False)
            setattr(adapted.get_submodule(parent), end, made.setdefault(id(parameter), empty))
    load_adapter(adapted, adapter.folder)
    return AdaptedSkeleton(adapted, adapter, rules, tied)


def plan_merge(base: SavedWeights, adapted: AdaptedSkeleton, dtype: torch.dtype | None) -> Merge:
    """Find what the adapter changes in `base`, without reading any of its weights.

    `dtype`: what to store floating-point weights in; None for the base's own. Raises `UserError` for an adapter that
    cannot be stored in the base's own layout.
    """
    rules = adapted.key_rules
    targets = rules.targets(base)
    changes = find_changes(adapted.model.float().eval())
    assert changes.keys() <= rules.weights.keys(), f"no weights of the model: {changes.keys() - rules.weights.keys()}"
    groups = find_groups(base, adapted, targets, changes)
    stored = list(dict.fromkeys(target.name for target in targets.values()))
    stored += [name for group in groups.values() for name in group.names if name not in stored]
    if lost := sorted(changes.keys() - set(stored).union(*adapted.tied)):
        raise UserError(
            where=str(base.folder),
            problem=f"the checkpoint lacks weights that the adapter changes: {', '.join(lost[:3])}.",
            fix="Name the model that the adapter was trained on with --base.",
        )
    broken = [group for group in adapted.tied if breaks_tie(group, changes)]
    # Of a broken tie, the weights that the checkpoint lacks are stored right after the one that it has.
    lacking = {next(name for name in stored if name in group): sorted(group - set(stored)) for group in broken}

    def plan_tensor(key: str, source: StoredTensor) -> list[Entry]:
        target = targets[key]
        new_keys = {rules.new_key(name, targets): name for name in lacking.get(target.name, ())}
        entries = [
            Entry(
                rules.key_for_engines(new_key),
                name,
                source,
                groups.get(key) or changes.get(name),
                choose_format(source, dtype),
            )
            for new_key, name in {key: target.name, **new_keys}.items()
        ]
        for entry in entries:
            check_storage(entry, converted=target.converted)
        return entries

    shards = {
        file: [entry for key, source in shard.items() for entry in plan_tensor(key, source)]
        for file, shard in base.shards.items()
    }
    return Merge(base, shards, untied=[name for group in broken for name in sorted(group)])


def find_groups(
    base: SavedWeights,
    adapted: AdaptedSkeleton,
    targets: Mapping[str, WeightTarget],
    changes: Mapping[str, LoraLayer | torch.Tensor],
) -> dict[str, StoredGroup]:
    """Key of a stored tensor → the group that it is merged with: experts, and what is fused or split on its way.

    Raises `UserError` where the merged weights cannot be stored as the base's are.
    """
    rules, found = adapted.key_rules, dict[str, StoredGroup]()
    shapes = {key: torch.empty(stored.shape, device="meta") for key, stored in base.stored.items()}
    plain = [
        ([key], [target.name])
        for key, target in targets.items()
        if not target.converted and isinstance(changes.get(target.name), ParamWrapper)
    ]
    for keys, names in [*plain, *rules.groups(shapes)]:
        layers = {name: layer for name in names if isinstance(layer := changes.get(name), LoraLayer)}
        if not layers:
            continue
        group = StoredGroup(base, rules, tuple(keys), tuple(names), layers, converted=targets[keys[0]].converted)
        weights = {name: torch.empty(rules.weights[name].shape, device="meta") for name in names}
        stored = {key: base.stored[key].shape for key in keys}
        fits = (
            rules.revert(weights, stored) is not None if group.converted else stored[keys[0]] == weights[names[0]].shape
        )
        if not fits or not all(map(can_add, layers.values())):
            raise UserError(
                where=keys[0],
                problem=f"the adapter changes {next(iter(layers))}, which this checkpoint stores in another layout.",
                fix=MERGE_IN_MEMORY,
            )
        found |= dict.fromkeys(keys, group)
    return found


def choose_format(source: StoredTensor, dtype: torch.dtype | None) -> str:
    """The format to store a tensor in: that of `dtype`, or the base's own for None and where numbers are not floats."""
    asked = [name for name, known in FLOATS.items() if known == dtype]
    return asked[0] if asked and source.format in FLOATS else source.format


def find_tied(model: PreTrainedModel) -> list[set[str]]:
    """Groups of names of one and the same parameter."""
    groups: dict[int, set[str]] = defaultdict(set)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        groups[id(parameter)].add(name)
    return [group for group in groups.values() if len(group) > 1]


def breaks_tie(group: set[str], changes: Mapping[str, LoraLayer | torch.Tensor]) -> bool:
    """Whether tied weights differ after the merge: PEFT can adapt the embedding and leave the head as it was."""
    changed = [changes[name] for name in group if name in changes]
    if len(changed) < len(group):
        return bool(changed)
    values = [change for change in changed if isinstance(change, torch.Tensor)]
    return len(values) < len(changed) or not all(torch.equal(values[0], value) for value in values[1:])


def check_mergeable(adapter: Adapter) -> None:
    """Raises `UserError` for a kind of adapter that does more than change weights."""
    config = read_adapter_config(adapter.folder)
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
    """Whether an adapter with this init_lora_weights belongs to a changed base model."""
    return isinstance(init, str) and init.lower() not in BASE_KEPT


def check_storage(entry: Entry, *, converted: bool) -> None:
    """Raises `UserError` where a tensor that changes cannot be stored in the place of the base's."""
    if entry.change is None:
        return
    if converted and not isinstance(entry.change, StoredGroup):
        raise UserError(
            where=entry.key,
            problem=f"the adapter changes {entry.name}, which this checkpoint stores in another layout.",
            fix=MERGE_IN_MEMORY,
        )
    if entry.source.format not in FLOATS:
        raise UserError(
            where=f"{entry.source.file}, {entry.key}",
            problem=f"the tensor is quantised ({entry.source.format}), and the adapter changes it.",
            fix="Give the unquantised base model with --base.",
        )
    if isinstance(entry.change, torch.Tensor) and tuple(entry.change.shape) != entry.source.shape:
        raise UserError(
            where=entry.name,
            problem=f"its shape is {tuple(entry.change.shape)} in the adapter and {entry.source.shape} in the base.",
            fix="Name the model that the adapter was trained on with --base.",
        )


def find_changes(adapted: PeftModel) -> dict[str, LoraLayer | torch.Tensor]:
    """Name of a weight of the base model → the layer that adapts it, or the value that training gave it.

    `adapted` is a skeleton: what is not on the meta device came with the adapter. Raises `UserError` for what is
    neither LoRA on a weight nor a module that was saved in full.
    """
    changes: dict[str, LoraLayer | torch.Tensor] = {}
    done: list[str] = []  # prefixes of modules whose parameters are PEFT's
    for name, module in adapted.get_base_model().named_modules():
        if name.startswith(tuple(done)):
            continue
        if isinstance(module, ModulesToSaveWrapper):
            saved = module.modules_to_save[ADAPTER_NAME].state_dict()
            changes |= {f"{name}.{parameter}": value for parameter, value in saved.items()}
        elif isinstance(module, ParamWrapper):  # one for each parameter of the module, one in the other
            layer: nn.Module = module
            while isinstance(layer, ParamWrapper):
                changes[f"{name}.{layer.parameter_name}"] = layer
                layer = layer.base_layer
            own = layer.named_parameters(prefix=name, recurse=False)
            changes |= {parameter: value.detach() for parameter, value in own if not value.is_meta}
        elif isinstance(module, LoraLayer) and isinstance(
            getattr(module.get_base_layer(), "weight", None), nn.Parameter
        ):
            changes[f"{name}.weight"] = module
            bias = dict(module.get_base_layer().named_parameters(recurse=False)).get("bias")
            if module.lora_bias[ADAPTER_NAME]:
                changes[f"{name}.bias"] = module
            elif bias is not None and not bias.is_meta:
                changes[f"{name}.bias"] = bias.detach()
        elif isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
            raise UserError(
                where=name,
                problem=f"an adapter of the kind {type(module).__name__} cannot be merged here.",
                fix=MERGE_IN_MEMORY,
            )
        else:
            own = module.named_parameters(prefix=name, recurse=False)
            changes |= {parameter: value.detach() for parameter, value in own if not value.is_meta}
            continue
        done.append(f"{name}.")
    return changes


@contextlib.contextmanager
def base_layer_with(layer: LoraLayer, weights: Mapping[str, torch.Tensor]) -> Iterator[nn.Module]:
    """Give the base layer of `layer` these weights in float32, and its own again afterwards.

    A skeleton does not know its buffers, such as the factor of Gemma's embedding: they become 1 for base and adapter.
    """
    base = layer.get_base_layer()
    own = dict(base.named_parameters(recurse=False))
    for name in own:
        setattr(base, name, nn.Parameter(weights[name].float(), requires_grad=False))
    for name, buffer in base.named_buffers(recurse=False):
        if buffer.is_meta:
            setattr(base, name, torch.ones_like(buffer, dtype=torch.float32, device="cpu"))
    try:
        yield base
    finally:
        layer.merged_adapters.clear()
        for name, parameter in own.items():
            setattr(base, name, parameter)


def merge_layer(layer: LoraLayer, weights: Mapping[str, torch.Tensor], name: str) -> dict[str, torch.Tensor]:
    """Merge `layer` into its base weights, in float32. `weights` stay as they are.

    Raises `UserError` where PEFT cannot merge it, or where the result is NaN or infinite.
    """
    with base_layer_with(layer, weights) as base:
        try:
            layer.merge(safe_merge=True, adapter_names=[ADAPTER_NAME])  # in a copy of the weights
        except (ValueError, RuntimeError) as error:
            raise UserError(where=name, problem=f"the layer cannot be merged: {first_line(error)}.") from error
        return {parameter: value.detach() for parameter, value in base.named_parameters(recurse=False)}
