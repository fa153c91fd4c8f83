"""The page of a check, `check.html`: what is wrong with the data, and what a model would be trained on."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np

from tuning.checking.report import IMAGE, SUPERVISED, Report, SampleRow, Token
from tuning.pages.charts import Chart, draw_histogram
from tuning.pages.pictures import OF_ROW, Mark, Picture, draw_marks
from tuning.pages.render import format_value, plural, render, to_words

MAX_EXAMPLES = 10  # of each kind of problem
MAX_SIZES = 8


@dataclass(frozen=True)
class Sample:
    """A sample row with its tokens in the shortest form, as a page may have tens of thousands of them.

    `pictures` have its boxes drawn over them. A piece is the tag it gets, its ids, its text, and how many tokens it
    stands for: image tokens are one piece.
    """

    row: SampleRow
    pictures: list[Picture]
    counts: str
    pieces: list[tuple[str, str, str, int]]


def render_page(report: Report) -> str:
    """The page as HTML."""
    sizes = report.image_sizes
    return render(
        "check.html.j2",
        report=report,
        verdict=state_verdict(report),
        totals={name: format_value(value) for name, value in report.totals.items()},
        kinds=report.by_kind(),
        max_examples=MAX_EXAMPLES,
        length_charts=draw_lengths(report.lengths),
        size_chart=draw_sizes(sizes),
        sizes=sizes.most_common(MAX_SIZES),
        num_images=sizes.total(),
        num_more_sizes=len(sizes) - MAX_SIZES,
        samples=[
            Sample(row, draw_boxes(row), count_tokens(row), list(group_tokens(row.tokens))) for row in report.samples
        ],
        legend=[(OF_ROW, "box of the row")] if any(row.boxes for row in report.samples) else [],
    )


def draw_boxes(row: SampleRow) -> list[Picture]:
    """The pictures of a row with its boxes."""
    return draw_marks(row.pictures, [(box.image, Mark(OF_ROW, box.place)) for box in row.boxes])


def state_verdict(report: Report) -> str:
    """The result in a few words."""
    rows = report.totals.get("rows")
    if report.is_clean:
        return "No problems" if rows is None else f"No problems in {plural(rows, 'row')}" if rows else "No rows"
    bad = len({(problem.file, problem.row) for problem in report.problems})
    where = plural(bad, "row") if rows is None else f"{bad:,} of {plural(rows, 'row')}"
    return f"{plural(len(report.problems), 'problem')} in {where}"


def draw_lengths(lengths: Mapping[str, np.ndarray]) -> list[Chart | str]:
    """A histogram for each kind of tokens that a row has. In place of one without any, its title."""
    return [
        draw_histogram(f"{to_words(name)} tokens", values, "token", "row")
        if values.max() > 0
        else f"{to_words(name)} tokens"
        for name, values in lengths.items()
        if len(values)
    ]


def draw_sizes(sizes: Counter[tuple[int, int]]) -> Chart | None:
    """A histogram of the longer sides of images."""
    if not sizes:
        return None
    longer = np.repeat([max(size) for size in sizes], list(sizes.values()))
    return draw_histogram("longer side", longer, "pixel", "image")


def count_tokens(row: SampleRow) -> str:
    total, images, supervised = len(row.tokens), row.count(IMAGE), row.count(SUPERVISED)
    return f"{plural(total, 'token')} · {images:,} image · {supervised:,} supervised"


def group_tokens(tokens: Sequence[Token]) -> Iterator[tuple[str, str, str, int]]:
    """The pieces of a `Sample`."""
    for is_image, group in groupby(tokens, key=lambda token: token.role == IMAGE):
        run = list(group)
        if is_image:
            ids = list(dict.fromkeys(token.id for token in run))
            shown = ", ".join(map(str, ids[:4])) + (", …" if len(ids) > 4 else "")
            yield "b", shown, plural(len(run), "image token"), len(run)
        else:
            for token in run:
                yield "u" if token.role == SUPERVISED else "i", str(token.id), token.text, 1
