"""The page of the demo: pictures with the right answer and the model's."""

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from tuning.files import write_text
from tuning.pages.render import render

MAX_SHOWN = 24  # in a section


@dataclass(frozen=True)
class Answered:
    """A picture, the right answer, and the one that the model gave."""

    image: Image.Image
    right: str
    given: str

    @property
    def is_right(self) -> bool:
        return self.given == self.right

    @property
    def uri(self) -> str:
        """The picture as a data URI."""
        data = io.BytesIO()
        self.image.save(data, format="PNG")
        return f"data:image/png;base64,{base64.b64encode(data.getvalue()).decode()}"


def write_demo_page(path: Path, sections: Mapping[str, Sequence[Answered]], links: Mapping[str, str]) -> None:
    """Write a page with some rows of each section, wrong answers first. `links`: relative addresses by title."""
    chosen = {title: sorted(rows, key=lambda row: row.is_right)[:MAX_SHOWN] for title, rows in sections.items()}
    write_text(path, render("demo.html.j2", chosen=chosen, links=links))
