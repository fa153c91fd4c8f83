"""The page of a training run: how far it is, its curves, its answers, and what was trained on what."""

from datetime import datetime
from pathlib import Path

from tuning.files import REPORT_FILE, write_text
from tuning.page.html import escape, read_asset, render_document, show_count
from tuning.report.predictions import render_predictions
from tuning.report.record import ENDED, FINISHED, RUNNING, RunRecord, read_record
from tuning.report.sections import (
    render_facts,
    render_model,
    render_options,
    render_summary,
    render_training_curves,
    render_validation,
)

RELOAD_SECONDS = 30


def write_report(output_dir: str | Path) -> Path:
    """Write `report.html` from the files in `output_dir`, and return its path. Raises `OSError`."""
    path = Path(output_dir, REPORT_FILE)
    write_text(path, render_report(read_record(Path(output_dir))))
    return path


def render_report(record: RunRecord) -> str:
    """The page as HTML; it needs no network, and can be read without JavaScript. It reloads itself during training."""
    sections = [
        ("summary", "Summary", render_summary(record)),
        ("curves", "Curves", render_training_curves(record)),
        ("validation", "Validation", render_validation(record)),
        ("answers", "Sample answers", render_predictions(record.predictions)),
        ("model", "What is trained", render_model(record.facts)),
        ("data", "Data and machine", render_facts(record)),
        ("options", "Options", render_options(record.options)),
    ]
    verdict, reload = state_verdict(record), f'<meta http-equiv="refresh" content="{RELOAD_SECONDS}">'
    return render_document(
        title=f"{verdict} – {escape(Path(record.output_dir).name)}",
        header=_render_header(record, verdict),
        sections=[section for section in sections if section[2]],
        style=read_asset("tuning.report", "report.css"),
        script=read_asset("tuning.report", "report.js"),
        head=f"<noscript>{reload}</noscript>\n" if record.state == RUNNING else "",
    )


def state_verdict(record: RunRecord) -> str:
    """How the run is, in a few words."""
    of_all = f"{record.step:,} of {record.max_steps:,}" if record.max_steps else f"{record.step:,}"
    if record.state == FINISHED:
        stopped = 0 < record.step < record.max_steps  # by early stopping
        return f"Finished after {of_all} steps" if stopped else f"Finished after {show_count(record.step, 'step')}"
    if record.state == ENDED:
        return f"Ended early: step {of_all}"
    if record.state != RUNNING:
        return f"Step {of_all}" if record.step else "Nothing was trained yet"
    left = record.seconds_left
    return f"Running: step {of_all}" + (f", about {format_duration(left)} left" if left else "")


def format_duration(seconds: float) -> str:
    """Two units at most: 45 s, 12 min, 3 h 20 min, 2 d 4 h."""
    if round(seconds) < 100:
        return f"{max(round(seconds), 1)} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    if not hours:
        return f"{minutes} min"
    if hours < 48:
        return f"{hours} h {minutes} min" if minutes else f"{hours} h"
    return f"{hours // 24} d {hours % 24} h"


def _render_header(record: RunRecord, verdict: str) -> str:
    entries = {
        "Model": record.facts.get("model") or record.options.get("model_name_or_path"),
        "Data": record.facts.get("training_data") or record.options.get("training_data_path"),
        "Folder": record.output_dir,
    }
    shown = {key: escape(str(value)) for key, value in entries.items() if value}
    times = {"Begun": record.facts.get("begun"), "As of": record.progress.get("updated")}
    shown |= {key: _render_time(value) for key, value in times.items() if isinstance(value, str)}
    listed = "".join(f"<div><dt>{key}</dt><dd>{value}</dd></div>" for key, value in shown.items())
    reason = record.progress.get("reason")
    told = f'<p class="reason">{escape(str(reason))}</p>' if reason else ""
    bar = ""
    if record.state in (RUNNING, ENDED) and record.max_steps:
        bar = f'<progress max="{record.max_steps}" value="{record.step}" aria-label="steps trained"></progress>\n'
    style = {FINISHED: "clean", ENDED: "unclean"}.get(record.state, "running")
    reload = f' data-reload="{RELOAD_SECONDS}"' if record.state == RUNNING else ""
    return (
        f'<header class="{style}"{reload}>\n<h1>{verdict}</h1>\n{bar}{told}<dl class="names">{listed}</dl>\n</header>'
    )


def _render_time(when: str) -> str:
    """A time in ISO 8601, for people and for the page's script."""
    try:
        shown = datetime.fromisoformat(when).strftime("%d %b %Y, %H:%M")
    except ValueError:
        shown = when
    return f'<time datetime="{escape(when)}">{escape(shown)}</time>'
