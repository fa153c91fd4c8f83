"""Boxes of a row → text: the column `objects` is written where the messages have marks.

The column and the marks are those of ms-swift:
https://swift.readthedocs.io/en/latest/Customization/Custom-dataset.html#grounding
"""

import functools
import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from tuning.boxes import Place
from tuning.config.box_formats import BOX_FORMATS, PIXELS, BoxFormat
from tuning.data.images import ImageRules, measure_image
from tuning.data.messages import CALLS, THOUGHT, Conversation, Message, parse_json, strip_nulls
from tuning.data.sources import Row
from tuning.errors import UserError, error_field

BOX_MARK, REF_MARK = "<bbox>", "<ref-object>"
MARK = re.compile(f"({BOX_MARK}|{REF_MARK})")
REFS, BOXES, BOX_TYPE, IMAGE_IDS = "ref", "bbox", "bbox_type", "image_id"
REAL, NORM1 = "real", "norm1"
ROUNDING = 1e-6  # as a share of the picture: a box may lie outside by that much, as float32 may put it
FIELD = "objects"
Size = tuple[int, int]
"""Width and height."""


@dataclass(frozen=True)
class BoxOnImage:
    """A box or point of a row. `image`: the number of its image. `place`: in shares of the image's width and height.

    `scale`: the coordinates of the image's lower right corner in texts.
    """

    image: int
    place: Place
    scale: Size


@dataclass(frozen=True)
class Grounded:
    """A conversation whose marks are replaced, and its boxes in the order of their marks."""

    conversation: Conversation
    boxes: Sequence[BoxOnImage] = ()


@dataclass(frozen=True)
class Objects:
    """The column `objects` of a row, checked. `image_ids`: the image of each box. `normalized`: boxes are shares."""

    refs: list[str]
    boxes: list[Place]
    image_ids: list[int]
    normalized: bool


def ground_row(
    row: Row,
    conversation: Conversation,
    format: BoxFormat | None,
    resize: Callable[[Size, str], Size],
    *,
    rules: ImageRules,
    max_images: int | None,
) -> Grounded:
    """`write_objects` for a conversation that was read from `row`. Reads the headers of images, where it needs them."""
    field = row.format.field_of_images

    @functools.cache
    def measure(number: int) -> Size:
        with error_field(field):
            where = f"{row.where}, field '{field}', image {number}"
            return measure_image(conversation.images[number], row.folder, where, rules)

    where = f"{row.where}, field '{FIELD}'"
    return write_objects(conversation, where, format=format, measure=measure, resize=resize, max_images=max_images)


def write_objects(
    conversation: Conversation,
    where: str,
    *,
    format: BoxFormat | None,
    measure: Callable[[int], Size],
    resize: Callable[[Size, str], Size],
    max_images: int | None = None,
) -> Grounded:
    """Replace the marks in the texts of a conversation by the references and boxes of its objects, in order.

    `format`: how the model writes boxes. `measure`: the size of the image with a number. `resize`: the size that the
    image processor gives an image, with the place that an error names. Raises `UserError`, naming `where`, for boxes
    that do not fit marks or images.
    """
    marks = [mark for message in conversation.messages for text in _texts_of(message) for mark in MARK.findall(text)]
    stored = strip_nulls(parse_json(conversation.objects)) or {}
    if not marks and not (isinstance(stored, dict) and stored.keys() <= {REFS, BOXES, BOX_TYPE, IMAGE_IDS}):
        return Grounded(conversation)  # a column of other contents
    objects = read_objects(stored, where)
    _check_number(BOX_MARK, marks.count(BOX_MARK), "boxes", len(objects.boxes), where)
    _check_number(REF_MARK, marks.count(REF_MARK), "references", len(objects.refs), where)
    if not marks:
        return Grounded(replace(conversation, objects=None))
    if format is None:
        raise UserError(
            where=where,
            problem="how this model writes boxes is not known.",
            fix=f"Set bbox_format to one of {', '.join(BOX_FORMATS)}.",
            field=FIELD,
            kind="no bbox_format",
        )
    images = len(conversation.images)
    limit = images if max_images is None else min(max_images, images)
    boxes = []
    for number, (place, image) in enumerate(zip(objects.boxes, objects.image_ids, strict=True)):
        of_box = f"{where}, box {number}"
        _check_image(image, images, limit, of_box)
        shares = _to_shares(place, None if objects.normalized else measure(image), of_box)
        boxes.append(BoxOnImage(image, shares, _find_scale(format, image, measure, resize, of_box)))
    texts, refs = (write_place(box.place, box.scale, format) for box in boxes), iter(objects.refs)
    messages = [_fill_message(message, texts, refs, format) for message in conversation.messages]
    return Grounded(replace(conversation, messages=messages, objects=None), boxes)


# --- read ---


def read_objects(stored: Any, where: str) -> Objects:
    """Check the contents of the column `objects`. Raises `UserError`."""
    if not isinstance(stored, dict):
        raise _malformed(where, f"expected an object with {BOXES} and {REFS}, found {str(stored)[:60]!r}.")
    refs, boxes = stored.get(REFS) or [], stored.get(BOXES) or []
    if not isinstance(refs, list) or not all(isinstance(ref, str) for ref in refs):
        raise _malformed(where, f"{REFS} must be a list of texts, found {str(refs)[:60]}.")
    if not isinstance(boxes, list):
        raise _malformed(where, f"{BOXES} must be a list of boxes, found {str(boxes)[:60]}.")
    kind = stored.get(BOX_TYPE) or REAL
    if kind not in (REAL, NORM1):
        raise _malformed(where, f"{BOX_TYPE} must be {REAL} or {NORM1}, found {str(kind)[:60]!r}.")
    image_ids = stored.get(IMAGE_IDS) or [0] * len(boxes)
    if not isinstance(image_ids, list) or any(type(image) is not int for image in image_ids):
        raise _malformed(where, f"{IMAGE_IDS} must be a list of whole numbers, found {str(image_ids)[:60]}.")
    if len(image_ids) != len(boxes):
        raise _malformed(where, f"{IMAGE_IDS} has {len(image_ids)} entries, but there are {len(boxes)} boxes.")
    read = [_read_box(box, f"{where}, box {number}") for number, box in enumerate(boxes)]
    return Objects(refs, read, image_ids, kind == NORM1)


def _read_box(box: Any, where: str) -> Place:
    numbers = box if isinstance(box, list) else []
    if len(numbers) not in (2, 4) or not all(type(number) in (int, float) for number in numbers):
        raise _malformed(where, f"expected [x1, y1, x2, y2] or a point [x, y], found {str(box)[:60]}.")
    if not all(map(math.isfinite, numbers)):
        raise _malformed(where, f"a coordinate is NaN or infinite: {numbers}.")
    if len(numbers) == 4 and (numbers[2] < numbers[0] or numbers[3] < numbers[1]):
        raise UserError(
            where=where,
            problem=f"the box ends before it begins: {numbers}.",
            fix="Give [x1, y1, x2, y2] with x1 ≤ x2 and y1 ≤ y2.",
            field=FIELD,
            kind="box that ends before it begins",
        )
    return tuple(map(float, numbers))


def _malformed(where: str, problem: str) -> UserError:
    return UserError(where=where, problem=problem, fix="Correct the row.", field=FIELD, kind="malformed objects")


def _check_number(mark: str, marks: int, what: str, given: int, where: str) -> None:
    if marks != given:
        raise UserError(
            where=where,
            problem=f"{mark} stands {marks} times in the texts, but the number of {what} is {given}.",
            fix="Give one for each mark, in order.",
            field=FIELD,
            kind="marks and objects differ",
        )


def _check_image(image: int, images: int, limit: int, where: str) -> None:
    """Raise `UserError` unless the row has this image, and it is among the first `limit`, which the model sees."""
    if 0 <= image < limit:
        return
    left_out = f"image {image} is left out, because the model takes {limit} per row"
    raise UserError(
        where=where,
        problem=f"{left_out if 0 <= image < images else f'there is no image {image}, only {images} (from 0)'}.",
        fix=f"Correct {IMAGE_IDS}, or drop the row.",
        field=FIELD,
        kind="box without an image",
    )


def _to_shares(box: Place, size: Size | None, where: str) -> Place:
    """A box in shares of a picture's width and height. `size` is None where it is that already.

    Raises `UserError` for a box outside the picture.
    """
    shares = [number / size[index % 2] if size else number for index, number in enumerate(box)]
    if min(shares) < -ROUNDING or max(shares) > 1 + ROUNDING:
        area = f"{size[0]}×{size[1]} pixels" if size else f"0 to 1, because {BOX_TYPE} is {NORM1}"
        raise UserError(
            where=where,
            problem=f"the box {list(box)} lies outside the picture ({area}).",
            fix="Correct the box, or drop the row.",
            field=FIELD,
            kind="box outside the image",
        )
    return tuple(min(1.0, max(0.0, share)) for share in shares)


# --- write ---


def _find_scale(
    format: BoxFormat,
    image: int,
    measure: Callable[[int], Size],
    resize: Callable[[Size, str], Size],
    where: str,
) -> Size:
    """The coordinates of an image's lower right corner in texts."""
    if isinstance(format.scale, int):
        return (format.scale, format.scale)
    if format.scale == PIXELS:
        return measure(image)
    with error_field(FIELD):
        return resize(measure(image), where)


def write_place(place: Place, scale: Size, format: BoxFormat) -> str:
    """A box or a point, given in shares of a picture, as the model writes it."""
    numbers = [share * scale[index % 2] for index, share in enumerate(place)]
    written = [f"{number:.{format.decimals}f}" if format.decimals else round(number) for number in numbers]
    pattern = format.box if len(place) == 4 else format.point
    return pattern.format(**dict(zip(("x1", "y1", "x2", "y2"), written, strict=False)))


def _texts_of(message: Message) -> Iterator[str]:
    """Every text of a message, in the order in which `_fill_message` fills them."""
    for value in (message.get(THOUGHT), message["content"], message.get(CALLS)):
        yield from _strings_in(value)


def _strings_in(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, (list, dict)):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _strings_in(inner)


def _fill_message(message: Message, boxes: Iterator[str], refs: Iterator[str], format: BoxFormat) -> Message:
    """The message with its marks replaced. A text part keeps under `written` what the library wrote."""
    filled = dict(message)
    if THOUGHT in message:
        filled[THOUGHT] = _fill_strings(message[THOUGHT], boxes, refs, format)
    filled["content"] = [
        _join(part, _fill(part["text"], boxes, refs, format)) if MARK.search(part.get("text", "")) else part
        for part in message["content"]
    ]
    if CALLS in message:
        filled[CALLS] = _fill_strings(message[CALLS], boxes, refs, format)
    return filled


def _fill_strings(value: Any, boxes: Iterator[str], refs: Iterator[str], format: BoxFormat) -> Any:
    if isinstance(value, str):
        return "".join(text for text, _ in _fill(value, boxes, refs, format))
    if isinstance(value, dict):
        return {name: _fill_strings(inner, boxes, refs, format) for name, inner in value.items()}
    return [_fill_strings(inner, boxes, refs, format) for inner in value] if isinstance(value, list) else value


def _fill(text: str, boxes: Iterator[str], refs: Iterator[str], format: BoxFormat) -> Iterator[tuple[str, bool]]:
    """The pieces of a text with its marks replaced, and whether each is written by the library."""
    for piece in MARK.split(text):
        if piece == BOX_MARK:
            yield next(boxes), True
        elif piece == REF_MARK:
            before, after = format.reference
            yield from ((before, True), (next(refs), False), (after, True))
        else:
            yield piece, False


def _join(part: dict[str, Any], pieces: Iterator[tuple[str, bool]]) -> dict[str, Any]:
    text, written = "", []
    for piece, is_written in pieces:
        if is_written and piece:
            written.append((len(text), len(text) + len(piece)))
        text += piece
    return {**part, "text": text, "written": written}


def split_written(part: dict[str, Any]) -> Sequence[tuple[str, bool]]:
    """The text of a part in pieces, and whether each is written by the library."""
    pieces, end = [], 0
    for start, stop in part.get("written", ()):
        pieces += [(part["text"][end:start], False), (part["text"][start:stop], True)]
        end = stop
    return [*pieces, (part["text"][end:], False)]
