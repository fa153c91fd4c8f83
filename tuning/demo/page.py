"""A self-contained page of pictures with the right answer and the model's."""

import base64
import html
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

SHOWN = 24

STYLE = """
:root { color-scheme: light dark; --line: #8884; --right: #1a7f37; --wrong: #cf222e; }
@media (prefers-color-scheme: dark) { :root { --right: #3fb950; --wrong: #ff7b72; } }
body { font: 16px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 60rem; padding: 0 1rem; }
h2 { font-size: 1.1rem; margin: 2.2rem 0 .8rem; }
ul { display: grid; grid-template-columns: repeat(auto-fill, minmax(8.5rem, 1fr)); gap: .8rem; padding: 0; }
li { list-style: none; border: 1px solid var(--line); border-radius: .5rem; padding: .7rem; }
img { width: 100%; image-rendering: pixelated; border-radius: .25rem; }
p { margin: .3rem 0 0; font-size: .85rem; overflow-wrap: anywhere; }
.links { display: flex; flex-wrap: wrap; gap: .4rem 1.4rem; }
.links li { border: 0; padding: 0; }
.right { color: var(--right); } .wrong { color: var(--wrong); }
"""


@dataclass(frozen=True)
class Answered:
    """A picture, the right answer, and the one a model gave."""

    image: Image.Image
    right: str
    given: str


def write_page(path: Path, sections: Mapping[str, Sequence[Answered]], links: Mapping[str, str]) -> None:
    """Write a page with some rows of each section, wrong answers first; it works from `file://`.

    `links`: what other pages show, and where they lie from this one.
    """
    others = "".join(
        f'<li><a href="{html.escape(place)}">{html.escape(words)}</a></li>' for words, place in links.items()
    )
    body = "".join(_section(title, rows) for title, rows in sections.items())
    path.write_text(
        '<!doctype html><html lang="en"><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>Handwritten digits</title><style>{STYLE}</style>"
        "<h1>A tiny model reads handwritten digits</h1>"
        "<p>Images it has not seen in training, with the model's answer and the right one; its mistakes come first.</p>"
        f'<nav><ul class="links">{others}</ul></nav>{body}</html>\n',
        encoding="utf-8",
    )


def _section(title: str, rows: Sequence[Answered]) -> str:
    shown = sorted(rows, key=lambda row: row.right == row.given)[:SHOWN]
    return f"<h2>{html.escape(title)}</h2><ul>{''.join(_card(row) for row in shown)}</ul>"


def _card(row: Answered) -> str:
    data = io.BytesIO()
    row.image.save(data, format="PNG")
    picture = base64.b64encode(data.getvalue()).decode()
    verdict, mark = ("right", "✓") if row.right == row.given else ("wrong", "✗")
    return (
        f'<li><img src="data:image/png;base64,{picture}" alt="{html.escape(row.right)}">'
        f'<p class="{verdict}">{mark} {html.escape(row.given) or "(nothing)"}</p>'
        f"<p>right: {html.escape(row.right)}</p></li>"
    )
