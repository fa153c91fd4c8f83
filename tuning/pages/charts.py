"""Figures by step as curves: SVG that needs no JavaScript, whose points tell their values when pointed at."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from tuning.pages.render import escape, round_up, shorten, show_count
from tuning.pages.run_record import Series

SMALL, WIDE = (360, 190), (760, 290)
RIGHT, TOP, BOTTOM = 12, 24, 32
BUCKETS = 160  # a curve shows the lowest and the highest value of each
BANDS = 48  # parts of a chart that tell their values
VERY_FEW, FEW = 24, 64  # so many values are also shown as points; more than FEW also as means
MEANS = 32
LOG_RANGE = 20  # largest ÷ smallest value from which on a logarithmic axis shows more
MAX_TICKS = 7


@dataclass(frozen=True)
class Axis:
    """Numbers from `low` to `high` on pixels from `start` to `end`, and the round ones to name."""

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


def render_curves(
    title: str,
    lines: Mapping[str, Series],
    *,
    wide: bool = False,
    may_be_log: bool = False,
    from_zero: bool = False,
    tells_highest: bool = False,
) -> str:
    """A chart of one or two lines by name; the second is drawn as dots. `title` and names are plain text.

    Nothing where there is no number to show. `wide`: across the page, where that is wide enough. `may_be_log`: numbers
    of very different sizes get a logarithmic axis. `from_zero`: another axis begins there. `tells_highest`: the words
    above the curve name its highest value, else its lowest.
    """
    finite = {name: series.finite() for name, series in lines.items()}
    finite = {name: series for name, series in finite.items() if len(series)}
    if not finite:
        return ""
    facts = "; ".join(
        _summarize(name if len(lines) > 1 else "", series, tells_highest) for name, series in finite.items()
    )
    strange = sum(len(series) - len(series.finite()) for series in lines.values())
    note = f" {show_count(strange, 'value')} of no finite size, marked ×." if strange else ""
    is_log = may_be_log and _spreads(list(finite.values()))
    sizes = {"wide": WIDE, "narrow": SMALL} if wide else {"": SMALL}
    label = escape(f"{title} by step: {facts}")
    drawn = "".join(
        f'<svg class="{name}" viewBox="0 0 {width} {height}" role="img" aria-label="{label}">'
        f"{''.join(_draw(lines, finite, (width, height), is_log, from_zero))}</svg>"
        for name, (width, height) in sizes.items()
    )
    scale = " <span class=small>logarithmic</span>" if is_log else ""
    return (
        f"<figure{' class=across' if wide else ''}><figcaption><h3>{escape(title)}{scale}</h3>{_render_legend(lines)}"
        f"<p>{escape(facts)}.{note}</p></figcaption>{drawn}</figure>"
    )


def _summarize(name: str, series: Series, tells_highest: bool) -> str:
    values, latest = series.values, show_number(series.values[-1])
    if len(values) == 1:
        return f"{name} {latest} at step {series.steps[0]:,}".strip()
    at = int(values.argmax() if tells_highest else values.argmin())
    extreme = f"{'highest' if tells_highest else 'lowest'} {show_number(values[at])} at step {series.steps[at]:,}"
    return f"{name} first {show_number(values[0])}, latest {latest}, {extreme}".strip()


def _render_legend(lines: Mapping[str, Series]) -> str:
    if len(lines) < 2:
        return ""
    items = "".join(
        f"<li><span class=key-{number} aria-hidden=true>{sign}</span> {escape(name)}</li>"
        for number, (name, sign) in enumerate(zip(lines, "―●", strict=False))
    )
    return f"<ul class=keys>{items}</ul>"


def _spreads(lines: Sequence[Series]) -> bool:
    low, high = min(line.values.min() for line in lines), max(line.values.max() for line in lines)
    return low > 0 and high / low >= LOG_RANGE


def _draw(
    lines: Mapping[str, Series], finite: Mapping[str, Series], size: tuple[int, int], is_log: bool, from_zero: bool
) -> Iterator[str]:
    width, height = size
    values = np.concatenate([series.values for series in finite.values()])
    low = min(0.0, float(values.min())) if from_zero and not is_log else float(values.min())
    y = _make_axis(low, float(values.max()), height - BOTTOM, TOP, is_log)
    left = 12 + 6.5 * max(len(shorten(tick)) for tick in y.ticks)
    steps = np.concatenate([series.steps for series in lines.values()])
    x = _make_step_axis(int(steps.min()), int(steps.max()), left, width - RIGHT)
    yield from _draw_axes(x, y)
    yield from _draw_bands(x, y, finite)
    for number, name in enumerate(lines):
        if name in finite:
            yield from _draw_line(x, y, finite[name]) if number == 0 else _draw_dots(x, y, finite[name])
        yield from _mark_strange(x, lines[name])


def _make_axis(low: float, high: float, start: float, end: float, is_log: bool) -> Axis:
    if is_log:
        powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        marks = [float(f"{factor}e{power}") for power in powers for factor in (1, 2, 5)]
        low, high = max(mark for mark in marks if mark <= low), min(mark for mark in marks if mark >= high)
        ticks = [mark for mark in marks if low <= mark <= high]
        if len(ticks) > MAX_TICKS:
            tens = [float(f"1e{power}") for power in powers if low <= float(f"1e{power}") <= high]
            ticks = tens[:: -(-len(tens) // MAX_TICKS)]
        return Axis(low, high, start, end, ticks, is_log=True)
    if 0 <= low <= high / 2 or low == high:
        low, high = min(low, 0.0), max(high, 0.0)
    step = round_up((high - low) / 4 or 1)
    first, last = math.floor(round(low / step, 6)), math.ceil(round(high / step, 6))
    last += first == last
    ticks = [float(f"{number * step:.12g}") for number in range(first, last + 1)]
    return Axis(ticks[0], ticks[-1], start, end, ticks)


def _make_step_axis(first: int, last: int, start: float, end: float) -> Axis:
    low = 0 if first <= last / 5 else first
    last = max(last, low + 1)
    step = max(int(round_up((last - low) / 5)), 1)
    return Axis(low, last, start, end, list(range(-(-low // step) * step, last + 1, step)))


def _draw_axes(x: Axis, y: Axis) -> Iterator[str]:
    for tick in y.ticks:
        at = float(y.place(tick))
        yield f'<line class="grid" x1="{x.start:.1f}" x2="{x.end:.1f}" y1="{at:.1f}" y2="{at:.1f}"/>'
        yield f'<text x="{x.start - 6:.1f}" y="{at + 3.5:.1f}" text-anchor="end">{shorten(tick)}</text>'
    for tick in x.ticks:
        text = f'<text x="{float(x.place(tick)):.1f}" y="{y.start + 15:.1f}" text-anchor="middle">'
        yield f"{text}{shorten(tick)}</text>"
    yield f'<text x="{x.end:.1f}" y="{y.start + 29:.1f}" text-anchor="end">steps</text>'


def _draw_line(x: Axis, y: Axis, series: Series) -> Iterator[str]:
    """The values, and of many their means on top."""
    if len(series) <= VERY_FEW:
        yield from _draw_points(x, y, series, "point")
    if len(series) == 1:
        return
    faint = " faint" if len(series) > FEW else ""
    yield f'<path class="curve{faint}" d="{_path(x, y, thin_out(series))}"/>'
    if faint:
        yield f'<path class="curve" d="{_path(x, y, average(series))}"/>'


def _draw_dots(x: Axis, y: Axis, series: Series) -> Iterator[str]:
    thinned = thin_out(series)
    yield f'<path class="curve second" d="{_path(x, y, thinned)}"/>'
    yield from _draw_points(x, y, thinned, "point second")


def _draw_points(x: Axis, y: Axis, series: Series, style: str) -> Iterator[str]:
    for across, down in zip(x.place(series.steps), y.place(series.values), strict=True):
        yield f'<circle class="{style}" cx="{across:.1f}" cy="{down:.1f}" r="3"/>'


def _path(x: Axis, y: Axis, series: Series) -> str:
    places = zip(x.place(series.steps), y.place(series.values), strict=True)
    return "M" + "L".join(f"{across:.1f} {down:.1f}" for across, down in places)


def _mark_strange(x: Axis, series: Series) -> Iterator[str]:
    """A mark above each step whose value is no number; of many, one a band."""
    strange = np.flatnonzero(~np.isfinite(series.values))
    for index in strange[:: max(1, -(-len(strange) // BANDS))].tolist():
        at = float(x.place(series.steps[index]))
        yield (
            f'<text class="strange" x="{at:.1f}" y="{TOP - 8}" text-anchor="middle">×'
            f"<title>step {series.steps[index]:,}: {series.values[index]}</title></text>"
        )


def _draw_bands(x: Axis, y: Axis, lines: Mapping[str, Series]) -> Iterator[str]:
    """Areas that tell the values in them when they are pointed at."""
    steps = np.unique(np.concatenate([series.steps for series in lines.values()]))
    bands = np.array_split(steps, min(BANDS, len(steps)))
    between = [(before[-1] + after[0]) / 2 for before, after in pairwise(bands)]
    edges = [x.start, *x.place(np.array(between)).tolist(), x.end]
    for band, (start, end) in zip(bands, pairwise(edges), strict=True):
        told = [
            f"{name} {_tell(inside)}"
            for name, series in lines.items()
            if len(inside := series.values[(series.steps >= band[0]) & (series.steps <= band[-1])])
        ]
        when = f"step {band[0]:,}" if len(band) == 1 else f"steps {band[0]:,}–{band[-1]:,}"
        area = f'x="{start:.1f}" y="{TOP}" width="{end - start:.1f}" height="{y.start - TOP:.1f}"'
        yield f'<g><title>{escape(when)}: {escape(", ".join(told))}</title><rect class="hover" {area}/></g>'


def _tell(values: np.ndarray) -> str:
    low, high, mean = map(show_number, (values.min(), values.max(), values.mean()))
    return mean if low == high else f"{mean} ({low} to {high})"


def show_number(value: float) -> str:
    """Four digits of a number, or nan or inf."""
    return shorten(float(f"{value:.4g}")) if math.isfinite(value) else str(float(value))


def thin_out(series: Series) -> Series:
    """So few points that a page stays small; none of the peaks is lost."""
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
