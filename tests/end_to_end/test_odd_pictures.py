"""`check` says of fifty odd pictures what training makes of them: which it refuses, and the tokens of the others."""

import io
import json
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tuning import cli
from tuning.config.parse import build_config
from tuning.data.from_config import make_encoder
from tuning.data.sources import Row
from tuning.errors import UserError
from tuning.model import load

RGB = Image.radial_gradient("L").resize((60, 40)).convert("RGB")
TALL = RGB.resize((30, 70))


def saved(image: Image.Image, kind: str, **options) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def with_alpha(mode: str) -> Image.Image:
    image = RGB.convert(mode)
    image.putalpha(Image.linear_gradient("L").resize(RGB.size))
    return image


def turned(orientation: int, kind: str, image: Image.Image = TALL) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return saved(image, kind, exif=exif)


def png_chunk(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def late_exif(orientation: int) -> bytes:
    """A PNG with its orientation behind the pixels, where Pillow writes none but its format allows it."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    whole = saved(TALL, "PNG")
    end = whole.rindex(b"IEND") - 4
    return whole[:end] + png_chunk(b"eXIf", exif.tobytes().removeprefix(b"Exif\0\0")) + whole[end:]


def huge_header() -> bytes:
    """A PNG whose header promises 60,000 × 60,000 pixels."""
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + png_chunk(b"IDAT", zlib.compress(b"\0" * 99)) + png_chunk(b"IEND", b"")


def sixteen_bit_rgb() -> bytes:
    pixels = b"".join(b"\0" + b"\x12\x34\x56\x78\x9a\xbc" * 20 for _ in range(10))
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", 20, 10, 16, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + png_chunk(b"IDAT", zlib.compress(pixels)) + png_chunk(b"IEND", b"")


def animation(kind: str) -> bytes:
    return saved(RGB, kind, save_all=True, append_images=[RGB.rotate(n) for n in (90, 180)])


def cut(content: bytes, share: float = 0.5) -> bytes:
    return content[: int(len(content) * share)]


def broken_pixels() -> bytes:
    content = bytearray(saved(RGB, "PNG"))
    place = content.index(b"IDAT") + 12
    content[place : place + 20] = b"\xff" * 20
    return bytes(content)


GREY16 = Image.fromarray(np.linspace(0, 65535, 60 * 40).reshape(40, 60).astype(np.uint16))
GREY32 = Image.fromarray(np.linspace(0, 65535, 60 * 40).reshape(40, 60).astype(np.int32))
FLOAT = Image.fromarray(np.linspace(0, 1, 60 * 40).reshape(40, 60).astype(np.float32))
PALETTE = RGB.quantize(16)

PICTURES: dict[str, Callable[[], bytes]] = {
    "1.png": lambda: saved(RGB.convert("1"), "PNG"),
    "1.tif": lambda: saved(RGB.convert("1"), "TIFF", compression="group4"),
    "L.png": lambda: saved(RGB.convert("L"), "PNG"),
    "L.jpg": lambda: saved(RGB.convert("L"), "JPEG"),
    "LA.png": lambda: saved(with_alpha("L"), "PNG"),
    "P.png": lambda: saved(PALETTE, "PNG"),
    "P transparent.png": lambda: saved(PALETTE, "PNG", transparency=3),
    "P transparent bytes.png": lambda: saved(PALETTE, "PNG", transparency=bytes(range(0, 256, 16))),
    "P.gif": lambda: saved(PALETTE, "GIF", transparency=0),
    "P.bmp": lambda: saved(PALETTE, "BMP"),
    "RGB transparent.png": lambda: saved(RGB, "PNG", transparency=(0, 0, 0)),
    "RGBA.png": lambda: saved(with_alpha("RGB"), "PNG"),
    "RGBA.webp": lambda: saved(with_alpha("RGB"), "WEBP"),
    "RGBA.tif": lambda: saved(with_alpha("RGB"), "TIFF"),
    "CMYK.jpg": lambda: saved(RGB.convert("CMYK"), "JPEG"),
    "CMYK.tif": lambda: saved(RGB.convert("CMYK"), "TIFF"),
    "YCbCr.tif": lambda: saved(RGB.convert("YCbCr"), "TIFF", compression="jpeg"),
    "unread YCbCr.tif": lambda: saved(RGB.convert("YCbCr"), "TIFF"),  # Pillow 12 writes it, but reads it as cut off
    "LAB.tif": lambda: saved(Image.merge("LAB", RGB.split()), "TIFF"),
    "I;16.png": lambda: saved(GREY16, "PNG"),
    "I;16.tif": lambda: saved(GREY16, "TIFF"),
    "I.tif": lambda: saved(GREY32, "TIFF"),
    "F.tif": lambda: saved(FLOAT, "TIFF"),
    "RGB 16 bit.png": sixteen_bit_rgb,
    "RGB.ppm": lambda: saved(RGB, "PPM"),
    "RGB.ico": lambda: saved(RGB.resize((48, 48)), "ICO"),
    "RGB.jp2": lambda: saved(RGB, "JPEG2000"),
    "RGB.tga": lambda: saved(RGB, "TGA"),
    "RGB.avif": lambda: saved(RGB, "AVIF"),
    "progressive.jpg": lambda: saved(RGB, "JPEG", progressive=True),
    "interlaced.gif": lambda: saved(PALETTE, "GIF", interlace=1),
    **{f"turned {n}.jpg": (lambda n=n: turned(n, "JPEG")) for n in (1, 3, 5, 6, 8)},
    "turned 6.png": lambda: turned(6, "PNG"),
    "turned 6.webp": lambda: turned(6, "WEBP"),
    "turned 6.tif": lambda: turned(6, "TIFF"),
    "turned by nonsense.jpg": lambda: turned(77, "JPEG"),
    "turned late 6.png": lambda: late_exif(6),
    "turned late 3.png": lambda: late_exif(3),
    "animated.gif": lambda: animation("GIF"),
    "animated.webp": lambda: animation("WEBP"),
    "animated.png": lambda: animation("PNG"),
    "several.mpo": lambda: saved(RGB, "MPO", save_all=True, append_images=[TALL]),
    "several.tif": lambda: animation("TIFF"),
    "one pixel.png": lambda: saved(RGB.resize((1, 1)), "PNG"),
    "thin.png": lambda: saved(RGB.resize((1, 60)), "PNG"),
    "flat.png": lambda: saved(RGB.resize((60, 1)), "PNG"),
    "very thin.png": lambda: saved(RGB.resize((1, 5000)), "PNG"),
    "very flat.png": lambda: saved(RGB.resize((5000, 1)), "PNG"),
    "huge.png": huge_header,
    "cut header.png": lambda: saved(RGB, "PNG")[:20],
    "cut.png": lambda: cut(saved(RGB, "PNG")),
    "cut.jpg": lambda: cut(saved(RGB, "JPEG")),
    "cut.gif": lambda: cut(saved(PALETTE, "GIF")),
    "cut.webp": lambda: cut(saved(RGB, "WEBP")),
    "cut.tif": lambda: cut(saved(RGB, "TIFF")),
    "broken pixels.png": broken_pixels,
    "empty.png": lambda: b"",
    "text.png": lambda: b"no picture",
    "page.jpg": lambda: b"<html>404</html>",
    "png as.jpg": lambda: saved(RGB, "PNG"),
    "jpeg as.png": lambda: saved(RGB, "JPEG"),
    "picture.svg": lambda: b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>',
    "program.eps": lambda: saved(RGB, "EPS"),
}


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> Path:
    """A row for each picture: once as a file, and once as a mixture of ways to store it."""
    folder = tmp_path_factory.mktemp("pictures")
    lines = []
    for number, (name, make) in enumerate(PICTURES.items()):
        (folder / name).write_bytes(make())
        question = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": f"What is it? {number}"}]}
        answer = {"role": "assistant", "content": "A gradient." + " Grey." * (number % 3)}
        lines.append(json.dumps({"messages": [question, answer], "images": [name]}))
    (folder / "rows.jsonl").write_text("\n".join(lines) + "\n")
    return folder / "rows.jsonl"


@pytest.mark.parametrize("layout", ["llava15", "granite_vision", "mllama"])
def test_check_and_training_agree_on_every_picture(layout, models, rows, tmp_path):
    options = {
        "model_name_or_path": str(models[layout]),
        "training_data_path": str(rows),
        "output_dir": str(tmp_path / "out"),
        "date_string": "01 Jan 2026",
        "sample_rows": len(PICTURES),
        "decode_images": True,
        "max_image_pixels": 1_000_000,
    }
    (tmp_path / "config.json").write_text(json.dumps(options))
    assert cli.main(["check", str(tmp_path / "config.json")]) == 1
    report = json.loads((tmp_path / "out/check.json").read_text())
    found = {problem["row"]: problem["message"] for problem in report["problems"]}

    config = build_config(options)
    model_config = load.load_config(config.model)
    processor = load.load_processor(config.model, model_config)
    encoder = make_encoder(config.data, processor, model_config, "01 Jan 2026")
    expected, tokens = {}, {}
    for number, row in enumerate(map(json.loads, rows.read_text().splitlines())):
        read = Row(row, str(rows), number, folder=rows.parent)
        try:
            tokens[number] = encoder.encode(read)
        except UserError as error:
            expected[number] = str(error)
    names = list(PICTURES)
    assert all(f"{rows}, row {number}" in message for number, message in expected.items())
    assert {names[number] for number in found} == {names[number] for number in expected}
    assert found == expected
    assert report["totals"]["tokens"] == sum(len(sample.sequence["input_ids"]) for sample in tokens.values())
    supervised = sum(int((sample.sequence["labels"] != -100).sum()) for sample in tokens.values())
    assert report["totals"]["supervised_tokens"] == supervised
    assert not [warning for warning in report["warnings"] if "approximate" in warning]
    for sample in report["samples"]:
        assert sample["num_tokens"] == len(tokens[sample["row"]].sequence["input_ids"]), names[sample["row"]]
    assert len(report["samples"]) == len(tokens)
    refused = {names[number] for number in found}
    always = {
        "huge.png",
        "empty.png",
        "text.png",
        "page.jpg",
        "picture.svg",
        "program.eps",
        "cut header.png",
        "cut.png",
    }
    assert always <= refused
    assert refused <= always | {name for name in names if name.startswith(("cut", "broken", "very", "unread"))}
    assert ({"very thin.png", "very flat.png"} <= refused) == (layout == "llava15")
