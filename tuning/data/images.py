"""The image column of a row → pictures in RGB."""

import base64
import binascii
import io
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps, UnidentifiedImageError

from tuning.errors import UserError


def list_images(value: Any) -> list[Any]:
    """The stored images of a row as a list: nothing, one image, or several."""
    if value is None:
        return []
    return list(value) if isinstance(value, (list, tuple)) else [value]


def load_image(stored: Any, folder: Path | None, where: str) -> Image.Image:
    """Decode one stored image to RGB: PIL, `{"bytes", "path"}`, a path, a data URI or base64 text.

    Relative paths start from `folder`, the data file's. The camera's orientation (EXIF) is applied, and transparent
    pictures are laid on white. Raises `UserError` when there is no such file or it is not a readable image.
    """
    try:
        image = _open(stored, folder, where)
        image.load()
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"the image cannot be read: {_reason(error)}.", where, "Replace it or drop the row.") from error
    return to_rgb(ImageOps.exif_transpose(image))


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert any mode to RGB; transparency shows white."""
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def _open(stored: Any, folder: Path | None, where: str) -> Image.Image:
    if isinstance(stored, Image.Image):
        return stored
    if isinstance(stored, dict) and stored.get("bytes"):
        return Image.open(io.BytesIO(stored["bytes"]))
    if isinstance(stored, dict) and stored.get("path"):
        stored = stored["path"]
    if isinstance(stored, bytes):
        return Image.open(io.BytesIO(stored))
    if not isinstance(stored, str) or not stored:
        raise UserError(f"expected an image, found {type(stored).__name__} {str(stored)[:60]!r}.", where)
    if stored.startswith("data:"):
        return Image.open(io.BytesIO(_decode_base64(stored.partition(",")[2])))
    path = Path(folder or ".", stored)
    if len(stored) < 1024 and path.is_file():
        return Image.open(path)
    decoded = _decode_base64(stored) if len(stored) >= 64 else b""
    if not decoded:
        advice = "Paths are relative to the data file's folder."
        raise UserError(f"there is no image file {str(path)[:500]}.", where, advice)
    return Image.open(io.BytesIO(decoded))


def _decode_base64(text: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except binascii.Error:
        return b""


def _reason(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        return "it is not in a known image format"
    return str(error).splitlines()[0] if str(error) else type(error).__name__
