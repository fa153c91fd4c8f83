"""Rows with the model's answers before, during and after training."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tuning.pages.render import escape, read_asset, render_document, show_count, show_name
from tuning.pages.run_record import Prediction

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


MOST_SHOWN = 48


def render_answers(
    lines: Sequence[Mapping[str, Any]], summary: Mapping[str, Any], show_pictures: Callable[[int], list[str]]
) -> str:
    """The page as HTML. `lines` and `summary` as `vlm-tuning predict` writes them; `show_pictures`: the pictures of the
    row with an index, as data URIs. With scores, the rows with the lowest come first.
    """
    models = {field: Path(name).name or name for field, name in summary["models"].items()}
    answered = [line for line in lines if "error" not in line]
    scored = sorted(answered, key=_mean_score)[:MOST_SHOWN]
    cards = "\n".join(
        render_card(
            number, _to_row(line, show_pictures), [(models[field], line[field] or "") for field in reversed(models)]
        )
        for number, line in enumerate(scored)
    )
    order = ", those with the lowest scores first" if summary["scores"] else ""
    left = f"; {show_count(summary['rows_left_out'], 'row')} could not be used" if summary["rows_left_out"] else ""
    told = f"<p>{len(scored):,} of {show_count(len(answered), 'answered row')}{order}{left}.</p>"
    sections = [("scores", "Scores", _render_scores(summary, models)), ("answers", "Answers", told + cards)]
    title = f"Answers of {' and '.join(models.values())}"
    places = zip(("Model", "Beside"), summary["models"].values(), strict=False)
    names = "".join(f"<div><dt>{label}</dt><dd>{escape(place)}</dd></div>" for label, place in places)
    return render_document(
        title=escape(title),
        header=f'<header class="clean">\n<h1>{escape(title)}</h1>\n<dl class="names">{names}</dl>\n</header>',
        sections=[section for section in sections if section[2]],
        style=read_asset("tuning.pages", "run.css"),
        script="",
    )


def _mean_score(line: Mapping[str, Any]) -> float:
    scores = line.get("scores", {}).get("prediction", {})
    return sum(scores.values()) / len(scores) if scores else 0.0


def _to_row(line: Mapping[str, Any], show_pictures: Callable[[int], list[str]]) -> Prediction:
    reference = " / ".join(dict.fromkeys(line["references"]))
    return Prediction(line["file"], str(line["row"]), line["question"], reference, show_pictures(line["index"]))


def _render_scores(summary: Mapping[str, Any], models: dict[str, str]) -> str:
    if not summary["scores"]:
        return ""
    head = "".join(f"<th>{show_name(metric)}</th>" for metric in summary["scores"]["prediction"])
    rows = ""
    for field in reversed(models):
        cells = "".join(f"<td>{score:.2%}</td>" for score in summary["scores"][field].values())
        rows += f"<tr><th>{escape(models[field])}</th>{cells}</tr>"
    table = f"<table><thead><tr><th>model</th>{head}</tr></thead><tbody>{rows}</tbody></table>"
    note = f"<p class=small>Means of {show_count(summary['rows_scored'], 'row')} with a right answer.</p>"
    return f'<div class="scroll">{table}</div>{note}'
