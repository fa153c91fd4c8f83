"""A merge → the files of a complete checkpoint, written tensor by tensor."""

import json
from collections.abc import Iterator, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import PreTrainedConfig

from tuning.model.merge import Entry, Merge, value_of
from tuning.model.published import DTYPES, INDEX, NAMES, Checkpoint, read_bytes, read_tensor, tensor_bytes, write_shard

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
