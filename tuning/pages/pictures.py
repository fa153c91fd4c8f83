"""Pictures on a page, with the boxes and points of rows and answers drawn over them."""

from collections.abc import Sequence
from dataclasses import dataclass

from tuning.boxes import Place

OF_ROW, OF_ANSWER, OF_COMPARED = "of-row", "of-answer", "of-compared"  # classes in page.css
MAX_MARKS = 200  # on a picture


@dataclass(frozen=True)
class Mark:
    """A box or a point on a picture, in shares of its width and height. `kind` is its class, by which it is styled."""

    kind: str
    place: Place

    @property
    def percent(self) -> list[float]:
        """The coordinates in percent. Those of a box are sorted: an answer may name its corners in any order."""
        numbers = [100 * share for share in self.place]
        if len(numbers) == 4:
            numbers = [*map(min, numbers[:2], numbers[2:]), *map(max, numbers[:2], numbers[2:])]
        return numbers


@dataclass(frozen=True)
class Picture:
    """A picture as a data URI, and what is drawn over it."""

    uri: str
    marks: Sequence[Mark] = ()

    @property
    def description(self) -> str:
        """What is drawn, for people who do not see it."""
        names = {OF_ROW: "of the row", OF_ANSWER: "of the answer", OF_COMPARED: "of the answer compared with"}
        found = {name: sum(mark.kind == kind for mark in self.marks) for kind, name in names.items()}
        parts = [f"{count} box{'es'[: 2 * (count > 1)]} {name}" for name, count in found.items() if count]
        return f", with {' and '.join(parts)}" if parts else ""


def draw_marks(uris: Sequence[str], marks: Sequence[tuple[int, Mark]]) -> list[Picture]:
    """The pictures of a row with its marks, each of which comes after the number of its picture."""
    return [
        Picture(uri, [mark for image, mark in marks if image == number][:MAX_MARKS]) for number, uri in enumerate(uris)
    ]
