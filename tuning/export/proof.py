"""Prove that a merged model is base and adapter: every byte of its files, every merged layer, and its logits."""

import gc
import zlib
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import nn
from tqdm import tqdm
from transformers import PreTrainedConfig, PreTrainedModel

from tuning.config.options import ModelSource
from tuning.export.merge import Entry, Merge, base_layer_with, merge_layer
from tuning.export.stored_group import StoredGroup, added_to
from tuning.model import load
from tuning.model.answering import without_masked
from tuning.model.attention import choose_attention
from tuning.model.lora import Adapter, BaseModel, add_adapter
from tuning.model.mllama import patch_mllama_cross_attention
from tuning.model.picture_dtype import patch_picture_dtype
from tuning.model.saved_weights import SavedWeights, tensor_bytes

PROBES = 64  # random inputs of a layer
POSITIONS = 64  # last tokens of a row whose logits are compared
TOLERANCES = {"F64": 1e-3, "F32": 1e-3, "F16": 2e-2, "BF16": 5e-2}
"""How far logits may be from those of base and adapter in float32, relative to the largest: a weight's rounding."""


@dataclass
class WeightProof:
    """What is known of the written weights. `faults`: what is wrong with them, a sentence each.

    `checksums`: key → CRC-32 of the bytes that its file must hold. `layers`: how many merged layers were run.
    `lost` / `effect`: the share of what the adapter adds to its layers' outputs that rounding loses. `groups`: those of
    tensors that were checked together.
    """

    faults: list[str] = field(default_factory=list)
    checksums: dict[str, int] = field(default_factory=dict)
    layers: int = 0
    lost: float = 0.0
    effect: float = 0.0
    groups: set[StoredGroup] = field(default_factory=set)

    @property
    def lost_share(self) -> float:
        return self.lost / self.effect if self.effect else 0.0

    def check(self, merge: Merge, entry: Entry, value: torch.Tensor) -> None:
        """Check the tensor `value` on its way to the file, and remember its bytes for `read_back`.

        A merged layer must do what PEFT's does. Of a tensor that does not change, the base's own bytes are remembered.
        """
        if isinstance(entry.change, StoredGroup):
            self._check_group(entry.change, entry, value)
        elif isinstance(entry.change, LoraLayer):
            self._check_layer(merge, entry, value)
        self.checksums[entry.key] = _checksum(entry.source.read() if entry.is_copy else value)

    def _check_layer(self, merge: Merge, entry: Entry, value: torch.Tensor) -> None:
        """Compare a merged layer, before and after rounding, with PEFT's own forward, on random inputs."""
        layer, weights = entry.change, merge.base_weights(entry)
        assert isinstance(layer, LoraLayer)
        name, _, parameter = entry.name.rpartition(".")
        inputs = probe_inputs(layer.get_base_layer(), weights["weight"])
        with torch.no_grad():
            with base_layer_with(layer, weights) as base:
                adapted, plain = layer(inputs), base(inputs)
            exact = merge_layer(layer, weights, name)
            with base_layer_with(layer, exact) as base:
                error = torch.linalg.vector_norm(base(inputs) - adapted).item()
            with base_layer_with(layer, {**exact, parameter: value}) as base:
                rounding = base(inputs) - adapted
        if not torch.equal(value, exact[parameter].to(value.dtype)):
            self.faults.append(f"{entry.key} is not what base and adapter make of it")
        effect = adapted - plain
        allowed = 1e-3 * torch.linalg.vector_norm(effect).item() + 1e-5 * torch.linalg.vector_norm(adapted).item()
        if not error <= allowed:  # also where it is NaN
            self.faults.append(f"{name}: merged, the layer does not give what base and adapter give")
        self.layers += parameter == "weight"
        self.lost -= (rounding * effect).sum().item()
        self.effect += effect.square().sum().item()

    def _check_group(self, group: StoredGroup, entry: Entry, value: torch.Tensor) -> None:
        """Check once that transformers loads what base and adapter make, and measure what rounding loses of it."""
        if group not in self.groups:
            self.groups.add(group)
            self.layers += len(group.layers)
            if fault := group.find_fault():
                self.faults.append(fault)
        effect = added_to(group)[entry.source.key]
        rounding = value.float() - (entry.source.read().float() + effect)
        self.lost -= PROBES * (rounding * effect).sum().item()  # as the sum over random inputs of a layer
        self.effect += PROBES * effect.square().sum().item()

    def read_back(self, merge: Merge, folder: Path) -> None:
        """Read the files in `folder`: the same keys, shapes and formats as planned, and the bytes that were checked."""
        written = SavedWeights(folder)
        expected = {(file, e.key, e.format, e.source.shape) for file, shard in merge.shards.items() for e in shard}
        found = {(file, t.key, t.format, t.shape) for file, shard in written.shards.items() for t in shard.values()}
        for problem, tensors in (("missing", expected - found), ("unexpected", found - expected)):
            self.faults += [f"{key} is {problem} in {file} as {kind} {s}" for file, key, kind, s in sorted(tensors)]
        for key in tqdm(written, desc="checking weights", unit="tensor"):
            if key in self.checksums and _checksum(written[key]) != self.checksums[key]:
                self.faults.append(f"{key} is not what base and adapter make of it")


def _checksum(tensor: torch.Tensor) -> int:
    """CRC-32 finds damage. A cryptographic hash would cost several times as much and protect from nobody here."""
    return zlib.crc32(tensor_bytes(tensor))


def probe_inputs(layer: nn.Module, weight: torch.Tensor) -> torch.Tensor:
    """Random inputs for a layer, the same each time. `weight`: its own, whose shape says what it takes."""
    random = torch.Generator().manual_seed(0)
    if isinstance(layer, nn.Embedding):
        return torch.randint(weight.shape[0], (PROBES,), generator=random)
    if isinstance(layer, nn.modules.conv._ConvNd):
        return torch.randn(PROBES, layer.in_channels, *layer.kernel_size, generator=random)
    features = weight.shape[1] if isinstance(layer, nn.Linear) else weight.shape[0]  # transformers' Conv1D
    return torch.randn(PROBES, features, generator=random)


@dataclass(frozen=True)
class Comparison:
    """`difference`: the largest between two models' logits, relative to the largest logit, and what it may be.

    `agreeing`: at how many of the `positions` both models choose the same token.
    """

    difference: float
    tolerance: float
    agreeing: int
    positions: int


def memory_for_logits(merge: Merge) -> int:
    """Bytes of memory that `compare_logits` needs: those of one model in float32, and some more."""
    return int(1.2 * sum(4 * torch.Size(entry.source.shape).numel() for entry in merge.entries))


def compare_logits(
    merge: Merge, folder: Path, base: BaseModel, adapter: Adapter, batches: list[dict[str, Any]]
) -> Comparison:
    """Load base and adapter, then the merged model in `folder` as a user would, and compare their logits in float32."""
    merged = replace(base.source, model_name_or_path=str(folder))
    expected = torch.cat(run_model(base.source, base.config, adapter, batches))
    found = torch.cat(run_model(merged, load.load_config(merged), None, batches))
    difference = (expected - found).abs().max() / expected.abs().max().clamp(min=1e-30)
    return Comparison(
        difference.item(),
        max(TOLERANCES[entry.format] for entry in merge.entries if entry.change is not None),
        int((expected.argmax(-1) == found.argmax(-1)).sum()),
        len(expected),
    )


def run_model(
    source: ModelSource, config: PreTrainedConfig, adapter: Adapter | None, batches: list[dict[str, Any]]
) -> list[torch.Tensor]:
    """Load a model, run it, and free its memory. Returns the last logits of each batch, `[positions, vocabulary]`."""
    attention = choose_attention(
        load.model_class(config),
        use_flash_attn=False,
        attn_implementation=None,
        dtype=torch.float32,
        device_type="cpu",
    )
    model: PreTrainedModel | PeftModel = load.load_model(
        source, config, dtype=torch.float32, attention=attention.loaded
    )
    patch_mllama_cross_attention(model)
    patch_picture_dtype(model)
    model = (add_adapter(model, adapter) if adapter else model).eval()
    with torch.no_grad():
        logits = [without_masked(model(**batch).logits[0, -POSITIONS:].float()) for batch in batches]
    del model
    gc.collect()
    return logits
