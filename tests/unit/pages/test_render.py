"""Templates: every value is escaped, and a missing one is an error."""

import re
from pathlib import Path

import pytest
from jinja2 import UndefinedError

from tuning.pages import render
from tuning.pages.render import ENVIRONMENT

PAGES = Path(render.__file__).parent


def draw(source: str, **values) -> str:
    return ENVIRONMENT.from_string(source).render(values)


def test_values_are_escaped_and_what_cannot_be_seen_is_shown():
    assert draw("<p title='{{ x }}'>{{ x }}</p>", x="<b>'\"&") == (
        "<p title='&lt;b&gt;&#39;&#34;&amp;'>&lt;b&gt;&#39;&#34;&amp;</p>"
    )
    assert draw("{{ x }}", x="a\x00b\x1b\x7f\t\n\ud800") == "a␀b␛␡\t\n\\ud800"
    assert draw("{{ x }} {{ y|commas }}", x=3, y=1234567) == "3 1,234,567"


def test_a_missing_value_is_an_error():
    with pytest.raises(UndefinedError):
        draw("{{ missing }}")


def test_nothing_is_marked_as_safe_but_charts():
    for template in (PAGES / "templates").glob("*.j2"):
        assert not re.search(r"\|\s*safe|autoescape", template.read_text(encoding="utf-8")), template
    assert [path.name for path in PAGES.glob("*.py") if "Markup" in path.read_text(encoding="utf-8")] == ["charts.py"]


@pytest.mark.parametrize(
    ("value", "shown"), [(3.0, "3"), (0.12345, "0.123"), (1234.6, "1,235"), (float("nan"), "unknown")]
)
def test_value(value, shown):
    assert render.format_value(value) == shown
