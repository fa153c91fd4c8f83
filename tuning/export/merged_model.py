"""Write a merged model: its weights tensor by tensor, and the files that lie with them."""

import json
from collections.abc import Iterator, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import PreTrainedConfig
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME

from tuning.export.merge import Entry, Merge
from tuning.export.proof import WeightProof
from tuning.export.stored_group import added_to
from tuning.files import write_json
from tuning.model.saved_weights import write_tensors

NOT_COPIED = (
    *(".safetensors", ".bin", ".pth", ".pt", ".gguf", ".h5", ".msgpack", ".index.json"),
    *(".md", ".html", ".jsonl"),
)
"""Weights in any format; model cards, which describe the base model; pages and rows, which may show users' data."""


def write_weights(merge: Merge, folder: Path) -> WeightProof:
    """Write every shard under the base's file and key names. Each tensor is made once, checked, and written."""
    proof = WeightProof()
    total = sum(entry.nbytes for entry in merge.entries)
    with tqdm(total=total, desc="merging", unit="B", unit_scale=True) as progress:

        def checked_tensors(entries: list[Entry]) -> Iterator[torch.Tensor]:
            for entry, value in merge.tensors(entries):
                proof.check(merge, entry, value)
                yield value
                progress.update(value.nbytes)

        for file, entries in merge.shards.items():
            write_tensors(folder / file, entries, checked_tensors(entries))
    added_to.cache_clear()
    if merge.base.has_index:
        weight_map = {entry.key: file for file, entries in merge.shards.items() for entry in entries}
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        write_json(folder / SAFE_WEIGHTS_INDEX_NAME, index)
    return proof


def copy_files(
    merge: Merge, folder: Path, config: PreTrainedConfig, dtype: torch.dtype | None, *, exclude: Sequence[str]
) -> None:
    """Copy the base model's other files, and correct what the merge changes in config.json.

    `exclude`: patterns of names to leave out, such as the files of a run that trained the base in its folder.
    """
    for file in merge.base.folder.iterdir():
        excluded = file.name.endswith(NOT_COPIED) or any(fnmatch(file.name, pattern) for pattern in exclude)
        if file.is_file() and not excluded and not file.name.startswith("."):
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
