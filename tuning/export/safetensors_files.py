"""A checkpoint on disk: where each tensor lies in its files, and which weight of the model it becomes."""

import json
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from tuning.errors import UserError

SINGLE_FILE, INDEX = "model.safetensors", "model.safetensors.index.json"
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""The formats that weights are merged in and cast to; all others are only ever copied."""
NAMES = {dtype: name for name, dtype in DTYPES.items()}
CHUNK = 1 << 25


@dataclass(frozen=True)
class Stored:
    """A tensor in a safetensors file; its bytes are those from `start` to `end` of the file."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True)
class Checkpoint:
    """The files of a checkpoint's weights: file name → published key → tensor, in the order in which they lie."""

    folder: Path
    shards: dict[str, dict[str, Stored]]

    @property
    def tensors(self) -> dict[str, Stored]:
        return {key: stored for shard in self.shards.values() for key, stored in shard.items()}


@dataclass(frozen=True)
class WeightTarget:
    """The model's weight that a published tensor becomes; `converted`: not as it is, but fused, split or turned."""

    name: str
    converted: bool


def find_folder(name: str) -> Path:
    """The local folder of a checkpoint, downloaded where it is of the hub. Raises `UserError` if there is none."""
    local = Path(name).expanduser()
    if local.is_dir():
        return local
    try:
        return Path(snapshot_download(name, ignore_patterns=["*/*", "*.bin", "*.pth", "*.gguf"]))
    except (HfHubHTTPError, LocalEntryNotFoundError, HFValidationError, OSError) as error:
        raise UserError(
            where=name, problem=f"cannot be loaded: {str(error).splitlines()[0]}", fix="Give a folder or a hub id."
        ) from error


def read_checkpoint(folder: Path) -> Checkpoint:
    """Look up every tensor of a checkpoint. Raises `UserError` where its weights are not there as safetensors."""
    try:
        files = [SINGLE_FILE]
        if (folder / INDEX).is_file():
            files = sorted(set(json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"].values()))
        return Checkpoint(folder, {file: read_header(folder / file) for file in files})
    except (OSError, ValueError, KeyError, struct.error) as error:
        what = f"has no readable weights: {error}."
        raise UserError(where=str(folder), problem=what, fix="The weights must be there as safetensors.") from error


def read_header(file: Path) -> dict[str, Stored]:
    """Format: https://huggingface.co/docs/safetensors (8 bytes with the length of a JSON header, then the data)."""
    with file.open("rb") as opened:
        (length,) = struct.unpack("<Q", opened.read(8))
        header = json.loads(opened.read(length))
    header.pop("__metadata__", None)
    found = {
        key: Stored(file, entry["dtype"], tuple(entry["shape"]), *(8 + length + at for at in entry["data_offsets"]))
        for key, entry in header.items()
    }
    if file.stat().st_size < max((stored.end for stored in found.values()), default=0):
        raise ValueError(f"{file.name} is cut short")
    return dict(sorted(found.items(), key=lambda item: item[1].start))


def read_bytes(stored: Stored) -> Iterator[bytes]:
    """A tensor as it lies in its file, in pieces."""
    with stored.file.open("rb") as opened:
        opened.seek(stored.start)
        for start in range(stored.start, stored.end, CHUNK):
            yield opened.read(min(CHUNK, stored.end - start))


def read_tensor(stored: Stored) -> torch.Tensor:
    """A tensor of one of `DTYPES`."""
    data = bytearray(b"".join(read_bytes(stored)))
    tensor = torch.frombuffer(data, dtype=DTYPES[stored.dtype]) if data else torch.empty(0, dtype=DTYPES[stored.dtype])
    return tensor.reshape(stored.shape)


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data


def write_shard(file: Path, layout: dict[str, tuple[str, tuple[int, ...], int]], data: Iterable[Any]) -> None:
    """Write a safetensors file: key → dtype, shape and length in bytes, then the tensors' bytes one after the other."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for key, (dtype, shape, length) in layout.items():
        header[key] = {"dtype": dtype, "shape": shape, "data_offsets": (position, position + length)}
        position += length
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as opened:
        opened.write(struct.pack("<Q", len(text)) + text)
        for piece in data:
            opened.write(piece)


def find_places(skeleton: PreTrainedModel, keys: Iterable[str]) -> dict[str, WeightTarget]:
    """Published key → place in the model, by transformers' own rules for loading this model.

    The last step is `convert_and_load_state_dict_in_model`'s: a key that needs no new name keeps its own.
    """
    conversions = get_model_conversion_mapping(skeleton)
    renamings = [rule for rule in conversions if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in conversions if isinstance(rule, WeightConverter)]
    prefix, known = skeleton.base_model_prefix, skeleton.state_dict()
    places = {}
    for key in keys:
        name, pattern = rename_source_key(key, renamings, converters, prefix, known)
        if name not in known and key in known:
            name, pattern = rename_source_key(key, [], [], prefix, known)
        places[key] = WeightTarget(name, converted=pattern is not None)
    return places


def publish_name(skeleton: PreTrainedModel, name: str, like: dict[str, WeightTarget]) -> str:
    """A key for a weight that a checkpoint with the places `like` lacks; it loads into `name`."""
    rules = [rule for rule in get_model_conversion_mapping(skeleton) if type(rule) is WeightRenaming]
    back = [rule.reverse_transform() for rule in reversed(rules)]

    def reverse(key: str) -> str:
        return rename_source_key(key, back, [], reverse=True)[0]

    old_style = any(place.name != key and reverse(place.name) == key for key, place in like.items())
    candidates = [reverse(name), name] if old_style else [name, reverse(name)]
    for key in candidates:
        if key not in like and find_places(skeleton, [key])[key].name == name:
            return key
    raise UserError(where=name, problem="cannot be stored beside the weights of the base model.")
