"""The stored images of a row → decoded images in RGB, or only their size."""

import base64
import binascii
import io
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, cast
from urllib.parse import unquote

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from tuning.data.image_download import fetch_image
from tuning.data.json_files import parse_list
from tuning.errors import UserError, first_line, try_optional

T = TypeVar("T")
THUMBNAIL = (320, 320)
ORIENTATION = 0x0112  # the EXIF tag; with 5 to 8, width and height change places (CIPA DC-008)
URL_SAFE = str.maketrans("-_", "+/")
WEB_FORMATS = {"JPEG": "jpeg", "PNG": "png", "WEBP": "webp"}  # what every server decodes
PNG_EXIF = ("exif", "Raw profile type exif", "XML:com.adobe.xmp", "xmp")


@dataclass(frozen=True)
class ImageRules:
    """Which images may be read.

    `folder`: relative paths start here and may not lead out of it. None stands for the data file's folder.
    `allow_outside` allows paths that lead out of it, `allow_remote` addresses in the network. `max_pixels` and
    `max_bytes` limit one image, before it is decoded. `short_edge`: the model's processor resizes the short side of
    every image to so many pixels (see `find_short_edge`); the resized image must stay within `max_pixels`, too.
    """

    folder: str | None = None
    allow_outside: bool = False
    allow_remote: bool = False
    max_pixels: int = 100_000_000
    max_bytes: int = 100_000_000
    short_edge: int | None = None


@dataclass(frozen=True)
class EncodedImage:
    """An image as it is stored: its file, or its bytes. `format`: by its header, such as `png`."""

    content: Path | bytes
    format: str

    def read(self) -> bytes:
        """The bytes of the image."""
        return self.content if isinstance(self.content, bytes) else self.content.read_bytes()


def list_images(value: Any) -> list[Any]:
    """The stored images of a row as a list. `value` is None, one image, or several, also as the text of a list."""
    if isinstance(value, str) and (found := parse_list(value)) is not None:
        return found
    if value is None:
        return []
    return list(value) if isinstance(value, (list, tuple)) else [value]


def load_image(stored: Any, folder: Path | None, where: str, rules: ImageRules = ImageRules()) -> Image.Image:
    """Decode one stored image to RGB: PIL, `{"bytes", "path"}`, a path, a URL, a data URI or base64 text.

    Relative paths start from `folder`, the data file's. Applies the camera's orientation (EXIF), puts transparent
    images on white, and takes the first frame of an animation. Raises `UserError` where there is no such file, it is
    not a readable image, or it breaks one of `rules`.
    """

    def decode() -> Image.Image:
        image = _open_checked(stored, folder, where, rules)
        image.load()
        return to_rgb(ImageOps.exif_transpose(image))

    return _read_or_explain(decode, where)


def encode_image(stored: Any, folder: Path | None, where: str, rules: ImageRules = ImageRules()) -> str:
    """The image that `load_image` gives, as a data URL: its stored bytes if they show the same, else a PNG."""
    if not isinstance(stored, Image.Image):
        stored = find_image(stored, folder, where, rules).read()
    image = load_image(stored, folder, where, rules)
    if isinstance(stored, bytes):
        with _open(stored, where, rules) as opened:
            if opened.format in WEB_FORMATS and _shows_as_stored(opened):
                return _data_url(stored, WEB_FORMATS[opened.format])
    data = io.BytesIO()
    image.save(data, "PNG", compress_level=1)
    return _data_url(data.getvalue(), "png")


def _shows_as_stored(image: Image.Image) -> bool:
    """Whether `load_image` only decodes the image: it is upright and opaque, has 8 bits a channel and one frame."""
    is_plain = image.mode in ("RGB", "L") and not image.has_transparency_data and getattr(image, "n_frames", 1) == 1
    return is_plain and image.getexif().get(ORIENTATION, 1) == 1


def _data_url(content: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def measure_image(stored: Any, folder: Path | None, where: str, rules: ImageRules = ImageRules()) -> tuple[int, int]:
    """Width and height of the image that `load_image` would give, from its header, under the same rules."""

    def read_header() -> tuple[int, int]:
        image = _open_checked(stored, folder, where, rules)
        turned = _reads_exif(image) and image.getexif().get(ORIENTATION, 1) in (5, 6, 7, 8)
        return (image.height, image.width) if turned else image.size

    return _read_or_explain(read_header, where)


def _reads_exif(image: Image.Image) -> bool:
    """Whether the orientation must be read from EXIF.

    Where a PNG's header has no EXIF, Pillow would decode the image to look for it behind the pixels, where nobody puts
    it. For a TIFF, Pillow gives the turned size.
    """
    return image.format != "TIFF" and (image.format != "PNG" or any(key in image.info for key in PNG_EXIF))


def find_image(stored: Any, folder: Path | None, where: str, rules: ImageRules = ImageRules()) -> EncodedImage:
    """The encoded image that `load_image` would decode, under the same rules. Reads only its header."""

    def find() -> EncodedImage:
        content = _find_encoded(stored, folder, where, rules)
        with _open(content, where, rules) as image:
            return EncodedImage(content, str(image.format).lower())

    return _read_or_explain(find, where)


def _read_or_explain(read: Callable[[], T], where: str) -> T:
    """Run `read`, and turn whatever Pillow raises for a damaged file into a `UserError`: its decoders check little."""
    attempt = try_optional(read)
    if attempt.error is None:
        return cast(T, attempt.value)
    is_unknown = isinstance(attempt.error, UnidentifiedImageError)
    reason = "it is not in a known image format" if is_unknown else first_line(attempt.error)
    raise UserError(
        where=where,
        problem=f"the image cannot be read: {reason}.",
        fix="Replace it or drop the row.",
        kind="unreadable image",
    ) from attempt.error


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert any mode to RGB with 8 bits per channel. Transparent pixels become white."""
    if image.mode.startswith("I") or image.mode == "F":  # 16 or 32 bits of grey: Pillow would clip them at 255
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
        with _without_pillow_limit():
            image = Image.open(content if isinstance(content, Path) else io.BytesIO(content))
    if image.format == "EPS":  # a PostScript program: Pillow would let Ghostscript run it
        raise UnidentifiedImageError
    _check_pixels(image.width, image.height, where, rules)
    return image


def _check_pixels(width: int, height: int, where: str, rules: ImageRules) -> None:
    """Raises `UserError` for an image with too many pixels, as it is stored or as the processor would resize it."""
    has = f"the image has {width}×{height} pixels"
    if width * height > rules.max_pixels:
        raise UserError(
            where=where,
            problem=f"{has}, more than max_image_pixels {rules.max_pixels}.",
            fix="Make it smaller, drop the row, or raise max_image_pixels.",
            kind="image too large",
        )
    if not rules.short_edge or not width or not height:
        return
    edge, short = rules.short_edge, min(width, height)
    resized = round(width * edge / short), round(height * edge / short)
    if resized[0] * resized[1] > rules.max_pixels:
        raise UserError(
            where=where,
            problem=(
                f"{has}, and the model's processor would resize its short side to {edge}, which makes"
                f" {resized[0]}×{resized[1]} pixels, more than max_image_pixels {rules.max_pixels}."
            ),
            fix="Crop or pad it to a less thin shape, drop the row, or raise max_image_pixels.",
            kind="image too large",
        )


@contextmanager
def _without_pillow_limit() -> Iterator[None]:
    """Turn off Pillow's limit of pixels, which `max_pixels` replaces, and its warnings about large images and EXIF."""
    limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        Image.MAX_IMAGE_PIXELS = limit


def _find_encoded(stored: Any, folder: Path | None, where: str, rules: ImageRules) -> Path | bytes:
    """The file or the bytes of a stored image."""
    if isinstance(stored, dict):
        stored = stored.get("bytes") or stored.get("path") or stored
    if isinstance(stored, bytes):
        return _check_bytes(stored, where, rules)
    if not isinstance(stored, str) or not stored:
        raise UserError(
            where=where,
            problem=f"expected an image, found {type(stored).__name__} {str(stored)[:60]!r}.",
            fix="Give a path, an address, bytes or base64 text.",
            kind="not an image",
        )
    if stored.startswith("data:"):
        return _check_bytes(_decode_base64(stored.partition(",")[2]), where, rules)
    if stored.startswith(("http://", "https://")):
        if not rules.allow_remote:
            raise UserError(
                where=where,
                problem=f"the image is on the network: {stored[:200]}.",
                fix="Download the images, or set allow_remote_images true.",
                kind="remote image",
            )
        return fetch_image(stored, where, max_bytes=rules.max_bytes)
    start = Path(rules.folder).expanduser() if rules.folder else folder or Path(".")
    name = unquote(stored.removeprefix("file://")) if stored.startswith("file://") else stored
    path = start / os.path.expanduser(name)
    if rules.folder and folder and len(stored) < 1024 and not os.path.isfile(path) and _is_inside(folder / name, start):
        path = folder / name  # paths may also start from the data file and stay inside image_folder
    if len(stored) < 1024 and os.path.isfile(path):  # Path's own methods raise on base64 text: it is not a file name
        _check_place(path, start, where, rules)
        _check_size(path.stat().st_size, where, rules)
        return path
    decoded = _decode_base64(stored) if len(stored) >= 64 else b""
    if not decoded:
        raise UserError(
            where=where,
            problem=f"there is no image file {str(path)[:500]}.",
            fix="Set image_folder, or give the path from the data file's folder.",
            kind="missing image file",
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
    """Refuse a path outside the folder: a data file must not make a model learn other files of the machine."""
    if not rules.allow_outside and not _is_inside(path, start):
        limit = "image_folder" if rules.folder else "the folder"
        raise UserError(
            where=where,
            problem=f"the image {str(path)[:500]} lies outside {limit} {start}.",
            fix="Set image_folder to a folder that contains all images, or set allow_outside_paths true.",
            kind="image outside image_folder",
        )


def _is_inside(path: Path, folder: Path) -> bool:
    real = os.path.realpath(folder)
    return os.path.commonpath([os.path.realpath(path), real]) == real


def _decode_base64(text: str) -> bytes:
    """The bytes in base64 text, in the usual or the URL-safe alphabet, or none."""
    text = "".join(text.split())
    if ("-" in text or "_" in text) and "+" not in text and "/" not in text:
        text = text.translate(URL_SAFE).rstrip("=")
        text += "=" * (-len(text) % 4)  # which addresses leave out
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        return b""


def thumbnail(image: Image.Image) -> str:
    """A small version of `image` as a data URI, for a page."""
    small = image.convert("RGB")
    small.thumbnail(THUMBNAIL)
    data = io.BytesIO()
    small.save(data, "JPEG", quality=85)
    return _data_url(data.getvalue(), "jpeg")
