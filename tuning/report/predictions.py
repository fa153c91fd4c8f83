"""Rows with the model's answers before, during and after training."""

from collections.abc import Sequence

from tuning.page.html import escape, show_count
from tuning.report.record import Prediction

MAX_SHOWN = 40


def render_predictions(predictions: Sequence[Prediction]) -> str:
    """A card a row: pictures, question, reference, and the first and latest answer beside it."""
    if not predictions:
        return ""
    cards = "\n".join(_render_card(number, prediction) for number, prediction in enumerate(predictions[:MAX_SHOWN]))
    more = len(predictions) - MAX_SHOWN
    rest = f'<p class="small">and {show_count(more, "more row")} in the file</p>' if more > 0 else ""
    return f"{_state_right(predictions)}{cards}{rest}"


def _state_right(predictions: Sequence[Prediction]) -> str:
    """How many answers are the reference, word by word."""
    answered = [row for row in predictions if row.answers and row.reference]
    if not answered:
        return ""
    right = sum(is_right(row, row.answers[max(row.answers)]) for row in answered)
    return f"<p>{right:,} of {show_count(len(answered), 'latest answer')} say exactly what the reference says.</p>"


def is_right(row: Prediction, answer: str) -> bool:
    return row.reference != "" and answer.strip() == row.reference.strip()


def _render_card(number: int, row: Prediction) -> str:
    steps = sorted(row.answers)
    named = {step: f"Step {step:,}" if step else "Before training" for step in steps}
    ends = [steps[0], steps[-1]] if len(steps) > 1 else steps
    between = steps[1:-1]
    return render_card(
        number,
        row,
        [(named[step], row.answers[step]) for step in ends],
        folded=[(named[step], row.answers[step]) for step in between],
    )


def render_card(
    number: int, row: Prediction, answers: Sequence[tuple[str, str]], folded: Sequence[tuple[str, str]] = ()
) -> str:
    """A row with its pictures and `answers`, each with who or when it is from; those that are `folded` open below."""
    name = f"answer-{number}"
    pictures = "".join(
        f'<img src="{escape(uri)}" alt="picture {n} of {len(row.images)} of row {escape(row.row)}" loading="lazy">'
        for n, uri in enumerate(row.images, 1)
        if uri.startswith("data:image/")
    )
    shown = "".join(_render_answer(row, *answer) for answer in answers)
    more = (
        f"<details><summary>{show_count(len(folded), 'answer')} in between</summary>"
        f'<dl class="answers">{"".join(_render_answer(row, *answer) for answer in folded)}</dl></details>'
        if folded
        else ""
    )
    return (
        f'<article id="{name}" aria-labelledby="{name}-title"><h3 id="{name}-title">Row {escape(row.row)} '
        f"<span class=small>{escape(row.file)}</span></h3>"
        f'<div class="row">{f"<div class=pictures>{pictures}</div>" if pictures else ""}<div>'
        f'<dl class="answers"><div class="asked"><dt>Question</dt><dd>{escape(row.question)}</dd></div>'
        f'<div class="asked"><dt>Reference</dt><dd>{escape(row.reference)}</dd></div>{shown}</dl>{more}</div></div>'
        "</article>"
    )


def _render_answer(row: Prediction, source: str, answer: str) -> str:
    right = is_right(row, answer)
    mark = ' <span class="right">= reference</span>' if right else ""
    shown = escape(answer) if answer else "<i>(nothing)</i>"
    return f"<div{' class=same' if right else ''}><dt>{escape(source)}{mark}</dt><dd>{shown}</dd></div>"
