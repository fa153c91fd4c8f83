"""The page of a check: one self-contained HTML file that shows what a model would be trained on."""

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby

import numpy as np

from tuning.checking.report import IMAGE, SUPERVISED, Problem, Report, SampleRow, Token
from tuning.pages.render import (
    escape,
    format_value,
    read_asset,
    render_document,
    render_figures,
    render_settings,
    render_share,
    render_warnings,
    round_up,
    shorten,
    show_count,
    show_name,
)

EXAMPLES = 10
FREQUENT_SIZES = 8
MAX_BARS, MIN_BARS = 48, 7
WIDTH, HEIGHT = 360, 174
LEFT, RIGHT, TOP, BOTTOM = 40, 8, 28, 34


def render_page(report: Report) -> str:
    """The page as HTML; it needs no network, and can be read without JavaScript."""
    sections = [
        ("summary", "Summary", _render_summary(report)),
        ("problems", "Problems", _render_problems(report)),
        ("lengths", "Tokens per row", _render_lengths(report.lengths)),
        ("images", "Image sizes", _render_image_sizes(report.image_sizes)),
        ("cost", "Padding and estimates", _render_cost(report)),
        ("samples", "Sample rows", _render_samples(report.samples)),
    ]
    verdict = _state_verdict(report)
    header = f"""<header class="{"clean" if report.is_clean else "unclean"}">
<h1>{verdict}</h1>
<dl class="names"><div><dt>Model</dt><dd>{escape(report.model)}</dd></div>
<div><dt>Data</dt><dd>{escape(report.data)}</dd></div></dl>
</header>"""
    return render_document(
        title=f"{verdict} – {escape(report.data)}",
        header=header,
        sections=sections,
        style=read_asset("tuning.pages", "check.css"),
        script=read_asset("tuning.pages", "check.js"),
    )


def _state_verdict(report: Report) -> str:
    rows = report.totals.get("rows")
    if report.is_clean:
        return "No problems" if rows is None else f"No problems in {show_count(rows, 'row')}" if rows else "No rows"
    bad = len({(problem.file, problem.row) for problem in report.problems})
    where = show_count(bad, "row") if rows is None else f"{bad:,} of {show_count(rows, 'row')}"
    return f"{show_count(len(report.problems), 'problem')} in {where}"


def _render_summary(report: Report) -> str:
    figures = render_figures({key: format_value(value) for key, value in report.totals.items()})
    settings = f"<h3>Settings</h3>{render_settings(report.settings)}" if report.settings else ""
    return figures + render_warnings(report.warnings) + settings


def _render_problems(report: Report) -> str:
    if report.is_clean:
        return "<p>None were found.</p>"
    groups = "".join(_render_kind(kind, problems) for kind, problems in report.by_kind().items())
    return f'<p class="small">Rows count from 0 within their file.</p>{groups}'


def _render_kind(kind: str, problems: Sequence[Problem]) -> str:
    items = "".join(_render_problem(problem) for problem in problems[:EXAMPLES])
    more = len(problems) - EXAMPLES
    rest = f'<p class="small">and {more:,} more in <code>check.json</code></p>' if more > 0 else ""
    heading = f'<span class="kind">{show_name(kind)}</span> <span class="badge">{len(problems):,}</span>'
    return f"<details open><summary>{heading}</summary><ul>{items}</ul>{rest}</details>"


def _render_problem(problem: Problem) -> str:
    field = f" <code>{escape(problem.field)}</code>" if problem.field else ""
    return (
        f"<li><p><b>row {problem.row}</b>{field} <span class=small>{escape(problem.file)}</span></p>"
        f"<p class=message>{escape(problem.message)}</p></li>"
    )


def _render_lengths(lengths: Mapping[str, np.ndarray]) -> str:
    measured = {name: values for name, values in lengths.items() if len(values)}
    if not measured:
        return "<p>There are no good rows to measure.</p>"
    charts = "".join(
        _render_chart(f"{show_name(name)} tokens", values, ("token", "row"))
        if values.max() > 0
        else f"<figure><figcaption><h3>{show_name(name)} tokens</h3><p>none in any row</p></figcaption></figure>"
        for name, values in measured.items()
    )
    note = '<p class="small">“text” counts every token that is not an image token, supervised ones included.</p>'
    return f'<div class="charts">{charts}</div>{note if "text" in measured else ""}'


def _render_image_sizes(sizes: Counter[tuple[int, int]]) -> str:
    total = sum(sizes.values())
    if not total:
        return "<p>There are no images.</p>"
    longer = np.repeat([max(size) for size in sizes], list(sizes.values()))
    rows = "".join(
        f"<tr><td>{width:,} × {height:,}</td><td>{width * height / 1e6:.2f}</td><td>{count:,}</td>"
        f"<td>{count / total:.0%}</td></tr>"
        for (width, height), count in sizes.most_common(FREQUENT_SIZES)
    )
    rest = len(sizes) - FREQUENT_SIZES
    more = f'<p class="small">and {show_count(rest, "more size")}</p>' if rest > 0 else ""
    return (
        f'<div class="charts">{_render_chart("longer side", longer, ("pixel", "image"))}'
        "<div><h3>most frequent sizes</h3><table><thead><tr><th>pixels</th><th>megapixels</th><th>images</th>"
        f"<th>share</th></tr></thead><tbody>{rows}</tbody></table>{more}</div></div>"
    )


def _render_cost(report: Report) -> str:
    parts = []
    if report.padding:
        bars = "".join(render_share(name, share) for name, share in report.padding.items())
        parts.append(f'<h3>Share of a batch that is padding</h3><ul class="shares">{bars}</ul>')
    if report.estimates:
        entries = "".join(
            f"<dt>{show_name(name)}</dt><dd><b>{format_value(value)}</b> <span class=small>{escape(how)}</span></dd>"
            for name, (value, how) in report.estimates.items()
        )
        parts.append(f'<h3>Estimates</h3><dl class="settings">{entries}</dl>')
    return "".join(parts) or "<p>Nothing could be estimated.</p>"


def _render_chart(title: str, values: np.ndarray, nouns: tuple[str, str]) -> str:
    """A histogram of whole numbers with its figures below the title; `nouns`: of a value, and of what has it."""
    median, most = float(np.median(values)), int(values.max())
    facts = f"median {format_value(median)} · mean {format_value(float(values.mean()))} · max {most:,}"
    label = f"Histogram of {title} of {show_count(len(values), nouns[1])}: {facts.replace(' ·', ',')}"
    counts, edges = _bin(values)
    step = int(round_up(max(int(counts.max()) / 4, 1)))
    top = math.ceil(int(counts.max()) / step) * step
    parts = [
        *_draw_counts(top, step, nouns[1]),
        *_draw_bars(counts, edges, top, nouns),
        *_draw_values(edges, median, nouns[0]),
    ]
    return (
        f"<figure><figcaption><h3>{title}</h3><p>{facts}</p></figcaption>"
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}">{"".join(parts)}</svg></figure>'
    )


def _bin(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Counts in bars of a round width, and their edges; few bars get empty ones beside them."""
    low, high = int(values.min()), int(values.max())
    width = int(round_up(max((high - low + 1) / MAX_BARS, 1)))
    first, last = low // width, high // width
    missing = max(0, MIN_BARS - (last - first + 1))
    first = max(0, first - missing // 2)
    last = max(last, first + MIN_BARS - 1)
    edges = np.arange(first, last + 2) * width
    # Halves keep whole numbers off the edges: the last bar of numpy's histogram includes its upper one.
    return np.histogram(values, edges - 0.5)[0], edges


def _place_x(value: float, edges: np.ndarray) -> float:
    return LEFT + (value - edges[0]) / (edges[-1] - edges[0]) * (WIDTH - LEFT - RIGHT)


def _place_y(count: float, top: int) -> float:
    return HEIGHT - BOTTOM - count / top * (HEIGHT - TOP - BOTTOM)


def _draw_counts(top: int, step: int, noun: str) -> Iterator[str]:
    yield f'<text x="0" y="12">{noun}s</text>'
    for count in range(0, top + 1, step):
        y = _place_y(count, top)
        yield f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
        yield f'<text x="{LEFT - 5}" y="{y + 3.5:.1f}" text-anchor="end">{shorten(count)}</text>'


def _draw_bars(counts: np.ndarray, edges: np.ndarray, top: int, nouns: tuple[str, str]) -> Iterator[str]:
    for count, start, end in zip(counts.tolist(), edges[:-1].tolist(), edges[1:].tolist(), strict=True):
        if not count:
            continue
        x, right = _place_x(start, edges), _place_x(end, edges)
        height = max(1.5, _place_y(0, top) - _place_y(count, top))
        values = show_count(start, nouns[0]) if end - start == 1 else f"{start:,}–{end - 1:,} {nouns[0]}s"
        yield (
            f"<g><title>{values}: {show_count(count, nouns[1])}</title>"
            f'<rect class="hover" x="{x:.1f}" y="{TOP}" width="{right - x:.1f}" height="{HEIGHT - TOP - BOTTOM}"/>'
            f'<rect class="bar" x="{x + 0.5:.1f}" y="{_place_y(0, top) - height:.1f}" width="{right - x - 1:.1f}"'
            f' height="{height:.1f}"/></g>'
        )


def _draw_values(edges: np.ndarray, median: float, noun: str) -> Iterator[str]:
    """The axis below the bars, and a line at the median. Half is added as a bar of width 1 starts at its number."""
    step = int(round_up(max((edges[-1] - edges[0]) / 5, 1)))
    for tick in range(-(-int(edges[0]) // step) * step, int(edges[-1]), step):
        x = _place_x(tick + 0.5, edges)
        yield f'<text x="{x:.1f}" y="{HEIGHT - BOTTOM + 14}" text-anchor="middle">{shorten(tick)}</text>'
    yield f'<text x="{WIDTH - RIGHT}" y="{HEIGHT - 4}" text-anchor="end">{noun}s</text>'
    x = _place_x(median + 0.5, edges)
    anchor = "start" if x < WIDTH / 2 else "end"
    yield f'<line class="median" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP - 22}" y2="{HEIGHT - BOTTOM}"/>'
    yield f'<text x="{x + (4 if anchor == "start" else -4):.1f}" y="12" text-anchor="{anchor}">median</text>'


def _render_samples(samples: Sequence[SampleRow]) -> str:
    if not samples:
        return "<p>There is no good row to show.</p>"
    links = "".join(f'<li><a href="#sample-{n}">row {sample.row}</a></li>' for n, sample in enumerate(samples))
    legend = (
        '<ul class="legend"><li><u>supervised</u> the model learns to write it</li>'
        "<li><i>text</i> it only reads it</li>"
        "<li><b>3 image tokens</b> a picture</li><li><s></s> a line break</li></ul>"
    )
    articles = "\n".join(_render_sample(number, sample) for number, sample in enumerate(samples))
    return f'<nav aria-label="Sample rows"><ul>{links}</ul></nav>{legend}{articles}'


def _render_sample(number: int, sample: SampleRow) -> str:
    name = f"sample-{number}"
    pictures = "".join(
        f'<img src="{escape(uri)}" alt="picture {n} of {len(sample.pictures)} of row {sample.row}" loading="lazy">'
        for n, uri in enumerate(sample.pictures, 1)
    )
    counts = [
        show_count(len(sample.tokens), "token"),
        f"{sample.count(IMAGE):,} image",
        f"{sample.count(SUPERVISED):,} supervised",
    ]
    return (
        f'<article id="{name}" aria-labelledby="{name}-title"><h3 id="{name}-title">Row {sample.row} '
        f"<span class=small>{escape(sample.file)}</span></h3>"
        f"{f'<div class=pictures>{pictures}</div>' if pictures else ''}<p class=small>{' · '.join(counts)}</p>"
        f'<div class="tokens" tabindex="0" role="group" aria-label="tokens of row {sample.row}"'
        f' aria-describedby="{name}-status">{_render_tokens(sample.tokens)}</div>'
        f'<p class="status" id="{name}-status" aria-live="polite"></p></article>'
    )


def _render_tokens(tokens: Sequence[Token]) -> str:
    """The shortest markup that says it all, as a page may have tens of thousands of tokens; title is the id."""
    parts = []
    for is_image, run in groupby(tokens, key=lambda token: token.role == IMAGE):
        if is_image:
            parts.append(_render_image_run(list(run)))
            continue
        for token in run:
            tag = "u" if token.role == SUPERVISED else "i"
            text = escape(token.text).replace("\n", "<s></s>\n")
            parts.append(f"<{tag} title={token.id}>{text}</{tag}>")
    return "".join(parts)


def _render_image_run(run: Sequence[Token]) -> str:
    ids = list(dict.fromkeys(token.id for token in run))
    shown = ", ".join(map(str, ids[:4])) + (", …" if len(ids) > 4 else "")
    return f'<b title="{shown}" data-n={len(run)}>{show_count(len(run), "image token")}</b>'
