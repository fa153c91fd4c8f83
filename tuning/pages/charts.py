"""SVG charts that need no JavaScript: curves by step, and histograms. Pointing at a place shows its values."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from markupsafe import Markup

from tuning.pages.render import format_number, format_value, make_visible, plural, shorten
from tuning.pages.run_record import Series

SMALL, WIDE = (360, 190), (760, 290)  # width, height
RIGHT, TOP, BOTTOM = 12, 24, 32  # margins
BUCKETS = 160  # a curve shows the lowest and the highest value of each
BANDS = 48  # parts of a chart that show their values
VERY_FEW, FEW = 24, 64  # a curve of so many values also shows points. One of more than FEW also shows means.
MEANS = 32
LOG_RANGE = 20  # largest ÷ smallest value from which on a logarithmic axis shows more
MAX_TICKS = 7
MAX_BARS, MIN_BARS = 48, 7


@dataclass(frozen=True)
class Chart:
    """A drawing and the words above it. `lines`: the names of its curves. A wide chart has two drawings in `svg`, and
    the style sheet shows the one that fits the screen.
    """

    title: str
    summary: str
    svg: Markup
    lines: Sequence[str] = ()
    is_log: bool = False
    is_wide: bool = False


@dataclass(frozen=True)
class Axis:
    """Numbers from `low` to `high`, drawn from pixel `start` to pixel `end`, and the round ones to label."""

    low: float
    high: float
    start: float
    end: float
    ticks: Sequence[float]
    is_log: bool = False

    def place(self, values: np.ndarray | float) -> np.ndarray:
        """Pixels of `values`."""
        low, high, numbers = self.low, self.high, np.asarray(values, float)
        if self.is_log:
            low, high, numbers = math.log(low), math.log(high), np.log(numbers)
        return np.asarray(self.start + (numbers - low) / (high - low) * (self.end - self.start))


def draw_curves(
    title: str,
    lines: Mapping[str, Series],
    *,
    is_wide: bool = False,
    allow_log: bool = False,
    from_zero: bool = False,
    extreme: str = "lowest",
) -> Chart | None:
    """A chart of one or two lines by name. The second is drawn as dots. None if no value is finite.

    `allow_log`: values of very different sizes get a logarithmic axis. `from_zero`: any other axis includes zero.
    `extreme`: whether the summary names the `lowest` or the `highest` value.
    """
    finite = {name: series.finite() for name, series in lines.items()}
    finite = {name: series for name, series in finite.items() if len(series)}
    if not finite:
        return None
    values = np.concatenate([series.values for series in finite.values()])
    is_log = bool(allow_log and values.min() > 0 and values.max() / values.min() >= LOG_RANGE)
    named = [_summarize(series, extreme, name if len(lines) > 1 else "") for name, series in finite.items()]
    summary = "; ".join(named) + "."
    label = f"{title} by step: {summary}"
    if not_finite := sum(len(series) for series in lines.values()) - len(values):
        summary += f" {plural(not_finite, 'NaN or infinite value')}, marked ×."
    svg = Markup().join(
        _element(
            "svg",
            *_draw_lines(lines, finite, size, is_log, from_zero),
            class_=name,
            viewBox=f"0 0 {size[0]} {size[1]}",
            role="img",
            aria_label=label,
        )
        for name, size in ({"wide": WIDE, "narrow": SMALL} if is_wide else {"": SMALL}).items()
    )
    return Chart(title, summary, svg, list(lines), is_log, is_wide)


def draw_histogram(title: str, values: np.ndarray, value_noun: str, noun: str) -> Chart:
    """A histogram of whole numbers, at least one. `value_noun` is what a value counts, `noun` what has it."""
    median, largest = float(np.median(values)), int(values.max())
    summary = f"median {format_value(median)} · mean {format_value(float(values.mean()))} · max {largest:,}"
    label = f"Histogram of {title} of {plural(len(values), noun)}: {summary.replace(' ·', ',')}"
    counts, edges = _bin(values)
    width, height = SMALL
    y = _make_value_axis(0, int(counts.max()), height - BOTTOM, TOP, min_step=1)
    x_ticks = _whole_ticks(math.ceil(edges[0]), math.floor(edges[-1]))
    x = Axis(float(edges[0]), float(edges[-1]), _left_of(y), width - RIGHT, x_ticks)
    middle = float(x.place(median))
    side, shift = ("start", 4) if middle < width / 2 else ("end", -4)
    parts = [
        _element("text", f"{noun}s", x=0, y=12),
        *_draw_axes(x, y, f"{value_noun}s"),
        *_draw_bars(x, y, counts, edges, (value_noun, noun)),
        _element("line", class_="median", x1=middle, x2=middle, y1=2, y2=y.start),
        _element("text", "median", x=middle + shift, y=12, text_anchor=side),
    ]
    return Chart(title, summary, _element("svg", *parts, viewBox=f"0 0 {width} {height}", role="img", aria_label=label))


def _element(tag: str, *content: str, **attributes: str | float) -> Markup:
    """An SVG element. Content and attributes are escaped, unless they are Markup. Floats get one decimal."""
    opened = Markup(tag)
    for name, value in attributes.items():  # class_ → class, text_anchor → text-anchor
        text = f"{value:.1f}" if isinstance(value, float) else make_visible(value)
        opened += Markup(' {}="{}"').format(name.rstrip("_").replace("_", "-"), text)
    return Markup("<{}>{}</{}>").format(opened, Markup().join(map(make_visible, content)), tag)


def _summarize(series: Series, extreme: str, name: str) -> str:
    values, latest = series.values, format_number(series.values[-1])
    if len(values) == 1:
        return f"{name} {latest} at step {series.steps[0]:,}".strip()
    at = int(values.argmax() if extreme == "highest" else values.argmin())
    found = f"{extreme} {format_number(values[at])} at step {series.steps[at]:,}"
    return f"{name} first {format_number(values[0])}, latest {latest}, {found}".strip()


def _draw_lines(
    lines: Mapping[str, Series], finite: Mapping[str, Series], size: tuple[int, int], is_log: bool, from_zero: bool
) -> Iterator[Markup]:
    width, height = size
    values = np.concatenate([series.values for series in finite.values()])
    low, high = float(values.min()), float(values.max())
    if is_log:
        y = _make_log_axis(low, high, height - BOTTOM, TOP)
    else:
        y = _make_value_axis(min(0.0, low) if from_zero else low, high, height - BOTTOM, TOP)
    steps = np.concatenate([series.steps for series in lines.values()])
    first = 0 if steps.min() <= steps.max() / 5 else int(steps.min())
    last = max(int(steps.max()), first + 1)
    x = Axis(first, last, _left_of(y), width - RIGHT, _whole_ticks(first, last))
    yield from _draw_axes(x, y, "steps")
    yield from _draw_bands(x, y, finite)
    for number, name in enumerate(lines):
        if name in finite:
            yield from _draw_curve(x, y, finite[name], is_second=number > 0)
        yield from _mark_not_finite(x, lines[name])


def _make_value_axis(low: float, high: float, start: float, end: float, min_step: float = 0.0) -> Axis:
    if 0 <= low <= high / 2 or low == high:
        low, high = min(low, 0.0), max(high, 0.0)
    step = max(round_up((high - low) / 4 or 1), min_step)
    first, last = math.floor(round(low / step, 6)), math.ceil(round(high / step, 6))
    last += first == last
    ticks = [float(f"{number * step:.12g}") for number in range(first, last + 1)]
    return Axis(ticks[0], ticks[-1], start, end, ticks)


def _make_log_axis(low: float, high: float, start: float, end: float) -> Axis:
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    marks = [float(f"{factor}e{power}") for power in powers for factor in (1, 2, 5)]
    low, high = max(mark for mark in marks if mark <= low), min(mark for mark in marks if mark >= high)
    ticks = [mark for mark in marks if low <= mark <= high]
    if len(ticks) > MAX_TICKS:
        tens = [float(f"1e{power}") for power in powers if low <= float(f"1e{power}") <= high]
        ticks = tens[:: -(-len(tens) // MAX_TICKS)]
    return Axis(low, high, start, end, ticks, is_log=True)


def _whole_ticks(low: int, high: int) -> range:
    step = max(int(round_up((high - low) / 5 or 1)), 1)
    return range(-(-low // step) * step, high + 1, step)


def _left_of(y: Axis) -> float:
    """Where the area of a chart begins: to the right of the labels of `y`."""
    return 12 + 6.5 * max(len(shorten(tick)) for tick in y.ticks)


def _draw_axes(x: Axis, y: Axis, unit: str) -> Iterator[Markup]:
    for tick in y.ticks:
        at = float(y.place(tick))
        yield _element("line", class_="grid", x1=x.start, x2=x.end, y1=at, y2=at)
        yield _element("text", shorten(tick), x=x.start - 6, y=at + 3.5, text_anchor="end")
    for tick in x.ticks:
        yield _element("text", shorten(tick), x=float(x.place(tick)), y=y.start + 15, text_anchor="middle")
    yield _element("text", unit, x=x.end, y=y.start + 29, text_anchor="end")


def _draw_curve(x: Axis, y: Axis, series: Series, is_second: bool) -> Iterator[Markup]:
    """A line, with its values as points where there are few. Of many values also the means. A second line has dots."""
    thinned, style = thin_out(series), " second" if is_second else ""
    if is_second or len(series) <= VERY_FEW:
        for across, down in zip(x.place(thinned.steps).tolist(), y.place(thinned.values).tolist(), strict=True):
            yield _element("circle", class_=f"point{style}", cx=across, cy=down, r=3)
    if len(series) == 1:
        return
    shows_means = not is_second and len(series) > FEW
    yield _draw_path(x, y, thinned, f"curve{style}{' faint' if shows_means else ''}")
    if shows_means:
        yield _draw_path(x, y, average(series), "curve")


def _draw_path(x: Axis, y: Axis, series: Series, style: str) -> Markup:
    places = zip(x.place(series.steps), y.place(series.values), strict=True)
    return _element("path", class_=style, d="M" + "L".join(f"{across:.1f} {down:.1f}" for across, down in places))


def _mark_not_finite(x: Axis, series: Series) -> Iterator[Markup]:
    """A mark above each step with a NaN or infinite value. Where there are many, one mark per band."""
    found = np.flatnonzero(~np.isfinite(series.values))
    for index in found[:: max(1, -(-len(found) // BANDS))].tolist():
        step = series.steps[index]
        title = _element("title", f"step {step:,}: {series.values[index]}")
        yield _element("text", "×", title, class_="not-finite", x=float(x.place(step)), y=TOP - 8, text_anchor="middle")


def _draw_bands(x: Axis, y: Axis, lines: Mapping[str, Series]) -> Iterator[Markup]:
    """Areas that show the values in them when you point at them."""
    steps = np.unique(np.concatenate([series.steps for series in lines.values()]))
    bands = np.array_split(steps, min(BANDS, len(steps)))
    between = [(before[-1] + after[0]) / 2 for before, after in pairwise(bands)]
    edges = [x.start, *x.place(np.array(between)).tolist(), x.end]
    for band, (start, end) in zip(bands, pairwise(edges), strict=True):
        values = ", ".join(
            f"{name} {_describe_values(inside)}"
            for name, series in lines.items()
            if len(inside := series.values[(series.steps >= band[0]) & (series.steps <= band[-1])])
        )
        when = f"step {band[0]:,}" if len(band) == 1 else f"steps {band[0]:,}–{band[-1]:,}"
        area = _element("rect", class_="hover", x=start, y=TOP, width=end - start, height=float(y.start - TOP))
        yield _element("g", _element("title", f"{when}: {values}"), area)


def _describe_values(values: np.ndarray) -> str:
    low, high, mean = map(format_number, (values.min(), values.max(), values.mean()))
    return mean if low == high else f"{mean} ({low} to {high})"


def _bin(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Counts in bars of a round width, and their edges. There are at least MIN_BARS bars, some of them empty.

    Edges lie half below a whole number, as the last bar of numpy's histogram includes its upper edge.
    """
    low, high = int(values.min()), int(values.max())
    width = int(round_up(max((high - low + 1) / MAX_BARS, 1)))
    first, last = low // width, high // width
    missing = max(0, MIN_BARS - (last - first + 1))
    first = max(0, first - missing // 2)
    last = max(last, first + MIN_BARS - 1)
    edges = np.arange(first, last + 2) * width - 0.5
    return np.histogram(values, edges)[0], edges


def _draw_bars(x: Axis, y: Axis, counts: np.ndarray, edges: np.ndarray, nouns: tuple[str, str]) -> Iterator[Markup]:
    for number, start, end in zip(counts.tolist(), edges[:-1].tolist(), edges[1:].tolist(), strict=True):
        if not number:
            continue
        low, high = int(start + 0.5), int(end - 0.5)
        values = plural(low, nouns[0]) if low == high else f"{low:,}–{high:,} {nouns[0]}s"
        left, right = float(x.place(start)), float(x.place(end))
        height = max(1.5, y.start - float(y.place(number)))
        yield _element(
            "g",
            _element("title", f"{values}: {plural(number, nouns[1])}"),
            _element("rect", class_="hover", x=left, y=TOP, width=right - left, height=float(y.start - TOP)),
            _element("rect", class_="bar", x=left + 0.5, y=y.start - height, width=right - left - 1, height=height),
        )


def round_up(number: float) -> float:
    """The next of …, 0.1, 0.2, 0.5, 1, 2, 5, 10, … for a number above 0."""
    exponent = math.floor(math.log10(number))
    rounded = (float(f"{factor}e{exponent}") for factor in (1, 2, 5, 10, 20))
    return next(value for value in rounded if value >= number)


def thin_out(series: Series) -> Series:
    """Few enough points that a page stays small. Every peak is kept."""
    if len(series) <= 2 * BUCKETS:
        return series
    kept = [0, len(series) - 1]
    for bucket in np.array_split(np.arange(len(series)), BUCKETS):
        inside = series.values[bucket]
        kept += [int(bucket[inside.argmin()]), int(bucket[inside.argmax()])]
    order = np.unique(kept)
    return Series(series.steps[order], series.values[order])


def average(series: Series) -> Series:
    """Means of neighbouring points."""
    places = np.array_split(np.arange(len(series)), MEANS)
    return Series(
        np.array([series.steps[place].mean() for place in places]),
        np.array([series.values[place].mean() for place in places]),
    )
