"""The weights of a trained model under the keys and in the files of its base."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from transformers import PreTrainedModel

from tuning.export.checkpoint_keys import KeyRules
from tuning.export.merge import find_tied
from tuning.model.saved_weights import FORMATS, SavedWeights, StoredTensor, TensorHeader, write_tensors


@dataclass(frozen=True, eq=False)
class Group:
    """Tensors that are fused, split or transposed into weights: `stored` by key, and the `names` of the weights."""

    stored: Mapping[str, StoredTensor]
    names: tuple[str, ...]


@dataclass(frozen=True)
class Place:
    """A tensor of the saved model: its `key` and `file`.

    `source`: the name of the weight that it is, the group that it is made from, or the base's tensor that it stays.
    `base_key`: its key in the base, which may be an older one.
    """

    key: str
    file: str
    source: str | Group | StoredTensor
    base_key: str = ""


@dataclass(frozen=True)
class BaseWeights:
    """Where a model's weights lie in its base. `places`: in the order of the files and of the tensors in them.

    `left_out`: keys of the base that the model has no place for.
    """

    base: SavedWeights
    rules: KeyRules
    places: list[Place]
    left_out: list[str]

    @property
    def copied(self) -> list[StoredTensor]:
        """The base's tensors that transformers does not load. They are saved as they are: engines use them."""
        return [place.source for place in self.places if isinstance(place.source, StoredTensor)]

    @property
    def keys(self) -> set[str]:
        """Those of the saved model."""
        return {place.key for place in self.places}

    def without_lost(self) -> "BaseWeights":
        """Without the base's tensors, if the base is gone: what was trained is worth more."""
        if all(tensor.file.exists() for tensor in self.copied):
            return self
        return replace(self, places=[place for place in self.places if not isinstance(place.source, StoredTensor)])

    @property
    def renamed(self) -> list[Place]:
        """The tensors that engines do not find under the base's keys."""
        return [place for place in self.places if place.base_key not in ("", place.key)]

    def write(self, weights: Mapping[str, torch.Tensor], folder: Path) -> None:
        """Write `weights` (by name) one tensor at a time, with an index where the base has one."""
        tensors, files = TensorsToSave(self, weights), dict[str, list[TensorHeader]]()
        for place in self.places:
            files.setdefault(place.file, []).append(tensors.header(place))
        for file, headers in files.items():
            write_tensors(folder / file, headers, (tensors[header.key] for header in headers))
        total = sum(header.nbytes for headers in files.values() for header in headers)
        self.base.write_index_like(folder, {place.key: place.file for place in self.places}, total)


@dataclass(frozen=True)
class Header:
    """See `TensorHeader`."""

    key: str
    format: str
    shape: tuple[int, ...]
    nbytes: int


class TensorsToSave(Mapping[str, torch.Tensor]):
    """The tensors of a saved model by key, made from `weights`, by name, when you ask for them."""

    def __init__(self, base: BaseWeights, weights: Mapping[str, torch.Tensor]):
        self.rules, self.weights = base.rules, weights
        self.places = {place.key: place for place in base.places}
        self._last: tuple[Group, dict[str, torch.Tensor]] | None = None  # a layer's experts lie side by side

    def header(self, place: Place) -> TensorHeader:
        source = place.source
        if isinstance(source, StoredTensor):
            return source
        weight = self.weights[source.names[0] if isinstance(source, Group) else source]
        shape = source.stored[place.base_key].shape if isinstance(source, Group) else tuple(weight.shape)
        return Header(place.key, FORMATS[weight.dtype], shape, torch.Size(shape).numel() * weight.itemsize)

    def __getitem__(self, key: str) -> torch.Tensor:
        place = self.places[key]
        if isinstance(place.source, StoredTensor):
            return place.source.read()
        if isinstance(place.source, str):
            return self.weights[place.source].cpu()
        if self._last is None or self._last[0] is not place.source:
            self._last = place.source, self._revert_group(place.source)
        return self._last[1][place.base_key].cpu()

    def _revert_group(self, group: Group) -> dict[str, torch.Tensor]:
        weights = {name: self.weights[name] for name in group.names}
        made = self.rules.revert(weights, {key: tensor.shape for key, tensor in group.stored.items()})
        assert made is not None, "plan_weights has refused it"
        return made

    def __iter__(self) -> Iterator[str]:
        return iter(self.places)

    def __len__(self) -> int:
        return len(self.places)


def plan_weights(base: SavedWeights, skeleton: PreTrainedModel) -> BaseWeights | None:
    """Find the place of each weight of a model in its base; None where transformers stores some in another layout."""
    rules = KeyRules(skeleton)
    targets, groups = rules.targets(base), dict[str, Group]()
    for keys, names in rules.groups({key: torch.empty(one.shape, device="meta") for key, one in base.stored.items()}):
        group = Group({key: base.stored[key] for key in keys}, tuple(names))
        weights = {name: rules.weights[name].to("meta") for name in names}
        if rules.revert(weights, {key: base.stored[key].shape for key in keys}) is None:
            return None
        groups |= dict.fromkeys(keys, group)
    ignored = [re.compile(pattern) for pattern in skeleton._keys_to_ignore_on_load_unexpected or ()]
    places, left_out = list[Place](), list[str]()
    for file, stored in base.shards.items():
        for key, tensor in stored.items():
            name = targets[key].name
            if key in groups or name in rules.weights:
                places.append(Place(rules.key_for_engines(key), file, groups.get(key, name), key))
            elif any(pattern.search(name) for pattern in ignored):
                places.append(Place(key, file, tensor))
            else:
                left_out.append(key)
    there = {name for place in places for name in names_of(place)}
    tied = {name for group in find_tied(skeleton) if group & there for name in group}
    unsaved = [re.compile(pattern) for pattern in skeleton._keys_to_ignore_on_save or ()]
    for name in sorted(rules.weights.keys() - there - tied):
        if not any(pattern.search(name) for pattern in unsaved):
            places.append(Place(rules.new_key(name, targets), places[-1].file, name))
    return BaseWeights(base, rules, places, left_out)


def names_of(place: Place) -> tuple[str, ...]:
    """The weights of the model that a tensor is made from."""
    if isinstance(place.source, StoredTensor):
        return ()
    return (place.source,) if isinstance(place.source, str) else place.source.names
