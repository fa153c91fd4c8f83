"""Stored images of a row → pictures in RGB, or only their size."""

import base64
import binascii
import io
import os
import struct
import warnings
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from tuning.data.image_download import fetch_image
from tuning.errors import UserError

THUMBNAIL = (320, 320)
ORIENTATION = 0x0112  # the EXIF tag; 5 to 8 turn the picture by a quarter (CIPA DC-008)
PNG_EXIF = ("exif", "Raw profile type exif", "XML:com.adobe.xmp", "xmp")
# What Pillow raises on damaged files: its decoders check little.
UNREADABLE = (
    *(UnidentifiedImageError, Image.DecompressionBombError, OSError, SyntaxError, ValueError, EOFError, struct.error),
    *(NotImplementedError, RuntimeError, TypeError, LookupError, ArithmeticError),
)


@dataclass(frozen=True)
class ImageRules:
    """What an image may be and where it may lie.

    `folder`: where relative paths start and which they may not leave; None for the data file's. `max_pixels` and
    `max_bytes` are of one image, before it is decoded.
    """

    folder: str | None = None
    allow_outside: bool = False
    allow_remote: bool = False
    max_pixels: int = 100_000_000
    max_bytes: int = 100_000_000


@dataclass(frozen=True)
class EncodedImage:
    """An image as it is stored: the file it lies in, or its bytes. `format`: what its header says, as in `png`."""

    content: Path | bytes
    format: str

    def read(self) -> bytes:
        return self.content if isinstance(self.content, bytes) else self.content.read_bytes()


def list_images(value: Any) -> list[Any]:
    """The stored images of a row as a list: nothing, one image, or several."""
    if value is None:
        return []
    return list(value) if isinstance(value, (list, tuple)) else [value]


def load_image(stored: Any, folder: Path | None, where: str, rules: ImageRules = ImageRules()) -> Image.Image:
    """Decode one stored image to RGB: PIL, `{"bytes", "path"}`, a path, a URL, a data URI or base64 text.

    Relative paths start from `folder`, the data file's. The camera's orientation (EXIF) is applied, transparent
    pictures are laid on white, and of an animation the first frame is taken. Raises `UserError` when there is no such
    file, it is not a readable image, or it breaks one of `rules`.
    """
    try:
        image = _open_checked(stored, folder, where, rules)
        image.load()
        return to_rgb(ImageOps.exif_transpose(image))
    except UNREADABLE as error:
        raise _unreadable(error, where) from error


def measure_image(stored: Any, folder: Path | None, where: str, rules: ImageRules = ImageRules()) -> tuple[int, int]:
    """Width and height as `load_image` would give them, from the image's header alone, under the same rules."""
    try:
        image = _open_checked(stored, folder, where, rules)
        turned = _reads_exif(image) and image.getexif().get(ORIENTATION, 1) in (5, 6, 7, 8)
    except UNREADABLE as error:
        raise _unreadable(error, where) from error
    return (image.height, image.width) if turned else image.size


def _reads_exif(image: Image.Image) -> bool:
    """Pillow would decode a PNG whose header has no EXIF to look for it behind the pixels, where it is not in use.

    The size that it tells of a TIFF is the turned one.
    """
    return image.format != "TIFF" and (image.format != "PNG" or any(key in image.info for key in PNG_EXIF))


def find_image(stored: Any, folder: Path | None, where: str, rules: ImageRules = ImageRules()) -> EncodedImage:
    """The encoded image that `load_image` would decode, under the same rules; only its header is read."""
    try:
        content = _find_encoded(stored, folder, where, rules)
        with _open(content, where, rules) as image:
            return EncodedImage(content, str(image.format).lower())
    except UNREADABLE as error:
        raise _unreadable(error, where) from error


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert any mode to RGB, 8 bits a channel; transparency shows white."""
    if image.mode.startswith("I") or image.mode == "F":  # 16 or 32 bits of grey: Pillow would cut them off at 255
        values = np.nan_to_num(np.asarray(image).astype(np.float64))
        top = 1.0 if image.mode == "F" and values.max(initial=0) <= 1 else 255.0 if image.mode == "F" else 65535.0
        image = Image.fromarray((values.clip(0, top) * (255 / top)).round().astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def _open_checked(stored: Any, folder: Path | None, where: str, rules: ImageRules) -> Image.Image:
    decoded = isinstance(stored, Image.Image)
    return _open(stored if decoded else _find_encoded(stored, folder, where, rules), where, rules)


def _open(content: Image.Image | Path | bytes, where: str, rules: ImageRules) -> Image.Image:
    if isinstance(content, Image.Image):
        image = content
    else:
        with _without_pillows_limit():
            image = Image.open(content if isinstance(content, Path) else io.BytesIO(content))
    if image.format == "EPS":  # a program in PostScript: Pillow would have Ghostscript run it
        raise UnidentifiedImageError
    if image.width * image.height > rules.max_pixels:
        raise UserError(
            where=where,
            problem=(
                f"the image has {image.width}×{image.height} pixels, more than max_image_pixels {rules.max_pixels}."
            ),
            fix="Make it smaller, drop the row, or raise max_image_pixels.",
            kind="image too large",
        )
    return image


@contextmanager
def _without_pillows_limit():
    """Pillow warns of large images and odd EXIF, and refuses what is twice its own limit: ours takes its place."""
    limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        Image.MAX_IMAGE_PIXELS = limit


def _find_encoded(stored: Any, folder: Path | None, where: str, rules: ImageRules) -> Path | bytes:
    """The file or the bytes that `stored` stands for."""
    if isinstance(stored, dict):
        stored = stored.get("bytes") or stored.get("path") or stored
    if isinstance(stored, bytes):
        return _check_bytes(stored, where, rules)
    if not isinstance(stored, str) or not stored:
        found = f"{type(stored).__name__} {str(stored)[:60]!r}"
        raise UserError(where=where, problem=f"expected an image, found {found}.", kind="not an image")
    if stored.startswith("data:"):
        return _check_bytes(_decode_base64(stored.partition(",")[2]), where, rules)
    if stored.startswith(("http://", "https://")):
        if not rules.allow_remote:
            advice = "Download the images, or set allow_remote_images true."
            raise UserError(
                where=where, problem=f"the image is on the network: {stored[:200]}.", fix=advice, kind="remote image"
            )
        return fetch_image(stored, where, max_bytes=rules.max_bytes)
    start = Path(rules.folder).expanduser() if rules.folder else folder or Path(".")
    name = unquote(stored.removeprefix("file://")) if stored.startswith("file://") else stored
    path = start / os.path.expanduser(name)
    if rules.folder and folder and len(stored) < 1024 and not os.path.isfile(path) and _is_inside(folder / name, start):
        path = folder / name  # image_folder may also be the fence around paths that start from the data file
    if len(stored) < 1024 and os.path.isfile(path):  # Path's own methods raise on base64 text: it is no file name
        _check_place(path, start, where, rules)
        _check_size(path.stat().st_size, where, rules)
        return path
    decoded = _decode_base64(stored) if len(stored) >= 64 else b""
    if not decoded:
        advice = "Relative paths start from the data file's folder, or from image_folder."
        raise UserError(
            where=where, problem=f"there is no image file {str(path)[:500]}.", fix=advice, kind="missing image file"
        )
    return _check_bytes(decoded, where, rules)


def _check_bytes(data: bytes, where: str, rules: ImageRules) -> bytes:
    _check_size(len(data), where, rules)
    return data


def _check_size(size: int, where: str, rules: ImageRules) -> None:
    if size > rules.max_bytes:
        raise UserError(
            where=where,
            problem=f"the image has {size / 1e6:.1f} MB, more than max_image_megabytes {rules.max_bytes / 1e6:g}.",
            fix="Make it smaller, drop the row, or raise max_image_megabytes.",
            kind="image too large",
        )


def _check_place(path: Path, start: Path, where: str, rules: ImageRules) -> None:
    """A data file must not make a run read, and a model learn, what lies elsewhere on the machine."""
    if not rules.allow_outside and not _is_inside(path, start):
        raise UserError(
            where=where,
            problem=(
                f"the image {str(path)[:500]} lies outside {'image_folder' if rules.folder else 'the folder'} {start}."
            ),
            fix="Set image_folder to a folder that holds all images, or allow_outside_paths true.",
            kind="image outside image_folder",
        )


def _is_inside(path: Path, folder: Path) -> bool:
    real = os.path.realpath(folder)
    return os.path.commonpath([os.path.realpath(path), real]) == real


def _decode_base64(text: str) -> bytes:
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError):
        return b""


def _unreadable(error: BaseException, where: str) -> UserError:
    if isinstance(error, UnidentifiedImageError):
        reason = "it is not in a known image format"
    else:
        reason = str(error).splitlines()[0].rstrip(".") if str(error) else type(error).__name__
    return UserError(
        where=where,
        problem=f"the image cannot be read: {reason}.",
        fix="Replace it or drop the row.",
        kind="unreadable image",
    )


def thumbnail(image: Image.Image) -> str:
    """A small version of `image` as a data URI, to be shown."""
    small = image.convert("RGB")
    small.thumbnail(THUMBNAIL)
    data = io.BytesIO()
    small.save(data, "JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(data.getvalue()).decode()
