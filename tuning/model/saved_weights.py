"""Read and write the weights of a saved model or adapter: all of this package's own work with safetensors files."""

import json
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from transformers.utils import ADAPTER_SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from tuning.errors import UserError, first_line
from tuning.files import write_json

NOT_DOWNLOADED = ["*/*", "*.bin", "*.pth", "*.gguf"]

FORMATS = {
    **{torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"},
    **{torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8"},
    **{torch.uint8: "U8", torch.bool: "BOOL"},
}
"""What safetensors calls the dtypes that weights and buffers have."""


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a safetensors file. `format`: its dtype as the file names it (F32, BF16, F8_E4M3, …)."""

    file: Path
    key: str
    format: str
    shape: tuple[int, ...]
    nbytes: int

    def read(self) -> torch.Tensor:
        """The tensor. It is a view of the file: only the pages that you use are read from the disk."""
        with safe_open(self.file, framework="pt") as opened:
            return opened.get_tensor(self.key)


class SavedWeights(Mapping[str, torch.Tensor]):
    """The weights in a folder, by their keys in its files. A tensor is read when you ask for it.

    `shards`: file name → key → stored tensor, in the order in which the tensors lie in the file. `stored`: the same for
    all files at once. `index`: what names the files, if they are several.

    Takes the first that is there: the weights of an adapter, of a model in one file, of a model with an index. Raises
    `OSError`, `SafetensorError`, `ValueError` or `KeyError` where a file is missing or damaged: see `open_weights`.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        single = [name for name in (ADAPTER_SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_NAME) if (folder / name).is_file()][:1]
        index = folder / SAFE_WEIGHTS_INDEX_NAME
        self.index: dict[str, Any] = {} if single else json.loads(index.read_text(encoding="utf-8"))
        files = single or sorted(set(self.index["weight_map"].values()))
        self.shards = {name: _list_tensors(folder / name) for name in files}
        self.stored = {key: stored for shard in self.shards.values() for key, stored in shard.items()}

    def write_index_like(self, folder: Path, files: Mapping[str, str], nbytes: int) -> None:
        """Where these weights have an index, write one for others. `files`: by key. `nbytes`: of all tensors."""
        if self.index:
            metadata = {**self.index.get("metadata", {}), "total_size": nbytes}
            index = {"metadata": metadata, "weight_map": dict(sorted(files.items()))}
            write_json(folder / SAFE_WEIGHTS_INDEX_NAME, index)

    def __getitem__(self, key: str) -> torch.Tensor:
        return self.stored[key].read()

    def __iter__(self) -> Iterator[str]:
        return iter(self.stored)

    def __len__(self) -> int:
        return len(self.stored)


def open_weights(name: str | Path) -> SavedWeights:
    """The weights of a model or adapter that the user named: a folder, or a hub id, which is downloaded.

    Raises `UserError` where the weights are missing, damaged, or not stored as safetensors.
    """
    folder = Path(name).expanduser()
    try:
        if not folder.is_dir():
            folder = Path(snapshot_download(str(name), ignore_patterns=NOT_DOWNLOADED))
        return SavedWeights(folder)
    except (OSError, SafetensorError, ValueError, KeyError) as error:  # ValueError: also no JSON, or no hub id
        raise UserError(
            where=str(name),
            problem=f"the weights cannot be read: {first_line(error)}.",
            fix="Give a folder or a hub id whose weights are complete and stored as safetensors.",
        ) from error


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """The bytes of a tensor as they lie in a safetensors file, whatever its dtype."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data


class TensorHeader(Protocol):
    """What a safetensors file says of a tensor; see `StoredTensor`."""

    @property
    def key(self) -> str: ...
    @property
    def format(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def nbytes(self) -> int: ...


def write_tensors(file: Path, headers: Sequence[TensorHeader], tensors: Iterable[torch.Tensor]) -> None:
    """Write a safetensors file one tensor at a time: safetensors' own `save_file` needs all of them in memory.

    Format: https://huggingface.co/docs/safetensors (8 bytes with the length of a JSON header, the header, the data).
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    start = 0
    for one in headers:
        end = start + one.nbytes
        header[one.key] = {"dtype": one.format, "shape": one.shape, "data_offsets": (start, end)}
        start = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as opened:
        opened.write(struct.pack("<Q", len(text)) + text)
        for tensor in tensors:
            opened.write(tensor_bytes(tensor))


def _list_tensors(file: Path) -> dict[str, StoredTensor]:
    found = {}
    with safe_open(file, framework="pt") as opened:
        for key in opened.offset_keys():
            header, nbytes = opened.get_slice(key), opened.get_tensor(key).nbytes  # a view: no numbers are read
            found[key] = StoredTensor(file, key, header.get_dtype(), tuple(header.get_shape()), nbytes)
    return found
