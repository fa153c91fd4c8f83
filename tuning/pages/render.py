"""What the pages of this library share: one self-contained HTML file that needs no network and no JavaScript."""

import html
import math
from collections.abc import Iterable, Mapping
from importlib.resources import files

POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
UNITS = {"gb": "GB", "gib": "GiB", "mb": "MB", "mib": "MiB"}
VISIBLE_CONTROLS = {code: 0x2400 + code for code in range(32) if chr(code) not in "\t\n"} | {127: 0x2421}


def render_document(
    *, title: str, header: str, sections: Iterable[tuple[str, str, str]], style: str, script: str, head: str = ""
) -> str:
    """A page of `sections`, each an id, a heading and a body; all but `style` and `script` is HTML already.

    `style` is added to `page.css`, `head` to the page's head.
    """
    sections = list(sections)
    links = "".join(f'<li><a href="#{name}">{heading}</a></li>' for name, heading, _ in sections)
    main = "\n".join(
        f'<section id="{name}" aria-labelledby="{name}-title"><h2 id="{name}-title">{heading}</h2>{body}</section>'
        for name, heading, body in sections
    )
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<meta name="viewport" content="width=device-width, initial-scale=1">
{head}<title>{title}</title>
<style>
{read_asset("tuning.pages", "page.css")}{style}</style>
</head>
<body>
{header}
<nav aria-label="Sections"><ul>{links}</ul></nav>
<main>
{main}
</main>
<script>
{script}</script>
</body>
</html>
"""


def read_asset(package: str, name: str) -> str:
    return files(package).joinpath(name).read_text(encoding="utf-8")


def escape(text: str) -> str:
    """`text` as HTML. Control characters become visible, as does half a surrogate pair, which no file can hold."""
    visible = text.translate(VISIBLE_CONTROLS).encode("utf-8", "backslashreplace").decode("utf-8")
    return html.escape(visible)


def show_name(key: str) -> str:
    return escape(" ".join(UNITS.get(word, word) for word in key.split("_")))


def show_count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def format_value(value: float) -> str:
    if not math.isfinite(value):
        return "unknown"
    if float(value).is_integer() or abs(value) >= 1000:
        return f"{round(value):,}"
    return f"{value:.3g}"


def render_figures(figures: Mapping[str, str]) -> str:
    """Big figures by name, already formatted."""
    shown = "".join(f"<div><dt>{show_name(key)}</dt><dd>{value}</dd></div>" for key, value in figures.items())
    return f'<dl class="totals">{shown}</dl>' if shown else ""


def render_warnings(warnings: Iterable[str]) -> str:
    items = "".join(f"<li>{escape(warning)}</li>" for warning in warnings)
    return f'<div class="warnings"><h3>Worth a look</h3><ul>{items}</ul></div>' if items else ""


def render_settings(settings: Mapping[str, str]) -> str:
    return f'<dl class="settings">{"".join(_render_setting(key, value) for key, value in settings.items())}</dl>'


def _render_setting(key: str, value: str) -> str:
    style = ' class="lines" tabindex="0" role="group"' if "\n" in value else ""
    label = f' aria-label="{show_name(key)}"' if style else ""
    return f"<dt>{show_name(key)}</dt><dd{style}{label}>{escape(value)}</dd>"


def render_share(name: str, share: float, shown: str = "") -> str:
    """An item of a list of bars; `shown` stands at its end instead of the percentage."""
    width = min(max(share, 0), 1) * 100
    return (
        f"<li><span>{show_name(name)}</span><span class=track aria-hidden=true>"
        f'<span style="width:{width:.1f}%"></span></span><b>{shown or f"{share:.1%}"}</b></li>'
    )


def round_up(number: float) -> float:
    """The next of …, 0.1, 0.2, 0.5, 1, 2, 5, 10, …; `number` is above 0."""
    exponent = math.floor(math.log10(number))
    rounded = (float(f"{factor}e{exponent}") for factor in (1, 2, 5, 10, 20))
    return next(value for value in rounded if value >= number)


def shorten(number: float) -> str:
    """A number at an axis."""
    for size, letter in ((10**9, "G"), (10**6, "M"), (10**4, "k")):
        if number >= size:
            return f"{number / (1000 if letter == 'k' else size):g}{letter}"
    if 0 < abs(number) < 1e-3:
        digits, exponent = f"{number:.3e}".split("e")
        return f"{float(digits):g}e{int(exponent)}"
    return f"{number:,.6g}"
