"""Text that a processor inserts without reporting it moves the spans behind it."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tuning.data.token_spans import add_insertion, after_expansion, is_insertion

IMAGE = {"span": (0, 7), "new_span": (0, 70)}  # <image> becomes ten of them


@pytest.mark.parametrize(
    ("expansions", "text", "layout", "answer"),
    [
        ([IMAGE], "<image>q\nan answer", "<image><bos>q\nan answer\n", (77, 86)),  # PaliGemma's
        ([], "q\nan answer", "<bos>q\nan answer", (7, 16)),
        ([{"span": (5, 12), "new_span": (5, 75)}], "<image>q\nan answer", "<bos><image>q\nan answer", (77, 86)),
        ([IMAGE], "<image>q\nan answer", "<image>q\nan answer", (72, 81)),  # nothing
        ([IMAGE], "<image>q\nan answer", "<image>q\nan answer\n", (72, 81)),  # only after the end
        ([IMAGE], "<image>q\nan answer", "<image>Q:an answer", (72, 81)),  # rewritten: nothing is known
    ],
)
def test_an_insertion_moves_what_comes_after_it(expansions, text, layout, answer):
    (moved,) = after_expansion([(text.index("an answer"), len(text))], add_insertion(expansions, text, layout))
    assert moved == answer


@given(st.text("ab<", max_size=8), st.text("ab<", min_size=1, max_size=4), st.text("abc", min_size=1, max_size=8))
def test_the_end_of_the_text_moves_by_what_is_inserted(before, inserted, after):
    text, layout = before + after, before + inserted + after
    expansions = add_insertion([], text, layout)
    assert all(map(is_insertion, expansions))
    ((_, end),) = after_expansion([(0, len(text))], expansions)
    assert layout[:end].endswith(after[-1])
    assert end <= len(layout)
