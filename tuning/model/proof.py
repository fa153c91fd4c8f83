"""Proof that a merged checkpoint is base and adapter: tensor by tensor, layer by layer, and by the model's answers."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import nn
from tqdm import tqdm
from transformers import PreTrainedModel

from tuning.model.merge import Entry, Merge, holding, merge_layer, read_layer
from tuning.model.merged_files import written_bytes
from tuning.model.published import DTYPES, Checkpoint, Stored, read_bytes, read_tensor

PROBES = 64
POSITIONS = 64
TOLERANCES = {"F64": 1e-3, "F32": 1e-3, "F16": 2e-2, "BF16": 5e-2}
"""How far logits may be from those of base and adapter in float32, relative to the largest: a weight's rounding."""


@dataclass
class WeightProof:
    """What was found in the written weights. `faults`: how far off, and what is; the worst is named.

    `lost` and `effect`: of what the adapter adds to its layers' outputs, the share that rounding takes away is their
    quotient.
    """

    faults: list[tuple[float, str]] = field(default_factory=list)
    layers: int = 0
    lost: float = 0.0
    effect: float = 0.0

    @property
    def worst(self) -> str:
        return max(self.faults)[1] if self.faults else ""

    @property
    def lost_share(self) -> float:
        return self.lost / self.effect if self.effect else 0.0


def prove_weights(merge: Merge, written: Checkpoint, dtype: torch.dtype | None) -> WeightProof:
    """Read every written tensor back. What stays must be the base's, bit for bit; what changes, the merge rounded once.

    The merge itself must do what the adapter does: on random inputs, a layer's merged float32 weight gives what PEFT's
    own forward of base and adapter gives.
    """
    proof, tensors = WeightProof(), written.tensors
    entries = [(key, entry) for shard in merge.shards.values() for key, entry in shard.items()]
    for key, entry in tqdm(entries, desc="checking weights", unit="tensor"):
        found = tensors[key]
        if isinstance(entry.change, LoraLayer):
            prove_layer(merge, key, entry, found, proof)
            continue
        stays = entry.change is None and found.dtype == entry.source.dtype
        pieces = read_bytes(entry.source) if stays else written_bytes(merge, entry, dtype)
        if not _are_equal(pieces, found):
            proof.faults.append((_difference(entry, found), f"{key} is not what base and adapter make of it"))
    return proof


def _are_equal(wanted: Iterator[Any], found: Stored) -> bool:
    """Whether these pieces are the bytes of a stored tensor."""
    with found.file.open("rb") as opened:
        opened.seek(found.start)
        same = all(opened.read(len(piece)) == piece for piece in wanted)
        return same and opened.tell() == found.end


def _difference(entry: Entry, found: Stored) -> float:
    """How far a tensor is from the base's, which orders faults; without bound where it is no number."""
    if found.dtype not in DTYPES or entry.source.dtype not in DTYPES:
        return 0.0
    difference = (read_tensor(found).float() - read_tensor(entry.source).float()).abs().max().item()
    return difference if difference == difference else float("inf")


def prove_layer(merge: Merge, key: str, entry: Entry, written: Stored, proof: WeightProof) -> None:
    """Hold a merged layer, before and after rounding, against PEFT's forward of the layer it was made from."""
    layer, weights = entry.change, read_layer(merge, entry)
    assert isinstance(layer, LoraLayer)
    name, _, end = entry.name.rpartition(".")
    inputs = probe_inputs(layer.get_base_layer(), weights["weight"])
    with torch.no_grad():
        with holding(layer, weights) as base:
            adapted, plain = layer(inputs), base(inputs)
        exact = merge_layer(layer, weights, name)
        with holding(layer, exact) as base:
            error = torch.linalg.vector_norm(base(inputs) - adapted).item()
        found = read_tensor(written)
        with holding(layer, {**exact, end: found}) as base:
            rounding = base(inputs) - adapted
    if not torch.equal(found, exact[end].to(found.dtype)):
        far = torch.linalg.vector_norm(rounding).item()
        proof.faults.append((far, f"{key} is not what base and adapter make of it"))
    effect = adapted - plain
    allowed = 1e-3 * torch.linalg.vector_norm(effect).item() + 1e-5 * torch.linalg.vector_norm(adapted).item()
    if not error <= allowed:
        proof.faults.append((error, f"{name}: merged, the layer does not give what base and adapter give"))
    proof.layers += end == "weight"
    proof.lost -= (rounding * effect).sum().item()
    proof.effect += effect.square().sum().item()


def probe_inputs(layer: nn.Module, weight: torch.Tensor) -> torch.Tensor:
    """Random inputs for a layer, the same each time. `weight`: its own, whose shape says what it takes."""
    random = torch.Generator().manual_seed(0)
    if isinstance(layer, nn.Embedding):
        return torch.randint(weight.shape[0], (PROBES,), generator=random)
    if isinstance(layer, nn.modules.conv._ConvNd):
        return torch.randn(PROBES, layer.in_channels, *layer.kernel_size, generator=random)
    features = weight.shape[1] if isinstance(layer, nn.Linear) else weight.shape[0]  # transformers' Conv1D
    return torch.randn(PROBES, features, generator=random)


def last_logits(model: PreTrainedModel | PeftModel, batches: list[dict[str, Any]]) -> list[torch.Tensor]:
    """The logits of each batch of one row, at its last positions, in float32: `[positions, vocabulary]`."""
    with torch.no_grad():
        return [model(**batch).logits[0, -POSITIONS:].float() for batch in batches]


@dataclass(frozen=True)
class Comparison:
    """How far logits are from those they should be: `difference` of the largest of these, and equal first choices."""

    difference: float
    agreeing: int
    positions: int


def compare_logits(wanted: list[torch.Tensor], found: list[torch.Tensor]) -> Comparison:
    a, b = torch.cat(wanted), torch.cat(found)
    difference = ((a - b).abs().max() / a.abs().max().clamp(min=1e-30)).item()
    return Comparison(difference, int((a.argmax(-1) == b.argmax(-1)).sum()), len(a))
