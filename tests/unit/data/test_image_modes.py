"""Whatever mode a picture is stored in, the model sees what a person sees; size and limits hold before decoding."""

import io

import numpy as np
import pytest
from PIL import Image

from tuning.data.images import ImageRules, load_image, measure_image, to_rgb
from tuning.errors import UserError

WHERE = "rows.json, row 3, field 'images', image 0"
WIDTH, HEIGHT = 6, 4


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def of_array(values, dtype) -> Image.Image:
    return Image.fromarray(np.asarray(values, dtype=dtype))


def colours() -> np.ndarray:
    """`[4, 6, 3]`, every pixel another colour: no turn or mirror image of it is equal to it."""
    values = np.arange(WIDTH * HEIGHT, dtype=np.uint8).reshape(HEIGHT, WIDTH)
    return np.stack([values * 10, 255 - values * 5, values + 100], axis=-1)


def grey_ramp() -> np.ndarray:
    return np.linspace(0, 255, WIDTH * HEIGHT).round().astype(np.uint8).reshape(HEIGHT, WIDTH)


def on_all_channels(grey: np.ndarray) -> np.ndarray:
    return np.stack([grey] * 3, axis=-1)


def over_white(grey: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    share = alpha / 255
    return np.round(grey * share + 255 * (1 - share))


def half_clear() -> np.ndarray:
    alpha = np.full((HEIGHT, WIDTH), 255, dtype=np.uint8)
    alpha[:, ::2], alpha[:, 1::3] = 0, 128
    return alpha


def rgba() -> Image.Image:
    return of_array(np.concatenate([colours(), half_clear()[..., None]], axis=-1), np.uint8)


def palette() -> Image.Image:
    """Red, green and blue stripes."""
    picture = of_array(np.arange(WIDTH * HEIGHT).reshape(HEIGHT, WIDTH) % 3, np.uint8)
    picture.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
    return picture


STRIPES = np.eye(3, dtype=np.uint8)[np.arange(WIDTH * HEIGHT).reshape(HEIGHT, WIDTH) % 3] * 255
GREY, ALPHA, CHECKS = grey_ramp(), half_clear(), np.indices((HEIGHT, WIDTH)).sum(axis=0) % 2 * 255
SIXTEEN = GREY.astype(np.uint16) * 257  # the same brightness on a scale up to 65535
CLEAR_GREEN = np.where((STRIPES == (0, 255, 0)).all(axis=-1, keepdims=True), np.uint8(255), STRIPES)
LA = Image.merge("LA", [of_array(GREY, np.uint8), of_array(ALPHA, np.uint8)])
CMYK = Image.merge(
    "CMYK", [of_array(255 - colours()[..., n], np.uint8) for n in range(3)] + [Image.new("L", (WIDTH, HEIGHT))]
)

# name: (the stored file, what is to be seen, the largest difference that the codec makes)
PICTURES = {
    "RGB PNG": (encoded(of_array(colours(), np.uint8), "PNG"), colours(), 0),
    "RGBA PNG": (encoded(rgba(), "PNG"), over_white(colours(), ALPHA[..., None]), 1),
    "RGBA WEBP": (encoded(rgba(), "WEBP", lossless=True, exact=True), over_white(colours(), ALPHA[..., None]), 1),
    "RGBA TIFF": (encoded(rgba(), "TIFF"), over_white(colours(), ALPHA[..., None]), 1),
    "LA PNG": (encoded(LA, "PNG"), on_all_channels(over_white(GREY, ALPHA)), 1),
    "L PNG": (encoded(of_array(GREY, np.uint8), "PNG"), on_all_channels(GREY), 0),
    "L with a transparent grey": (
        encoded(of_array(CHECKS, np.uint8), "PNG", transparency=0),
        np.full((HEIGHT, WIDTH, 3), 255),
        0,
    ),
    "RGB with a transparent colour": (
        encoded(Image.fromarray(STRIPES), "PNG", transparency=(0, 255, 0)),
        CLEAR_GREEN,
        0,
    ),
    "1 PNG": (encoded(of_array(CHECKS, np.uint8).convert("1"), "PNG"), on_all_channels(CHECKS), 0),
    "1 TIFF": (encoded(of_array(CHECKS, np.uint8).convert("1"), "TIFF"), on_all_channels(CHECKS), 0),
    "P PNG": (encoded(palette(), "PNG"), STRIPES, 0),
    "P GIF": (encoded(palette(), "GIF"), STRIPES, 0),
    "P with a transparent colour": (encoded(palette(), "PNG", transparency=1), CLEAR_GREEN, 0),
    "P GIF with a transparent colour": (encoded(palette(), "GIF", transparency=1), CLEAR_GREEN, 0),
    "P with an alpha for each colour": (
        encoded(palette(), "PNG", transparency=bytes([255, 0, 255])),
        CLEAR_GREEN,
        0,
    ),
    "CMYK TIFF": (encoded(CMYK, "TIFF"), colours(), 1),
    "16 bits PNG": (encoded(of_array(SIXTEEN, np.uint16), "PNG"), on_all_channels(GREY), 0),
    "16 bits TIFF": (encoded(of_array(SIXTEEN, np.uint16), "TIFF"), on_all_channels(GREY), 0),
    "16 bits TIFF, other byte order": (
        encoded(Image.frombytes("I;16B", (WIDTH, HEIGHT), SIXTEEN.astype(">u2").tobytes()), "TIFF"),
        on_all_channels(GREY),
        0,
    ),
    "32 bits whole numbers TIFF": (encoded(of_array(SIXTEEN, np.int32), "TIFF"), on_all_channels(GREY), 0),
    "32 bits floats up to 255 TIFF": (encoded(of_array(GREY, np.float32), "TIFF"), on_all_channels(GREY), 0),
    "32 bits floats up to 1 TIFF": (encoded(of_array(GREY / 255, np.float32), "TIFF"), on_all_channels(GREY), 0),
}


def seen(stored) -> np.ndarray:
    image = load_image(stored, None, WHERE)
    assert image.mode == "RGB"
    return np.asarray(image).astype(int)


@pytest.mark.parametrize("name", PICTURES)
def test_every_mode_is_seen_as_a_person_sees_it(name):
    data, expected, tolerance = PICTURES[name]
    assert np.abs(seen(data) - np.asarray(expected).astype(int)).max() <= tolerance


def test_cmyk_jpeg_is_seen_in_its_colours():
    """JPEGs of printing houses are stored inverted; in the corners of large areas the codec loses little."""
    picture = Image.new("CMYK", (64, 64), (0, 255, 255, 0))
    picture.paste((255, 255, 0, 0), (32, 0, 64, 64))
    shown = seen(encoded(picture, "JPEG", quality=95))
    assert np.abs(shown[8, 8] - (255, 0, 0)).max() <= 6
    assert np.abs(shown[8, 56] - (0, 0, 255)).max() <= 6


@pytest.mark.parametrize("mode", ["I;16", "I;16B", "I;16L", "I", "F"])
def test_more_than_8_bits_are_scaled_and_not_cut_off(mode):
    dtype = {"I;16": "<u2", "I;16L": "<u2", "I;16B": ">u2", "I": np.int32, "F": np.float32}[mode]
    values = GREY if mode == "F" else SIXTEEN
    picture = Image.frombytes(mode, (WIDTH, HEIGHT), values.astype(dtype).tobytes())
    assert np.array_equal(np.asarray(to_rgb(picture)), on_all_channels(GREY))


def test_a_gap_in_floats_up_to_1_is_black_and_changes_nothing_else():
    shown = np.asarray(to_rgb(Image.fromarray(np.array([[0.0, np.nan, 0.2, 1.0]], dtype=np.float32))))
    assert shown[0, :, 0].tolist() == [0, 0, 51, 255]


def test_floats_beyond_their_scale_and_gaps_in_them_do_no_harm():
    values = np.array([[-3.0, 0.0, 255.0, 1e9, np.nan, np.inf]], dtype=np.float32)
    shown = np.asarray(to_rgb(Image.fromarray(values)))[0, :, 0]
    assert shown[:4].tolist() == [0, 0, 255, 255]
    assert shown[5] == 255


# What the viewer does to the stored pixels, by the EXIF orientation: TIFF 6.0, tag 274.
TURNS = {
    1: lambda pixels: pixels,
    2: lambda pixels: pixels[:, ::-1],
    3: lambda pixels: pixels[::-1, ::-1],
    4: lambda pixels: pixels[::-1],
    5: lambda pixels: pixels.transpose(1, 0, 2),
    6: lambda pixels: np.rot90(pixels, -1),
    7: lambda pixels: np.rot90(pixels, 2).transpose(1, 0, 2),
    8: lambda pixels: np.rot90(pixels, 1),
}


def turned(orientation: int, kind: str, picture: Image.Image | None = None) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if kind == "WEBP" else {"quality": 100} if kind == "JPEG" else {}
    return encoded(picture or of_array(colours(), np.uint8), kind, exif=exif, **options)


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", TURNS)
def test_camera_orientation_is_applied(orientation, kind):
    data = turned(orientation, kind)
    expected = TURNS[orientation](colours())
    assert np.array_equal(seen(data), expected)
    assert measure_image(data, None, WHERE) == (expected.shape[1], expected.shape[0])


@pytest.mark.parametrize("orientation", TURNS)
def test_camera_orientation_of_a_jpeg_is_applied(orientation):
    """One bright quarter of a picture that is wider than high: where it is seen tells the turn."""
    pixels = np.zeros((32, 64, 3), dtype=np.uint8)
    pixels[:16, :32] = 255
    data = turned(orientation, "JPEG", Image.fromarray(pixels))
    expected = TURNS[orientation](pixels)
    assert np.abs(seen(data) - expected.astype(int)).mean() < 3
    assert measure_image(data, None, WHERE) == (expected.shape[1], expected.shape[0])


@pytest.mark.parametrize("orientation", [0, 9, 77])
def test_an_orientation_that_does_not_exist_turns_nothing(orientation):
    assert np.array_equal(seen(turned(orientation, "PNG")), colours())


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_of_an_animation_the_first_frame_is_seen(kind):
    frames = [Image.new("RGB", (WIDTH, HEIGHT), color) for color in ("red", "lime", "blue")]
    lossless = {"lossless": True} if kind == "WEBP" else {}
    data = encoded(frames[0], kind, save_all=True, append_images=frames[1:], **lossless)
    assert Image.open(io.BytesIO(data)).n_frames == 3
    assert (seen(data) == (255, 0, 0)).all()
    assert measure_image(data, None, WHERE) == (WIDTH, HEIGHT)


@pytest.mark.parametrize("name", PICTURES)
def test_the_header_tells_the_size_that_is_loaded(name):
    data = PICTURES[name][0]
    assert measure_image(data, None, WHERE) == load_image(data, None, WHERE).size == (WIDTH, HEIGHT)


def test_a_picture_that_was_decoded_before_is_measured_as_it_is_loaded():
    image = Image.open(io.BytesIO(turned(6, "PNG")))
    assert measure_image(image, None, WHERE) == load_image(image, None, WHERE).size == (HEIGHT, WIDTH)


# --- limits ---

LOOKS = (load_image, measure_image)
TOO_MANY_PIXELS = f"has {WIDTH}×{HEIGHT} pixels, more than max_image_pixels {WIDTH * HEIGHT - 1}"


@pytest.mark.parametrize("look", LOOKS)
@pytest.mark.parametrize("as_file", [False, True])
def test_an_image_may_have_as_many_pixels_and_bytes_as_allowed(look, as_file, tmp_path):
    data = PICTURES["RGB PNG"][0]
    (tmp_path / "a.png").write_bytes(data)
    stored = "a.png" if as_file else data
    look(stored, tmp_path, WHERE, ImageRules(max_pixels=WIDTH * HEIGHT, max_bytes=len(data)))
    with pytest.raises(UserError, match=TOO_MANY_PIXELS) as caught:
        look(stored, tmp_path, WHERE, ImageRules(max_pixels=WIDTH * HEIGHT - 1))
    assert (caught.value.where, caught.value.kind) == (WHERE, "image too large")
    with pytest.raises(UserError, match="MB, more than max_image_megabytes") as caught:
        look(stored, tmp_path, WHERE, ImageRules(max_bytes=len(data) - 1))
    assert (caught.value.where, caught.value.kind) == (WHERE, "image too large")


@pytest.mark.parametrize("look", LOOKS)
def test_our_limit_of_pixels_holds_in_place_of_pillows(look, monkeypatch):
    """Pillow refuses what is more than twice its own limit: raising ours has to be enough."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 5)
    data = PICTURES["RGB PNG"][0]
    look(data, None, WHERE, ImageRules(max_pixels=WIDTH * HEIGHT))
    with pytest.raises(UserError, match=TOO_MANY_PIXELS):
        look(data, None, WHERE, ImageRules(max_pixels=WIDTH * HEIGHT - 1))
    assert Image.MAX_IMAGE_PIXELS == 5


def test_an_image_with_too_many_pixels_is_not_decoded(monkeypatch):
    monkeypatch.setattr(Image.Image, "load", lambda image: pytest.fail("decoded"))
    with pytest.raises(UserError, match="max_image_pixels"):
        load_image(PICTURES["P GIF"][0], None, WHERE, ImageRules(max_pixels=4))


# --- where images may lie ---


@pytest.fixture
def places(tmp_path):
    """The data file's folder, another for images, and files in, beside and below them."""
    for folder in ("data/deep", "images", "data-two"):
        (tmp_path / folder).mkdir(parents=True)
        Image.new("RGB", (2, 2), "red").save(tmp_path / folder / "a.png")
    (tmp_path / "data" / "out.png").symlink_to(tmp_path / "images" / "a.png")
    (tmp_path / "data" / "in.png").symlink_to(tmp_path / "data" / "deep" / "a.png")
    (tmp_path / "data" / "door").symlink_to(tmp_path / "images")
    return tmp_path


INSIDE = ("deep/a.png", "{}/data/deep/a.png", "deep/../deep/a.png", "in.png", "file://{}/data/deep/a.png")
OUTSIDE = (
    "../images/a.png",
    "{}/images/a.png",
    "out.png",
    "door/a.png",
    "deep/../../images/a.png",
    "../data-two/a.png",
)


@pytest.mark.parametrize("look", LOOKS)
@pytest.mark.parametrize("path", INSIDE)
def test_images_in_the_folder_of_the_data_file_are_read(path, look, places):
    look(path.format(places), places / "data", WHERE)
    look({"bytes": None, "path": path.format(places)}, places / "data", WHERE)


@pytest.mark.parametrize("look", LOOKS)
@pytest.mark.parametrize("path", OUTSIDE)
def test_images_elsewhere_are_read_only_on_request(path, look, places):
    path = path.format(places)
    for stored in (path, {"bytes": None, "path": path}):
        with pytest.raises(UserError, match="lies outside the folder") as caught:
            look(stored, places / "data", WHERE)
        assert str(caught.value).endswith(
            "Set image_folder to a folder that contains all images, or set allow_outside_paths true."
        )
    look(path, places / "data", WHERE, ImageRules(allow_outside=True))


@pytest.mark.parametrize("look", LOOKS)
def test_image_folder_takes_the_place_of_the_data_files_folder(look, places):
    rules = ImageRules(folder=str(places / "images"))
    look("a.png", places / "data", WHERE, rules)
    look(str(places / "images" / "a.png"), places / "data", WHERE, rules)
    with pytest.raises(UserError, match="there is no image file"):
        look("deep/a.png", places / "data", WHERE, rules)
    for path in ("../data/deep/a.png", str(places / "data" / "deep" / "a.png")):
        with pytest.raises(UserError, match=f"lies outside image_folder {places / 'images'}"):
            look(path, places / "data", WHERE, rules)
    look("a.png", None, WHERE, ImageRules(folder=str(places / "data" / "door")))  # the folder itself may be a link


def test_a_postscript_program_is_no_image():
    program = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n%%EOF\n"
    for read in (load_image, measure_image):
        with pytest.raises(UserError, match="not in a known image format"):
            read(program, None, "rows.jsonl, row 0")


@pytest.mark.parametrize("read", [load_image, measure_image])
def test_image_folder_can_be_the_fence_around_paths_from_the_data_file(read, tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "rows").mkdir()
    Image.new("RGB", (7, 5)).save(tmp_path / "images" / "a.png")
    read("../images/a.png", tmp_path / "rows", "row 0", ImageRules(folder=str(tmp_path)))
    with pytest.raises(UserError):
        read("../images/a.png", tmp_path / "rows", "row 0", ImageRules(folder=str(tmp_path / "rows")))
