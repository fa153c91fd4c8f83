"""Boxes and points in texts: finding them in every form that models write, and comparing them."""

import re

Place = tuple[float, ...]
"""A box (x1, y1, x2, y2) or a point (x, y), from the upper left corner of a picture."""

NUMBER = r"\s*(-?\d{1,7}(?:\.\d+)?)\s*"
PAIR = rf"{NUMBER},{NUMBER}"
LOCATIONS = r"<loc(\d{4})><loc(\d{4})>"  # PaliGemma: y before x
PLACE = re.compile(
    rf"{LOCATIONS}(?:{LOCATIONS})?"
    rf"|\({PAIR}\)(?:\s*,\s*\({PAIR}\))?"  # Qwen2-VL: (x1,y1),(x2,y2)
    rf"|\[{PAIR}(?:,{PAIR})?\]"  # Qwen2.5-VL, Qwen3-VL, InternVL: [x1, y1, x2, y2]
)


def find_places(text: str) -> list[Place]:
    """The boxes and points in a text, in order, in the units of the text."""
    places = []
    for found in PLACE.finditer(text):
        numbers = [float(number) for number in found.groups() if number is not None]
        if found[0].startswith("<"):
            numbers = [numbers[index ^ 1] for index in range(len(numbers))]
        places.append(tuple(numbers))
    return places


def find_boxes(text: str) -> list[Place]:
    """The boxes in a text, as `find_places` gives them."""
    return [place for place in find_places(text) if len(place) == 4]


def overlap(first: Place, second: Place) -> float:
    """Intersection over union of two boxes. 0 where one of them has no area, unless both are the same."""
    if first == second:
        return 1.0
    width = min(first[2], second[2]) - max(first[0], second[0])
    height = min(first[3], second[3]) - max(first[1], second[1])
    areas = [
        (box[2] - box[0]) * (box[3] - box[1]) if box[2] > box[0] and box[3] > box[1] else 0 for box in (first, second)
    ]
    if width <= 0 or height <= 0 or 0 in areas:
        return 0.0
    return width * height / (sum(areas) - width * height)
