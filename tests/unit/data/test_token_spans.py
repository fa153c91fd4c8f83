"""What a processor changes in a text, and where its tokens are in the text as it was."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tuning.data.token_spans import NOWHERE, find_changes, reported_changes, undo_changes

TEXT = "<image>q\nan answer"
ANSWER = (TEXT.index("an answer"), len(TEXT))
REPORT = {"span": (0, 7), "new_span": (0, 70)}  # <image> becomes ten of them


def characters(text: str) -> np.ndarray:
    """The offsets of a text of which every character is a token."""
    return np.array([(place, place + 1) for place in range(len(text))]).reshape(-1, 2)


@pytest.mark.parametrize(
    ("reported", "read", "believed"),
    [
        ([REPORT], "<image>" * 10 + "q\nan answer", True),
        ([REPORT], "<image>" * 10 + "<bos>q\nan answer\n", False),  # PaliGemma's
        ([REPORT], "<bos>" + "<image>" * 10 + "q\nan answer", False),
        ([REPORT], "<image>" * 10 + "Q:an answer", False),  # of the same length
        ([], "<image>" * 10 + "q\nan answer", False),  # Idefics 2's
        ([], TEXT, True),
    ],
)
def test_a_report_is_believed_only_if_it_makes_the_text_that_was_read(reported, read, believed):
    changes = reported_changes(reported, TEXT, read)
    assert (changes is not None) == believed
    assert not changes or changes == [((0, 7), (0, 70))]


@pytest.mark.parametrize(
    "read",
    [
        "<image>" * 10 + "q\nan answer",
        "<image>" * 10 + "<bos>q\nan answer\n",
        "<bos>" + "<image>" * 10 + "q\nan answer",
        "<fake>" + "<image>" * 10 + "<fake> q\nan answer</s>",
    ],
)
def test_changes_that_nobody_reports_are_found(read):
    changes = find_changes(TEXT, read, "<image>", [ANSWER])
    if read.startswith("<bos>"):  # an insertion before the placeholder is a part of what became of it
        assert changes == [((0, 7), (0, 75))]
    places = undo_changes(characters(read), changes)
    found = [read[index] for index, (start, _) in enumerate(places) if start >= ANSWER[0]]
    assert "".join(found) == "an answer"


@pytest.mark.parametrize(
    ("text", "read", "needed"),
    [
        ("<image>q\nan answer", "<image>Q:an answer", [(9, 18)]),  # rewritten
        ("<image>yes", "<image>yesyes", [(7, 10)]),  # in two places
        ("<s>q<image>r", "<s><image><s>q<image>r", [(11, 12)]),  # an image of its own beside ours (Idefics)
        ("a<image>b", "b<image>a", [(8, 9)]),
    ],
)
def test_what_is_not_sure_is_not_found(text, read, needed):
    assert find_changes(text, read, "<image>", needed) is None


def test_only_the_needed_parts_must_be_in_one_place():
    text, read = "<image>\n<image>\nan answer", "[\n][\n]\n[\n][\n]\nan answer"
    assert find_changes(text, read, "<image>", [(16, 25)]) is not None
    assert find_changes(text, read, "<image>", [(0, 25)]) is None


def test_nothing_stands_between_two_images():
    changes = find_changes("q<image><image>r", "<s>q[<image>][<image>]r", "<image>", [(0, 16)])
    assert changes[0] == ((0, 0), (0, 3))
    assert changes[-1][1][1] == len("<s>q[<image>][<image>]")


def test_a_text_may_end_with_an_image():
    changes = find_changes("q<image>", "<s>q<fake><image><image><fake>", "<image>", [(0, 1)])
    assert changes == [((0, 0), (0, 3)), ((1, 8), (4, 30))]


def test_an_inserted_token_is_nowhere():
    read = "<bos>abc"
    places = undo_changes(characters(read), find_changes("abc", read, "<image>"))
    assert places.tolist() == [[NOWHERE, NOWHERE]] * 5 + [[0, 1], [1, 2], [2, 3]]


@given(st.lists(st.text("ab", max_size=4), min_size=1, max_size=4), st.text("ab<", max_size=4), st.integers(1, 5))
def test_each_character_is_found_again(parts, inserted, count):
    """However alike the parts are, what is found has the right characters."""
    text, read = "I".join(parts), inserted + ("I" * count).join(parts) + inserted
    changes = find_changes(text, read, "I")
    if changes is None:  # not sure
        return
    places = undo_changes(characters(read), changes)
    for character, (start, end) in zip(read, places, strict=True):
        if start != NOWHERE and end - start == 1 and text[start:end] != "I":
            assert character == text[start:end]
    assert {place for place in range(len(text)) if text[place] != "I"} <= set(places[:, 0].tolist())


@given(st.text("ab<", max_size=8), st.text("ab<", min_size=1, max_size=4), st.text("abc", min_size=1, max_size=8))
def test_needed_text_is_in_the_right_place_or_refused(before, inserted, after):
    text, read = before + "I" + after, before + "III" + inserted + after
    changes = find_changes(text, read, "I", [(len(before) + 1, len(text))])
    if changes is not None:
        places = undo_changes(characters(read), changes)
        tokens = np.flatnonzero(places[:, 0] > len(before))
        assert tokens.tolist() == list(range(len(read) - len(after), len(read)))
