"""Pages from templates: each is one HTML file that needs no network and can be read without JavaScript."""

import math
from datetime import datetime
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

UNITS = {"gb": "GB", "gib": "GiB", "mb": "MB", "mib": "MiB"}
VISIBLE_CONTROLS = {code: 0x2400 + code for code in range(32) if chr(code) not in "\t\n"} | {127: 0x2421}


def render(template: str, **values: Any) -> str:
    """The text of a file in `templates`, filled with `values`. They are escaped as HTML, except in Markdown files."""
    return ENVIRONMENT.get_template(template).render(values) + "\n"


def read_asset(name: str) -> str:
    """The text of a style sheet or script in `templates`."""
    return LOADER.get_source(ENVIRONMENT, name)[0]


def make_visible(value: Any) -> Any:
    """Show control characters of a text as symbols, and half a surrogate pair, which no file can hold, as its code."""
    if not isinstance(value, str) or hasattr(value, "__html__"):  # drawn already
        return value
    return value.translate(VISIBLE_CONTROLS).encode("utf-8", "backslashreplace").decode("utf-8")


def to_words(key: str) -> str:
    """`peak_memory_gb` → `peak memory GB`."""
    return " ".join(UNITS.get(word, word) for word in key.split("_"))


def plural(number: int, noun: str) -> str:
    """A number with its noun: `1 row`, `1,234 rows`."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def format_value(value: float) -> str:
    """Three digits of a fraction, all of a whole number or one from 1,000 on."""
    if not math.isfinite(value):
        return "unknown"
    if float(value).is_integer() or abs(value) >= 1000:
        return f"{round(value):,}"
    return f"{value:.3g}"


def shorten(number: float) -> str:
    """A number as the label of an axis: `0.25`, `1,200`, `20k`, `3M`, `2e-5`."""
    for size, letter in ((10**9, "G"), (10**6, "M"), (10**4, "k")):
        if number >= size:
            return f"{number / (1000 if letter == 'k' else size):g}{letter}"
    if 0 < abs(number) < 1e-3:
        digits, exponent = f"{number:.3e}".split("e")
        return f"{float(digits):g}e{int(exponent)}"
    return f"{number:,.6g}"


def format_number(value: float) -> str:
    """A number with four digits, or nan or inf."""
    return shorten(float(f"{value:.4g}")) if math.isfinite(value) else str(float(value))


def format_percent(share: float, digits: int = 1) -> str:
    return f"{share:.{digits}%}"


def quote_names(names: list[str]) -> str:
    """Names as Markdown code, with commas."""
    return ", ".join(f"`{name}`" for name in names)


def escape_cell(text: str) -> str:
    """A text for a cell of a Markdown table."""
    return text.replace("|", "\\|")


def format_date(when: str) -> str:
    """A time in ISO 8601 for people. Any other text stays as it is."""
    try:
        return datetime.fromisoformat(when).strftime("%d %b %Y, %H:%M")
    except ValueError:
        return when


LOADER = PackageLoader("tuning.pages")
ENVIRONMENT = Environment(
    loader=LOADER,
    autoescape=lambda name: not (name or "").endswith(".md.j2"),
    finalize=make_visible,  # of every value, before it is escaped
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
ENVIRONMENT.filters |= {
    "cell": escape_cell,
    "commas": "{:,}".format,
    "plural": plural,
    "date": format_date,
    "number": format_number,
    "percent": format_percent,
    "quoted": quote_names,
    "to_words": to_words,
    "value": format_value,
}
