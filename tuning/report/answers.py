"""The page of predictions: scores, and rows with their pictures and the answers of one model or two."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tuning.page.html import escape, read_asset, render_document, show_count, show_name
from tuning.report.predictions import render_card
from tuning.report.record import Prediction

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
        style=read_asset("tuning.report", "report.css"),
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
