"""Rows with the answers of models: cards on a run's page, and the page of `vlm-tuning predict`."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tuning.boxes import find_places
from tuning.pages.pictures import OF_ANSWER, OF_COMPARED, OF_ROW, Mark, draw_marks
from tuning.pages.render import plural, render
from tuning.pages.run_record import AnsweredRow

MAX_CARDS = 40  # on a run's page
MAX_PREDICTIONS = 48


@dataclass(frozen=True)
class Answer:
    """`source` is the model, or the time, that the answer is from. `is_right`: it equals the reference."""

    source: str
    text: str
    is_right: bool


@dataclass(frozen=True)
class Card:
    """A row with its answers. The `folded` ones open below."""

    row: AnsweredRow
    answers: list[Answer]
    folded: list[Answer] = field(default_factory=list)


def make_cards(rows: Sequence[AnsweredRow]) -> list[Card]:
    """One for each row, with its first and latest answer. The ones in between are folded."""
    cards = []
    for row in rows:
        answers = [
            Answer(f"Step {step:,}" if step else "Before training", text, is_right(row, text))
            for step, text in sorted(row.answers.items())
        ]
        cards.append(Card(row, [*answers[:1], *answers[1:][-1:]], folded=answers[1:-1]))
    return cards


def is_right(row: AnsweredRow, answer: str) -> bool:
    return row.reference != "" and answer.strip() == row.reference.strip()


def describe_right(rows: Sequence[AnsweredRow]) -> str:
    """A sentence on how many latest answers equal their reference. Empty if no row has both."""
    answered = [row for row in rows if row.answers and row.reference]
    if not answered:
        return ""
    right = sum(is_right(row, row.answers[max(row.answers)]) for row in answered)
    return f"{right:,} of {plural(len(answered), 'latest answer')} exactly equal the reference."


def render_answers(
    lines: Sequence[Mapping[str, Any]], summary: Mapping[str, Any], show_pictures: Callable[[int], list[str]]
) -> str:
    """The page as HTML, from what `vlm-tuning predict` writes. Rows with the lowest scores come first.

    `show_pictures` returns the pictures of the row with an index, as data URIs. The boxes of rows, and those in
    answers to rows with boxes, are drawn over them.
    """
    models = {column: Path(name).name or name for column, name in summary["models"].items()}
    kinds = dict(zip(models, (OF_ANSWER, OF_COMPARED), strict=False))
    answered = [line for line in lines if "error" not in line]
    cards = []
    for line in sorted(answered, key=_mean_score)[:MAX_PREDICTIONS]:
        reference = " / ".join(dict.fromkeys(line["references"]))
        pictures = draw_marks(show_pictures(line["index"]), find_marks(line, kinds))
        row = AnsweredRow(line["file"], str(line["row"]), line["question"], reference, pictures)
        texts = [(name, line[column] or "") for column, name in reversed(models.items())]
        cards.append(Card(row, [Answer(name, text, is_right(row, text)) for name, text in texts]))
    return render(
        "answers.html.j2",
        title=f"Answers of {' and '.join(models.values())}",
        names=dict(zip(("Model", "Compared with"), summary["models"].values(), strict=False)),
        scores=[(name, summary["scores"][column]) for column, name in reversed(models.items()) if summary["scores"]],
        num_scored=summary["rows_scored"],
        num_left_out=summary["rows_left_out"],
        num_answered=len(answered),
        cards=cards,
        legend=[
            (OF_ROW, "box of the row"),
            *((kind, f"box in the answer of {models[name]}") for name, kind in kinds.items()),
        ]
        if any(line.get("boxes") for line in answered)
        else [],
    )


def find_marks(line: Mapping[str, Any], kinds: Mapping[str, str]) -> list[tuple[int, Mark]]:
    """The boxes of a row and of the answers in the columns of `kinds`, with the numbers of their images.

    A text does not say which image a box is on: it is drawn on that of the row's box in the same place of the answer.
    """
    boxes = line.get("boxes") or []
    if not boxes:
        return []
    marks = [(box["image"], Mark(OF_ROW, tuple(box["place"]))) for box in boxes]
    in_answer = boxes[-len(find_places(line["reference"] or "")) :]
    for column, kind in kinds.items():
        for number, place in enumerate(find_places(line[column] or "")):
            like = in_answer[min(number, len(in_answer) - 1)]
            shares = tuple(coordinate / like["scale"][index % 2] for index, coordinate in enumerate(place))
            marks.append((like["image"], Mark(kind, shares)))
    return marks


def _mean_score(line: Mapping[str, Any]) -> float:
    scores = line.get("scores", {}).get("prediction", {})
    return sum(scores.values()) / len(scores) if scores else 0.0
