"""Boxes in texts: found in every form, and compared exactly."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tuning.boxes import find_boxes, find_places, overlap
from tuning.config.box_formats import BOX_FORMATS
from tuning.data.grounding import write_place


@pytest.mark.parametrize(
    ("text", "places"),
    [
        ("the cat [1, 2, 30, 40].", [(1, 2, 30, 40)]),
        ('```json\n[\n\t{"bbox_2d": [1, 2,\n30, 40], "label": "a [x]"}\n]```', [(1, 2, 30, 40)]),
        ("[[1,2,30,40],[5,6,7,8]]", [(1, 2, 30, 40), (5, 6, 7, 8)]),
        ("<box>[[1, 2, 30, 40]]</box>", [(1, 2, 30, 40)]),
        ("<|box_start|>(1,2),(30,40)<|box_end|>", [(1, 2, 30, 40)]),
        ("(1,2),(30,40)(5,6),(7,8)", [(1, 2, 30, 40), (5, 6, 7, 8)]),  # without the special tokens
        ("<loc0002><loc0001><loc0040><loc0030> cat ; <loc0006><loc0005>", [(1, 2, 30, 40), (5, 6)]),
        ("[0.25, 0.5, 1, 0.75] and click (-3, 4.5)", [(0.25, 0.5, 1, 0.75), (-3, 4.5)]),
        ("nothing [1, 2, 3] (1) [a, b, c, d] <loc12><loc13> [1, 2, 3, 4, 5]", []),
        ("[1e400, 2, 3, 4] [" + "9" * 400 + ", 1, 2, 3]", []),
        ("", []),
    ],
)
def test_places_are_found_in_every_form(text, places):
    assert find_places(text) == places
    assert find_boxes(text) == [place for place in places if len(place) == 4]


@given(st.text(alphabet="[](),<loc>0123456789.- \n", max_size=200))
def test_any_text_can_be_searched(text):
    for place in find_places(text):
        assert len(place) in (2, 4)
        assert overlap(place, place) == 1 if len(place) == 4 else True


SHARE = st.floats(0, 1)


@given(st.sampled_from(list(BOX_FORMATS)), st.tuples(SHARE, SHARE, SHARE, SHARE), st.integers(200, 5000))
def test_what_a_format_writes_is_read_back(name, corners, size):
    box = (*map(min, corners[:2], corners[2:]), *map(max, corners[:2], corners[2:]))
    format = BOX_FORMATS[name]
    scale = (format.scale, format.scale) if isinstance(format.scale, int) else (size, 2 * size)
    words = f"a {write_place(box, scale, format)}, {write_place(box[:2], scale, format)} b"
    whole, point = find_places(words)
    assert [number / scale[i % 2] for i, number in enumerate(whole)] == pytest.approx(box, abs=0.003)
    assert point == whole[:2]


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ((0, 0, 10, 10), (0, 0, 10, 10), 1),
        ((0, 0, 10, 10), (5, 0, 15, 10), 50 / 150),
        ((0, 0, 10, 10), (2, 2, 4, 4), 4 / 100),
        ((0, 0, 10, 10), (10, 0, 20, 10), 0),  # they touch
        ((0, 0, 10, 10), (10, 10, 0, 0), 0),  # corners in the wrong order
        ((3, 3, 3, 3), (0, 0, 10, 10), 0),
        ((3, 3, 3, 3), (3, 3, 3, 3), 1),
    ],
)
def test_overlap_is_intersection_over_union(first, second, expected):
    assert overlap(first, second) == overlap(second, first) == pytest.approx(expected)


@given(*[st.tuples(*[st.integers(0, 50)] * 4)] * 2, st.integers(1, 9), st.integers(1, 9))
def test_overlap_stays_when_both_sides_are_scaled(first, second, x, y):
    scaled = [(box[0] * x, box[1] * y, box[2] * x, box[3] * y) for box in (first, second)]
    assert overlap(*scaled) == pytest.approx(overlap(first, second))
    assert 0 <= overlap(first, second) <= 1
