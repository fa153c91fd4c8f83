"""A merge → the files of a complete checkpoint, written tensor by tensor."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import nn
from tqdm import tqdm
from transformers import PreTrainedConfig, PreTrainedModel

from tuning.export.merge import Entry, Merge, holding, merge_layer, read_layer, value_of
from tuning.export.safetensors_files import (
    DTYPES,
    INDEX,
    NAMES,
    Checkpoint,
    Stored,
    read_bytes,
    read_tensor,
    tensor_bytes,
    write_shard,
)

NOT_COPIED = (
    *(".safetensors", ".bin", ".pth", ".pt", ".gguf", ".h5", ".msgpack", ".index.json"),
    *(".md", ".html", ".jsonl"),
)
"""Weights in any format; model cards, which tell of the base model; pages and rows, which may show users' data."""


def stored_dtype(entry: Entry, dtype: torch.dtype | None) -> str:
    """The format that a tensor is written in: the base's own, unless another is asked for."""
    return NAMES[dtype] if dtype and entry.source.dtype in DTYPES else entry.source.dtype


def shard_layout(shard: dict[str, Entry], dtype: torch.dtype | None) -> dict[str, tuple[str, tuple[int, ...], int]]:
    """Key → dtype, shape and length in bytes of what `write_weights` writes."""
    layout = {}
    for key, entry in shard.items():
        name, length = stored_dtype(entry, dtype), entry.source.end - entry.source.start
        if name != entry.source.dtype:
            length = length // DTYPES[entry.source.dtype].itemsize * DTYPES[name].itemsize
        layout[key] = (name, entry.source.shape, length)
    return layout


def count_bytes(merge: Merge, dtype: torch.dtype | None) -> int:
    """How much `write_weights` writes."""
    return sum(length for shard in merge.shards.values() for *_, length in shard_layout(shard, dtype).values())


def written_bytes(merge: Merge, entry: Entry, dtype: torch.dtype | None) -> Iterator[Any]:
    """A tensor of the merged checkpoint. What does not change is copied; what does is rounded once, from float32."""
    name = stored_dtype(entry, dtype)
    if entry.change is not None:
        yield tensor_bytes(value_of(merge, entry).to(DTYPES[name]))
    elif name != entry.source.dtype:
        yield tensor_bytes(read_tensor(entry.source).to(DTYPES[name]))
    else:
        yield from read_bytes(entry.source)


def write_weights(merge: Merge, folder: Path, dtype: torch.dtype | None) -> None:
    """Write every shard under the base's file and key names. No more than a tensor is held in memory."""
    with tqdm(total=count_bytes(merge, dtype), desc="merging", unit="B", unit_scale=True) as progress:

        def pieces(shard: dict[str, Entry]) -> Iterator[Any]:
            for entry in shard.values():
                for piece in written_bytes(merge, entry, dtype):
                    yield piece
                    progress.update(len(piece))

        for file, shard in merge.shards.items():
            write_shard(folder / file, shard_layout(shard, dtype), pieces(shard))
    if (merge.base.folder / INDEX).is_file():
        weight_map = {key: file for file, shard in merge.shards.items() for key in shard}
        index = {"metadata": {"total_size": count_bytes(merge, dtype)}, "weight_map": dict(sorted(weight_map.items()))}
        write_json(folder / INDEX, index)


def copy_files(
    merge: Merge, folder: Path, config: PreTrainedConfig, dtype: torch.dtype | None, *, without: Sequence[str]
) -> None:
    """Copy what is beside the weights, and change what is no longer so in config.json.

    `without`: patterns of names to leave out, such as those of a run that trained the base in its folder.
    """
    for file in merge.base.folder.iterdir():
        left_out = file.name.endswith(NOT_COPIED) or any(fnmatch(file.name, pattern) for pattern in without)
        if file.is_file() and not left_out and not file.name.startswith("."):
            (folder / file.name).write_bytes(file.read_bytes())
    raw = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if dtype:
        _set_dtype(raw, str(dtype).removeprefix("torch."))
    if merge.untied:
        text = next(
            (raw[name] for name in config.sub_configs if getattr(config, name) is config.get_text_config()), raw
        )
        raw["tie_word_embeddings"] = text["tie_word_embeddings"] = False
    if "image_grid_pinpoints" in raw:  # the processor's, which may be the adapter's own
        raw["image_grid_pinpoints"] = config.image_grid_pinpoints
    write_json(folder / "config.json", raw)


def _set_dtype(raw: dict[str, Any], dtype: str) -> None:
    raw["torch_dtype" if "torch_dtype" in raw else "dtype"] = dtype
    for part in raw.values():
        if isinstance(part, dict) and ("torch_dtype" in part or "dtype" in part):
            _set_dtype(part, dtype)


def write_json(file: Path, value: Any) -> None:
    file.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def compare_layouts(merge: Merge, written: Checkpoint, dtype: torch.dtype | None) -> list[str]:
    """What of the written keys, shapes and formats, file by file, is not the base checkpoint's."""
    problems = []
    for file, shard in merge.shards.items():
        wanted, found = shard_layout(shard, dtype), written.shards.get(file, {})
        problems += [f"{key} is missing in {file}" for key in wanted if key not in found]
        problems += [f"{key} is unexpected in {file}" for key in found if key not in wanted]
        for key in wanted.keys() & found.keys():
            have = found[key]
            if (have.dtype, have.shape, have.end - have.start) != wanted[key]:
                problems.append(f"{key} is {have.dtype} {have.shape}, not {wanted[key][0]} {wanted[key][1]}")
    return problems + [f"{file} is unexpected" for file in written.shards if file not in merge.shards]


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
