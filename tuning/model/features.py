"""Features of images on disk, one file an image, for several processes and runs at once."""

import hashlib
import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from tuning.console import say
from tuning.errors import UserError


def digest(*items: Any) -> str:
    """A name for `items`, tensors by shape, precision and contents, all else as Python writes it: 40 hexadecimal
    digits.
    """
    found = hashlib.blake2b(digest_size=20)
    for item in items:
        if isinstance(item, torch.Tensor):
            found.update(f"{item.dtype} {tuple(item.shape)}\0".encode())
            found.update(item.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
        else:
            found.update(f"{item!r}\0".encode())
    return found.hexdigest()


@dataclass
class FeatureFolder:
    """Features by their key. A file is whole or not there; one that cannot be read counts as not there.

    `full`: the disk takes no more, so that nothing is written any longer.
    """

    path: Path
    full: bool = False

    @classmethod
    def open(cls, folder: str, option: str) -> "FeatureFolder":
        """Raises `UserError` that names `option` where `folder` neither exists nor can be made."""
        path = Path(folder).expanduser()
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(where=f"{option} {folder}", problem=f"cannot be made: {error.strerror}.") from error
        return cls(path)

    def load(self, key: str) -> dict[str, torch.Tensor] | None:
        try:
            return load_file(self._file(key))
        except (OSError, SafetensorError):
            return None

    def save(self, key: str, features: dict[str, torch.Tensor]) -> None:
        if self.full:
            return
        file = self._file(key)
        unfinished = file.with_suffix(f".{uuid4().hex}")
        try:
            file.parent.mkdir(exist_ok=True)
            unfinished.write_bytes(save(features))
            os.replace(unfinished, file)
        except OSError as error:
            self.full = True
            say(f"{self.path} takes no more features ({error.strerror}): the run goes on without writing any.")
        finally:
            with suppress(OSError):
                unfinished.unlink()

    def _file(self, key: str) -> Path:
        return self.path / key[:2] / f"{key[2:]}.safetensors"
